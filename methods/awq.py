"""Other methods as ways to fit a QuantLinear: each takes (weight (C, d), bias, Inputs, config, generator, progress).

Every method quantizes every linear of every block through one runtime: weights symmetric per output channel (RTN's
also asymmetric), activations asymmetric per token. Where a method's own code does otherwise (groups of 128, symmetric
activations), the docstring says so. All of them return (QuantLinear, record of what was found).
"""

import torch

from methods.gptq import gptq, hessian, output_error, round_columns, shrunk_scale
from runtime.layers import Grid, QuantLinear, Weight
from starquant import Diagonal
from starquant import fake_quantize

# ---- AWQ -------------------------------------------------------------------------------------------------------------
AWQ_EXPONENTS = tuple(i / 20 for i in range(20))
AWQ_SHRINK = tuple(1 - i / 20 for i in range(10))


def awq_scale(mean_abs, exponent: float):
    """s = mean|x|^r, at least 1e-4, divided by √(max s · min s): (d,)."""
    s = mean_abs.pow(exponent).clamp_min(1e-4)
    return s / (s.max() * s.min()).sqrt()


def awq_loss(weight, s, H, bits: int):
    """‖X (Q(W s)/s − W)ᵀ‖², what AWQ minimizes over its grid; scalar."""
    error = fake_quantize(weight * s, bits, symmetric=True) / s - weight
    return output_error(error.double(), H).sum()


def fit_awq(weight, bias, inputs, config, generator, progress, token_weights=None, compensate=False):
    """AWQ (arXiv 2306.00978): a scale per input channel, then a clipped range per output channel, both by grid search.

    Differs from AWQ's code, which is weight-only: the error is that of this linear, not of the attention or MLP around
    it; rows are not split into groups of 128; q and k are clipped like the rest. `compensate` rounds by GPTQ.
    """
    x = inputs.x.flatten(0, 1)
    H = hessian(x, None if token_weights is None else token_weights.flatten())
    scales = [awq_scale(x.abs().mean(0), r) for r in AWQ_EXPONENTS]
    losses = torch.stack([awq_loss(weight, s, H, config.wbits) for s in scales])
    s = scales[int(losses.argmin())]
    H = H / s.double() / s.double()[:, None]  # second moment of x / s
    scale = shrunk_scale((weight * s).double(), config.wbits, H, AWQ_SHRINK)
    if compensate:
        codes, scale = gptq(weight * s, H, config.wbits, scale)
    else:
        codes, scale = round_columns(weight * s, scale.float(), config.wbits).to(torch.int8), scale[:, 0]
    fitted = QuantLinear(weight=Weight(codes, scale, bits=config.wbits), grid=Grid(config.abits), P=[Diagonal(1 / s)],
                         bias=bias)
    return fitted, {"exponent": AWQ_EXPONENTS[int(losses.argmin())]}
