"""starquant+, our method beyond the paper: a transform in closed form instead of a trained one.

What is balanced
    A linear Y = X Wᵀ may be computed as (X P)(P⁻¹ Wᵀ) with any invertible P (Eq. 6). The errors of per-token and
    per-channel quantizers grow with ‖X P‖² ‖P⁻¹ Wᵀ‖². P is chosen such that this product is small.

The transform
    Let Σ_x = L_x L_xᵀ and WᵀW = L_w L_wᵀ (Cholesky factors of the damped second moments of inputs and weight), and let
    L_wᵀ L_x = U S Vᵀ (singular value decomposition). All matrices are d x d, or b x b for each block. Then

        T = S^−a Uᵀ L_wᵀ,   T Σ_x Tᵀ = S^(2−2a),   T^−ᵀ WᵀW T⁻¹ = S^2a,   P = Tᵀ H

    H is a Hadamard rotation. It spreads S evenly over the channels. With a = ½ both sides have the same second moment
    and the product is least. The scales of the input channels drop out: outlier channels that a norm gain, v_proj or
    up_proj makes are cancelled. Block by block and with a = ½, this is WUSH (arXiv 2512.00956).
    `balance` names the form of P: "block" (diagonal blocks, H across and inside of them), "dense" (d² multiplications a
    token, the most accurate) or "kronecker" (T1 ⊗ T2, the cheapest).

Rounding
    Weights are rounded by GPTQ, which knows the activations. Activations are rounded by feedback at run time, which
    knows the weights: the channels of a block that are still open make up for the error of those already rounded. Both
    leave less error, the more uneven the other side's spectrum is. So H first mixes singular values of equal rank from
    different blocks and only then inside a block, and `exponent` gives the uneven share to the side with more bits.

Centring and gain
    Every token loses the mean of its state before the transform, and the exact output of that mean is added behind the
    integer product. Masked tokens share most of what they carry, and what is shared needs no bits. After rounding, the
    scales of the weights are set such that every output channel keeps its size (`unit_gain`).

`docs/starquant-plus.md` says what each part is worth, what it costs, and what we tried and dropped.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange

from methods.gptq import gptq, hessian, shrunk_scale, upper_factor
from methods.hadamard import rotation_sizes, spread
from methods.settings import between, choice
from methods.tac import Compensated
from runtime.cpu import fake_quantize_rows
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


def lean(moment, tokens: int, prior: float = 0.14, damping: float = 1e-2):
    """Mix second moments H (..., d, d) of `tokens` tokens, in place, with a prior: equal variances, no correlation.

    Few tokens tell little of d channels, and what is fitted to them alone does not hold for others. From 14 d tokens
    on the moments stay as they are, because the steps that follow damp them by as much.
    """
    # H + max(0, prior · d / tokens − damping) · mean(diag H) · I
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal += max(0.0, prior * moment.shape[-1] / tokens - damping) * diagonal.mean(-1, keepdim=True)
    return moment


def _cholesky(moment, damping: float):
    """Lower Cholesky factor of second moments (..., n, n), damped by a share of the mean diagonal."""
    load = damping * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    # the moments of a linear that is never used are zero; 1e-30 changes nothing else, and its root is no denormal
    return torch.linalg.cholesky(moment + load.clamp_min(1e-30) * eye)


def aligned(moment_x, moment_w, damping: float = 1e-2):
    """S (..., n) and Uᵀ L_wᵀ (..., n, n) of the module's formula from Σ_x and WᵀW (..., n, n); float64."""
    L_x, L_w = _cholesky(moment_x.double(), damping), _cholesky(moment_w.double(), damping)
    # L_wᵀ L_x = U S Vᵀ; small blocks on the CPU, since a GPU decomposes them one at a time
    where = "cpu" if L_w.shape[-1] <= 128 else L_w.device
    U, S, _ = (t.to(L_w.device) for t in torch.linalg.svd((L_w.mT @ L_x).to(where)))
    return S, U.mT @ L_w.mT


def balance(S, R, a: float):
    """T = S^−a R, R = Uᵀ L_wᵀ: T Σ_x Tᵀ = S^(2−2a) and T^−ᵀ WᵀW T⁻¹ = S^2a; S (..., n), R (..., n, n)."""
    return S.pow(-a)[..., None] * R


