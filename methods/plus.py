"""starquant+, beyond the paper: a closed-form balanced transform in place of a trained one. No training.

A linear Y = X Wᵀ may be computed as (X P)(P⁻¹ Wᵀ) with any invertible P (Eq. 6). Per-token and per-channel quantizers
leave errors that grow with ‖X P‖² ‖P⁻¹ Wᵀ‖². With Σ_x = L_x L_xᵀ, WᵀW = L_w L_wᵀ (Cholesky, damped), L_wᵀ L_x = U S Vᵀ,

    T = S^−a Uᵀ L_wᵀ:   T Σ_x Tᵀ = S^(2−2a),   T^−ᵀ WᵀW T⁻¹ = S^2a,   P = Tᵀ H

H a Hadamard rotation, which spreads S evenly over the channels. a = ½ gives both sides the same second moment and the
product its least value. The result does not depend on the scales of the input channels: outlier channels made by a norm
gain or by v_proj and up_proj cancel. Block by block, with a = ½, this is WUSH (arXiv 2512.00956). `kind`: "block"
(diagonal blocks of 64, H across and inside of them), "dense" (d² multiplications a token: the most accurate, for small
d), "kronecker" (T1 ⊗ T2, the cheapest).

Both sides are then rounded against each other: the weights by GPTQ, which knows the activations, and, at run time, the
activations by feedback, which knows the weights (`feedback.py`). The more uneven the one side is, the less is left of
the other's error. So S, sorted in every block, is not spread between ranks: H mixes what has the same rank in all
blocks, and then inside the blocks. `exponent` gives the uneven share to the side that has more bits. Blocks of 64, what
mixes them and feedback cost 2.5 % of LLaDA-8B's linears and 3.9 % of Dream-7B's.

Before it every token loses the mean of its state, whose exact output is added behind the integer product: masked tokens
share most of what they carry (in the first layer all of it), and what is shared needs no bits. Behind it the scales of
the weights are set such that every output channel keeps its size (`unit_gain`).

What each part is worth stands in results/table-2-nelbo.md; masked tokens counting double (`mask_weight`) made no
difference there, and with outlier channels 0.1 of 2.4. Trials on development seeds, whose runs are not kept, spoke
against correcting the weight for Q(X) or the 16-bit stream by least squares, a corrected output bias, weighing by
confidence or by 1/t, second moments of the loss's gradients in place of WᵀW, a second stage of blocks across the first
in place of the rotation, a rotation that makes all conditional variances equal (geometric mean decomposition: the range
of tokens suffers), GPTQ in the order of the diagonal, coordinate descent on its codes, and TAC from statistics
(`tac=ridge` is on request). They spoke for such a stage on top of the rotation, and, within the noise, for tokens
weighted by gradients; neither is worth its cost. Larger blocks are better and cost more: the table has blocks of 16 and
192, too.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange

from kernels import fake_quantize_rows
from methods.gptq import gptq, hessian, inverse_factor, shrunk_scale
from methods.hadamard import hadamard_sizes, spread
from methods.settings import between, choice
from methods.tac import Compensated
from runtime.layers import Centre, Grid, QuantLinear, Weight
from starquant import Across, Blocks, Dense, Kronecker, apply_basis, fold_weight, linear, tac_block_size

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
EXPONENTS = tuple(i / 20 for i in range(16))


@dataclass(frozen=True)
class StarQuantPlus(Compensated):
    balance: str = choice("block", "kronecker", "dense", text="form of the transform")
    balance_block: int = between(64, 1, 10**5, "channels per block of the transform")
    exponent: float = between(-1.0, -1, 1, "a of the balance; below 0: chosen by the bits of weights and activations")
    centre: str = choice("state", "joint", "none", text="mean taken off before the transform: of each token state, of "
                         "all tokens, or none")
    rounding: str = choice("feedback", "nearest", text="of activations: by feedback against the weights, or to nearest")
    gain: str = choice("unit", "none", text="unit keeps the size of every output channel")
    mask_weight: float = between(2.0, 0, 10**6, "weight of a masked token against an unmasked one")
    tac: str = choice("none", "ridge", text="TAC by paired least squares; on top of starquant+, Eq. 18 loses")
    second_order = True


def _cholesky(moment, damping: float):
    """Lower factor of a batch of second moments (..., n, n), damped by a share of the mean diagonal."""
    load = damping * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    # of a linear that is never used the moments are zero: small enough to change nothing else, its root no denormal
    return torch.linalg.cholesky(moment + load.clamp_min(1e-30) * eye)


def aligned(moment_x, moment_w, damping: float = 1e-2):
    """S (..., n) and Uᵀ L_wᵀ (..., n, n) of the module's formula from Σ_x and WᵀW (..., n, n); float64."""
    L_x, L_w = _cholesky(moment_x.double(), damping), _cholesky(moment_w.double(), damping)
    # L_wᵀ L_x = U S Vᵀ; of blocks on the CPU, since a GPU takes one at a time
    where = "cpu" if L_w.shape[-1] <= 128 else L_w.device
    U, S, _ = (t.to(L_w.device) for t in torch.linalg.svd((L_w.mT @ L_x).to(where)))
    return S, U.mT @ L_w.mT


