"""SGAT: Section 3.2 (Equations 7-15), Appendix B (29) and A (27, 28) against float64 loops (`references.py`)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import (
    KINDS,
    ORTHOGONAL,
    TOLERANCE,
    basis,
    inv,
    loop_linear,
    loop_quantize,
    loop_quantize_symmetric,
    loop_sgat,
    orthogonal,
    randn,
    seeds,
)

import starquant

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

    @given(state=st.lists(st.booleans(), min_size=1, max_size=9), split=splits(), seed=seeds, symmetric=st.booleans())
    def test_equals_eq14_of_the_scattered_output(self, state, split, seed, symmetric):
        P = orthogonal(12, seed)
        x, y = randn(len(state), 12, seed=seed), randn(len(state), 7, seed=seed + 1)
        w, b = randn(7, 12, seed=seed + 2), randn(7, seed=seed + 3)
        state = torch.tensor(state)
        y_hat = starquant.sgat_linear(x, state, P, w, *split, bias=b, symmetric=symmetric)
        torch.testing.assert_close(starquant.sgat_loss(x, y, state, P, w, *split, bias=b, symmetric=symmetric),
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
