"""Independent float64 references for the paper's equations: loops or numpy, dense matrices, every kind of P."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from methods.flat import clip_range
from runtime.cpu import fake_quantize_rows
from starquant import Across, Blocks, Dense, Diagonal, Kronecker, fake_quantize, linear

seeds = st.integers(0, 2**32 - 1)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def orthogonal(n, seed=0):
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0])


def invertible(n, seed=0):
    """Far from orthogonal, condition number 4."""
    return orthogonal(n, seed) * torch.linspace(0.5, 2, n, dtype=torch.float64) @ orthogonal(n, seed + 1)


def block_matrix(blocks):
    out = np.zeros((sum(len(b) for b in blocks),) * 2)
    at = 0
    for b in blocks:
        out[at : at + len(b), at : at + len(b)] = b
        at += len(b)
    return torch.from_numpy(out)


def basis(kind, seed=0):
    """(P as `apply_basis` takes it, the same as a dense 12 x 12 matrix)."""
    if kind == "dense":
        P = orthogonal(12, seed)
        return P, P
    if kind == "invertible":
        P = invertible(12, seed)
        return Dense(P), P
    if kind == "diagonal":
        d = randn(12, seed=seed).abs() + 0.5
        return Diagonal(d), torch.diag(d)
    if kind == "block":
        B = torch.stack([invertible(4, seed), orthogonal(4, seed + 2), invertible(4, seed + 3)])
        return Blocks(B), block_matrix(B.numpy())
    if kind == "across":
        A = invertible(3, seed)
        return Across(A), torch.from_numpy(np.kron(A.numpy(), np.eye(4)))
    if kind in ("kronecker", "invertible kronecker"):
        make = orthogonal if kind == "kronecker" else invertible
        P = Kronecker(make(3, seed), make(4, seed + 5))
        return P, torch.from_numpy(np.kron(P.P1.numpy(), P.P2.numpy()))
    first, second = basis("diagonal", seed), basis("kronecker", seed + 1)
    return [first[0], second[0]], first[1] @ second[1]


KINDS = ("dense", "invertible", "diagonal", "block", "across", "kronecker", "invertible kronecker", "list")
ORTHOGONAL = ("dense", "kronecker")


def inv(P):
    return torch.from_numpy(np.linalg.inv(P.numpy()))


def loop_quantize(x, bits):
    """Q(x) per row of an asymmetric grid that includes zero: Python floats, one number at a time."""
    out = np.empty(x.shape)
    for i, row in enumerate(np.asarray(x, dtype=np.float64)):
        low, high = min(0.0, min(row)), max(0.0, max(row))
        s = (high - low) / (2**bits - 1)
        z = round(-low / s)
        for j, value in enumerate(row):
            out[i, j] = s * (min(max(round(value / s) + z, 0), 2**bits - 1) - z)
    return torch.from_numpy(out)


def loop_quantize_symmetric(w, bits):
    out = np.empty(w.shape)
    for i, row in enumerate(np.asarray(w, dtype=np.float64)):
        s = max(abs(v) for v in row) / (2 ** (bits - 1) - 1)
        for j, value in enumerate(row):
            out[i, j] = s * round(value / s)
    return torch.from_numpy(out)


def fake_quantized(layer, x, state=None):
    """What a `QuantLinear` computes, through fake quantization in fp32: its integers put back on their grid, rounded to
    x's dtype."""
    phi = layer.phi(x, state)
    if layer.feedback is not None:
        phi = fake_quantize_rows(phi, layer.abits, layer.clip, layer.feedback)
    else:
        phi = fake_quantize(phi if layer.clip is None else clip_range(phi, layer.clip), layer.abits)
    return layer.finish(linear(phi, layer.weight()), state).to(x.dtype)


def loop_linear(x, w):
    """Σ_k x_ik w_ck, one number at a time."""
    rows = [[math.fsum(float(a) * float(b) for a, b in zip(i, c, strict=True)) for c in w] for i in x]
    return torch.tensor(rows, dtype=torch.float64)


def loop_sgat(x, state, P, weight, d_m, d_u, abits, wbits):
    """Eq. 13 token by token with dense matrices: P_e Wᵀ once, the gate as a matrix."""
    d = x.shape[1]
    gates = {True: torch.diag(torch.tensor([1.0] * (d - d_u) + [0.0] * d_u, dtype=torch.float64)),
             False: torch.diag(torch.tensor([1.0] * (d - d_m - d_u) + [0.0] * d_m + [1.0] * d_u, dtype=torch.float64))}
    folded = loop_quantize_symmetric((inv(P) @ weight.T).T, wbits)
    return torch.cat([loop_linear(loop_quantize(row[None] @ P @ gates[bool(s)], abits), folded)
                      for row, s in zip(x, state, strict=True)])


def diagonal_blocks(matrix, size: int):
    """(d, d) -> (d / size, size, size)."""
    return torch.stack([matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)])
