"""Appendix B: how SGAT's basis P is initialized, kept orthogonal and trained; closed-form subspace allocation.

As in the paper, P starts as a random Gaussian matrix, orthogonalized (`initial_basis`), and is trained by AdamW on
Eq. 15 with learning rate 1e-3, batch 4 and 15 epochs while the model is frozen (`fit_sgat`). P stays orthogonal because
it is the start times the Cayley image of a skew-symmetric matrix. `kind="dense"` is one d x d matrix;
`kind="kronecker"` is P1 ⊗ P2 (with FlatQuant's sizes), which is what deploys. Beyond the paper, `allocate_subspaces`
starts from the directions that the other state does not use.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import einsum, rearrange
from torch import nn

from methods.rtn import RTN, Inputs, fit_rtn
from methods.settings import Settings, between, choice
from methods.tac import Compensated
from runtime import checks, cuda
from runtime.layers import QuantLinear
from runtime.processes import Refused
from starquant import Dense, Kronecker, fake_quantize, sgat_loss, subspace_gates


@dataclass(frozen=True)
class Trained(Settings):
    """Settings of methods that train a transform (`minimize`)."""

    lr: float = between(1e-3, 0, 10, "learning rate of AdamW (App. B)")
    epochs: int = between(15, 0, 10**4, "epochs (App. B); 0 keeps the start")
    batch: int = between(4, 1, 10**6, "segments per step (App. B)")
    schedule: str = choice("constant", "cosine", text="learning rate over the steps")
    trained = True


@dataclass(frozen=True)
class Gated(Trained):
    """Settings of methods with a subspace for each token state."""

    state_fraction: int = between(32, 0, 10**6, "d_m = d_u = d / state_fraction (App. B); 0 for no gates")

    def __post_init__(self):
        super().__post_init__()
        if self.state_fraction == 1:
            raise Refused("state_fraction 1 gives each state the whole width; give 2 or more, or 0 for no gates.")

    def subspace(self, d: int) -> int:
        """d_m = d_u of a linear of width d."""
        return d // self.state_fraction if self.state_fraction else 0


@dataclass(frozen=True)
class StarQuant(Gated, Compensated, RTN):
    transform: str = choice("kronecker", "dense", "none", text="P = P1 ⊗ P2, one d x d matrix (App. B to the letter), "
                            "or no SGAT (Table 2)")
    allocation: str = choice("random", "closed_form", text="start of P: App. B's orthogonalized Gaussian, or the "
                             "directions that the other state does not use")
    tac: str = choice("statistics", "ridge", "none", text="TAC by Eq. 18, by paired least squares, or none")
    smoothing: float = between(0.15, 0, 1, "η of TAC: smoothing of singular values (App. C)")
    shrinkage: float = between(0.55, 0, 1, "α of TAC: shrinkage towards the identity (App. C)")

    @property
    def trained(self) -> bool:
        return self.transform != "none"


def random_orthogonal(n: int, generator: torch.Generator):
    """Haar-distributed orthogonal matrix (n, n): QR of a Gaussian with the signs of diag(R) taken out. float64."""
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def kronecker_sizes(d: int) -> tuple[int, int]:
    """(n1, n2), n1 n2 = d, as close to √d as divisors allow, n1 ≤ n2: 4096 -> 64, 64; 12288 -> 96, 128.

    Where n1 alone is 64 or 128 they change places, 18944 -> 148, 128: a kernel on a GPU takes such an n2.
    """
    n1 = next(n for n in range(int(d**0.5), 0, -1) if d % n == 0)
    n2 = d // n1
    return (n2, n1) if n1 in (64, 128) and n2 not in (64, 128) else (n1, n2)


def initial_basis(d: int, kind: str, generator: torch.Generator):
    """App. B: a random Gaussian matrix, orthogonalized; each factor on its own in the Kronecker form."""
    if kind == "dense":
        return random_orthogonal(d, generator)
    return Kronecker(*(random_orthogonal(n, generator) for n in kronecker_sizes(d)))


class Cayley(torch.autograd.Function):
    """Orthogonal matrix of the skew-symmetric part of A: Q = (I + S)⁻¹ (I − S), S = (A − Aᵀ)/2; A = 0 gives I."""

    @staticmethod
    def forward(ctx, A):
        S, eye = (A - A.mT) / 2, torch.eye(len(A), dtype=A.dtype, device=A.device)
        Q = torch.linalg.solve_ex(eye + S, eye - S)[0]  # I + S is never singular
        ctx.save_for_backward(eye + Q)
        return Q

    @staticmethod
    def backward(ctx, grad):
        # (I + S)⁻¹ = (I + Q)/2, so dQ = −½ (I + Q) dS (I + Q) and ∂L/∂A = Dᵀ − D with D = ¼ (I + Q)ᵀ (∂L/∂Q) (I + Q)ᵀ
        (twice,) = ctx.saved_tensors
        D = twice.mT @ grad @ twice.mT / 4
        return D.mT - D


cayley = Cayley.apply


@contextmanager
def products_in(precision: str):
    """Inside, a GPU multiplies fp32 matrices in "tf32", with 10 bits of each factor, or in "ieee", with all of them."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, precision
    try:
        yield
    finally:
        setting.fp32_precision = before


