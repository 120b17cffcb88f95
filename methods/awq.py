"""AWQ (arXiv 2306.00978): a scale per input channel, then a clipped range per output channel, both by grid search."""

import torch

from methods.gptq import gptq, hessian, output_error, round_columns, shrunk_scale
from runtime.layers import Grid, QuantLinear, Weight
from starquant import Diagonal, fake_quantize

AWQ_EXPONENTS = tuple(i / 20 for i in range(20))
AWQ_SHRINK = tuple(1 - i / 20 for i in range(10))


def awq_scale(mean_abs, exponent: float):
    """Scale of the input channels for mean|x| (d,) and an exponent r: (d,)."""
    # s = max(mean|x|^r, 1e-4),   s ← s / √(max s · min s)
    s = mean_abs.pow(exponent).clamp_min(1e-4)
    return s / (s.max() * s.min()).sqrt()


def awq_loss(weight, s, H, bits: int):
    """What AWQ minimizes over its grid, for weight (C, d), s (d,) and the second moment H (d, d): scalar."""
    # ‖X (Q(W s)/s − W)ᵀ‖²
    error = fake_quantize(weight * s, bits, symmetric=True) / s - weight
    return output_error(error.double(), H).sum()


def fit_awq(weight, bias, inputs, config, generator, progress, token_weights=None):
    """AWQ for one linear, rounded to nearest or by GPTQ (`second_order`); token_weights (S, L) weigh the second moment.

    AWQ's own code quantizes weights alone and differs in three points. It judges the error of the attention or MLP
    around a linear; here the linear itself is judged. It splits rows into groups of 128; here a row has one scale. It
    does not clip q and k; here they are clipped like the rest.
    """
    x = inputs.x.flatten(0, 1)
    H = hessian(x, None if token_weights is None else token_weights.flatten())
    scales = [awq_scale(x.abs().mean(0), r) for r in AWQ_EXPONENTS]
    losses = torch.stack([awq_loss(weight, s, H, config.wbits) for s in scales])
    s = scales[int(losses.argmin())]
    H = H / s.double() / s.double()[:, None]  # second moment of x / s
    scale = shrunk_scale((weight * s).double(), config.wbits, H, AWQ_SHRINK)
    if config.second_order:
        codes, scale = gptq(weight * s, H, config.wbits, scale)
    else:
        codes, scale = round_columns(weight * s, scale.float(), config.wbits).to(torch.int8), scale[:, 0]
    fitted = QuantLinear(weight=Weight(codes, scale, bits=config.wbits), grid=Grid(config.abits), P=[Diagonal(1 / s)],
                         bias=bias)
    return fitted, {"exponent": AWQ_EXPONENTS[int(losses.argmin())]}


def stored_awq(config, d: int, behind_norm: bool) -> dict:
    return {"factors": [Diagonal((d,))]}
