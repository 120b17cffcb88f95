"""The paper's tables on the embedded model, cell by cell: python evaluate.py --table 2 [--stress 4] [--seeds 3]

Cells
    A cell is one setting with one calibration seed, judged on held-out examples of that seed's own. `cells.jsonl` keeps
    it under a key of all that determines it, except the code, whose commit stands beside it. So a long run resumes,
    tables share their cells, and `torchrun --nproc-per-node N evaluate.py --table 2` divides them.

Files
    Tables and cells go to the folder of --out, `out/tables` unless given. The cells of the published tables are in
    `results/cells.jsonl`. They are read, unless --fresh asks to measure everything again, and written only by
    `--out results`.

Parallel decoding
    Table 1 also decodes `math` and `code` by a confidence threshold (the rule is in `runtime/sampling.py`). An answer
    is one block. The table counts the passes that an answer took. "Right answers per pass" are those of both tasks
    together, as a share of 16 bit's. Table `passes` does the same for several thresholds. Those values are cells of
    their own.

Statistics
    ± is half a 95 % bootstrap interval. For what is counted from 16 bit (KL, penalty, mean of the tasks) the bootstrap
    draws calibration seeds and, within each, its examples; for the accuracy on a task it draws from all its problems.
    Every row is compared with another one, example by example, in KL divergence from the 16-bit model, which is less
    noisy than NELBO. Three seeds are few. So * marks a difference only if its interval is clear of 0 and all seeds
    agree on its sign.

Seeds
    Settings were chosen on calibration seeds and examples 0-9. Tables report seeds from 10 on.

`--stress c` gives the model outlier channels first. `--nelbo` leaves the tasks out. `--quick` is for a first look: the
likelihoods of few examples, one seed, and one epoch on a sixth of the segments.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from calibrate import QuantConfig, quantize_model
from checkpoint.folder import SINGLE, Checkpoint, resolve, sha256
from checkpoint.tokenizer import load_tokenizer
from methods import settings_of
from model import load_model
from runtime import processes
from runtime.layers import QuantLinear
from runtime.processes import Refused
from tiny import metrics, tasks
from tiny.stress import stress

RESULTS = Path(__file__).parent.parent / "results"  # published tables, figures and cells
OUT = Path("out/tables")
FIRST_SEED = 10
SEEDS, PROBLEMS, SEQUENCES = 3, 250, 100  # of the published tables: seeds, problems per task, sequences per domain

# ---- the rows ------------------------------------------------------------------------------------------------------

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
NEAREST = "starquant+, activations rounded to nearest", PLUS | {"rounding": "nearest"}
RAW_GAIN = "starquant+, gain as GPTQ leaves it", PLUS | {"gain": "none"}
EVEN = "starquant+, both sides even (a = ½)", PLUS | {"exponent": 0.5}


def bits(row: Row, wbits: int, abits: int, suffix: str = "", against: str | None = ABOVE) -> Row:
    return Row(row.label + suffix, row.setting | {"wbits": wbits, "abits": abits}, against)


def low_bit_rows():
    """Fewer bits than four, and four beside eight: which side costs, two methods tell."""
    for w, a in ((4, 8), (8, 4), (4, 3), (3, 4), (3, 3), (2, 4)):
        name = f" W{w}A{a}"
        yield bits(SETTINGS["RTN"], w, a, name, None)
        if 8 not in (w, a):
            yield from (bits(SETTINGS[label], w, a, name) for label in ("QuaRot", "FlatQuant", "STaR-Quant"))
        yield bits(SETTINGS["starquant+ (ours)"], w, a, name)
        if (w, a) in ((4, 3), (3, 4), (2, 4)):
            yield from (bits(Row(*row), w, a, name, f"starquant+ (ours){name}") for row in (NEAREST, EVEN, RAW_GAIN))


def data_rows():
    """Calibration text of other kinds, and less of it."""
    kinds = {"English alone": {"text": "english"}, "random tokens": {"text": "random"},
             "states of its own trajectory": {"states": "rollout"},
             **{f"{n} segment{'s' * (n > 1)}": {"segments": n} for n in (64, 16, 4, 1)}}
    yield Row("RTN", RTN)
    for label in ("starquant+ (ours)", "QuaRot", "STaR-Quant"):
        yield Row(f"{label}, own text, 128 segments", SETTINGS[label].setting, "RTN")
        yield from (Row(f"{label}, {kind}", SETTINGS[label].setting | change, f"{label}, own text, 128 segments")
                    for kind, change in kinds.items())


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
        Row(*NEAREST),
        Row(*RAW_GAIN, "starquant+"),
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

# ---- the cells -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What all cells of a table share."""

    name: str  # model
    c: float  # scale of the outlier channels, 1: none
    problems: int  # per task and seed
    nelbo: bool  # likelihoods (NELBO and KL) only
    device: str
    segments: int = 128  # of calibration
    sequences: int | None = None  # of each domain, for the likelihoods; as many as problems unless given

    def check(self) -> None:
        """Refused unless the model is one that tables can calibrate and judge."""
        checkpoint = Checkpoint(resolve(self.name))
        if checkpoint.quantization:
            raise Refused(f"--table calibrates a 16-bit model, and {self.name} is quantized already.")
        if load_tokenizer(checkpoint.folder) is None:
            raise Refused(f"{self.name} has no tokenizer.json, which the embedded tasks need.")

    @cache  # noqa: B019 (one run a process)
    def model(self):
        model = load_model(self.name, self.device)
        return model if self.c == 1 else stress(model, self.c)

    @cache  # noqa: B019
    def reference(self, seed: int):
        """16 bit on one seed's examples: (values, trajectories)."""
        return metrics.scores(self.model(), self.problems, seed, self.nelbo, f"16-bit, examples {seed}",
                              sequences=self.sequences)

    def key(self, setting: dict | None, seed: int, threshold: float | None = None) -> dict:
        """`setting` counts as far as it differs from the method's defaults. With a threshold: of decoding by it."""
        if setting is not None:
            defaults = dataclasses.asdict(config_of({"method": setting.get("method", "starquant")}, seed))
            defaults["method"] = "starquant"
            setting = {k: v for k, v in setting.items() if defaults.get(k) != v}
        sequences = {} if self.sequences in (None, self.problems) else {"sequences": self.sequences}
        return {"weights": weights_digest(resolve(self.name)), "stress": self.c, "problems": self.problems,
                "seed": seed, "setting": setting,
                **({"nelbo": self.nelbo, **sequences} if threshold is None else {"threshold": threshold}),
                **({} if self.segments == 128 else {"segments": self.segments}),
                **({} if self.kind == "cpu" else {"device": self.kind})}

    @property
    def kind(self) -> str:
        """"cpu" (fp32) or "cuda" (bf16): their numbers are not each other's."""
        return self.device.partition(":")[0]

    def measure(self, setting: dict | None, seed: int, threshold: float | None = None) -> dict[str, list[float]]:
        """Values per example of one setting (None: 16 bit) calibrated with and judged on a seed."""
        model, label = self.calibrated(json.dumps(setting), seed), (setting or {"method": "16-bit"}).get("method", "")
        if threshold is not None:
            values = metrics.parallel(model, self.problems, seed, threshold, label)
        elif setting is None:
            values, _ = self.reference(seed)
        else:
            values, paths = metrics.scores(model, self.problems, seed, self.nelbo, label, self.model(), self.sequences)
            values = values if self.nelbo else values | metrics.agreement(paths, self.reference(seed)[1])
        return {k: [round(x, 5) for x in v.tolist()] for k, v in values.items()}

    @lru_cache(maxsize=1)  # noqa: B019 (a cell of each kind needs the same model)
    def calibrated(self, setting: str, seed: int):
        """The model of a setting in JSON (null: 16 bit)."""
        model, setting = self.model(), json.loads(setting)
        if setting is None:
            return model
        tokens, region = self.calibration_set(setting, seed)
        judged = quantize_model(model, tokens, config_of(setting, seed), region)
        if setting.get("gates") == "off":
            switch_gates_off(judged)
        return judged

    def calibration_set(self, setting: dict, seed: int):
        """Segments of 64 tokens, and where they may be masked."""
        tokenizer, n = self.model().tokenizer, setting.get("segments", self.segments)
        if setting.get("text") == "english":
            return tasks.english_segments(tokenizer, "calib", n, 64, seed)
        if setting.get("text") == "random":
            ids = torch.randint(self.model().mask_id, (n, 64), generator=torch.Generator().manual_seed(seed))
            return ids, torch.ones_like(ids, dtype=torch.bool)
        return tasks.calibration_set(tokenizer, n, 64, seed)