class OrthogonalBasis(nn.Module):
    """P = P_start · cayley(A), A trained from 0, per factor; fp32 unless the start is wider."""

    def __init__(self, start):
        super().__init__()
        self.start = start if isinstance(start, Kronecker) else (start,)
        self.skew = nn.ParameterList(torch.zeros_like(f) for f in self.start)

    def forward(self):
        with products_in("ieee"):  # else P would be orthogonal to 10 bits only
            P = [f @ cayley(A) for f, A in zip(self.start, self.skew, strict=True)]
        return Kronecker(*P) if len(P) > 1 else P[0]

# ---- closed-form allocation ----------------------------------------------------------------------------------------


def least_energy(moments, counts, n: int, generator: torch.Generator):
    """Orthogonal (n, n) whose last columns carry little energy under given second moments (n, n).

    The last counts[0] columns have the least energy under moments[0]. The counts[1] columns before them have the least
    energy under moments[1] within what is left, and so on. What remains is rotated at random, which spreads outliers.
    """
    rest, columns = torch.eye(n, dtype=torch.float64), []
    for moment, count in zip(moments, counts, strict=True):
        if count == rest.shape[1]:  # nothing to choose from
            break
        rest = rest.to(moment)
        _, Q = torch.linalg.eigh(rest.mT @ moment @ rest)  # eigenvectors, those of the smallest eigenvalues first
        columns.insert(0, rest @ Q[:, :count])
        rest = rest @ Q[:, count:]
    return torch.cat((rest @ random_orthogonal(rest.shape[1], generator).to(rest), *columns), 1)


def allocate_subspaces(x, state, d_m: int, d_u: int, kind: str, generator: torch.Generator):
    """Closed-form start of P = [U_sh, U_m, U_u] from calibration inputs x (N, d) and their states (N,); float64.

    U_u are the d_u directions with the least masked energy, since masked tokens lose what lies in them. U_m are, within
    the rest, the d_m directions with the least unmasked energy. U_sh is what remains.

    In the Kronecker form, coordinate (i, j) of the (n1, n2) layout is column i of P1 times column j of P2. Some rows i
    hold coordinates that a state loses to its gate. These rows get the columns of P1 in which the states that lose them
    have the least energy, the last row first. Then the same is done for the columns of P2, within these rows.
    """
    d, x = x.shape[1], x.double()
    if kind == "dense":
        moments = [x[s].mT @ x[s] / max(int(s.sum()), 1) for s in (state, ~state)]
        return least_energy(moments, (d_u, d_m), d, generator)
    n1, n2 = kronecker_sizes(d)
    # of masked and of unmasked tokens: what the gate takes (n1, n2), and the inputs (N_s, n1, n2)
    lost = [(gate == 0).view(n1, n2) for gate in subspace_gates(d, d_m, d_u)]
    tokens = [rearrange(x[own], "n (i j) -> n i j", i=n1) for own in (state, ~state)]
    rows = [i for i in reversed(range(n1)) if lost[0][i].any() or lost[1][i].any()]
    # energy of each state in the directions of P1: E[X Xᵀ]
    energy = [einsum(T, T, "n i k, n j k -> i j") / max(len(T), 1) for T in tokens]
    moments = [sum(int(lost[s][i].sum()) * energy[s] for s in (0, 1)) for i in rows]
    P1 = least_energy(moments, [1] * len(rows), n1, generator)
    # energy of each state within each of these rows, in the directions of P2: E[xᵀ x], x = P1_iᵀ X
    inner = {(s, i): einsum(T, P1[:, i], "n i j, i -> n j") for s, T in enumerate(tokens) for i in rows}
    energy = {key: x.mT @ x / max(len(x), 1) for key, x in inner.items()}
    moments, counts = [], []
    # neighbouring columns j that the same states lose in the same rows share a moment, the last columns first
    for losing, columns in groupby(reversed(range(n2)), lambda j: [(s, i) for s, i in energy if lost[s][i, j]]):
        if losing:
            moments.append(sum(energy[key] for key in losing))
            counts.append(len(list(columns)))
    return Kronecker(P1, least_energy(moments, counts, n2, generator))