def conditional_variance(spectrum):
    """What GPTQ leaves of a unit rounding error if channels of variances λ are mixed at random: spectrum λ -> scalar.

    GPTQ corrects a channel by the channels that it rounds later. What stays is the variance of each channel given the
    channels before it, on average. Rounding to nearest leaves mean(λ); GPTQ leaves a number between the geometric and
    the arithmetic mean. The formula is the limit of many channels, from the derivative of the mean log-determinant of a
    random minor. Tests compare it with the Cholesky factors of randomly rotated spectra.

        ∫₀¹ x / ((1 − x) ω) dx,   x(ω) = mean(ω λ / (1 + ω λ))

    ω runs over the noise levels; x is the share of channels that are already rounded at the level ω.
    """
    spectrum = spectrum.flatten().double()
    spectrum = spectrum.clamp_min(1e-9 * spectrum.max())  # channels that are never used would stretch ω's range
    omega = torch.logspace(-8, 8, 200).to(spectrum)[:, None] / spectrum.log().mean().exp()
    kept = (1 / (1 + omega * spectrum)).mean(-1)  # 1 − x
    share = (omega * spectrum / (1 + omega * spectrum)).mean(-1)  # x
    return torch.trapezoid(share / (kept * omega[:, 0]), share)


def exponent(S, wbits: int, abits: int, feedback: bool = True) -> float:
    """The a of EXPONENTS with the least predicted error of both quantizers, for all singular values S (n, b).

    A bit removes three quarters of a quantizer's noise. What GPTQ leaves of the weights' error depends on all channels.
    What feedback leaves of the activations' error depends on one block, whose spectrum is the mean over blocks.

        4^−abits mean(S^(2−2a)) conditional_variance(mean_n(S^2a)) + 4^−wbits conditional_variance(S^(2−2a)) mean(S^2a)

    Without feedback, mean(S^2a) takes the place of its conditional variance.
    """
    predicted = []
    for a in EXPONENTS:
        x, w = S.pow(2 - 2 * a), S.pow(2 * a)
        left = conditional_variance(w.mean(0)) if feedback else w.mean()
        predicted.append(float(4.0**-abits * x.mean() * left + 4.0**-wbits * conditional_variance(x) * w.mean()))
    return EXPONENTS[predicted.index(min(predicted))]


