"""DLLMQuant (arXiv 2508.14090): calibration states, token weights and a scale for V."""

from dataclasses import dataclass

import torch

from methods.awq import fit_awq
from methods.gptq import GPTQ
from methods.quarot import fit_quarot
from methods.settings import between
from runtime import sampling
from starquant import dequantize, quantize

IA_AQ_GRID = (1.0, 0.95, 0.9, 0.85, 0.8)  # α; a survey prints "{1.0, 0.8}", read as a range: not settled
TMAS_SHARES = (0.3, 0.2, 0.2, 0.3)  # of calibration samples per bucket; bucket edges are unpublished, taken as quarters
CGQ_UNMASKED = 0.7  # weight of an unmasked token, of a masked one 1 (quoted by its reviewers)


@dataclass(frozen=True)
class DLLMQuant(GPTQ):
    """DLLMQuant+."""

    tac_samples: int = between(64, 1, 10**6, "calibration segments for TAC, or for "
                               "DLLMQuant's scale of V (kv_bits < 16), at most (App. C)")
    diffusion_aware = True


@dataclass(frozen=True)
class DLLMQuantRotated(DLLMQuant):
    """DLLMQuant++."""

    rotated = True


def ia_aq(A, v, bits: int, grid=IA_AQ_GRID):
    """Interaction-aware scale of V (DLLMQuant): static per channel, (scale, zero), both (K, 1, h).

    s = α ŝ with the α of `grid` that minimizes ‖A (V̂ − V)‖_F², ŝ = (V_max − V_min)/(2^b − 1): errors count as the
    softmax output A (B, H, L, L) spreads them. v (B, K, L, h). The loss is a sum over channels, so each has its own α;
    under grouped queries the heads that share a V are summed.
    """
    low, high = (f(v.amin((0, 2)) if f is torch.minimum else v.amax((0, 2)), v.new_zeros(()))
                 for f in (torch.minimum, torch.maximum))
    full = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    zero = torch.round(-low[:, None] / full)
    losses = []
    for alpha in grid:
        error = dequantize(quantize(v, alpha * full, zero, bits), alpha * full, zero) - v
        spread = A.unflatten(1, (v.shape[1], -1)) @ error[:, :, None]  # (B, K, H / K, L, h)
        losses.append(spread.square().sum((0, 2, 3)))
    best = torch.tensor(grid).to(v)[torch.stack(losses).argmin(0)]
    return best[:, None] * full, zero


def tmas_ratios(n: int, generator: torch.Generator):
    """Temporal-mask adaptive sampling: n masking ratios, (n,), 30/20/20/30 % of them in the four quarters of (0, 1].

    Exact shares (largest remainders first), stratified within a bucket, in random order. DLLMQuant takes its samples at
    fixed steps of generation; here the forward process of the same ratio stands in for the step.
    """
    exact = [n * share for share in TMAS_SHARES]
    counts = [int(e) for e in exact]
    for i in sorted(range(4), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    ratios = [(i + sampling.stratified_ratios(c, generator)) / 4 for i, c in enumerate(counts) if c]
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
