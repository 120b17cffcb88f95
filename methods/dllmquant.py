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
    """Interaction-aware quantizer of V (DLLMQuant), static per channel: v (B, H_kv, L, h) -> scale, zero, (H_kv, 1, h).

    Errors of V count as the softmax output A (B, H, L, L) spreads them. The loss is a sum over channels, so that each
    channel has its own α of `grid`. Under grouped queries, the losses of the heads that share a V are summed.
    """
    # s = α ŝ,  α minimizes ‖A (V̂ − V)‖_F²,  ŝ = (V_max − V_min) / (2^b − 1)
    low, high = v.amin((0, 2)).clamp(max=0), v.amax((0, 2)).clamp(min=0)  # (H_kv, h)
    full = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)[:, None]  # (H_kv, 1, h)
    zero = torch.round(-low[:, None] / full)
    losses = []
    for alpha in grid:
        error = dequantize(quantize(v, alpha * full, zero, bits), alpha * full, zero) - v
        spread = A.unflatten(1, (v.shape[1], -1)) @ error[:, :, None]  # (B, H_kv, H / H_kv, L, h)
        losses.append(spread.square().sum((0, 2, 3)))
    best = torch.tensor(grid).to(v)[torch.stack(losses).argmin(0)]
    return best[:, None] * full, zero


def tmas_ratios(n: int, generator: torch.Generator):
    """Temporal-mask adaptive sampling: n masking ratios (n,), 30/20/20/30 % of them in the four quarters of (0, 1].

    The shares are exact (largest remainders first), the ratios stratified within a quarter and in random order.
    DLLMQuant takes its samples at fixed steps of generation; here the forward process stands in for the step.
    """
    exact = [n * share for share in TMAS_SHARES]
    counts = [int(e) for e in exact]
    for i in sorted(range(4), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    ratios = [(i + sampling.stratified_ratios(c, generator)) / 4 for i, c in enumerate(counts) if c]
    return torch.cat(ratios)[torch.randperm(n, generator=generator)]


def cgq_weights(state, confidence):
    """Certainty-guided weights of tokens (S, L) from their states and the confidence of their predictions."""
    # H = Σ_j w_j² x_j x_jᵀ,  w = (1 if masked else 0.7) + √confidence
    return (torch.where(state, 1.0, CGQ_UNMASKED) + confidence.sqrt()).square()


def fit_dllmquant(weight, bias, inputs, config, generator, progress):
    """DLLMQuant+: AWQ's scales and clipping, judged and rounded (by GPTQ) under the certainty-guided Hessian.

    How this Hessian, which is made for GPTQ, combines with AWQ is unpublished. In this reading it takes part.
    DLLMQuant++ is QuaRot with this Hessian.
    """
    fit, weights = fit_quarot if config.rotated else fit_awq, cgq_weights(inputs.state, inputs.confidence)
    return fit(weight, bias, inputs, config, generator, progress, weights)
