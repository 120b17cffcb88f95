"""What a method can be told: frozen dataclasses whose fields carry their choices or their range, and one sentence.

`Settings` holds what every method has. A method adds its own settings in a subclass that stands beside its fit.
"""

from dataclasses import dataclass, field, fields

from runtime.processes import Refused


def choice(*values, text: str):
    """A field that takes one of `values`; the first is the default."""
    return field(default=values[0], metadata={"choices": values, "text": text})


def between(default, low, high, text: str):
    """A field that takes a number from low to high."""
    return field(default=default, metadata={"range": (low, high), "text": text})


@dataclass(frozen=True)
class Settings:
    """All that determines a quantized checkpoint besides the model and the calibration tokens."""

    method: str = "starquant"
    wbits: int = between(4, 2, 8, "weight bits, per output channel (Section 3.1)")
    abits: int = between(4, 2, 8, "activation bits, asymmetric per token (Eq. 4)")
    seed: int = between(0, 0, 2**31, "seed of the calibration text, the masks and the method")
    inputs: str = choice("quantized", "fp", text="inputs of block i + 1: from the quantized blocks before it, or from "
                         "the 16-bit ones (fp)")
    states: str = choice("masked", "rollout", text="token states of the segments: masked copies, or states of the "
                         "model's own denoising (rollout)")
    kv_bits: int = between(16, 2, 16, "bits of K and V in attention (Section 3.3, Fig. 3)")
    softmax_bits: int = between(16, 2, 16, "bits of the softmax output (Section 3.3, Fig. 3)")
    head_bits: int = choice(16, 8, 4, text="bits of embedding and LM head (16, as the published 5.20 GB implies)")
    embed_bits: int = choice(0, 8, 4, text="bits of the embedding alone; 0: as head_bits")

    # Facts about a method, which calibration asks for; a subclass overrides what differs.
    symmetric = True  # the grid of the weights
    trained = False  # the method trains P, for `epochs`
    compensated = False  # TAC is fitted and stored
    second_order = False  # weights are rounded by GPTQ, which takes memory
    rotated = False  # K and V are quantized behind a Hadamard rotation of each head (kv_bits < 16)
    diffusion_aware = False  # DLLMQuant: masking ratios by TMAS, prediction confidence, V's scale by IA-AQ

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if "choices" in f.metadata and value not in f.metadata["choices"]:
                raise Refused(f"{f.name} {value!r} is not one of {', '.join(map(str, f.metadata['choices']))}.")
            if "range" in f.metadata:
                low, high = f.metadata["range"]
                if type(value) is not kind and not (kind is float and type(value) is int):
                    raise Refused(f"{f.name} {value!r} is no {kind.__name__}.")
                if not low <= value <= high:
                    raise Refused(f"{f.name} {value} is not between {low} and {high}.")
        if self.embed_bits and self.head_bits == 16:
            raise Refused(f"embed_bits {self.embed_bits} needs head_bits 8 or 4.")
