"""Every method by name, as a way to fit one linear, and `QuantConfig`: all that a method can be told."""

from dataclasses import dataclass, fields
from typing import ClassVar

from methods.awq import fit_awq
from methods.dllmquant import fit_dllmquant_awq, fit_dllmquant_quarot
from methods.flat import fit_flatquant, fit_freeact
from methods.gptq import fit_gptq
from methods.plus import fit_starquant_plus
from methods.quarot import fit_quarot
from methods.rtn import fit_rtn
from methods.sgat import fit_starquant
from runtime.processes import Refused

BASELINES = {"rtn": fit_rtn, "awq": fit_awq, "gptq": fit_gptq, "quarot": fit_quarot, "flatquant": fit_flatquant,
             "freeact": fit_freeact, "dllmquant+": fit_dllmquant_awq, "dllmquant++": fit_dllmquant_quarot}
DLLMQUANT = ("dllmquant+", "dllmquant++")  # also: calibration ratios by TMAS, V's scale by IA-AQ (kv_bits < 16)
ROTATED = ("quarot", "dllmquant++")  # K and V are quantized behind a Hadamard rotation of each head (kv_bits < 16)
METHODS = {**BASELINES, "starquant": fit_starquant, "starquant+": fit_starquant_plus}
# settings that not every method has, and the methods that have them; the others count for all
_TRAINED, _OURS = ("flatquant", "freeact", "starquant"), ("starquant+",)
SETTINGS_OF = {
    "weights": ("rtn", "starquant"), "transform": ("starquant",), "allocation": ("starquant",),
    "state_fraction": ("freeact", "starquant"),
    "lr": _TRAINED, "epochs": _TRAINED, "batch": _TRAINED, "schedule": _TRAINED,
    "tac": ("starquant", *_OURS), "tac_block": ("starquant", *_OURS), "damping": ("starquant", *_OURS),
    "smoothing": ("starquant",), "shrinkage": ("starquant",),
    "tac_samples": (*DLLMQUANT, "starquant", *_OURS),
    "balance": _OURS, "balance_block": _OURS, "exponent": _OURS, "centre": _OURS, "rounding": _OURS, "gain": _OURS,
    "mask_weight": _OURS,
}
SECOND_ORDER = ("gptq", "quarot", *DLLMQUANT, *_OURS)  # round weights by GPTQ
# methods with TAC, and the kinds they take: on top of starquant+ the paper's statistics lose and ridge is on request
COMPENSATED = {"starquant": ("statistics", "ridge"), "starquant+": ("ridge",)}


