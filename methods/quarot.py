"""QuaRot (arXiv 2404.00456): a Hadamard rotation in front of GPTQ."""

from dataclasses import dataclass

import torch

from methods.gptq import GPTQ, fit_gptq
from methods.hadamard import rotation
from methods.rtn import Inputs
from starquant import Diagonal


@dataclass(frozen=True)
class QuaRot(GPTQ):
    rotated = True


def quarot_basis(inputs: Inputs, generator):
    """Norm gain taken out, then a randomized Hadamard rotation.

    QuaRot folds the gain of a norm into the linears behind it, so that what is rotated and quantized is gain-free; here
    it is a diagonal factor 1/gain, which a deployment folds into the norm.
    """
    H = rotation(inputs.x.shape[-1], generator).to(inputs.x)
    if inputs.gain is None:
        return [H]
    gain = inputs.gain.to(inputs.x)
    return [Diagonal(1 / torch.where(gain.abs() < 1e-6 * gain.abs().amax(), 1, gain)), H]


def quarot_clip(bits: int) -> float | None:
    """Clipping of activations of so many bits: 0.9, as QuaRot's authors set it for 4; None above, where it costs more
    than it brings."""
    return 0.9 if bits <= 4 else None


def fit_quarot(weight, bias, inputs, config, generator, progress, token_weights=None):
    """QuaRot (arXiv 2404.00456): Hadamard rotation, GPTQ weights with the scale search its authors recommend, and their
    clipping of activations.

    One rotation per input instead of one for the whole residual stream; activations asymmetric, not symmetric.
    """
    P = quarot_basis(inputs, generator)
    return fit_gptq(weight, bias, inputs, config, generator, progress, P, token_weights, search=True,
                    clip=quarot_clip(config.abits))