def balanced_basis(x, weight, kind: str, generator: torch.Generator, token_weights=None, block: int = 64,
                   choose=lambda S: 0.5):
    """Factors of P = Tᵀ H for inputs x (N, d) with token_weights (N,), and weight (C, d); fp32.

    choose(S): the exponent a for the singular values S (n, b).
    """
    d = x.shape[1]
    if kind == "kronecker":
        X = x.double() if token_weights is None else x.double() * token_weights.double().sqrt()[:, None]
        sizes = rotation_sizes(d)
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
    S, R = aligned(lean(hessian(x, token_weights, block=size), len(x)), block_moments(weight, size))
    T = balance(S, R, choose(S))
    # blockdiag(Tᵀ) (H1 ⊗ H2) = blockdiag(Tᵀ H2) (H1 ⊗ I): spreading inside a block costs nothing on top of T
    P = T.mT @ spread(size, generator).to(x.device)
    return [Dense(P[0]).to(x)] if size == d else [Blocks(P).to(x), Across(spread(d // size, generator)).to(x)]


def in_order(P: list, weight):
    """P with the columns of its blocks in `rounding_order`, one order for all blocks: weight (C, d)."""
    *outer, inner = P[0]
    channels = fold_weight(weight, P).reshape(-1, inner.shape[-1]).double()  # of all blocks and outputs: (C d/b, b)
    order = rounding_order(channels.mT @ channels)
    return [type(P[0])(*outer, inner[..., order]), *P[1:]]


def evenly(x, token_weights, most: int = 4096):
    """At most `most` tokens of x (N, d), evenly taken, and their weights: (n, d), (n,)."""
    step = -(-len(x) // most)
    return x[::step], x.new_ones(len(x[::step])) if token_weights is None else token_weights[::step]


def best_clip(x, weight: Weight, bits: int, token_weights=None, feedback=None):
    """The factor c of CLIPS, as (2,), with the least output error ‖Q(x) W̃ᵀ − x W̃ᵀ‖² if each token's range is c as wide.

    x (N, d) is transformed, W̃ (C, d) is the rounded weight; feedback (d/b, b, b). The largest of many values lies far
    out; clipping it makes the steps of all other values finer.
    """
    x, weights = evenly(x, token_weights, 1024)
    layer, losses = QuantLinear(weight=weight, grid=Grid(bits, feedback=feedback)), []
    y = linear(x, layer.weight())
    for c in CLIPS:
        layer.clip = x.new_full((2,), c)
        losses.append(float((torch.linalg.vector_norm(layer(x).sub_(y), dim=-1).square_() * weights).sum()))
    return x.new_full((2,), CLIPS[losses.index(min(losses))])


def unit_gain(y, y_hat, weights):
    """γ (C,) such that γ ŷ has slope 1 on y in every output channel: y, ŷ (N, C), weights (N,).

    GPTQ, its scale search and clipping seek the least squared error, and so they shrink the output: ŷ = α y + e with
    α = 0.93 at W2A4 and 0.997 at W4A4. Later layers suffer from it, presumably because noise averages out over tokens
    and channels while a gain does not. At W2A4, γ lowers the error of the first block's down_proj from 10 % to 3 %.
    TAC (Eq. 18) restores a covariance in a similar way; γ is one number a channel and vanishes in the weight's scale.

        γ_c = Σ_j w_j y_jc² / Σ_j w_j ŷ_jc y_jc
    """
    own, both = (einsum(weights, t, y, "n, n c, n c -> c") for t in (y, y_hat))
    # where a channel has lost more than half of its size, or never had any, more gain would only raise the noise
    return torch.where(2 * both > own, own / both, 1.0)


def state_means(x, masked):
    """μ_u and μ_m, the mean of each token state: x (N, d), masked (N,) -> (2, d); 0 if a state does not occur."""
    return torch.stack([x[own].sum(0) / own.sum().clamp_min(1) for own in (~masked, masked)])


def fit_starquant_plus(weight, bias, inputs, config, generator, progress):
    """Centring, balance, GPTQ, feedback, clipping and unit gain, in this order: (QuantLinear, record).

    Masked tokens weigh `mask_weight` times as much as unmasked ones in all steps but centring.

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
    # P is rounded to bf16 before the weight is folded with it, so that bf16 activations meet the very same numbers
    P = [factor.to(torch.bfloat16).to(weight) for factor in P]
    P = in_order(P, weight) if feedback else P
    x, folded = apply_basis(x, P), fold_weight(weight, P)
    H = lean(hessian(x, token_weights), len(x))
    codes, scale = gptq(folded, H, config.wbits, shrunk_scale(folded, config.wbits))
    rounded, W = Weight(codes, scale, bits=config.wbits), scale[:, None] * codes
    V = feedback_matrix(W, P[0][-1].shape[-1]) if feedback else None
    clip = best_clip(x, rounded, config.abits, token_weights, V)
    record = {"clip": float(clip[0])}
    if config.gain == "unit":
        few, weights = evenly(x, token_weights)
        y_hat = linear(fake_quantize_rows(few, config.abits, clip, V), W)
        gain = unit_gain(linear(few, folded), y_hat, weights)
        # s_c ← γ_c s_c
        rounded, record["gain"] = rounded._replace(scale=scale * gain), float(gain.mean())
    fitted = QuantLinear(weight=rounded, grid=Grid(config.abits, clip, V),
                         P=[factor.to(torch.bfloat16) for factor in P], bias=bias, centre=centre)
    return fitted, record


def stored_starquant_plus(config, d: int, behind_norm: bool) -> dict:
    b = d if config.balance == "dense" else tac_block_size(d, config.balance_block)  # channels per block of P
    factors = [Dense((d, d))] if b == d else [Blocks((d // b, b, b)), Across((d // b, d // b))]
    if config.balance == "kronecker":
        factors = [Kronecker(*((n, n) for n in rotation_sizes(d)))]
    # the blocks of feedback are as wide as those of the first factor, or as its P2
    feedback = factors[0][-1][-1] if config.rounding == "feedback" else 0
    return {"factors": factors, "factor_dtype": "BF16", "clip": True, "centred": config.centre != "none",
            "feedback": feedback}


def block_moments(weight, size: int):
    """The diagonal blocks of WᵀW, and nothing else of it: weight (C, d) -> (d / size, size, size) float64."""
    blocks = rearrange(weight, "c (n b) -> n c b", b=size).double()
    return blocks.mT @ blocks


def inverse_factor(H, damping: float):
    """U (..., d, d), upper triangular, with H⁻¹ = UᵀU for the damped H (..., d, d).

    Row i of U is, up to the factor U_ii, the first row of the inverse of what H says of the channels from i on.
    """
    R = upper_factor(H, damping)
    # U = R⁻¹
    return torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), upper=True)


def feedback_matrix(weight, size: int, damping: float = 0.01):
    """V (d / size, size, size) in bf16, zero on and below the diagonal, for the rounded weight (C, d)."""
    U = inverse_factor(block_moments(weight, size), damping)
    # V_ij = U_ij / U_ii
    return (U / U.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1).to(torch.bfloat16)


def rounding_order(moment):
    """Order of the channels of a second moment (b, b) in which feedback leaves little error, as indices (b,).

    Pick the last channel first. No later channel can repair its error, so it should have the smallest variance. Then
    pick the channel with the smallest variance given those already picked, and so on to the front (a Cholesky
    decomposition with the smallest pivot). In any order the product of these variances is the determinant, so their sum
    is least when they are even. They shrink with every channel that is picked; to pick the smallest keeps them even.
    """
    rest, order = moment.clone(), []
    left = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
    for _ in range(len(rest)):
        i = int(torch.where(left, rest.diagonal(), torch.inf).argmin())
        order.append(i)
        left[i] = False
        # the variance of the others, less what channel i explains
        rest = rest - torch.outer(rest[:, i], rest[i]) / rest[i, i]
    return torch.tensor(order[::-1], device=rest.device)