def balance(S, R, a: float):
    """T = S^−a R, R = Uᵀ L_wᵀ: T Σ_x Tᵀ = S^(2−2a) and T^−ᵀ WᵀW T⁻¹ = S^2a; S (..., n), R (..., n, n)."""
    return S.pow(-a)[..., None] * R


def conditional_variance(spectrum):
    """Mean variance of a channel given the channels before it, once a random rotation has mixed the given variances.

    It is what GPTQ leaves of a unit rounding error, where rounding to nearest leaves mean(λ): between the geometric and
    the arithmetic mean of the spectrum λ (any shape). The limit of many channels, from the derivative of the mean
    log-determinant of a random minor; tests hold it against the Cholesky factors of randomly rotated spectra.

        ∫₀¹ x / ((1 − x) ω) dx,   x(ω) = mean(ω λ / (1 + ω λ))   the share of channels that come before
    """
    spectrum = spectrum.flatten().double()
    spectrum = spectrum.clamp_min(1e-9 * spectrum.max())  # channels that are never used would stretch ω's range
    omega = torch.logspace(-8, 8, 200).to(spectrum)[:, None] / spectrum.log().mean().exp()
    after = (1 / (1 + omega * spectrum)).mean(-1)
    before = (omega * spectrum / (1 + omega * spectrum)).mean(-1)
    return torch.trapezoid(before / (after * omega[:, 0]), before)


def exponent(S, wbits: int, abits: int, feedback: bool = True) -> float:
    """The a of EXPONENTS with the least predicted error of both quantizers, for all singular values S (n, b).

    A bit takes three quarters of a quantizer's noise away. What GPTQ leaves of the weights' error depends on all
    channels, what feedback leaves of the activations' on a block, whose spectrum is the mean of all.

        4^−abits mean(S^(2−2a)) conditional_variance(mean_n(S^2a)) + 4^−wbits conditional_variance(S^(2−2a)) mean(S^2a)

    Without feedback mean(S^2a) takes the place of its conditional variance.
    """
    predicted = []
    for a in EXPONENTS:
        x, w = S.pow(2 - 2 * a), S.pow(2 * a)
        left = conditional_variance(w.mean(0)) if feedback else w.mean()
        predicted.append(float(4.0**-abits * x.mean() * left + 4.0**-wbits * conditional_variance(x) * w.mean()))
    return EXPONENTS[predicted.index(min(predicted))]