@dataclass(frozen=True)
class QuantConfig:
    """Everything that determines a quantized checkpoint besides the model and the calibration tokens."""

    method: str = "starquant"  # one of METHODS: the paper's here, of the command `starquant+`
    wbits: int = 4  # weight bits, 2-8, per output channel (Section 3.1)
    abits: int = 4  # activation bits, 2-8, asymmetric per token (Eq. 4)
    weights: str = "symmetric"  # grid of the weights; "asymmetric" is Eq. 4 for them, too (rtn and starquant)
    transform: str = "kronecker"  # P = P1 ⊗ P2, "dense" (App. B to the letter), or "none": no SGAT (Table 2)
    allocation: str = "random"  # start of P: "random" (App. B: Gaussian, orthogonalized) or "closed_form"
    state_fraction: int = 32  # d_m = d_u = d / 32 (App. B); 0 for no gates
    lr: float = 1e-3  # AdamW (App. B)
    epochs: int = 15  # (App. B); 0 keeps the start
    batch: int = 4  # segments per step (App. B)
    schedule: str = "constant"  # learning rate: "constant" or "cosine"
    tac: str = "statistics"  # Eq. 18, or "ridge" (paired least squares), or "none"
    tac_block: int = 16  # g (App. C, Table 3)
    damping: float = 3e-4  # ρ (App. C)
    smoothing: float = 0.15  # η, of singular values (App. C)
    shrinkage: float = 0.55  # α, towards the identity (App. C)
    tac_samples: int = 64  # calibration segments for the statistics, at most (App. C)
    balance: str = "block"  # starquant+, beyond the paper: form of its transform, "block", "kronecker" or "dense"
    balance_block: int = 64  # starquant+: size of the blocks
    exponent: float = -1.0  # starquant+: a of its balance; below 0: by the bits of weights and activations
    centre: str = "state"  # starquant+: mean taken off before the transform, of each "state", "joint", or "none"
    rounding: str = "feedback"  # starquant+: of activations, by "feedback" against the weights or to "nearest"
    gain: str = "unit"  # starquant+: "unit" keeps the size of every output channel, "none" takes what GPTQ leaves
    mask_weight: float = 2.0  # starquant+: weight of a masked token against an unmasked one
    kv_bits: int = 16  # bits of K and V in attention (Section 3.3 and Fig. 3; DLLMQuant's IA-AQ)
    softmax_bits: int = 16  # bits of the softmax output (Section 3.3, Fig. 3)
    head_bits: int = 16  # embedding and LM head: 16 (as the published 5.20 GB implies), 8 or 4
    embed_bits: int = 0  # embedding alone, 8 or 4; 0: as head_bits
    inputs: str = "quantized"  # inputs of block i + 1: behind the quantized prefix, or "fp" (16-bit)
    states: str = "masked"  # token states of the segments: masked copies, or "rollout" (own trajectory)
    seed: int = 0

    CHOICES: ClassVar = {"weights": ("symmetric", "asymmetric"),
                         "transform": ("kronecker", "dense", "none"), "allocation": ("random", "closed_form"),
                         "schedule": ("constant", "cosine"), "tac": ("statistics", "ridge", "none"),
                         "balance": ("block", "kronecker", "dense"), "centre": ("state", "joint", "none"),
                         "rounding": ("feedback", "nearest"), "gain": ("unit", "none"),
                         "inputs": ("quantized", "fp"), "states": ("masked", "rollout"),
                         "head_bits": (16, 8, 4), "embed_bits": (0, 8, 4)}
    RANGES: ClassVar = {"wbits": (2, 8), "abits": (2, 8), "state_fraction": (0, 10**6), "lr": (0, 10),
                        "epochs": (0, 10**4), "batch": (1, 10**6), "tac_block": (1, 10**4), "damping": (0, 10),
                        "smoothing": (0, 1), "shrinkage": (0, 1), "tac_samples": (1, 10**6),
                        "balance_block": (1, 10**5), "mask_weight": (0, 10**6), "exponent": (-1, 1), "kv_bits": (2, 16),
                        "softmax_bits": (2, 16), "seed": (0, 2**31)}

    def __post_init__(self):
        for name, values in {**self.CHOICES, "method": tuple(METHODS)}.items():
            if getattr(self, name) not in values:
                raise Refused(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(str, values))}.")
        for name, (low, high) in self.RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise Refused(f"{name} {getattr(self, name)} is not between {low} and {high}.")
        if self.embed_bits and self.head_bits == 16:
            raise Refused(f"embed_bits {self.embed_bits} needs head_bits 8 or 4.")
        if not self.symmetric:
            self.check_given(["weights"])
        if self.state_fraction == 1:
            raise Refused("state_fraction 1 gives each state the whole width; give 2 or more, or 0 for no gates.")

    @property
    def symmetric(self) -> bool:
        return self.weights == "symmetric"

    @property
    def compensated(self) -> bool:
        """Whether this method stores TAC."""
        return self.method in COMPENSATED and self.tac in COMPENSATED[self.method]

    def check_given(self, names) -> None:
        """Refused if one of the fields `names`, which somebody gave on purpose, has no part in this method."""
        for name in names:
            if self.method not in SETTINGS_OF.get(name, METHODS):
                *some, last = SETTINGS_OF[name]
                whose = ", ".join(some) + " and " * bool(some) + last
                raise Refused(f"{name} is for {whose}, not for {self.method}.")
            if name == "tac" and self.tac != "none" and not self.compensated:
                kinds = " or ".join((*COMPENSATED[self.method], "none"))
                raise Refused(f"tac {self.tac} is not for {self.method}, which takes {kinds}.")


def config_from(args) -> QuantConfig:
    values = {"method": args.method, "wbits": args.wbits, "abits": args.abits, "seed": args.seed}
    values |= {name: getattr(args, name) for name in ("inputs", "states") if getattr(args, name)}
    kinds = {f.name: type(f.default) for f in fields(QuantConfig)}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals or name not in kinds:
            raise Refused(f"--set {item!r}: expected FIELD=VALUE with a field of {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise Refused(f"--set {item!r}: {value!r} is not a {kinds[name].__name__}.") from None
    config = QuantConfig(**values)
    config.check_given(item.partition("=")[0] for item in args.set)
    return config
