"""QuaRot (arXiv 2404.00456): a Hadamard rotation in front of GPTQ."""

from dataclasses import dataclass

import torch

from methods.gptq import GPTQ, fit_gptq
from methods.hadamard import rotation, rotation_sizes
from starquant import Diagonal, Kronecker


@dataclass(frozen=True)
class QuaRot(GPTQ):
    rotated = True


def quarot_clip(bits: int) -> float | None:
    """Clipping factor of activations: 0.9 up to 4 bits, as QuaRot's authors set it; above, clipping would cost more."""
    return 0.9 if bits <= 4 else None


def fit_quarot(weight, bias, inputs, config, generator, progress, token_weights=None):
    """QuaRot for one linear: rotation, GPTQ with the scale search that its authors recommend, clipped activations.

    Three things differ from its code. There is a rotation for each input, not one for the whole residual stream.
    Activations are quantized asymmetrically. And where QuaRot folds the gain of a norm into the linears behind it, so
    that it rotates activations without the gain, a factor 1/gain does this, which a deployment can fold into the norm.
    """
    P = [rotation(weight.shape[1], generator).to(inputs.x)]
    if inputs.gain is not None:
        gain = inputs.gain.to(inputs.x)
        P.insert(0, Diagonal(1 / torch.where(gain.abs() <= 1e-6 * gain.abs().amax(), 1, gain)))
    return fit_gptq(weight, bias, inputs, config, generator, progress, P, token_weights, search=True,
                    clip=quarot_clip(config.abits))


def stored_quarot(config, d: int, behind_norm: bool) -> dict:
    return {"factors": [*([Diagonal((d,))] if behind_norm else []), Kronecker(*((n, n) for n in rotation_sizes(d)))],
            "clip": quarot_clip(config.abits) is not None}