def balanced_basis(x, weight, kind: str, generator: torch.Generator, token_weights=None, block: int = 64,
                   choose=lambda S: 0.5):
    """Factors of P = Tᵀ H for inputs x (N, d), each weighing token_weights (N,), and weight (C, d); fp32.

    choose: gives the exponent a for the singular values S (n, b).
    """
    d = x.shape[1]
    if kind == "kronecker":
        X = x.double() if token_weights is None else x.double() * token_weights.double().sqrt()[:, None]
        sizes = hadamard_sizes(d)
        tensors = [rearrange(t, "n (i j) -> n i j", i=sizes[0]) for t in (X, weight.double())]
        # E[X Xᵀ] and E[Xᵀ X]: the moments of each factor, for both sides
        rows = [einsum(t, t, "n i k, n j k -> i j") for t in tensors]
        columns = [einsum(t, t, "n k i, n k j -> i j") for t in tensors]
        (S1, R1), (S2, R2) = aligned(*rows), aligned(*columns)
        a = choose(S1[:, None] * S2)
        H1, H2 = (spread(n, generator).to(x.device) for n in sizes)
        return [Kronecker((balance(S1, R1, a).mT @ H1).to(x), (balance(S2, R2, a).mT @ H2).to(x))]
    # the largest block that divides d; dense is one block
    size = d if kind == "dense" else tac_block_size(d, block)
    S, R = aligned(diagonal_blocks(hessian(x, token_weights), size), block_moments(weight, size))
    T = balance(S, R, choose(S))
    # blockdiag(Tᵀ) (H1 ⊗ H2) = blockdiag(Tᵀ H2) (H1 ⊗ I): spreading inside a block costs nothing on top of T
    P = T.mT @ spread(size, generator).to(x.device)
    return [Dense(P[0]).to(x)] if size == d else [Blocks(P).to(x), Across(spread(d // size, generator)).to(x)]


def in_order(P: list, weight):
    """P with the columns of its blocks in `rounding_order`, one order for all blocks: weight (C, d)."""
    *outer, inner = P[0]
    order = rounding_order(block_moments(fold_weight(weight, P), inner.shape[-1]).mean(0))
    return [type(P[0])(*outer, inner[..., order]), *P[1:]]


def evenly(x, token_weights, rows: int = 4096):
    """At most `rows` tokens of x (N, d), evenly taken, and their weights: (n, d), (n,)."""
    step = -(-len(x) // rows)
    return x[::step], x.new_ones(len(x[::step])) if token_weights is None else token_weights[::step]


def best_clip(x, folded, bits: int, token_weights=None, feedback=None):
    """Factor c of CLIPS: every token's range shrunk to c times itself costs least output error ‖(Q(x) − x) Wᵀ‖², (2,).

    x (N, d) transformed, folded (C, d), feedback as in `kernels.quantize_rows`. The largest value of many is far out;
    clipping it refines the steps of all the others.
    """
    x, weights = evenly(x, token_weights, 1024)
    losses = []
    for c in CLIPS:
        error = fake_quantize_rows(x, bits, x.new_full((2,), c), feedback) - x
        losses.append(float(((error @ folded.mT).square().sum(-1) * weights).sum()))
    return x.new_full((2,), CLIPS[losses.index(min(losses))])


def unit_gain(y, y_hat, weights):
    """γ (C,) that gives γ ŷ slope 1 on y in every output channel: y, ŷ (N, C), weights (N,).

    GPTQ, its scale search and clipping seek the least squared error and shrink: ŷ = α y + e with α < 1 (at W2A4 0.93,
    at W4A4 0.997). What follows is the worse for it, presumably because noise averages out over tokens and channels and
    a gain does not: at W2A4 γ takes the error of the first block's down_proj from 10 % to 3 % (`starquant.json` records
    both). Kin to TAC (Eq. 18), which restores a covariance: here a number, folded into the weight's scale.

        γ_c = Σ_j w_j y_jc² / Σ_j w_j ŷ_jc y_jc
    """
    own, both = (einsum(weights, t, y, "n, n c, n c -> c") for t in (y, y_hat))
    # of a channel that has lost more than half, or was never there, more gain would raise the noise alone
    return torch.where(2 * both > own, own / both, 1.0)


def state_means(x, masked):
    """μ_u and μ_m, the mean of each token state: x (N, d), masked (N,) -> (2, d); 0 for a state that does not occur."""
    return torch.stack([x[rows].sum(0) / rows.sum().clamp_min(1) for rows in (~masked, masked)])


def fit_starquant_plus(weight, bias, inputs, config, generator, progress):
    """Centring, balance, GPTQ, feedback, clipping, unit gain; masked tokens weigh `mask_weight` times as much in all of
    them but the first.

        Y^s = Q_a((X^s − μ_s) P) Q_w(P⁻¹ Wᵀ) diag(γ) + μ_s Wᵀ
    """
    x, masked = inputs.x.flatten(0, 1), inputs.state.flatten()
    token_weights, centre = torch.where(masked, config.mask_weight, 1.0), None
    if config.centre != "none":
        means = state_means(x, masked) if config.centre == "state" else x.mean(0).expand(2, -1).contiguous()
        x, centre = x - means[masked.long()], Centre(means, means @ weight.mT)
    given, feedback = config.exponent >= 0, config.rounding == "feedback"
    P = balanced_basis(x, weight, config.balance, generator, token_weights, config.balance_block,
                       lambda S: config.exponent if given else exponent(S, config.wbits, config.abits, feedback))
    # rounded before the weight is folded with it: half the bytes, and bf16 activations meet the very same numbers
    P = [factor.to(torch.bfloat16).to(weight) for factor in P]
    P = in_order(P, weight) if feedback else P
    x, folded = apply_basis(x, P), fold_weight(weight, P)
    codes, scale = gptq(folded, hessian(x, token_weights), config.wbits, shrunk_scale(folded, config.wbits))
    W = scale[:, None] * codes
    V = feedback_matrix(W, P[0][-1].shape[-1]) if feedback else None
    clip = best_clip(x, W, config.abits, token_weights, V)
    record = {"clip": float(clip[0])}
    if config.gain == "unit":
        few, weights = evenly(x, token_weights)
        y_hat = linear(fake_quantize_rows(few, config.abits, clip, V), W)
        gain = unit_gain(linear(few, folded), y_hat, weights)
        # s_c ← γ_c s_c
        scale, record["gain"] = scale * gain, float(gain.mean())
    fitted = QuantLinear(weight=Weight(codes, scale, bits=config.wbits), grid=Grid(config.abits, clip, V),
                         P=[factor.to(torch.bfloat16) for factor in P], bias=bias, centre=centre)
    return fitted, record


def diagonal_blocks(matrix, size: int):
    """(d, d) -> (d / size, size, size)."""
    blocks = rearrange(matrix, "(n i) (m j) -> n m i j", i=size, j=size)
    return blocks.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def block_moments(weight, size: int):
    """The diagonal blocks of WᵀW for a weight (C, d), (d / size, size, size) float64, without the rest of it."""
    blocks = rearrange(weight, "c (n b) -> n c b", b=size).double()
    return blocks.mT @ blocks


def feedback_matrix(weight, size: int, damping: float = 0.01):
    """V (d / size, size, size), zero on and below the diagonal, for the weight (C, d) as it will be used; bf16."""
    U = inverse_factor(block_moments(weight, size), damping)
    # V_ij = U_ij / U_ii
    return (U / U.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1).to(torch.bfloat16)


def rounding_order(moment):
    """Order of the channels of a second moment (b, b) in which feedback leaves little, as indices (b,).

    From the last channel, which nothing follows, to the first: each time the one of least variance given those behind
    it. The product of these variances is det M in any order, and so their sum is least when they are even. They fall on
    the way to the first channel, so the small ones are taken while much is left (sorted Cholesky).
    """
    M, order = moment.clone(), []
    left = torch.ones(len(M), dtype=torch.bool, device=M.device)
    for _ in range(len(M)):
        i = int(torch.where(left, M.diagonal(), torch.inf).argmin())
        order.append(i)
        left[i] = False
        # what channel i explains of the others
        M = M - torch.outer(M[:, i], M[i]) / M[i, i]
    return torch.tensor(order[::-1], device=M.device)