def trains(setting: dict) -> bool:
    return "epochs" in settings_of(setting.get("method", "starquant"))


def config_of(setting: dict, seed: int):
    return QuantConfig(**{k: v for k, v in setting.items() if k not in EXTRA}, seed=seed)


def switch_gates_off(model) -> None:
    """Every token uses all of P from now on: what the gates themselves are worth, on the same learned rotation."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.d_m = module.d_u = 0


@cache
def weights_digest(folder: Path) -> str:
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    sums = [sha256(file) for file in files]
    return (sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest())[:16]


def digest(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def stored_cells(*files: Path) -> dict[str, dict]:
    """Finished cells by digest, the later of two; a line that an interruption cut short is left out."""
    cells = {}
    for line in (line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()):
        try:
            cell = json.loads(line)
            cells[cell["digest"]] = cell
        except ValueError:
            continue
    return cells


def store(cell: dict, file: Path) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:  # one write, so that processes may append side by side
        os.write(handle, (json.dumps(cell) + "\n").encode())
    finally:
        os.close(handle)

# ---- the tables ----------------------------------------------------------------------------------------------------


def make(number: str, run: Run, seeds: int = SEEDS, quick: bool = False, fresh: bool = False, out: Path = OUT) -> dict:
    """Measure what is missing of one table (fresh: all of it) and write it to the folder `out` as .json and .md."""
    run.check()
    # what is measured of a setting: likelihoods and tasks (None), and decoding by each threshold
    kinds = [None] * (number not in DECODING) + [*THRESHOLDS.get(number, ())] * (quick or not run.nelbo)
    if not kinds:
        raise Refused(f"table {number} has no likelihoods; leave --nelbo out.")
    out.mkdir(parents=True, exist_ok=True)
    table = {"16-bit": None}
    for row in TABLES[number]:
        trained = quick and trains(row.setting)
        table[row.label] = row.setting | ({"epochs": min(1, row.setting.get("epochs", 1))} if trained else {})
    todo = [(label, setting, FIRST_SEED + i) for label, setting in table.items() for i in range(seeds)]
    cells, rows, used = {} if fresh else stored_cells(RESULTS / "cells.jsonl", out / "cells.jsonl"), {}, []

    def finished(key):
        return cells.get(digest(key)) or cells.get(digest(key | {"nelbo": False}))

    mine = todo[processes.rank() :: processes.world()]  # under torchrun every process measures its share
    commit = current_commit()
    for _, setting, seed in processes.Bar(mine, desc=f"table {number}", unit="cell", disable=False):
        for threshold in kinds:
            key = run.key(setting, seed, threshold)
            if finished(key) is None:
                cells[digest(key)] = {"digest": digest(key), "commit": commit, "torch": torch.__version__, **key,
                                      "values": run.measure(setting, seed, threshold)}
                store(cells[digest(key)], out / "cells.jsonl")
    for others in processes.gather(cells):
        cells |= others
    for label, setting, seed in todo:
        values = {}
        for threshold in kinds:
            used.append(finished(run.key(setting, seed, threshold)))
            shown = [k for k in used[-1]["values"] if threshold or not run.nelbo or k in ("nelbo", "kl")]
            values |= {at(k, threshold): used[-1]["values"][k] for k in shown}
        rows.setdefault(label, []).append({"values": values})
    if processes.rank():
        return {}
    command = f"python evaluate.py --table {number} --model {run.name} --seeds {seeds} --problems {run.problems}"
    command += f" --sequences {run.sequences}" if run.sequences not in (None, run.problems) else ""
    command += (f" --stress {run.c:g}" if run.c != 1 else "") + (" --quick" if quick else " --nelbo" * run.nelbo)
    counterparts = {row.label: row.against for row in TABLES[number] if row.against != ABOVE}
    record = {"command": command, "commit": ", ".join(sorted({c["commit"] for c in used})),
              "torch": ", ".join(sorted({c["torch"] for c in used})), "model": run.name, "device": run.kind,
              "seeds": seeds, "first_seed": FIRST_SEED, "problems": run.problems,
              "sequences": run.sequences or run.problems, "stress": run.c, "thresholds": [t for t in kinds if t],
              "rows": summarize(rows, counterparts)}
    name = file_name(number, run, seeds, quick)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(record) + "\n", encoding="utf-8")
    if number == "passes":
        stress = "" if run.c == 1 else f"-stress{run.c:g}"
        (out / f"passes{stress}.json").write_text(json.dumps(curves(record), indent=1) + "\n", encoding="utf-8")
    print(markdown(record))
    return record


def curves(record: dict) -> dict:
    """Passes an answer and accuracy of every row by threshold, for a figure; at τ = 1 it is a token a pass, far off."""
    thresholds = [t for t in record["thresholds"] if t < 1]
    methods = {row["setting"]: {k: [row[at(k, t)][0] for t in thresholds] for k in ("passes", "accuracy")}
               for row in record["rows"]}
    return {"command": record["command"], "threshold": thresholds, "methods": methods}


def file_name(number: str, run: Run, seeds: int, quick: bool) -> str:
    """table-N, then model, stress, kind and size, each as far as it is not that of the published tables."""
    size = f"{seeds}x{run.problems}" + (f"x{run.sequences}" if run.sequences not in (None, run.problems) else "")
    published = {f"{SEEDS}x{SEQUENCES}" if run.nelbo else f"{SEEDS}x{PROBLEMS}x{SEQUENCES}"}
    parts = [f"table-{number}", "" if run.name == "tiny" else Path(run.name).name,
             "" if run.c == 1 else f"stress{run.c:g}", "quick" if quick else "nelbo" * run.nelbo,
             "" if size in published else size]
    return "-".join(filter(None, parts))


def current_commit() -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                          cwd=RESULTS.parent).stdout.strip()


def at(measure: str, threshold: float | None) -> str:
    """The name of a measure in a row; with a threshold it was decoded by that."""
    return measure if threshold is None else f"{measure} at {threshold:g}"


def summarize(rows: dict[str, list[dict]], reference: dict | None = None) -> list[dict]:
    """Each setting over its seeds and their examples: means with intervals, and paired differences."""
    base = {k: by_seed(rows["16-bit"], k) for k in rows["16-bit"][0]["values"]}
    out, measured, above, rtn = [], {}, None, None
    for label, cells in rows.items():
        values = {k: by_seed(cells, k) for k in cells[0]["values"]}
        # levels are uncertain by their problems, of which seeds bring more; what is counted from 16 bit by seeds, too
        row = {"setting": label, **{k: metrics.bootstrap(v if k == "kl" else v.flatten()) for k, v in values.items()}}
        row |= in_parallel(values, base)
        out.append(row)
        if label == "16-bit":
            continue
        if "kl" in values:
            row["penalty"] = metrics.bootstrap(values["nelbo"] - base["nelbo"])
            row["kl_by_seed"] = values["kl"].mean(-1).tolist()
            rtn = values["kl"] if "RTN" in label else rtn  # of the same bits: it comes first of them
            if rtn is not None:
                # share of RTN's divergence that is gone
                row["recovered"] = float(1 - values["kl"].mean() / rtn.mean())
        other = (reference or {}).get(label, above)
        if other in measured:
            differences = {k: values[k] - measured[other][k] for k in ("kl", "nelbo", *metrics.TASKS) if k in values}
            row["against"] = {"setting": other, **{k: metrics.bootstrap(d) for k, d in differences.items()},
                              **{k: v for k, v in in_parallel(values, measured[other]).items() if "per pass" in k}}
            if "kl" in values:
                row["against"]["significant"] = significant(row["against"]["kl"], differences["kl"])
        measured[label], above = values, label
        if set(metrics.TASKS) <= values.keys():
            # every task has as many problems: the mean over problems is the mean of the tasks
            row["mean"] = metrics.bootstrap(torch.cat([values[k] - base[k] for k in metrics.TASKS], -1))
    return out


def in_parallel(values: dict, base: dict) -> dict:
    """Of `math` and `code` together, by threshold: accuracy, passes an answer, and right answers per pass as a share of
    those of `base` (16 bit or another row). A value is (S, n), the result (mean, low, high)."""
    found = {}
    for threshold in (k.removeprefix("math_passes at ") for k in values if k.startswith("math_passes at ")):
        right, passes, right_16, passes_16 = (
            torch.cat([of[f"{task}{what} at {threshold}"] for task in metrics.GENERATION], -1)
            for of in (values, base) for what in ("", "_passes"))
        found[f"accuracy at {threshold}"] = metrics.bootstrap(right.flatten())
        found[f"passes at {threshold}"] = metrics.bootstrap(passes.flatten())
        found[f"per pass at {threshold}"] = metrics.bootstrap(right, passes, right_16, passes_16,
                                                              of=lambda r, p, r_16, p_16: r / p / (r_16 / p_16))
    return found


def significant(interval, differences) -> bool:
    """Whether the interval (mean, low, high) of differences (S, n) is clear of 0 and all seeds have its sign."""
    by_seed = differences.mean(-1)
    return interval[1] * interval[2] > 0 and bool((by_seed > 0).all() or (by_seed < 0).all())


def by_seed(cells: list[dict], measure: str):
    """(seeds, examples)"""
    return torch.tensor([c["values"][measure] for c in cells], dtype=torch.float64)


def interval(triple, scale: float = 100, digits: int = 1, sign: str = "") -> str:
    mean, low, high = triple
    return f"{scale * mean:{sign}.{digits}f} ± {scale * (high - low) / 2:.{digits}f}"


def columns(record: dict) -> list:
    """What a table shows of a row: [(heading, text of (row, setting of the row above)), ...]."""
    last, out, one = record["rows"][-1], [], len(record["thresholds"]) == 1

    def add(heading, measure, *how):
        if measure in last:
            out.append((heading, lambda row, _: interval(row[measure], *how) if measure in row else ""))

    def compare(heading, measure, scale, zero=0):
        out.append((heading, lambda row, above: against(row, above, measure, scale, zero)))

    add("KL from 16 bit, 10⁻³ nats/token", "kl", 1000)
    if "kl" in last:
        compare("against the row above (or the one named)", "kl", 1000)
        out.append(("recovered %", lambda row, _: f"{100 * row['recovered']:.1f}" if "recovered" in row else ""))
    add("NELBO penalty", "penalty", 1000)
    for task in metrics.TASKS:
        add(f"{task} %", task)
    add("mean of the tasks, points from 16 bit", "mean", 100, 1, "+")
    add("same tokens %", "tokens")
    for t in record["thresholds"]:
        for task in metrics.GENERATION if one else ():
            add(f"{task} %, τ = {t:g}", at(task, t))
            add(f"{task} passes, τ = {t:g}", at(f"{task}_passes", t), 1, 2)
        if not one:
            add(f"accuracy %, τ = {t:g}", at("accuracy", t))
            add(f"passes, τ = {t:g}", at("passes", t), 1, 2)
        add(f"right answers per pass, % of 16 bit, τ = {t:g}", at("per pass", t))
        if one and "kl" not in last:
            compare("against the row above (or the one named) in %", at("per pass", t), 100, 1)
    return out


def against(row: dict, above: str, measure: str, scale: float, zero: float) -> str:
    """How a measure differs from that of another row, which is named unless it is the row `above`."""
    other = row.get("against", {})
    if measure not in other:
        return ""
    difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(scale * (value - zero) for value in other[measure]))
    return difference + " *" * other.get("significant", False) + f" {other['setting']}" * (other["setting"] != above)


def markdown(record: dict) -> str:
    shown, rows = columns(record), record["rows"]
    lines = [f"| {' | '.join(['setting', *(heading for heading, _ in shown)])} |", "|" + "---|" * (1 + len(shown))]
    for above, row in zip([{"setting": ""}, *rows], rows, strict=False):
        lines.append(f"| {' | '.join([row['setting'], *(text(row, above['setting']) for _, text in shown)])} |")
    note = (f"`{record['command']}`: {record['seeds']} calibration seeds, {record['problems']} problems per task and "
            f"{record['sequences']} sequences of each kind for each; ± half a 95 % bootstrap interval over seeds and "
            f"their examples (of a task: over its problems), differences with theirs, * where it is clear of 0 and all "
            f"seeds agree; torch {record['torch']} on {record['device']}, commit {record['commit']}.")
    return "\n".join([*lines, "", note])
