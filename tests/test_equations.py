"""Section 3.1, Equations 1-6, against independent float64 computations (`references.py`).

SGAT (Equations 7-15, 27-29) is in `test_equations_sgat.py`, TAC (16-18, 30) in `test_equations_tac.py`.
"""

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
    orthogonal,
    randn,
    seeds,
)

import starquant
from starquant import Dense, Diagonal


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
    @pytest.mark.parametrize("differentiable", [True, False])
    @pytest.mark.parametrize("shape", [(2, 5), (), (0,)])
    def test_apply_basis_is_the_dense_product(self, kind, differentiable, shape):
        P, dense = basis(kind, seed=3)
        x = randn(12, *shape).movedim(0, -1).requires_grad_(differentiable)  # rows that do not lie in one piece
        torch.testing.assert_close(starquant.apply_basis(x, P), x @ dense, **TOLERANCE)

    def test_a_block_diagonal_basis_has_a_gradient(self):
        """A model built in memory keeps the gains of its norms as parameters: activations then ask for gradients."""
        P, _ = basis("block")
        x = randn(3, 12).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: starquant.apply_basis(x, P), x)

    @pytest.mark.parametrize("kind", KINDS)
    def test_inverse_transpose(self, kind):
        P, dense = basis(kind, seed=3)
        inverse = [factor.inverse_transpose() for factor in starquant.factors(P)]
        got = starquant.apply_basis(torch.eye(12, dtype=torch.float64), inverse)
        torch.testing.assert_close(got, inv(dense).T, **TOLERANCE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_orthogonal(self, kind):
        assert all(f.is_orthogonal() for f in starquant.factors(basis(kind)[0])) == (kind in ORTHOGONAL)

    def test_is_orthogonal_bounds(self):
        nearly = torch.eye(4, dtype=torch.float64)
        nearly[0, 1] = 1e-6
        assert not Dense(nearly).is_orthogonal()
        assert Dense(nearly.float()).is_orthogonal()
        assert Diagonal(torch.tensor([1.0, -1.0])).is_orthogonal()
        assert not Diagonal(torch.tensor([1.0, 2.0, 1.0, 1.0])).is_orthogonal()

    def test_a_list_is_folded_with_its_inverse_unless_all_of_it_is_orthogonal(self):
        P = [Dense(orthogonal(4)), Diagonal(torch.tensor([1.0, 2.0, 1.0, 1.0]))]
        W = randn(3, 4)
        want = starquant.apply_basis(W, [P[0].inverse_transpose(), P[1].inverse_transpose()])
        assert torch.equal(starquant.fold_weight(W, P), want)
        assert torch.equal(starquant.fold_weight(W, P[:1]), W @ orthogonal(4))

    @pytest.mark.parametrize("width", [11, 24, 6, 36])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_factor_of_another_width_is_refused(self, kind, width):
        """A dense P of 12 used to pass for P ⊗ I where the width is 24."""
        P, _ = basis(kind)
        if kind == "across" and width % 3 == 0:  # as many blocks of another size
            assert starquant.apply_basis(randn(2, width), P).shape == (2, width)
            return
        with pytest.raises(ValueError, match=f"does not fit a width of {width}"):
            starquant.apply_basis(randn(2, width), P)

    @pytest.mark.parametrize("P", [torch.ones(12), torch.ones(3, 4, 4), torch.ones(12, 24), torch.ones(3, 3)])
    def test_a_tensor_that_is_no_square_matrix_of_the_width_is_refused(self, P):
        with pytest.raises(ValueError, match="Dense"):
            starquant.apply_basis(randn(2, 12).float(), P)

    @pytest.mark.parametrize("kind", KINDS)
    def test_factors_in_another_dtype(self, kind):
        for factor in starquant.factors(basis(kind)[0]):
            for got in (factor.to(torch.float32), factor.to(torch.zeros(1))):
                assert type(got) is type(factor)
                assert all(torch.equal(a, b.float()) for a, b in zip(got, factor, strict=True))

    def test_kronecker_dense(self):
        P, dense = basis("kronecker")
        torch.testing.assert_close(P.dense(), dense, **TOLERANCE)
