"""Every equation of the paper against an independent float64 computation: explicit loops or numpy, dense matrices."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layers
import starquant
from families import ModelConfig
from model import Block, rope, rope_table
from starquant import Kronecker

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
        return P, P
    if kind == "diagonal":
        P = randn(12, seed=seed).abs() + 0.5
        return P, torch.diag(P)
    if kind == "block":
        P = torch.stack([invertible(4, seed), orthogonal(4, seed + 2), invertible(4, seed + 3)])
        return P, block_matrix(P.numpy())
    if kind in ("kronecker", "invertible kronecker"):
        make = orthogonal if kind == "kronecker" else invertible
        P = Kronecker(make(3, seed), make(4, seed + 5))
        return P, torch.from_numpy(np.kron(P.P1.numpy(), P.P2.numpy()))
    first, second = basis("diagonal", seed), basis("kronecker", seed + 1)
    return [first[0], second[0]], first[1] @ second[1]


KINDS = ("dense", "invertible", "diagonal", "block", "kronecker", "invertible kronecker", "list")
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


class TestTable:
    def test_every_row_names_a_function_and_a_test_class(self):
        rows = re.findall(r"^(\d+) +\|.*\| (\w+) +\| (TestEq\d+)$", starquant.__doc__, re.MULTILINE)
        assert [int(number) for number, _, _ in rows] == [*range(1, 19), 27, 28, 29, 30]
        for number, function, test in rows:
            assert callable(getattr(starquant, function))
            assert test == f"TestEq{number}"
            assert any(name.startswith("test_") for name in vars(globals()[test]))


# ---- Section 3.1 ---------------------------------------------------------------------------------------------------


class TestEq1:
    def test_equals_loops(self):
        x, w = randn(5, 7), randn(3, 7, seed=1)
        torch.testing.assert_close(starquant.linear(x, w), loop_linear(x, w), **TOLERANCE)

    def test_leading_dimensions(self):
        x, w = randn(2, 5, 7), randn(3, 7, seed=1)
        torch.testing.assert_close(starquant.linear(x, w)[1], loop_linear(x[1], w), **TOLERANCE)


class TestEq2:
    @given(bits=st.integers(2, 8), seed=seeds)
    def test_equals_loops(self, bits, seed):
        x, scale = randn(4, 9, seed=seed) * 3, randn(4, 1, seed=seed + 1).abs() + 0.05
        zero = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (4, 1))).double()
        codes = starquant.quantize(x, scale, zero, bits)
        for i in range(4):
            for j in range(9):
                want = min(max(round(float(x[i, j]) / float(scale[i])) + int(zero[i]), 0), 2**bits - 1)
                assert int(codes[i, j]) == want == float(codes[i, j])

    def test_rounds_to_nearest_ties_to_even(self):
        x = torch.tensor([[-1.5, -0.6, -0.5, 0.49, 0.5, 0.51, 1.5, 2.5, 2.9]])
        for z in (8, 7):  # x/s is rounded, and only then is z added
            codes = starquant.quantize(x, torch.ones(1, 1), torch.full((1, 1), float(z)), 4)
            assert (codes[0] - z).tolist() == [-2, -1, 0, 0, 0, 1, 2, 2, 3]

    def test_clamps_both_ends(self):
        codes = starquant.quantize(torch.tensor([[-100.0, 100.0]]), torch.ones(1, 1), torch.full((1, 1), 3.0), 4)
        assert codes.tolist() == [[0, 15]]


class TestEq3:
    def test_equals_loops(self):
        codes, scale, zero = torch.arange(12.0).reshape(3, 4), torch.tensor([[0.5], [2], [3]]), torch.ones(3, 1)
        want = [[float(scale[i]) * (float(codes[i, j]) - 1) for j in range(4)] for i in range(3)]
        assert starquant.dequantize(codes, scale, zero).tolist() == want

    @given(bits=st.integers(2, 8), seed=seeds)
    def test_inverts_eq2_on_the_grid(self, bits, seed):
        rng = np.random.default_rng(seed)
        codes = torch.from_numpy(rng.integers(0, 2**bits, (3, 8))).double()
        scale, zero = torch.from_numpy(rng.uniform(0.1, 9, (3, 1))), torch.from_numpy(rng.integers(0, 2**bits, (3, 1)))
        values = starquant.dequantize(codes, scale, zero)
        assert torch.equal(starquant.quantize(values, scale, zero, bits), codes)


class TestEq4:
    @given(bits=st.integers(2, 8), seed=seeds)
    def test_both_signs_to_the_letter(self, bits, seed):
        x = randn(6, 10, seed=seed)
        x[:, 0], x[:, 1] = -x[:, 0].abs() - 0.1, x[:, 1].abs() + 0.1
        scale, zero = starquant.quant_params(x, bits)
        for i, row in enumerate(x.tolist()):
            s = (max(row) - min(row)) / (2**bits - 1)
            assert float(scale[i]) == pytest.approx(s, rel=1e-12)
            assert float(zero[i]) == round(-min(row) / s)

    @pytest.mark.parametrize(("row", "scale", "zero"), [
        ([3.0, 15.0], 1.0, 0), ([-15.0, -3.0], 1.0, 15), ([-7.0, 8.0], 1.0, 7), ([0.0, 30.0], 2.0, 0)])
    def test_range_includes_zero(self, row, scale, zero):
        s, z = starquant.quant_params(torch.tensor([row]), 4)
        assert (s.item(), z.item()) == (scale, zero)

    @pytest.mark.parametrize(("bits", "scale", "zero"), [(2, 21.0, 2), (3, 7.0, 4), (4, 3.0, 8), (8, 21 / 127, 128)])
    def test_symmetric(self, bits, scale, zero):
        s, z = starquant.quant_params(torch.tensor([[1.0, -21.0, 20.0]]), bits, symmetric=True)
        assert (s.item(), z.item()) == (pytest.approx(scale, rel=1e-6), zero)

    def test_one_pair_per_row(self):
        s, z = starquant.quant_params(randn(2, 3, 5), 4)
        assert s.shape == z.shape == (2, 3, 1)
        assert len(set(s.flatten().tolist())) == 6


class TestEq5:
    @pytest.mark.parametrize(("abits", "wbits"), [(4, 4), (8, 8), (3, 4), (4, 2)])
    def test_equals_loops(self, abits, wbits):
        x, w = randn(5, 8), randn(6, 8, seed=1)
        want = loop_linear(loop_quantize(x, abits), loop_quantize_symmetric(w, wbits))
        torch.testing.assert_close(starquant.quantized_linear(x, w, abits, wbits), want, **TOLERANCE)


class TestEq6:
    @pytest.mark.parametrize("kind", KINDS)
    def test_without_bits_it_is_eq1(self, kind):
        P, _ = basis(kind)
        x, w = randn(5, 12), randn(7, 12, seed=9)
        torch.testing.assert_close(starquant.transformed_linear(x, w, P), loop_linear(x, w), **TOLERANCE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_quantized_equals_loops(self, kind):
        P, dense = basis(kind)
        x, w = randn(5, 12), randn(7, 12, seed=9)
        want = loop_linear(loop_quantize(x @ dense, 4), loop_quantize_symmetric((inv(dense) @ w.T).T, 3))
        torch.testing.assert_close(starquant.transformed_linear(x, w, P, 4, 3), want, **TOLERANCE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_apply_basis_is_the_dense_product(self, kind):
        P, dense = basis(kind, seed=3)
        x = randn(2, 5, 12)
        torch.testing.assert_close(starquant.apply_basis(x, P), x @ dense, **TOLERANCE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_inverse_transpose(self, kind):
        P, dense = basis(kind, seed=3)
        got = starquant.apply_basis(torch.eye(12, dtype=torch.float64), starquant.inverse_transpose(P))
        torch.testing.assert_close(got, inv(dense).T, **TOLERANCE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_orthogonal(self, kind):
        assert starquant.is_orthogonal(basis(kind)[0]) == (kind in ORTHOGONAL)

    def test_is_orthogonal_bounds(self):
        nearly = torch.eye(4, dtype=torch.float64)
        nearly[0, 1] = 1e-6
        assert not starquant.is_orthogonal(nearly)
        assert starquant.is_orthogonal(nearly.float())
        assert starquant.is_orthogonal(torch.tensor([1.0, -1.0]))
        assert not starquant.is_orthogonal([orthogonal(4), torch.tensor([1.0, 2.0, 1.0, 1.0])])

    def test_kronecker_dense(self):
        P, dense = basis("kronecker")
        torch.testing.assert_close(P.dense(), dense, **TOLERANCE)


# ---- Section 3.2 ---------------------------------------------------------------------------------------------------


states = st.lists(st.booleans(), max_size=12)


class TestEq7:
    @given(state=states, seed=seeds)
    def test_scatter_of_split_is_the_identity(self, state, seed):
        x, state = randn(len(state), 3, seed=seed), torch.tensor(state, dtype=torch.bool)
        assert torch.equal(starquant.scatter_by_state(*starquant.split_by_state(x, state), state), x)

    @pytest.mark.parametrize("state", [True, False])
    def test_all_of_one_state(self, state):
        x, states = randn(4, 3), torch.full((4,), state)
        x_m, x_u = starquant.split_by_state(x, states)
        assert (len(x_m), len(x_u)) == ((4, 0) if state else (0, 4))
        assert torch.equal(starquant.scatter_by_state(x_m, x_u, states), x)

    def test_order_and_batches(self):
        x, state = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[True, False, True], [False, False, True]])
        x_m, x_u = starquant.split_by_state(x, state)
        assert x_m.tolist() == [[0, 1], [4, 5], [10, 11]]
        assert x_u.tolist() == [[2, 3], [6, 7], [8, 9]]
        assert torch.equal(starquant.scatter_by_state(x_m, x_u, state), x)


@st.composite
def splits(draw, d=12):
    d_m = draw(st.integers(0, d))
    return d_m, draw(st.integers(0, d - d_m))


class TestEq8:
    @given(split=splits())
    def test_partition_of_the_columns(self, split):
        P, (d_m, d_u) = orthogonal(12), split
        U_sh, U_m, U_u = starquant.subspaces(P, d_m, d_u)
        assert (U_sh.shape, U_m.shape, U_u.shape) == ((12, 12 - d_m - d_u), (12, d_m), (12, d_u))
        assert torch.equal(torch.cat((U_sh, U_m, U_u), 1), P)


class TestEq9:
    @given(split=splits())
    def test_ones_and_zeros_where_eq9_puts_them(self, split):
        d_m, d_u = split
        d_sh = 12 - d_m - d_u
        gate_m, gate_u = starquant.subspace_gates(12, d_m, d_u)
        assert gate_m.tolist() == [1] * d_sh + [1] * d_m + [0] * d_u
        assert gate_u.tolist() == [1] * d_sh + [0] * d_m + [1] * d_u

    @given(split=splits(), state=states)
    def test_one_gate_per_token(self, split, state):
        gate_m, gate_u = starquant.subspace_gates(12, *split)
        gates = starquant.state_gate(torch.tensor(state, dtype=torch.bool), 12, *split)
        assert gates.shape == (len(state), 12)
        for gate, masked in zip(gates, state, strict=True):
            assert torch.equal(gate, gate_m if masked else gate_u)

    @pytest.mark.parametrize("split", [(-1, 2), (2, -1), (7, 6)])
    def test_impossible_sizes_are_refused(self, split):
        with pytest.raises(ValueError, match="do not fit"):
            starquant.subspace_gates(12, *split)


class TestEq10:
    @given(split=splits())
    def test_columns_of_the_other_state_are_zero(self, split):
        P, (d_m, d_u) = orthogonal(12), split
        d_sh = 12 - d_m - d_u
        gate_m, gate_u = starquant.subspace_gates(12, d_m, d_u, dtype=torch.float64)
        P_m, P_u = P.clone(), P.clone()
        P_m[:, d_sh + d_m :], P_u[:, d_sh : d_sh + d_m] = 0, 0
        assert torch.equal(starquant.state_basis(P, gate_m), P_m)
        assert torch.equal(starquant.state_basis(P, gate_u), P_u)


class TestEq11:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_dense_matrices(self, kind):
        P, dense = basis(kind)
        x = randn(5, 12)
        for gate in starquant.subspace_gates(12, 2, 3, dtype=torch.float64):
            torch.testing.assert_close(starquant.transform(x, P, gate), x @ dense @ torch.diag(gate), **TOLERANCE)

    def test_gated_coordinates_are_exactly_zero(self):
        gate_m, gate_u = starquant.subspace_gates(12, 2, 3, dtype=torch.float64)
        phi_m, phi_u = (starquant.transform(randn(5, 12), orthogonal(12), g) for g in (gate_m, gate_u))
        assert phi_m[:, 9:].eq(0).all()
        assert phi_u[:, 7:9].eq(0).all()
        assert phi_m[:, :9].ne(0).all()
        assert phi_u[:, 9:].ne(0).all()


class TestEq12:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_dense_matrices(self, kind):
        P, dense = basis(kind)
        w = randn(7, 12)
        torch.testing.assert_close(starquant.fold_weight(w, P), (inv(dense) @ w.T).T, **TOLERANCE)

    @pytest.mark.parametrize("kind", ORTHOGONAL)
    def test_orthogonal_basis_uses_its_transpose(self, kind):
        P, dense = basis(kind)
        w = randn(7, 12)
        torch.testing.assert_close(starquant.fold_weight(w, P), (dense.T @ w.T).T, **TOLERANCE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_weight_serves_both_states(self, kind):
        """Unit vectors of the transformed space read W̃ back row by row: both states see the same rows."""
        P, dense = basis(kind)
        w, unit = randn(7, 12), inv(dense)
        rows_m, rows_u = (starquant.sgat_linear(unit, torch.full((12,), s), P, w, 2, 3, None) for s in (True, False))
        folded = starquant.fake_quantize((inv(dense) @ w.T).T, 4, symmetric=True).T
        shared, masked, unmasked = slice(0, 7), slice(7, 9), slice(9, 12)
        for rows, own, other in ((rows_m, masked, unmasked), (rows_u, unmasked, masked)):
            torch.testing.assert_close(rows[shared], folded[shared], **TOLERANCE)
            torch.testing.assert_close(rows[own], folded[own], **TOLERANCE)
            torch.testing.assert_close(rows[other], torch.zeros_like(folded[other]), **TOLERANCE)


class TestEq13:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", [(4, 4), (3, 8)])
    def test_equals_loops(self, kind, bits):
        P, dense = basis(kind)
        x, w, state = randn(8, 12), randn(7, 12, seed=1), torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()
        want = loop_sgat(x, state, dense, w, 2, 3, *bits)
        torch.testing.assert_close(starquant.sgat_linear(x, state, P, w, 2, 3, *bits), want, **TOLERANCE)

    @given(state=st.lists(st.booleans(), min_size=1, max_size=10), split=splits(), seed=seeds,
           kind=st.sampled_from(KINDS))
    def test_split_and_scatter_equal_one_gate_per_token(self, state, split, seed, kind):
        P, _ = basis(kind, seed)
        x, w, state = randn(len(state), 12, seed=seed), randn(7, 12, seed=seed + 1), torch.tensor(state)
        phi = starquant.transform(x, P, starquant.state_gate(state, 12, *split, dtype=torch.float64))
        folded = starquant.fake_quantize(starquant.fold_weight(w, P), 4, symmetric=True)
        torch.testing.assert_close(starquant.sgat_linear(x, state, P, w, *split),
                                   starquant.linear(starquant.fake_quantize(phi, 4), folded), **TOLERANCE)

    def test_a_token_sees_only_its_own_state(self):
        x, w, P = randn(6, 12), randn(7, 12, seed=1), orthogonal(12)
        state = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
        mixed = starquant.sgat_linear(x, state, P, w, 2, 3)
        pure = {s: starquant.sgat_linear(x, torch.full((6,), s), P, w, 2, 3) for s in (True, False)}
        for i in range(6):
            torch.testing.assert_close(mixed[i], pure[bool(state[i])][i], **TOLERANCE)
            assert not torch.allclose(mixed[i], pure[not bool(state[i])][i])

    def test_bias_and_batches(self):
        x, w, b, P = randn(2, 3, 12), randn(7, 12, seed=1), randn(7, seed=2), orthogonal(12)
        state = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
        want = loop_sgat(x.reshape(6, 12), state.flatten(), P, w, 2, 3, 4, 4) + b
        got = starquant.sgat_linear(x, state, P, w, 2, 3, bias=b)
        torch.testing.assert_close(got, want.reshape(2, 3, 7), **TOLERANCE)


class TestEq14:
    def test_equals_loops(self):
        y, y_hat = randn(2, 4, 5), randn(2, 4, 5, seed=1)
        want = math.fsum((float(a) - float(b)) ** 2 for a, b in zip(y.flatten(), y_hat.flatten(), strict=True)) / 8
        assert float(starquant.reconstruction_loss(y, y_hat)) == pytest.approx(want, rel=1e-12)


def loop_loss(x, y, state, P, weight, d_m, d_u, abits, wbits):
    """Eq. 15: per token the sum over its state of the squared norms, averaged over the tokens."""
    y_hat = loop_sgat(x, state, P, weight, d_m, d_u, abits, wbits)
    total = 0.0
    for s in (True, False):
        for row, row_hat, token in zip(y, y_hat, state, strict=True):
            if bool(token) == s:
                total += math.fsum((float(a) - float(b)) ** 2 for a, b in zip(row, row_hat, strict=True))
    return total / len(y)


class TestEq15:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_loops(self, kind):
        P, dense = basis(kind)
        x, y, w = randn(8, 12), randn(8, 7, seed=2), randn(7, 12, seed=1)
        state = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()
        got = starquant.sgat_loss(x, y, state, P, w, 2, 3, 4, 3)
        assert float(got) == pytest.approx(loop_loss(x, y, state, dense, w, 2, 3, 4, 3), rel=1e-9)

    @given(state=st.lists(st.booleans(), min_size=1, max_size=9), split=splits(), seed=seeds)
    def test_equals_eq14_of_the_scattered_output(self, state, split, seed):
        P = orthogonal(12, seed)
        x, y = randn(len(state), 12, seed=seed), randn(len(state), 7, seed=seed + 1)
        w, b = randn(7, 12, seed=seed + 2), randn(7, seed=seed + 3)
        state = torch.tensor(state)
        y_hat = starquant.sgat_linear(x, state, P, w, *split, bias=b)
        torch.testing.assert_close(starquant.sgat_loss(x, y, state, P, w, *split, bias=b),
                                   starquant.reconstruction_loss(y, y_hat), **TOLERANCE)

    def test_gradient_in_P_against_finite_differences(self):
        """With 16 bits the rounding noise is far below the gating error, whose gradient numpy can take."""
        P, x, w = orthogonal(6, 4).requires_grad_(), randn(9, 6), randn(5, 6, seed=1)
        y, state = x @ w.T, torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1]).bool()
        (grad,) = torch.autograd.grad(starquant.sgat_loss(x, y, state, P, w, 2, 1, 16, 16), P)
        X, W, Y = x.numpy(), w.numpy(), y.numpy()
        gates = np.where(state.numpy()[:, None], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1])

        def loss(Q):
            return (((X @ Q * gates) @ (W @ Q).T - Y) ** 2).sum() / len(X)

        want, h = np.zeros((6, 6)), 1e-5
        for i in range(6):
            for j in range(6):
                step = np.zeros((6, 6))
                step[i, j] = h
                want[i, j] = (loss(P.detach().numpy() + step) - loss(P.detach().numpy() - step)) / (2 * h)
        np.testing.assert_allclose(grad.numpy(), want, atol=2e-3 * np.abs(want).max())


class TestEq29:
    @pytest.mark.parametrize("kind", ORTHOGONAL)
    def test_uses_the_transpose_of_an_orthogonal_basis(self, kind):
        P, dense = basis(kind, seed=6)
        x, y, w = randn(8, 12), randn(8, 7, seed=2), randn(7, 12, seed=1)
        state = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()
        folded = loop_quantize_symmetric((dense.T @ w.T).T, 4)
        total = 0.0
        for row, target, s in zip(x, y, state, strict=True):
            gate = [1] * 7 + ([1] * 2 + [0] * 3 if s else [0] * 2 + [1] * 3)
            phi = loop_quantize((row @ dense * torch.tensor(gate))[None], 4)
            total += float((target - loop_linear(phi, folded)[0]).square().sum())
        assert float(starquant.sgat_loss(x, y, state, P, w, 2, 3)) == pytest.approx(total / 8, rel=1e-9)


# ---- Appendix A ----------------------------------------------------------------------------------------------------


class TestEq27:
    @given(state=st.lists(st.booleans(), min_size=1, max_size=12), split=splits(), seed=seeds,
           kind=st.sampled_from(KINDS))
    def test_exact_when_the_inactive_subspace_is_empty(self, state, split, seed, kind):
        """Both states in one batch: X P = coefficients that vanish where the token's gate does (Eq. 25)."""
        P, dense = basis(kind, seed)
        (d_m, d_u), w = split, randn(7, 12, seed=seed + 7)
        coefficients = randn(len(state), 12, seed=seed)
        for row, masked in zip(coefficients, state, strict=True):
            row[(slice(12 - d_u, 12) if masked else slice(12 - d_m - d_u, 12 - d_u))] = 0
        x, state = coefficients @ inv(dense), torch.tensor(state)
        want = x @ w.T
        got = starquant.sgat_linear(x, state, P, w, d_m, d_u, abits=None, wbits=None)
        torch.testing.assert_close(got, want, **TOLERANCE)
        for gate, s in zip(starquant.subspace_gates(12, d_m, d_u, dtype=torch.float64), (state, ~state), strict=True):
            torch.testing.assert_close(starquant.sgat_exact(x[s], P, gate, w), want[s], **TOLERANCE)

    def test_not_exact_otherwise(self):
        gate_m, _ = starquant.subspace_gates(12, 2, 3, dtype=torch.float64)
        x, w = randn(5, 12), randn(7, 12, seed=1)
        assert (starquant.sgat_exact(x, orthogonal(12), gate_m, w) - x @ w.T).abs().max() > 0.1


