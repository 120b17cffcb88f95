"""GPTQ (arXiv 2210.17323): round a weight column by column, each rounding error pushed onto the columns still open.

It minimizes ‖X Wᵀ − X Ŵᵀ‖_F² = tr(E H Eᵀ), E = W − Ŵ, H = Σ_j w_j x_j x_jᵀ, greedily. It knows nothing of transforms:
given folded weights and transformed activations it composes with any of them.
"""

from dataclasses import dataclass

import torch

from methods.settings import Settings
from runtime import checks, cpu, cuda
from runtime.layers import Grid, QuantLinear, Weight
from runtime.processes import batches
from starquant import apply_basis, fold_weight, quant_params


@dataclass(frozen=True)
class GPTQ(Settings):
    second_order = True


def hessian(x, token_weights=None, at_once: int = 8192, block: int | None = None):
    """Second moment of x (N, d) with token_weights (N,), 1 by default: (d, d) float64.

    Products are taken in x's precision, `at_once` tokens at a time, and summed in float64. With `block`, only the
    diagonal blocks of that size are computed: (d / block, block, block).
    """
    # H = 2/N Σ_j w_j x_j x_jᵀ
    N, d = x.shape
    H = x.new_zeros((d // block, block, block) if block else (d, d), dtype=torch.float64)
    weights = x.new_ones(N) if token_weights is None else token_weights.to(x.dtype)
    for part, w in zip(x.split(at_once), weights.split(at_once), strict=True):
        weighted = w[:, None] * part
        if block:
            part, weighted = (t.view(-1, d // block, block).movedim(1, 0) for t in (part, weighted))  # (d/b, n, b)
        H += weighted.mT @ part
    return H.mul_(2 / N)


def output_error(error, H):
    """tr(E H Eᵀ) per output channel: error (C, d) -> (C,), twice the mean squared output error it causes."""
    return ((error @ H) * error).sum(-1)


def damped(H, damping: float):
    """H + λ I in H's place (..., d, d), λ = damping · mean(diag H); inputs that never occur (H_ii = 0) get 1 on it."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True) + (diagonal == 0).to(H)
    return H


def turned(A, at_once: int = 256):
    """A (..., d, d) in A's place, its rows and columns in reverse order; `at_once` rows of either half are copied."""
    d = A.shape[-1]
    for part in batches((d + 1) // 2, at_once):
        upper, lower = A[..., part, :], A[..., d - part.stop : d - part.start, :]
        kept = upper.flip(-2, -1)
        upper.copy_(lower.flip(-2, -1))
        lower.copy_(kept)
    return A


def upper_factor(H, damping: float):
    """R (..., d, d), upper triangular, with R Rᵀ = H for the damped H (..., d, d), which is overwritten."""
    # turn H, take its Cholesky factor, turn that, all in place: for an 8B model each of these matrices is a gigabyte
    return turned(torch.linalg.cholesky(damped(turned(H), damping)))


def round_columns(weight, scale, bits: int, out=None):
    """Symmetric codes ⌊w/s⌉ in [−2^(b−1), 2^(b−1) − 1], as floating-point numbers; `out` takes them if given."""
    return torch.div(weight, scale, out=out).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


SEARCHED = 2**20  # weights at a time, so that what is walked over 80 times stays in a CPU's cache
SHRINK = tuple(1 - i / 100 for i in range(80))  # GPTQ's grid


def rounding_losses(weight, scales, bits: int, H=None, norm: float = 2.4):
    """The error of each row of weight (C, d), rounded to the grid of each of its scales (C, n): (C, n).

    It is Σ |W − Ŵ|^2.4 as in GPTQ's code (its `mse` option, QuaRot's `w_clip`), or tr(E H Eᵀ) if H (d, d) is given.
    Without H, one kernel serves a GPU and one function of `runtime/cpu_kernels.c` a CPU, both in fp32.
    """
    scales = scales.to(weight).expand(len(weight), -1).contiguous()
    if H is None and weight.dtype == torch.float32:
        if weight.is_cuda and checks.ready(weight.device.index, torch.float32, "scales"):
            return cuda.rounding_losses(weight, scales, bits, norm)
        if weight.is_cpu and (library := cpu.compiled()):
            return cpu.rounding_losses(library, weight, scales, bits, norm)
    losses, at_once = torch.empty_like(scales), SEARCHED if weight.is_cpu else 16 * SEARCHED  # a GPU wants few launches
    for rows in batches(len(weight), max(1, at_once // weight.shape[1])):
        w, error = weight[rows], torch.empty_like(weight[rows])
        for i, scale in enumerate(scales[rows].mT[..., None]):  # (c, 1)
            round_columns(w, scale, bits, out=error).mul_(scale).sub_(w)  # in place: no new memory in 80 walks
            # |e|^p = 2^(p log₂|e|) takes a CPU 0.6 times as long as a power
            losses[rows, i] = error.abs_().log2_().mul_(norm).exp2_().sum(-1) if H is None else output_error(error, H)
    return losses


def shrunk_scale(weight, bits: int, H=None, grid=SHRINK):
    """Per-row scale, a factor of `grid` times the full one, of the least `rounding_losses`: weight (C, d) -> (C, 1)."""
    full, _ = quant_params(weight, bits, symmetric=True)
    scales = full * full.new_tensor(grid)  # (C, n)
    return scales.gather(1, rounding_losses(weight, scales, bits, H).argmin(1, keepdim=True))


def gptq(weight, H, bits: int, scale=None, damping: float = 0.01, block: int = cuda.GPTQ_BLOCK):
    """Codes (C, d) int8 and scale (C,) of weight (C, d) for inputs of second moment H (d, d).

    scale (C, 1) is fixed before the first column; by default it is max|w| / (2^(b−1) − 1). Columns are taken in order,
    in float64. If H is float64, it is overwritten.

    GPTQ's own code moves the open columns by the inverse of what is left of H. The same codes come from H itself, as
    LDLQ does it (QuIP, arXiv 2307.13304): with H = R Rᵀ, R upper triangular, and e_j = w_j − s q_j, the error is

        tr(E H Eᵀ) = ‖E R‖² = Σ_j R_jj² ‖e_j + Σ_{i<j} e_i R_ij / R_jj‖²,   q_j = ⌊(w_j + Σ_{i<j} e_i R_ij / R_jj) / s⌉

    Columns are rounded `block` at a time, and their errors move the columns behind them in products as large as can be:
    block 1 moves block 2, blocks 1 and 2 move 3 and 4, block 3 moves 4, blocks 1 to 4 move 5 to 8, and so on.
    """
    # one row per column of the weight, (d, C): what is to be rounded, and then its error
    W = weight.new_empty(weight.mT.shape, dtype=torch.float64).copy_(weight.mT)
    s = (quant_params(weight.double(), bits, symmetric=True)[0] if scale is None else scale).double()[:, 0]
    W[H.diagonal() == 0] = 0
    R = upper_factor(H.double(), damping)
    R /= R.diagonal().clone()  # R_ij / R_jj
    codes = torch.empty_like(W, dtype=torch.int8)
    one_kernel = W.is_cuda and checks.ready(W.device.index, torch.float32, "gptq")
    for start in range(0, len(W), block):
        end = min(start + block, len(W))
        columns, near = W[start:end], R[start:end, start:end]
        errors = torch.empty_like(columns).copy_(weight[:, start:end].mT)
        rounded = cuda.gptq_columns(columns, errors, near, s, bits) if one_kernel else columns
        for i, w in enumerate(() if one_kernel else columns):
            errors[i] -= s * round_columns(w, s, bits, out=w)
            columns[i + 1 :].addr_(near[i, i + 1 :], errors[i])
        codes[start:end] = rounded
        columns.copy_(errors)
        many = block * (end // block & -(end // block))  # the largest block · 2^n that divides `end`
        # w_j + Σ_{i<j} e_i R_ij / R_jj, for all i and j of two neighbours of that size
        W[end : end + many].addmm_(R[end - many : end, end : end + many].mT, W[end - many : end])
    return codes.mT.contiguous(), s.float()


def fit_gptq(weight, bias, inputs, config, generator, progress, P=(), token_weights=None, search=False, clip=None):
    """GPTQ for one linear, in the space of a transform P (none by default); token_weights (S, L) weigh the Hessian.

    search: take the scale of least rounding error for each output channel (`mse` in GPTQ's code), not that of max|w|.
    clip: factor by which every token's range is narrowed.
    """
    P = list(P)
    weights = None if token_weights is None else token_weights.flatten()
    H = hessian(apply_basis(inputs.x.flatten(0, 1), P), weights)
    folded = fold_weight(weight, P) if P else weight
    scale = shrunk_scale(folded, config.wbits) if search else None
    codes, scale = gptq(folded, H, config.wbits, scale)
    clip = None if clip is None else scale.new_full((2,), clip)
    fitted = QuantLinear(weight=Weight(codes, scale, bits=config.wbits), grid=Grid(config.abits, clip), P=P, bias=bias)
    return fitted, {}
