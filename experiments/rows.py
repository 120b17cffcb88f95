"""The rows of the paper's tables and of ours: which settings each has, and with which other row each is compared."""

from typing import NamedTuple

from methods import QuantConfig

ABOVE = "the row above"
EXTRA = {  # what a setting may hold besides those of QuantConfig
    "gates": "off: `switch_gates_off`",
    "text": "of calibration: english alone, or random tokens; by default the model's own mixture",
    "segments": "of calibration"}


class Row(NamedTuple):
    """A setting of a table, and the row with which it is compared."""

    label: str
    setting: dict  # of QuantConfig, as far as it differs from the paper's method; and of EXTRA
    against: str | None = ABOVE  # the label of an earlier row, or None: no row


RTN, QUAROT, PLUS = {"method": "rtn"}, {"method": "quarot"}, {"method": "starquant+"}
NO_TAC, NO_GATES, UNTRAINED, GATES_OFF = {"tac": "none"}, {"state_fraction": 0}, {"epochs": 0}, {"gates": "off"}
CLOSED, DENSE, ASYMMETRIC, KV = ({"allocation": "closed_form"}, {"transform": "dense"}, {"weights": "asymmetric"},
                                 {"kv_bits": 4})
NEAREST = Row("starquant+, activations rounded to nearest", PLUS | {"rounding": "nearest"})
RAW_GAIN = Row("starquant+, gain as GPTQ leaves it", PLUS | {"gain": "none"}, "starquant+")
EVEN = Row("starquant+, both sides even (a = ½)", PLUS | {"exponent": 0.5})


def bits(row: Row, wbits: int, abits: int, suffix: str = "", against: str | None = ABOVE) -> Row:
    return Row(row.label + suffix, row.setting | {"wbits": wbits, "abits": abits}, against)


def low_bit_rows():
    """Rows with fewer bits than four, and with four beside eight, where two methods tell which side costs."""
    for w, a in ((4, 8), (8, 4), (4, 3), (3, 4), (3, 3), (2, 4)):
        name = f" W{w}A{a}"
        yield bits(SETTINGS["RTN"], w, a, name, None)
        if 8 not in (w, a):
            yield from (bits(SETTINGS[label], w, a, name) for label in ("QuaRot", "FlatQuant", "STaR-Quant"))
        yield bits(SETTINGS["starquant+ (ours)"], w, a, name)
        if (w, a) in ((4, 3), (3, 4), (2, 4)):
            yield from (bits(row, w, a, name, f"starquant+ (ours){name}") for row in (NEAREST, EVEN, RAW_GAIN))


def data_rows():
    """Rows with calibration text of other kinds, and with less of it."""
    kinds = {"English alone": {"text": "english"}, "random tokens": {"text": "random"},
             "states of its own trajectory": {"states": "rollout"},
             **{f"{n} segment{'s' * (n > 1)}": {"segments": n} for n in (64, 16, 4, 1)}}
    yield Row("RTN", RTN)
    for label in ("starquant+ (ours)", "QuaRot", "STaR-Quant"):
        own, setting = f"{label}, own text, 128 segments", SETTINGS[label].setting
        yield Row(own, setting, "RTN")
        yield from (Row(f"{label}, {kind}", setting | change, own) for kind, change in kinds.items())


SETTINGS = {row.label: row for row in (  # the methods as Table 1 has them
    Row("RTN", RTN),
    Row("GPTQ", {"method": "gptq"}),
    Row("AWQ", {"method": "awq"}, "RTN"),
    Row("DLLMQuant+", {"method": "dllmquant+"}),
    Row("QuaRot", QUAROT),
    Row("DLLMQuant++", {"method": "dllmquant++"}),
    Row("FlatQuant", {"method": "flatquant"}),
    Row("FreeAct", {"method": "freeact"}),
    Row("STaR-Quant", {}, "DLLMQuant++"),
    Row("STaR-Quant, P dense", DENSE, "DLLMQuant++"),
    Row("starquant+ (ours)", PLUS, "QuaRot"))}
