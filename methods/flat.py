"""FlatQuant (arXiv 2410.09426) and FreeAct (arXiv 2603.01776): learned Kronecker transforms with learned clipping.

For every linear, both minimize ‖Y − Q_a(X P G_s) Q_w(P⁻¹Wᵀ)‖² (Eq. 15) over the transform and the clipping factors:

    FlatQuant   P = diag(δ)(P1 ⊗ P2), P_i = U diag(s) Vᵀ invertible; no gates
    FreeAct     P = diag(δ)(P1 ⊗ P2), P_i orthogonal; gates for two token types, d/32 dimensions each

Without clipping and gates, the orthogonal form is STaR-Quant's. FlatQuant's code minimizes the output error of a block
on 16-bit inputs. Here the loss is that of a linear behind the quantized blocks before it, as for STaR-Quant. So the
methods differ in their transforms and not in their training.
"""

import torch
from torch import nn

from methods.sgat import Gated, OrthogonalBasis, cayley, initial_basis, kronecker_sizes, minimize, quantizer
from runtime.layers import Grid, QuantLinear, quantize_weight
from starquant import Diagonal, Kronecker, apply_basis, quantized_linear, reconstruction_loss, state_gate, transform


class FlatParameters(nn.Module):
    """The trained parameters. A call gives (P, clip_x (2,), clip_w (C, 2)); P is a list of factors.

    A clip factor is sigmoid(p), and p starts at 4.
    """

    def __init__(self, start: Kronecker, channels: int, diagonal, orthogonal=False):
        super().__init__()
        self.basis, self.orthogonal = OrthogonalBasis(start), orthogonal
        if not orthogonal:
            self.right = nn.ParameterList(torch.zeros_like(f) for f in start)
            self.sizes = nn.ParameterList(torch.ones_like(f[0]) for f in start)
        self.diagonal = nn.Parameter(diagonal)
        self.clip_x, self.clip_w = (nn.Parameter(diagonal.new_full(size, 4.0)) for size in ((2,), (channels, 2)))

    def forward(self):
        P = self.basis()
        if not self.orthogonal:
            # P_i = U diag(s) Vᵀ, V = cayley(B), s = 1 at the start
            P = Kronecker(*((U * s) @ cayley(B).mT for U, s, B in zip(P, self.sizes, self.right, strict=True)))
        # a copy of δ: what is kept as the best iterate must not follow the parameters
        return [Diagonal(self.diagonal.clone()), P], self.clip_x.sigmoid(), self.clip_w.sigmoid()


def fit_flat(weight, bias, inputs, config, generator, progress):
    """Train P and the clipping of one linear and round it to nearest: (QuantLinear, record).

    It is FreeAct if the settings have gates, for the two token states of a diffusion model, and FlatQuant otherwise.
    """
    x, y, state = inputs[:3]
    d, norm = weight.shape[1], float(y.square().sum(-1).mean()) or 1.0
    orthogonal = isinstance(config, Gated)
    d_s = config.subspace(d) if orthogonal else 0
    start = initial_basis(d, "kronecker", generator).to(x)
    # δ = w_max^(1−α) / x_max^α, α = 0.3, at the start
    diagonal = weight.abs().amax(0).clamp_min(1e-5) ** 0.7 / x.abs().amax((0, 1)).clamp_min(1e-5) ** 0.3

    def folded(P, clip_w):
        # of an orthogonal factor P⁻ᵀ is P, of the diagonal 1/δ
        P = [p if orthogonal and isinstance(p, Kronecker) else p.inverse_transpose() for p in P]
        return clip_range(apply_basis(weight, P), clip_w)

    def loss_of(which, value):
        P, clip_x, clip_w = value
        phi = clip_range(transform(x[which], P, state_gate(state[which], d, d_s, d_s, x.dtype)), clip_x)
        y_hat = quantized_linear(phi, folded(P, clip_w), config.abits, config.wbits, quantizer)
        return reconstruction_loss(y[which], y_hat if bias is None else y_hat + bias) / norm

    parameters = FlatParameters(start, len(weight), diagonal, orthogonal)
    (P, clip_x, clip_w), record = minimize(parameters, loss_of, len(x), config.lr, config.epochs, config.batch,
                                           config.schedule, generator, progress)
    codes = quantize_weight(folded(P, clip_w), config.wbits)
    return QuantLinear(weight=codes, grid=Grid(config.abits, clip_x), P=P, d_m=d_s, d_u=d_s, bias=bias), record


def clip_range(x, clip):
    """Each row limited to (c_0 min, c_1 max) of itself, clip (..., 2): FlatQuant's learnable clipping.

    The quantizer takes its range from what is left, so limiting the values and shrinking the range are one thing.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    return torch.minimum(torch.maximum(x, low * clip[..., :1]), high * clip[..., 1:])


def stored_flat(config, d: int, behind_norm: bool) -> dict:
    return {"factors": [Diagonal((d,)), Kronecker(*((n, n) for n in kronecker_sizes(d)))], "clip": True}
