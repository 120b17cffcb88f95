"""STaR-Quant (arXiv 2606.04945): Equations 1-18, 27-30 and Appendices A and C, in the paper's order and symbols.

Tensors are row-major: activations x (..., d), weight W (C, d), token state (...) bool with True = masked. One equation
is one function, and its formula stands directly above its lines. The column *runs in* names the function that does its
work when a model is calibrated or runs; "tests only" marks a reference. The tests compare every function with an
independent float64 computation (`tests/test_equations*.py`). Appendix B, the training of P, is `methods/sgat.py`.

Eq.   | what                                      | function            | runs in             | test
1     | Y = X Wᵀ                                  | linear              | Linear.forward      | TestEq1
2     | X_int = clamp(⌊X/s⌉ + z, 0, 2ᵇ−1)         | quantize            | quantize_rows       | TestEq2
3     | X̂ = s (X_int − z)                         | dequantize          | scaled_product      | TestEq3
4     | s = (max − min)/(2ᵇ−1), z = ⌊−min/s⌉      | quant_params        | quantize_rows       | TestEq4
5     | Y ≈ Q_a(X) Q_w(Wᵀ)                        | quantized_linear    | int_linear          | TestEq5
6     | Y = (XP)(P⁻¹Wᵀ)                           | transformed_linear  | QuantLinear.forward | TestEq6
7     | X^m, X^u by token state, and back         | split_by_state      | tests only          | TestEq7
8     | P = [U_sh, U_m, U_u]                      | subspaces           | tests only          | TestEq8
9     | G_m, G_u                                  | subspace_gates      | QuantLinear.gates   | TestEq9
10    | P_s = P G_s                               | state_basis         | tests only          | TestEq10
11    | Φ_s(X) = X P G_s                          | transform           | QuantLinear.phi     | TestEq11
12    | W̃ = Q_w(P_e Wᵀ)                           | fold_weight         | QuantLinear.fold    | TestEq12
13    | Ŷ^s = Q_a(Φ_s(X^s)) W̃                     | sgat_linear         | QuantLinear.forward | TestEq13
14    | L = E ‖Y − Ŷ‖²                            | reconstruction_loss | fit_flat            | TestEq14
15    | L = E Σ_s ‖Y^s − Q_a(X^s P G_s) W̃‖²       | sgat_loss           | fit_sgat            | TestEq15
16    | Z = softmax(Q Kᵀ/√d_h) V                  | attention_value     | Block.attention     | TestEq16
17    | Z_tac = Ẑ Mᵀ + 1 dᵀ per block             | tac_apply           | TAC.forward         | TestEq17
18    | M = Σ_fp^½ (Σ_q + λI)^−½, d = μ_fp − M μ_q | tac_fit             | estimate_tac        | TestEq18
27    | X Wᵀ = Φ_s(X) P_e Wᵀ if X P G_s^⊥ = 0     | sgat_exact          | tests only          | TestEq27
28    | Δ_s = X P G_s^⊥ P_e Wᵀ                    | leakage             | tests only          | TestEq28
29    | Eq. 15 with W̃ = Q_w(PᵀWᵀ)                 | sgat_loss           | fit_sgat            | TestEq29
30    | μ_b, Σ_b of each block                    | block_statistics    | tac_fit             | TestEq30

Glossary: d input width, C output width, d_sh/d_m/d_u subspace sizes, b bits, s scale, z zero point, P basis,
P_e = P⁻¹ its weight-side partner, G gate, Q_a/Q_w activation/weight quantizer, g TAC block size, B blocks, M/d TAC map.
⌊·⌉ is rounding to the nearest integer, ties to even. P is a (d, d) tensor, a factor (last section) or a list of them.
"""

import math
from collections import namedtuple

import torch
from einops import einsum, rearrange

# ---- Section 3.1: uniform quantization -----------------------------------------------------------------------------


def linear(x, weight):
    """Eq. 1: the full-precision linear layer, (..., d) -> (..., C)."""
    # Y = X Wᵀ
    return x @ weight.mT


