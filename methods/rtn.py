"""Round to nearest, the smallest method, and what every method is fitted on."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from methods.settings import Settings, choice
from runtime.layers import QuantEmbedding, QuantLinear


class Inputs(NamedTuple):
    """What a linear is fitted on: S calibration segments of L tokens."""

    x: torch.Tensor  # (S, L, d) inputs behind the quantized prefix
    y: torch.Tensor  # (S, L, C) outputs of the 16-bit model
    state: torch.Tensor  # (S, L) bool, True = masked
    confidence: torch.Tensor | None = None  # (S, L) largest probability of the 16-bit model's prediction
    gain: torch.Tensor | None = None  # (d,) gain of the norm that x comes out of, None for `out` and `down`


@dataclass(frozen=True)
class RTN(Settings):
    weights: str = choice("symmetric", "asymmetric", text="grid of the weights; asymmetric is Eq. 4 for them, too")

    @property
    def symmetric(self) -> bool:
        return self.weights == "symmetric"


def fit_rtn(weight, bias, inputs, config, generator, progress):
    """Round to nearest, no transform (Eqs. 2-5)."""
    return QuantLinear.fold(weight, abits=config.abits, wbits=config.wbits, bias=bias, symmetric=config.symmetric), {}


def quantize_outer(model, head_bits: int = 8, embed_bits: int | None = None):
    """Embedding and head in integers, in place: rows of embed_bits (4 or 8, default head_bits) with a scale each.

    The head runs on integers like every other linear, its input in head_bits. A tied pair stays one tensor.
    """
    tied, head = model.config.tied, model.head.weight
    model.embed = QuantEmbedding.fold(model.embed.weight, head_bits if tied else embed_bits or head_bits)
    model.head = QuantLinear.fold(head, abits=head_bits, wbits=head_bits)
    if tied:
        model.head.weight_packed = model.embed.weight_packed
    return model