class TestEq28:
    @given(split=splits(), seed=seeds, kind=st.sampled_from(KINDS))
    def test_accounts_for_the_whole_difference(self, split, seed, kind):
        P, dense = basis(kind, seed)
        x, w = randn(6, 12, seed=seed), randn(7, 12, seed=seed + 1)
        for gate in starquant.subspace_gates(12, *split, dtype=torch.float64):
            delta = starquant.leakage(x, P, gate, w)
            # Δ_s = X Wᵀ − Φ_s(X) P_e Wᵀ for arbitrary X ...
            torch.testing.assert_close(delta, x @ w.T - (x @ dense * gate) @ inv(dense) @ w.T, **TOLERANCE)
            torch.testing.assert_close(delta + starquant.sgat_exact(x, P, gate, w), x @ w.T, **TOLERANCE)
            # ... = X P G_s^⊥ P_e Wᵀ
            inactive = torch.eye(12, dtype=torch.float64) - torch.diag(gate)
            torch.testing.assert_close(delta, x @ dense @ inactive @ inv(dense) @ w.T, **TOLERANCE)


# ---- Section 3.3 and Appendix C ------------------------------------------------------------------------------------


class TestEq16:
    def test_equals_loops(self):
        q, k, v = (randn(2, 5, 4, seed=i) for i in range(3))
        got = starquant.attention_value(q, k, v)
        for b in range(2):
            for i in range(5):
                scores = [math.exp(float(q[b, i] @ k[b, j]) / math.sqrt(4)) for j in range(5)]
                for c in range(4):
                    want = sum(s * float(v[b, j, c]) for j, s in enumerate(scores)) / sum(scores)
                    assert float(got[b, i, c]) == pytest.approx(want, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    def test_equals_the_fused_attention_of_the_model(self, kv_heads):
        config = ModelConfig("llada", d_model=32, n_layers=1, n_heads=4, n_kv_heads=kv_heads, head_dim=8, d_ffn=16,
                             vocab_size=8, rope_theta=1e4, norm_eps=1e-5, mask_id=7)
        qkv = randn(2, 6, (4 + 2 * kv_heads) * 8)
        table = rope_table(torch.arange(6), config, torch.float32)
        fused = Block(config).attention(qkv, table, None)
        for b in range(2):
            for head in range(4):
                group = head * kv_heads // 4  # consecutive heads share a key-value head
                at = [head * 8, 32 + group * 8, 32 + kv_heads * 8 + group * 8]
                q, k, v = (qkv[b, :, i : i + 8] for i in at)
                q, k = rope(q, *table), rope(k, *table)
                torch.testing.assert_close(fused[b, :, head * 8 : head * 8 + 8], starquant.attention_value(q, k, v),
                                           rtol=1e-9, atol=1e-9)


class TestEq17:
    def test_equals_the_column_vector_form(self):
        """z_b -> M_b z_b + d_b for each token and block, number by number."""
        z, M, bias = randn(5, 12), randn(3, 4, 4, seed=1), randn(3, 4, seed=2)
        got = starquant.tac_apply(z, M, bias)
        for n in range(5):
            for b in range(3):
                for i in range(4):
                    want = math.fsum(float(M[b, i, j]) * float(z[n, 4 * b + j]) for j in range(4)) + float(bias[b, i])
                    assert float(got[n, 4 * b + i]) == pytest.approx(want, rel=1e-9, abs=1e-12)

    def test_batches(self):
        z, M, bias = randn(2, 5, 12), randn(3, 4, 4, seed=1), randn(3, 4, seed=2)
        torch.testing.assert_close(starquant.tac_apply(z, M, bias)[1], starquant.tac_apply(z[1], M, bias), **TOLERANCE)

    def test_layer(self):
        z, M, bias = randn(2, 5, 12), randn(3, 4, 4, seed=1), randn(3, 4, seed=2)
        layer = layers.TAC(M, bias)
        assert layer(z.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(layer(z.float()).double(), starquant.tac_apply(z, M, bias), rtol=1e-5, atol=1e-5)


def paired(C, n=300, seed=0):
    """Correlated full-precision representations and a distorted copy, (n, C) each."""
    mix, mix2 = randn(C, C, seed=seed) + torch.eye(C), randn(C, C, seed=seed + 1) * 0.1 + torch.eye(C)
    z_fp = randn(n, C, seed=seed + 2) @ mix + randn(C, seed=seed + 3) * 3
    return z_fp, z_fp @ mix2 + 0.3 * randn(n, C, seed=seed + 4) + randn(C, seed=seed + 5)


def newton_sqrt(A):
    """Square root and inverse square root of a positive definite matrix by the Denman-Beavers iteration."""
    Y, Z = A, np.eye(len(A))
    for _ in range(60):
        Y, Z = (Y + np.linalg.inv(Z)) / 2, (Z + np.linalg.inv(Y)) / 2
    return Y, Z


EXACT = {"damping": 0.0, "smoothing": 0.0, "shrinkage": 0.0}


class TestEq18:
    def test_equals_an_independent_square_root(self):
        z_fp, z_q = paired(12)
        M, bias = starquant.tac_fit(z_fp, z_q, 4, damping=0.01, smoothing=0, shrinkage=0)
        for b in range(3):
            fp, q = (z[:, 4 * b : 4 * b + 4].numpy() for z in (z_fp, z_q))
            cov_fp, cov_q = (np.cov(z.T, bias=True) for z in (fp, q))
            lam = 0.01 * max(np.trace(cov_q) / 4, 1e-8)
            want = newton_sqrt(cov_fp)[0] @ newton_sqrt(cov_q + lam * np.eye(4))[1]
            np.testing.assert_allclose(M[b].numpy(), want, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(bias[b].numpy(), fp.mean(0) - want @ q.mean(0), rtol=1e-8, atol=1e-9)

    def test_every_step_of_appendix_c(self):
        """The defaults, by numpy's eigendecomposition and singular values."""
        z_fp, z_q = paired(48, seed=7)
        M, bias = starquant.tac_fit(z_fp, z_q)
        assert M.shape == (3, 16, 16)
        for b in range(3):
            fp, q = (z[:, 16 * b : 16 * b + 16].numpy() for z in (z_fp, z_q))
            (lf, Qf), (lq, Qq) = (np.linalg.eigh(np.cov(z.T, bias=True)) for z in (fp, q))
            root = Qf @ np.diag(np.sqrt(lf)) @ Qf.T
            inverse = Qq @ np.diag(1 / np.sqrt(lq + 3e-4 * lq.mean())) @ Qq.T
            U, sigma, Vt = np.linalg.svd(root @ inverse)
            want = 0.45 * (U @ np.diag(0.85 * sigma + 0.15 * sigma.mean()) @ Vt) + 0.55 * np.eye(16)
            np.testing.assert_allclose(M[b].numpy(), want, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(bias[b].numpy(), fp.mean(0) - want @ q.mean(0), rtol=1e-7, atol=1e-8)

    def test_restores_mean_and_covariance_without_damping_smoothing_shrinkage(self):
        z_fp, z_q = paired(12)
        z = starquant.tac_apply(z_q, *starquant.tac_fit(z_fp, z_q, 4, **EXACT)).numpy()
        for b in range(3):
            fp, corrected = z_fp[:, 4 * b : 4 * b + 4].numpy(), z[:, 4 * b : 4 * b + 4]
            np.testing.assert_allclose(np.cov(corrected.T, bias=True), np.cov(fp.T, bias=True), rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(corrected.mean(0), fp.mean(0), rtol=1e-9, atol=1e-9)

    @given(seed=seeds, damping=st.floats(0, 1), smoothing=st.floats(0, 1), shrinkage=st.floats(0, 1),
           C=st.sampled_from([5, 16, 34, 48]))
    def test_always_restores_the_mean(self, seed, damping, smoothing, shrinkage, C):
        z_fp, z_q = paired(C, n=64, seed=seed)
        M, bias = starquant.tac_fit(z_fp, z_q, 16, damping, smoothing, shrinkage)
        torch.testing.assert_close(starquant.tac_apply(z_q, M, bias).mean(0), z_fp.mean(0), rtol=1e-8, atol=1e-8)

    def test_identical_statistics_give_back_the_identity(self):
        z, _ = paired(12)
        M, bias = starquant.tac_fit(z, z.flip(0), 4, **EXACT)
        torch.testing.assert_close(M, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rtol=0, atol=1e-8)
        torch.testing.assert_close(bias, torch.zeros_like(bias), rtol=0, atol=1e-7)

    def test_identical_statistics_are_off_by_the_damping_only(self):
        """M = Σ^½ (Σ + λI)^−½ has the eigenvalues √(σ / (σ + λ)), at their lowest for the smallest σ."""
        z, _ = paired(12)
        M, _ = starquant.tac_fit(z, z, 4, damping=0.05, smoothing=0, shrinkage=0)
        for b in range(3):
            sigma = np.linalg.eigvalsh(np.cov(z[:, 4 * b : 4 * b + 4].numpy().T, bias=True))
            want = np.sqrt(sigma / (sigma + 0.05 * sigma.mean()))
            np.testing.assert_allclose(np.linalg.eigvalsh(M[b].numpy()), np.sort(want), rtol=1e-8)

    def test_single_token_and_constant_channels_stay_finite(self):
        for z_fp, z_q in ((torch.ones(1, 8), torch.zeros(1, 8)), (torch.ones(5, 8), randn(5, 8).float())):
            M, bias = starquant.tac_fit(z_fp, z_q, 4)
            assert bool(torch.isfinite(M).all() & torch.isfinite(bias).all())


class TestEq30:
    def test_equals_loops(self):
        z = randn(9, 6) * 2 + 1
        mu, cov = starquant.block_statistics(z, 3)
        for b in range(2):
            block = z[:, 3 * b : 3 * b + 3].tolist()
            means = [math.fsum(row[i] for row in block) / 9 for i in range(3)]
            for i in range(3):
                assert float(mu[b, i]) == pytest.approx(means[i], rel=1e-12)
                for j in range(3):
                    want = math.fsum(row[i] * row[j] for row in block) / 9 - means[i] * means[j]
                    assert float(cov[b, i, j]) == pytest.approx(want, rel=1e-9, abs=1e-12)

    def test_a_large_mean_does_not_cancel_the_covariance(self):
        z = randn(50, 4) * 1e-3 + 1e6
        _, cov = starquant.block_statistics(z, 4)
        np.testing.assert_allclose(cov[0].numpy(), np.cov(z.numpy().T, bias=True), rtol=1e-5, atol=1e-12)

    def test_half_precision_input_is_summed_in_float64(self):
        mu, cov = starquant.block_statistics(randn(5, 4).bfloat16(), 2)
        assert mu.dtype == cov.dtype == torch.float64


class TestBlockSize:
    @given(C=st.integers(1, 500), largest=st.integers(1, 64))
    def test_largest_divisor_not_above_the_default(self, C, largest):
        assert starquant.tac_block_size(C, largest) == max(g for g in range(1, largest + 1) if C % g == 0)

    @pytest.mark.parametrize(("C", "g"), [(4096, 16), (192, 16), (100, 10), (60, 15), (34, 2), (17, 1), (8, 8)])
    def test_appendix_c(self, C, g):
        assert starquant.tac_block_size(C) == g

    def test_tac_fit_follows_it(self):
        M, bias = starquant.tac_fit(*paired(60, n=80))
        assert M.shape == (4, 15, 15)
        assert bias.shape == (4, 15)


class TestDamping:
    @pytest.mark.parametrize("rho", [0.0, 3e-4, 0.5])
    def test_equals_the_formula(self, rho):
        cov = torch.stack([torch.diag(torch.tensor([1.0, 2, 3, 6])), torch.ones(4, 4)]).double()
        damped = starquant.damp(cov, rho)
        for b, mean in enumerate((3.0, 1.0)):
            np.testing.assert_allclose(damped[b].numpy(), cov[b].numpy() + rho * mean * np.eye(4), rtol=1e-12)

    def test_epsilon_is_the_least_mean(self):
        damped = starquant.damp(torch.zeros(1, 3, 3, dtype=torch.float64), 0.5)
        np.testing.assert_allclose(damped[0].numpy(), 0.5e-8 * np.eye(3), rtol=1e-12)


class TestMatrixPower:
    def test_square_roots(self):
        z, _ = paired(6)
        A = np.cov(z.numpy().T, bias=True)
        for p, want in zip((0.5, -0.5), newton_sqrt(A), strict=True):
            got = starquant.matrix_power(torch.from_numpy(A), p)
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-9)

    def test_integer_powers(self):
        A = torch.stack([orthogonal(4, s) * torch.tensor([1.0, 2, 3, 4]) @ orthogonal(4, s).T for s in range(2)])
        torch.testing.assert_close(starquant.matrix_power(A, 3), A @ A @ A, **TOLERANCE)
        eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
        torch.testing.assert_close(starquant.matrix_power(A, -1) @ A, eye, **TOLERANCE)

    def test_eigenvalues_are_clamped(self):
        A = torch.diag(torch.tensor([4.0, 0.0, -1e-3])).double()
        want = torch.diag(torch.tensor([0.5, 1e6, 1e6])).double()
        torch.testing.assert_close(starquant.matrix_power(A, -0.5), want, rtol=1e-9, atol=1e-3)


class TestSmoothing:
    @pytest.mark.parametrize("eta", [0.0, 0.15, 1.0])
    def test_singular_values_move_to_their_mean_and_directions_stay(self, eta):
        U, V, sigma = orthogonal(5), orthogonal(5, 1), np.array([5.0, 3, 2, 1.5, 0.5])
        M = (U * torch.from_numpy(sigma) @ V.T)[None]
        want = U.numpy() @ np.diag((1 - eta) * sigma + eta * 2.4) @ V.numpy().T
        np.testing.assert_allclose(starquant.smooth_singular_values(M, eta)[0].numpy(), want, rtol=1e-9, atol=1e-10)

    def test_each_block_has_its_own_mean(self):
        M = torch.stack([torch.eye(3), 9 * torch.eye(3)]).double()
        torch.testing.assert_close(starquant.smooth_singular_values(M, 0.5), M, **TOLERANCE)


class TestShrinkage:
    @pytest.mark.parametrize("alpha", [0.0, 0.55, 1.0])
    def test_equals_loops(self, alpha):
        M = randn(2, 3, 3)
        got = starquant.shrink_to_identity(M, alpha)
        for b in range(2):
            for i in range(3):
                for j in range(3):
                    want = (1 - alpha) * float(M[b, i, j]) + (alpha if i == j else 0)
                    assert float(got[b, i, j]) == pytest.approx(want, abs=1e-12)

    def test_alpha_one_leaves_the_mean_correction(self):
        z_fp, z_q = paired(8)
        M, bias = starquant.tac_fit(z_fp, z_q, 4, shrinkage=1.0)
        torch.testing.assert_close(M, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), rtol=0, atol=1e-12)
        torch.testing.assert_close(bias.flatten(), z_fp.mean(0) - z_q.mean(0), **TOLERANCE)


class TestRidge:
    """Not in the paper: the paired least-squares map."""

    def test_equals_numpys_least_squares_per_block(self):
        z_fp, z_q = paired(12)
        z_fp = z_fp + torch.roll(z_q, 1, 1) @ orthogonal(12)  # correlated, by a map that is not symmetric
        M, bias = starquant.tac_ridge(z_fp, z_q, 4, damping=0.0)
        for b in range(3):
            fp, q = (z[:, 4 * b : 4 * b + 4].numpy() for z in (z_fp, z_q))
            want, *_ = np.linalg.lstsq(np.c_[q, np.ones(len(q))], fp, rcond=None)
            np.testing.assert_allclose(M[b].numpy(), want[:4].T, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(bias[b].numpy(), want[4], rtol=1e-8, atol=1e-9)

    def test_damping_is_that_of_appendix_c(self):
        """As many more rows √(N λ) I without a target: ridge regression as plain least squares."""
        z_fp, z_q = paired(4)
        M, _ = starquant.tac_ridge(z_fp, z_q, 4, damping=0.3)
        fp, q = (z.numpy() - z.numpy().mean(0) for z in (z_fp, z_q))
        lam = 0.3 * np.trace(np.cov(q.T, bias=True)) / 4
        want, *_ = np.linalg.lstsq(np.r_[q, np.sqrt(len(q) * lam) * np.eye(4)], np.r_[fp, np.zeros((4, 4))], rcond=None)
        np.testing.assert_allclose(M[0].numpy(), want.T, rtol=1e-8, atol=1e-10)