def ste_round(x):
    """⌊x⌉ with the straight-through gradient d⌊x⌉/dx = 1."""
    return x + (torch.round(x) - x).detach()


def quantize(x, scale, zero_point, bits: int):
    """Eq. 2: integer-valued codes in 0..2^bits−1, kept in x's floating dtype so that gradients pass the rounding."""
    # X_int = clamp(⌊X/s⌉ + z, 0, 2ᵇ − 1)
    return torch.clamp(ste_round(x / scale) + zero_point, 0, 2**bits - 1)


def dequantize(codes, scale, zero_point):
    """Eq. 3."""
    # X̂ = s (X_int − z)
    return scale * (codes - zero_point)


def quant_params(x, bits: int, symmetric: bool = False):
    """Eq. 4: scale and zero point of each row, both (..., 1).

    Asymmetric (activations, per token): the range always includes 0, so that z is a code and gated channels stay exact
    zeros; a row with both signs is Eq. 4 to the letter. Symmetric (weights, per output channel): z = 2^(b−1) and
    s = max|x| / (2^(b−1) − 1). A row of zeros gets the smallest normal scale and stays exact.
    """
    tiny = torch.finfo(torch.float32).tiny
    # a tensor: CUDA multiplies by the reciprocal of a Python number, one ulp off
    steps = x.new_full((), 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
    if symmetric:
        scale = (x.abs().amax(-1, keepdim=True) / steps).clamp_min(tiny)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    # s = (X_max − X_min) / (2ᵇ − 1), divided first: the difference of two huge numbers overflows
    scale = (high / steps - low / steps).clamp_min(tiny)
    # z = ⌊−X_min / s⌉
    return scale, ste_round(-low / scale)


def fake_quantize(x, bits: int, symmetric: bool = False):
    """Q(x), Eqs. 2-4 per row: quantize and dequantize, in fp32 or wider; differentiable (also through s and z)."""
    y = x if x.dtype == torch.float64 else x.float()
    largest = torch.finfo(x.dtype).max  # the grid may end half a step above it
    if y.requires_grad and torch.is_grad_enabled():
        return FakeQuantize.apply(y, bits, symmetric, largest).to(x.dtype)
    scale, zero_point = quant_params(y, bits, symmetric)
    return dequantize(quantize(y, scale, zero_point, bits), scale, zero_point).clamp(-largest, largest).to(x.dtype)


def quantized_linear(x, weight, abits: int = 4, wbits: int = 4, Q=fake_quantize):
    """Eq. 5: round-to-nearest, per-token activations (asymmetric) and per-channel weights (symmetric)."""
    # Y ≈ Q_a(X) Q_w(Wᵀ)
    return linear(Q(x, abits), Q(weight, wbits, symmetric=True))


def transformed_linear(x, weight, P, abits: int | None = None, wbits: int | None = None):
    """Eq. 6: the linear computed in the transformed space; exact without bits, quantized with them."""
    # Y = (XP)(P⁻¹Wᵀ) ≈ Q_a(XP) Q_w(P⁻¹Wᵀ)
    xp, wp = apply_basis(x, P), fold_weight(weight, P)
    return linear(fake_quantize(xp, abits) if abits else xp, fake_quantize(wp, wbits, symmetric=True) if wbits else wp)


# ---- Section 3.2: State-Guided Activation Transformation -----------------------------------------------------------


def split_by_state(x, state):
    """Eq. 7: (X^m, X^u), the rows of masked and of unmasked tokens, in order."""
    # I_s = {i | s_i = s},  X^s = X[I_s]
    return x[state], x[~state]


def scatter_by_state(x_m, x_u, state):
    """Inverse of Eq. 7: rows back at their token positions, state's shape + (d,)."""
    out = x_m.new_empty(*state.shape, x_m.shape[-1])
    out[state], out[~state] = x_m, x_u
    return out


def subspaces(P, d_m: int, d_u: int):
    """Eq. 8: the columns of P = [U_sh, U_m, U_u] as three bases."""
    # d = d_sh + d_m + d_u
    d_sh = P.shape[-1] - d_m - d_u
    return P[..., :d_sh], P[..., d_sh : d_sh + d_m], P[..., d_sh + d_m :]


def subspace_gates(d: int, d_m: int, d_u: int, device=None, dtype=torch.float32):
    """Eqs. 9/21: the diagonals of G_m and G_u, each (d,) of 0 and 1, layout [sh, m, u]."""
    if d_m < 0 or d_u < 0 or d_m + d_u > d:
        raise ValueError(f"subspaces of {d_m} + {d_u} dimensions do not fit into {d}.")
    gate_m, gate_u = torch.ones(2, d, device=device, dtype=dtype)
    # G_m = diag(1_sh, 1_m, 0_u)
    gate_m[d - d_u :] = 0
    # G_u = diag(1_sh, 0_m, 1_u)
    gate_u[d - d_u - d_m : d - d_u] = 0
    return gate_m, gate_u


def state_gate(state, d: int, d_m: int, d_u: int, dtype=torch.float32):
    """The gate of every token at once, state.shape + (d,): what the runtime uses in place of split and scatter."""
    return torch.where(state[..., None], *subspace_gates(d, d_m, d_u, state.device, dtype))


def state_basis(P, gate):
    """Eq. 10: P_m = [U_sh, U_m, 0] or P_u = [U_sh, 0, U_u], dense."""
    # P_s = P G_s
    return P * gate


def transform(x, P, gate):
    """Eqs. 11/22: activation-side transform; the gate is one state's (d,) or one per token (..., d)."""
    # Φ_s(X) = X P G_s
    return apply_basis(x, P) * gate


def fold_weight(weight, P, orthogonal: bool = False):
    """Eqs. 12/23 before Q_w, in our row layout: (P_e Wᵀ)ᵀ = W P_eᵀ, (C, d). P_e = Pᵀ if orthogonal, else P⁻¹."""
    # P_e Wᵀ = (W P_eᵀ)ᵀ:  W P for orthogonal P, W P^{-T} in general
    orthogonal = orthogonal or all(factor.is_orthogonal() for factor in factors(P))
    return apply_basis(weight, P if orthogonal else [factor.inverse_transpose() for factor in factors(P)])


def sgat_linear(x, state, P, weight, d_m: int, d_u: int, abits: int | None = 4, wbits: int | None = 4, bias=None,
                symmetric: bool = True):
    """Eq. 13, fake-quantized: split by state, transform, quantize, one shared weight, scatter back.

    x (..., d), state (...), weight (C, d) -> (..., C). Without bits a side stays in full precision.
    """
    folded = fold_weight(weight, P)
    # W̃ = Q_w(P_e Wᵀ)
    folded = fake_quantize(folded, wbits, symmetric) if wbits else folded
    gates = subspace_gates(x.shape[-1], d_m, d_u, x.device, x.dtype)
    outputs = []
    for x_s, gate in zip(split_by_state(x, state), gates, strict=True):
        phi = transform(x_s, P, gate)
        # Ŷ^s = Q_a(Φ_s(X^s)) W̃
        outputs.append(linear(fake_quantize(phi, abits) if abits else phi, folded))
    y = scatter_by_state(*outputs, state)
    return y if bias is None else y + bias


def reconstruction_loss(y, y_hat):
    """Eq. 14: mean over tokens of the squared error (an expectation over the denoising steps that y samples)."""
    # L = E_t ‖Y − Ŷ‖_F²
    return torch.nn.functional.mse_loss(y_hat, y, reduction="sum") / y[..., 0].numel()


def sgat_loss(x, y, state, P, weight, d_m: int, d_u: int, abits: int = 4, wbits: int = 4, bias=None,
              symmetric: bool = True, orthogonal: bool = False, Q=fake_quantize):
    """Eqs. 15/29 for x (..., d), y (..., C), differentiable in P: the sum over states is Eq. 14 of all tokens."""
    folded = Q(fold_weight(weight, P, orthogonal), wbits, symmetric)
    phi = transform(x, P, state_gate(state, x.shape[-1], d_m, d_u, x.dtype))
    y_hat = linear(Q(phi, abits), folded)
    # L = E_t Σ_s ‖Y^s − Q_a(X^s P G_s) W̃‖_F²
    return reconstruction_loss(y, y_hat if bias is None else y_hat + bias)


# ---- Section 3.3: Temporal Attention Compensation ------------------------------------------------------------------


def attention_value(q, k, v):
    """Eq. 16: q, k, v (..., L, d_h) -> Z (..., L, d_h); the readable reference of the fused attention in model.py."""
    # Z = softmax(Q Kᵀ / √d_h) V
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def tac_apply(z, M, bias):
    """Eq. 17: z (..., C) -> (..., C) with M (B, g, g), bias (B, g), C = B g."""
    blocks = rearrange(z, "... (b g) -> ... b g", g=M.shape[-1])
    # Z_tac,b = Ẑ_b M_bᵀ + 1 d_bᵀ
    return (einsum(blocks, M, "... b g, b h g -> ... b h") + bias).flatten(-2)


def tac_fit(z_fp, z_q, block_size: int = 16, damping: float = 3e-4, smoothing: float = 0.15, shrinkage: float = 0.55):
    """Eq. 18 with Appendix C: paired representations (N, C) -> M (B, g, g), bias (B, g), in float64.

    damping ρ, singular-value smoothing η, identity shrinkage α; with η = α = 0 this is Eq. 18 itself, λ being ρ times
    the mean variance of a block.
    """
    g = tac_block_size(z_fp.shape[-1], block_size)
    mu_fp, cov_fp = block_statistics(z_fp, g)
    mu_q, cov_q = block_statistics(z_q, g)
    # M_b = (Σ_fp)^½ (Σ_q + λI)^−½
    M = matrix_power(cov_fp, 0.5) @ matrix_power(damp(cov_q, damping), -0.5)
    M = shrink_to_identity(smooth_singular_values(M, smoothing), shrinkage)
    # d_b = μ_fp − M_b μ_q
    return M, mu_fp - einsum(M, mu_q, "b h g, b g -> b h")


# ---- Appendix A: computation consistency of SGAT -------------------------------------------------------------------


def sgat_exact(x, P, gate, weight):
    """Right side of Eq. 27, Φ_s(X) P_e Wᵀ: equals X Wᵀ whenever X P G_s^⊥ = 0 (Eq. 25), for any invertible P."""
    # X^s Wᵀ = X^s P G_s P_e Wᵀ
    return linear(transform(x, P, gate), fold_weight(weight, P))


def leakage(x, P, gate, weight):
    """Eq. 28: Δ_s = X Wᵀ − Φ_s(X) P_e Wᵀ, what gating takes away from the output, (L, C), for arbitrary X."""
    # G_s^⊥ = I − G_s (Eq. 24);  Δ_s = X P G_s^⊥ P_e Wᵀ
    return linear(transform(x, P, 1 - gate), fold_weight(weight, P))


# ---- Appendix C: TAC in detail -------------------------------------------------------------------------------------


def tac_block_size(C: int, largest: int = 16) -> int:
    """Largest block size not above `largest` that divides C."""
    return next(g for g in range(min(largest, C), 0, -1) if C % g == 0)


def block_statistics(z, g: int):
    """Eq. 30: population mean (B, g) and covariance (B, g, g) of each block of z (N, C), in float64."""
    blocks = rearrange(z.double(), "n (b g) -> b n g", g=g)
    # μ_b = 1/N Σ_i z_i
    mu = blocks.mean(1)
    # Σ_b = 1/N Σ_i z_i z_iᵀ − μ μᵀ = 1/N Σ_i (z_i − μ)(z_i − μ)ᵀ, the form that does not cancel
    centred = blocks - mu[:, None]
    return mu, centred.mT @ centred / blocks.shape[1]


def damp(cov, rho: float, eps: float = 1e-8):
    """Σ̃_b = Σ_b + λ_b I."""
    g = cov.shape[-1]
    # λ_b = ρ · max(Tr(Σ_b) / g, ε)
    lam = rho * (cov.diagonal(dim1=-2, dim2=-1).sum(-1) / g).clamp_min(eps)
    return cov + lam[..., None, None] * torch.eye(g, dtype=cov.dtype, device=cov.device)


def matrix_power(A, p: float):
    """A^p of symmetric positive semi-definite matrices (..., g, g), eigenvalues clamped at 1e-12."""
    # A = Q diag(λ) Qᵀ,  A^p = Q diag(max(λ, 1e-12)^p) Qᵀ
    eigenvalues, Q = torch.linalg.eigh(A)
    return (Q * eigenvalues.clamp_min(1e-12).pow(p)[..., None, :]) @ Q.mT


def smooth_singular_values(M, eta: float):
    """Pull every singular value towards the block's mean: η = 0 leaves M, η = 1 makes them equal."""
    # M_b = U diag(σ) Vᵀ
    U, sigma, Vh = torch.linalg.svd(M)
    # σ' = (1 − η) σ + η σ̄
    sigma = (1 - eta) * sigma + eta * sigma.mean(-1, keepdim=True)
    return (U * sigma[..., None, :]) @ Vh


def shrink_to_identity(M, alpha: float):
    """M_final = (1 − α) M_sv + α I: α = 1 leaves only the mean correction."""
    return (1 - alpha) * M + alpha * torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)