TABLES = {
    "1": list(SETTINGS.values()),
    "2": [
        Row("neither (RTN)", RTN),
        Row("TAC only", {"transform": "none"}),
        Row("SGAT only", NO_TAC, "neither (RTN)"),
        Row("SGAT only, its gates switched off", NO_TAC | GATES_OFF),
        Row("SGAT + TAC (STaR-Quant)", {}, "SGAT only"),
        Row("the same, P dense", DENSE),
        Row("P dense, its gates switched off", DENSE | GATES_OFF),
        Row("P dense, no gates", DENSE | NO_GATES, "the same, P dense"),
        Row("SGAT + TAC, no gates", NO_GATES, "SGAT + TAC (STaR-Quant)"),
        Row("no gates, no TAC", NO_GATES | NO_TAC),
        Row("no gates, no TAC, random P, untrained", NO_GATES | NO_TAC | UNTRAINED),
        Row("gates, no TAC, random P, untrained", NO_TAC | UNTRAINED),
        Row("gates, no TAC, closed-form P, untrained", NO_TAC | UNTRAINED | CLOSED),
        Row("gates, no TAC, closed-form P, trained", NO_TAC | CLOSED, "SGAT only"),
        Row("gates, TAC, closed-form P, trained", CLOSED),
        Row("the same with paired TAC", CLOSED | {"tac": "ridge"}),
        Row("neither, asymmetric weights", RTN | ASYMMETRIC, "neither (RTN)"),
        Row("SGAT + TAC, asymmetric weights", ASYMMETRIC, "SGAT + TAC (STaR-Quant)"),
        Row("QuaRot", QUAROT, "SGAT + TAC (STaR-Quant)"),
        Row("QuaRot, K and V in 4 bits", QUAROT | KV),
        Row("DLLMQuant++, K and V in 4 bits", {"method": "dllmquant++"} | KV),
        Row("starquant+, Kronecker balance", PLUS | {"balance": "kronecker"}, "QuaRot"),
        Row("starquant+", PLUS),
        NEAREST,
        RAW_GAIN,
        Row("starquant+, states weigh alike", PLUS | {"mask_weight": 1.0}, "starquant+"),
        Row("starquant+, one mean for both states", PLUS | {"centre": "joint"}, "starquant+"),
        Row("starquant+, no centring", PLUS | {"centre": "none"}, "starquant+"),
        Row("starquant+ with paired TAC", PLUS | {"tac": "ridge"}, "starquant+"),
        Row("starquant+, blocks of 16", PLUS | {"balance_block": 16}, "starquant+"),
        Row("starquant+, blocks of 192", PLUS | {"balance_block": 192}, "starquant+"),
        Row("starquant+, dense balance", PLUS | {"balance": "dense"}, "starquant+")],
    "3": [Row("no TAC", NO_TAC), *(Row(f"TAC block {g}", {"tac_block": g}, "no TAC") for g in (4, 8, 16, 32, 64))],
    "5": [bits(SETTINGS[label], 8, 8)
          for label in ("RTN", "AWQ", "QuaRot", "DLLMQuant++", "STaR-Quant", "starquant+ (ours)")],
    "low-bit": list(low_bit_rows()),
    "data": list(data_rows()),
    "passes": [SETTINGS[label]._replace(against=None)
               for label in ("RTN", "QuaRot", "STaR-Quant", "starquant+ (ours)")],
    "state": [
        Row("RTN", RTN),
        Row("TAC only", {"transform": "none"}),
        Row("SGAT + TAC (STaR-Quant)", {}, None),
        Row("SGAT only", NO_TAC),
        Row("SGAT only, its gates switched off", NO_TAC | GATES_OFF),
        Row("SGAT + TAC, no gates", NO_GATES, "SGAT + TAC (STaR-Quant)"),
        Row("starquant+ (ours)", PLUS, None),
        Row("starquant+, one mean for both states", PLUS | {"centre": "joint"}),
        Row("starquant+, no centring", PLUS | {"centre": "none"}, "starquant+ (ours)")]}
DECODING = ("passes", "state")  # tables of decoding alone, without likelihoods
# confidence thresholds at which a table decodes
THRESHOLDS = {"1": (0.9,), "state": (0.9,), "passes": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)}


def config_of(setting: dict, seed: int):
    return QuantConfig(**{k: v for k, v in setting.items() if k not in EXTRA}, seed=seed)
