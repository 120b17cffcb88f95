"""Round to nearest, the smallest method; what every method is fitted on; and embedding and head in integers.

Every method quantizes every linear of every block for one runtime (`runtime/layers.py`): weights per output channel,
symmetric unless a method has the setting `weights`, and activations asymmetric per token. Where a method's own code
does otherwise, its docstring says so.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from methods.settings import Settings, choice
from runtime.layers import QuantEmbedding, QuantLinear
from runtime.processes import Refused


class Inputs(NamedTuple):
    """What a linear with weight (C, d) is fitted on: S calibration segments of L tokens."""

    x: torch.Tensor  # (S, L, d) inputs, behind the quantized blocks and linears before it
    y: torch.Tensor  # (S, L, C) outputs of the 16-bit model
    state: torch.Tensor  # (S, L) bool, True = masked
    confidence: torch.Tensor | None = None  # (S, L) largest probability of the 16-bit model's prediction
    gain: torch.Tensor | None = None  # (d,) gain of the norm that makes x; None for `out` and `down`


@dataclass(frozen=True)
class RTN(Settings):
    weights: str = choice("symmetric", "asymmetric", text="grid of the weights; asymmetric is Eq. 4 for them, too")

    @property
    def symmetric(self) -> bool:
        return self.weights == "symmetric"


def fit_rtn(weight, bias, inputs, config, generator, progress):
    """Round to nearest, no transform (Eqs. 2-5)."""
    return QuantLinear.fold(weight, abits=config.abits, wbits=config.wbits, bias=bias, symmetric=config.symmetric), {}


def check_tied(tied: bool, head_bits: int, embed_bits: int | None) -> None:
    """Refused where embedding and head are one tensor, but have been asked for in two widths."""
    if tied and embed_bits and embed_bits != head_bits:
        raise Refused("embed_bits is for models with a head of their own; this model's head is tied to its embedding, "
                      "so embed_bits must equal head_bits.")


def quantize_outer(model, head_bits: int = 8, embed_bits: int | None = None):
    """Embedding and head in integers, in place. Each row has a scale; an embedding row has embed_bits, or head_bits.

    The head runs on integers like every other linear, with its input in head_bits. A tied pair stays one tensor.
    """
    tied, head = model.config.tied, model.head.weight
    check_tied(tied, head_bits, embed_bits)
    model.embed = QuantEmbedding.fold(model.embed.weight, head_bits if tied else embed_bits or head_bits)
    model.head = QuantLinear.fold(head, abits=head_bits, wbits=head_bits)
    if tied:
        model.head.weight_packed = model.embed.weight_packed
    return model