# ---- Beside the paper ----------------------------------------------------------------------------------------------


class FakeQuantize(torch.autograd.Function):
    """Eqs. 2-4 with their gradient written out (tested equal); masks are 0 and 1 in x's dtype, faster than bool."""

    @staticmethod
    def forward(ctx, x, bits, symmetric, largest):
        scale, zero_point = quant_params(x, bits, symmetric)
        rounded, top = (x / scale).round_(), 2**bits - 1 - zero_point
        # no code is below 0, since s and z are those of the row; one may be above 2ᵇ − 1, unless symmetric
        ctx.bits, inside = bits, None if symmetric else torch.le(rounded, top, out=torch.empty_like(x))
        # X̂ = s (X_int − z),  X_int − z = min(⌊X/s⌉, 2ᵇ − 1 − z)
        x_hat = torch.minimum(rounded, top, out=rounded).mul_(scale).clamp_(-largest, largest)
        ctx.save_for_backward(x, x_hat, scale, inside)
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        def share(x, end):  # of each entry in the gradient of its row's end: those that equal the end divide it
            where = torch.eq(x, end, out=torch.empty_like(x))
            return where.div_(where.sum(-1, keepdim=True).clamp_min_(1))

        x, x_hat, scale, inside = ctx.saved_tensors
        # through the rounding: ∂X̂/∂X = [inside]
        out = grad if inside is None else grad * inside
        # ∂X̂/∂s = (X_int − z) − [inside] X/s, nothing where s is held at its least value
        d_scale = ((grad * x_hat).sum(-1, keepdim=True) - (out * x).sum(-1, keepdim=True)) / scale
        d_scale = d_scale * (scale > torch.finfo(torch.float32).tiny)
        if inside is None:  # symmetric
            # s = max|X| / (2^(b−1) − 1)
            at_max = share(x.abs(), x.abs().amax(-1, keepdim=True)).mul_(x.sign())
            return torch.addcmul(out, at_max, d_scale / (2 ** (ctx.bits - 1) - 1)), None, None, None
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        # z = −X_min / s,  ∂X̂/∂z = s ([inside] − 1), here divided by s, as s² may be 0;  s = (X_max − X_min) / (2ᵇ − 1)
        d_zero = out.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)
        d_high = (d_scale + d_zero * (low / scale)) / (2**ctx.bits - 1)
        return out.addcmul_(share(x, low), -d_high - d_zero).addcmul_(share(x, high), d_high), None, None, None