# ---- training ------------------------------------------------------------------------------------------------------


def quantizer(x, bits: int, symmetric: bool = False):
    """`starquant.fake_quantize`; on a GPU one kernel makes it, and another its gradient."""
    if x.dtype == torch.float32 and checks.usable(x, "training"):
        return cuda.FakeQuantize.apply(x, bits, symmetric)
    return fake_quantize(x, bits, symmetric)


def fit_sgat(x, y, state, weight, start, d_m: int, d_u: int, abits=4, wbits=4, lr=1e-3, epochs=15, batch=4,
             schedule="constant", bias=None, symmetric=True, generator=None, progress=lambda loss: None):
    """App. B: train P on Eq. 15; returns P with the least held-out loss, and a record of the losses.

    x (S, L, d): inputs of S calibration segments, y (S, L, C): their full-precision outputs, state (S, L), weight
    (C, d), start: the initial basis. Losses are divided by the mean squared norm of y. For a Kronecker P, a GPU
    computes them and their gradients by products in TF32 (docs/choices.md).
    """
    norm = float(y.square().sum(-1).mean()) or 1.0

    def loss_of(which, P):
        which = which.to(x.device)  # once: a GPU waits for every copy
        batch = (t.index_select(0, which) for t in (x, y, state))  # faster on a CPU than x[which]
        return sgat_loss(*batch, P, weight, d_m, d_u, abits, wbits, bias, symmetric, True, quantizer) / norm

    with products_in("tf32" if isinstance(start, Kronecker) else "ieee"):
        return minimize(OrthogonalBasis(start), loss_of, len(x), lr, epochs, batch, schedule, generator, progress)


@torch.enable_grad()  # whatever the caller's mode is
def minimize(parameters: nn.Module, loss_of, segments: int, lr=1e-3, epochs=15, batch=4, schedule="constant",
             generator=None, progress=lambda loss: None):
    """AdamW on `loss_of(which, parameters())` over batches of segments; returns its best value and a record.

    `which` holds numbers of segments; the loss is a mean over them. One eighth of the segments is held out, at least
    one; a single segment is both trained and judged on. A held-out loss that is not finite ends the training. The best
    iterate is kept in every case, at worst the start; `diverged` in the record says that the last iterate is worse than
    the start. Parameters named `clip...` learn 10 times as fast (FlatQuant).
    """
    held = torch.arange(min(7, segments - 1), segments, 8)
    train = torch.tensor([i for i in range(segments) if i not in held] or [0])
    optimizer = torch.optim.AdamW([{"params": [p], "lr": lr * (10 if name.startswith("clip") else 1)}
                                   for name, p in parameters.named_parameters()], lr=lr, fused=True)
    steps = epochs * -(-len(train) // batch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1)) if schedule == "cosine" else None

    @torch.no_grad()
    def current():
        """The value and its held-out loss."""
        value = parameters()
        losses = [loss_of(which, value) * len(which) for which in held.split(16)]
        return value, float(torch.stack(losses).sum()) / len(held)

    best, least = current()
    history = [least]
    for _ in range(epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for which in order.split(batch):
            loss = loss_of(which, parameters())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
        value, loss = current()
        history.append(loss)
        progress(loss)
        if not math.isfinite(loss):
            break
        if loss < least:
            best, least = value, loss
    last = history[-1] if math.isfinite(history[-1]) else None  # JSON has no NaN
    return best, {"start": history[0], "best": least, "last": last, "epochs": len(history) - 1,
                  "diverged": last is None or last > history[0]}


def fit_starquant(weight, bias, inputs: Inputs, config, generator, progress):
    """SGAT: start (App. B or closed form), train on Eq. 15, fold (Eq. 12)."""
    if config.transform == "none":
        return fit_rtn(weight, bias, inputs, config, generator, progress)
    (x, y, state), d = inputs[:3], weight.shape[1]
    d_s = config.subspace(d)
    if config.allocation == "random":
        start = initial_basis(d, config.transform, generator)
    else:
        start = allocate_subspaces(x.flatten(0, 1), state.flatten(), d_s, d_s, config.transform, generator)
    P, record = fit_sgat(x, y, state, weight, start.to(x), d_s, d_s, config.abits, config.wbits, config.lr,
                         config.epochs, config.batch, config.schedule, bias, config.symmetric, generator, progress)
    return QuantLinear.fold(weight, [P], d_s, d_s, config.abits, config.wbits, bias, config.symmetric), record


def stored_starquant(config, d: int, behind_norm: bool) -> dict:
    P = {"none": [], "dense": [Dense((d, d))], "kronecker": [Kronecker(*((n, n) for n in kronecker_sizes(d)))]}
    return {"factors": P[config.transform]}
