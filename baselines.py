"""Other methods as ways to fit a QuantLinear: each takes (weight (C, d), bias, Inputs, config, generator, progress).

Every method quantizes every linear of every block through one runtime: weights symmetric per output channel (RTN's
also asymmetric), activations asymmetric per token. Where a method's own code does otherwise (groups of 128, symmetric
activations), the docstring says so. All of them return (QuantLinear, record of what was found).
"""

from typing import NamedTuple

import torch

import data
from flat import fit_flatquant, fit_freeact
from gptq import gptq, hessian, output_error, round_columns, shrunk_scale
from hadamard import rotation
from layers import QuantLinear
from starquant import Kronecker, apply_basis, fake_quantize, fold_weight


class Inputs(NamedTuple):
    """What a linear is fitted on: S calibration segments of L tokens."""

    x: torch.Tensor  # (S, L, d) inputs behind the quantized prefix
    y: torch.Tensor  # (S, L, C) outputs of the 16-bit model
    state: torch.Tensor  # (S, L) bool, True = masked
    confidence: torch.Tensor | None = None  # (S, L) largest probability of the 16-bit model's prediction
    gain: torch.Tensor | None = None  # (d,) gain of the norm that x comes out of, None for `out` and `down`


def fit_rtn(weight, bias, inputs, config, generator, progress):
    """Round to nearest, no transform (Eqs. 2-5)."""
    return QuantLinear.fold(weight, abits=config.abits, wbits=config.wbits, bias=bias, symmetric=config.symmetric), {}


# ---- GPTQ and QuaRot -------------------------------------------------------------------------------------------------


def fit_gptq(weight, bias, inputs, config, generator, progress, P=(), token_weights=None, search=False, clip=None):
    """GPTQ in the space of a transform P (none by default); token_weights (S, L) weigh the Hessian.

    search: the per-channel scale of least rounding error instead of max|w| (`mse` in GPTQ's code); clip: factor of
    every token's range.
    """
    P = list(P)
    rows = None if token_weights is None else token_weights.flatten()
    H = hessian(apply_basis(inputs.x.flatten(0, 1), P), rows)
    folded = fold_weight(weight, P) if P else weight
    scale = shrunk_scale(folded, config.wbits) if search else None
    codes, scale = gptq(folded, H, config.wbits, scale)
    clip = None if clip is None else scale.new_full((2,), clip)
    return QuantLinear(codes, scale, P, 0, 0, config.abits, config.wbits, bias, clip=clip), {}


def quarot_basis(inputs: Inputs, generator):
    """Norm gain taken out, then a randomized Hadamard rotation.

    QuaRot folds the gain of a norm into the linears behind it, so that what is rotated and quantized is gain-free; here
    it is a diagonal factor 1/gain, which a deployment folds into the norm.
    """
    H = Kronecker(*(f.to(inputs.x) for f in rotation(inputs.x.shape[-1], generator)))
    if inputs.gain is None:
        return [H]
    gain = inputs.gain.to(inputs.x)
    return [1 / torch.where(gain.abs() < 1e-6 * gain.abs().amax(), 1, gain), H]


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
    fitted = QuantLinear(codes, scale, [1 / s], 0, 0, config.abits, config.wbits, bias)
    return fitted, {"exponent": AWQ_EXPONENTS[int(losses.argmin())]}


# ---- DLLMQuant (arXiv 2508.14090) ------------------------------------------------------------------------------------

TMAS_SHARES = (0.3, 0.2, 0.2, 0.3)  # of calibration samples per bucket; bucket edges are unpublished, taken as quarters
CGQ_UNMASKED = 0.7  # weight of an unmasked token, of a masked one 1 (quoted by its reviewers)


def tmas_ratios(n: int, generator: torch.Generator):
    """Temporal-mask adaptive sampling: n masking ratios, (n,), 30/20/20/30 % of them in the four quarters of (0, 1].

    Exact shares (largest remainders first), stratified within a bucket, in random order. DLLMQuant takes its samples at
    fixed steps of generation; here the forward process of the same ratio stands in for the step.
    """
    exact = [n * share for share in TMAS_SHARES]
    counts = [int(e) for e in exact]
    for i in sorted(range(4), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    ratios = [(i + data.stratified_ratios(c, generator)) / 4 for i, c in enumerate(counts) if c]
    return torch.cat(ratios)[torch.randperm(n, generator=generator)]


def cgq_weights(state, confidence):
    """Certainty-guided token weights w², w = (1 if masked else 0.7) + √confidence, (S, L): H = Σ w² x xᵀ."""
    return (torch.where(state, 1.0, CGQ_UNMASKED) + confidence.sqrt()).square()


def fit_dllmquant_awq(weight, bias, inputs, config, generator, progress):
    """DLLMQuant+: AWQ's scales and clipping, judged and rounded (GPTQ) under the certainty-guided Hessian.

    How CGQ, a Hessian for GPTQ, combines with AWQ is unpublished; this is the reading in which it takes part.
    """
    weights = cgq_weights(inputs.state, inputs.confidence)
    return fit_awq(weight, bias, inputs, config, generator, progress, weights, compensate=True)


def fit_dllmquant_quarot(weight, bias, inputs, config, generator, progress):
    """DLLMQuant++: QuaRot with the certainty-guided Hessian."""
    weights = cgq_weights(inputs.state, inputs.confidence)
    return fit_quarot(weight, bias, inputs, config, generator, progress, weights)


BASELINES = {"rtn": fit_rtn, "awq": fit_awq, "gptq": fit_gptq, "quarot": fit_quarot, "flatquant": fit_flatquant,
             "freeact": fit_freeact, "dllmquant+": fit_dllmquant_awq, "dllmquant++": fit_dllmquant_quarot}
DLLMQUANT = ("dllmquant+", "dllmquant++")  # also: calibration ratios by TMAS, V's scale by IA-AQ (kv_bits < 16)
ROTATED = ("quarot", "dllmquant++")  # K and V are quantized behind a Hadamard rotation of each head (kv_bits < 16)