# ---- Factors of P ----------------------------------------------------------------------------------------------------


def factors(P) -> list:
    """P as a list of factors; a (d, d) tensor means Dense."""
    P = [p if isinstance(p, Factor) else Dense(p) for p in (P if isinstance(P, list) else [P])]
    if any(isinstance(p, Dense) and (p.P.ndim != 2 or p.P.shape[0] != p.P.shape[1]) for p in P):
        raise ValueError("a Dense P is a square matrix; another shape needs the name of its factor, as Diagonal(d).")
    return P


def apply_basis(x, P):
    """X P, x (..., d); ValueError if a factor does not fit the width d."""
    for factor in factors(P):
        if not factor.fits(x.shape[-1]):
            sizes = ", ".join(str(tuple(tensor.shape)) for tensor in factor)
            raise ValueError(f"a {type(factor).__name__} factor of {sizes} does not fit a width of {x.shape[-1]}.")
        x = factor.apply(x)
    return x


class Factor:
    """What all factors share. A factor is a named tuple of tensors: square matrices, or the vector of a diagonal."""

    def fits(self, d: int) -> bool:
        return d == math.prod(n for t in self for n in t.shape[:max(t.ndim - 1, 1)])  # of (n, b, b): n b

    def to(self, to):
        """The factor in another dtype, or in the dtype and on the device of a tensor."""
        return type(self)(*(t.to(to) for t in self))

    def inverse_transpose(self):
        """The factor of P^{-T}: (P1 P2)^{-T} = P1^{-T} P2^{-T}. Matrices are inverted in float64."""
        return type(self)(*(1 / t if t.ndim == 1 else torch.linalg.inv(t.double()).mT.to(t.dtype) for t in self))

    @torch.no_grad()
    def is_orthogonal(self) -> bool:
        """Whether PᵀP = I to rounding, 1e-5 in fp32 and 1e-9 in fp64."""
        off = [t.square() - 1 if t.ndim == 1 else t.mT @ t - torch.eye(t.shape[-1]).to(t) for t in self]
        return all(bool(t.abs().max() <= (1e-9 if t.dtype == torch.float64 else 1e-5)) for t in off)


class Dense(Factor, namedtuple("Dense", "P")):
    """P (d, d) itself: d² multiplications a token. The factors below have structure and take fewer."""

    def apply(self, x):
        return x @ self.P


class Kronecker(Factor, namedtuple("Kronecker", "P1 P2")):
    """P = P1 ⊗ P2, P1 (n1, n1) and P2 (n2, n2): two small products, d (n1 + n2) multiplications."""

    def apply(self, x):
        mat = rearrange(x, "... (i j) -> i (...) j", i=len(self.P1))  # (n1, N, n2): both products are plain ones
        # x (P1 ⊗ P2) = P1ᵀ · mat(x) · P2
        mat = (self.P1.mT @ mat.flatten(1)).view(mat.shape) @ self.P2
        return rearrange(mat, "i n j -> n (i j)").view(x.shape)

    def dense(self):
        return torch.kron(self.P1.contiguous(), self.P2.contiguous())


class Diagonal(Factor, namedtuple("Diagonal", "d")):
    """P = diag(d), d (d,)."""

    def apply(self, x):
        return x * self.d


class Blocks(Factor, namedtuple("Blocks", "B")):
    """P = blockdiag(B_1, ..., B_n), B (n, b, b), d = n b."""

    def apply(self, x):
        x = rearrange(x, "... (n b) -> ... n b", n=len(self.B))
        return einsum(x, self.B, "... n b, n b c -> ... n c").flatten(-2)


class Across(Factor, namedtuple("Across", "A")):
    """P = A ⊗ I, A (n, n): mixes the channels that have the same place in each of n blocks."""

    def fits(self, d: int) -> bool:
        return d % len(self.A) == 0

    def apply(self, x):
        # x (A ⊗ I) = Aᵀ · mat(x)
        return (self.A.mT @ rearrange(x, "... (n b) -> ... n b", n=len(self.A))).flatten(-2)
