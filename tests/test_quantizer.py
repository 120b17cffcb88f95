"""Properties of the quantizer Q = Eq. 3 ∘ Eq. 2 with the parameters of Eq. 4, and its straight-through gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import starquant

seeds = st.integers(0, 2**32 - 1)


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


reals = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12)


class TestQuantizer:
    @given(row=reals, bits=st.integers(2, 8), symmetric=st.booleans())
    def test_error_at_most_half_a_step_inside_the_range(self, row, bits, symmetric):
        x = torch.tensor([row], dtype=torch.float64)
        scale, zero = starquant.quant_params(x, bits, symmetric)
        low, high = scale * (0 - zero), scale * (2**bits - 1 - zero)
        error = (starquant.fake_quantize(x, bits, symmetric) - x).abs()
        inside = (x >= low) & (x <= high)
        assert bool((error <= scale / 2 * (1 + 1e-9))[inside].all())
        # a rounded zero point shifts the grid by at most half a step, so no value is further out than that
        assert bool((error <= scale * (1 + 1e-9)).all())
        assert not symmetric or bool(inside.all())

    @given(row=reals, bits=st.integers(2, 8), symmetric=st.booleans())
    def test_idempotent_on_its_grid(self, row, bits, symmetric):
        x = torch.tensor([row], dtype=torch.float64)
        scale, zero = starquant.quant_params(x, bits, symmetric)
        once = starquant.dequantize(starquant.quantize(x, scale, zero, bits), scale, zero)
        twice = starquant.dequantize(starquant.quantize(once, scale, zero, bits), scale, zero)
        assert torch.equal(once, twice)

    @given(seed=seeds, bits=st.integers(2, 8))
    def test_symmetric_quantizer_is_idempotent(self, seed, bits):
        x = randn(4, 9, seed=seed)
        once = starquant.fake_quantize(x, bits, symmetric=True)
        torch.testing.assert_close(starquant.fake_quantize(once, bits, symmetric=True), once, rtol=1e-12, atol=0)

    @given(row=reals, bits=st.integers(2, 8), exponent=st.integers(-20, 20))
    def test_scales_with_its_input(self, row, bits, exponent):
        x = torch.tensor([row], dtype=torch.float64)
        x = torch.where(x.abs() < 1e-20, 0.0, x)
        assert torch.equal(starquant.fake_quantize(x * 2.0**exponent, bits),
                           starquant.fake_quantize(x, bits) * 2.0**exponent)

    @given(seed=seeds, bits=st.integers(2, 8), symmetric=st.booleans())
    def test_rows_do_not_see_each_other(self, seed, bits, symmetric):
        x = randn(5, 6, seed=seed)
        whole = starquant.fake_quantize(x, bits, symmetric)
        for i in range(5):
            assert torch.equal(starquant.fake_quantize(x[i : i + 1], bits, symmetric), whole[i : i + 1])

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_zeros_stay_zero(self, dtype, symmetric):
        x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 5.0, -3.0], [0.0, 2.0, 1.0], [0.0, -7.0, -0.5]], dtype=dtype)
        q = starquant.fake_quantize(x, 4, symmetric)
        assert q.dtype == dtype
        assert bool((q[0] == 0).all())
        assert bool((q[:, 0] == 0).all())

    BF16 = torch.finfo(torch.bfloat16).max

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("row", [[BF16, -BF16, 1.0], [BF16, BF16, BF16], [-BF16, 0.0, -1.0], [1e-40, -1e-41, 0.0],
                                     [1e-45, 1e-45, 1e-45], [3.0, 3.0, 3.0], [-2.0, -2.0, -2.0], [BF16, 1e-45, 0.0]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extremes_stay_finite(self, row, bits, symmetric, dtype):
        x = torch.tensor([row], dtype=dtype)
        scale, zero = starquant.quant_params(x.float(), bits, symmetric)
        codes = starquant.quantize(x.float(), scale, zero, bits)
        q = starquant.fake_quantize(x, bits, symmetric)
        for t in (scale, zero, codes, q):
            assert bool(torch.isfinite(t).all())
        assert 0 <= float(zero) <= 2**bits - 1
        # inside the range of the dtype the error is still bounded by a step
        assert bool(((q.double() - x.double()).abs() <= scale.double() * 1.01).all())

    @pytest.mark.parametrize("value", [3.0, -2.0, 0.7])
    def test_constant_rows_are_exact(self, value):
        x = torch.full((2, 5), value, dtype=torch.float64)
        torch.testing.assert_close(starquant.fake_quantize(x, 4), x, rtol=1e-12, atol=0)
        torch.testing.assert_close(starquant.fake_quantize(x, 4, symmetric=True), x, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_number_of_levels(self, bits):
        assert len(starquant.fake_quantize(torch.linspace(0, 1, 5000)[None], bits).unique()) == 2**bits
        both = torch.linspace(-1, 1, 5000)[None]
        assert len(starquant.fake_quantize(both, bits, symmetric=True).unique()) == 2**bits - 1


class TestStraightThrough:
    """The gradient of Q is that of Eqs. 2-4 with each rounding replaced by adding its (frozen) rounding error."""

    @staticmethod
    def unrounded(x, at, bits, symmetric):
        """Σ_j c_j Q(x)_j with the rounding errors and the clamping decisions frozen at `at` (plain floats)."""
        levels, out = 2**bits - 1, []

        def params(row):
            if symmetric:
                return max(abs(v) for v in row) / (2 ** (bits - 1) - 1), None
            low, high = min(0.0, *row), max(0.0, *row)
            return (high - low) / levels, -low / ((high - low) / levels)

        for row, base in zip(x, at, strict=True):
            (s0, z0), (s, z) = params(base), params(row)
            rounded_z = 2 ** (bits - 1) if symmetric else round(z0)
            z = rounded_z if symmetric else z + (rounded_z - z0)
            for v, v0 in zip(row, base, strict=True):
                code = round(v0 / s0) + rounded_z
                if code > levels or code < 0:
                    out.append(s * ((levels if code > levels else 0) - z))
                else:
                    out.append(s * (v / s + (round(v0 / s0) - v0 / s0)))
        return out

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize(("bits", "seed"), [(2, 0), (2, 3), (3, 1), (4, 2), (8, 4)])
    def test_against_finite_differences(self, bits, symmetric, seed):
        self.compare(randn(3, 7, seed=seed), bits, symmetric, seed)

    def test_where_both_ends_round_up_and_one_is_clamped(self):
        x = torch.tensor([[-1.5, 0.25, 1.5]] * 3, dtype=torch.float64)
        scale, zero = starquant.quant_params(x, 2)
        assert (scale[0].item(), zero[0].item()) == (1, 2)  # 1.5 is code 2 + 2 = 4, beyond the last one, 3
        self.compare(x, 2, False, 0)

    def compare(self, x, bits, symmetric, seed):
        x = x.requires_grad_()
        c = randn(*x.shape, seed=seed + 1)
        q = starquant.fake_quantize(x, bits, symmetric)
        (grad,) = torch.autograd.grad((q * c).sum(), x)
        at = x.detach().tolist()
        # the un-rounded function takes the quantizer's own values at the point itself
        assert self.unrounded(at, at, bits, symmetric) == pytest.approx(q.flatten().tolist(), abs=1e-12)
        weights, h = c.flatten().tolist(), 1e-6
        for i in range(3):
            for j in range(x.shape[1]):
                sides = []
                for sign in (1, -1):
                    moved = [list(row) for row in at]
                    moved[i][j] += sign * h
                    values = self.unrounded(moved, at, bits, symmetric)
                    sides.append(math.fsum(w * v for w, v in zip(weights, values, strict=True)))
                assert float(grad[i, j]) == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-6)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_rows_without_a_scale_have_a_finite_gradient(self, symmetric):
        """Zero and denormal rows, where s is held at its least value, beside a row of huge numbers."""
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        x[1], x[2], x[3] = 0, 1e-40, x[3] * 1e36
        x.requires_grad_()
        starquant.fake_quantize(x, 4, symmetric).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert torch.equal(x.grad[1:3], torch.ones(2, 8))

    def test_clamped_values_pass_no_gradient_of_their_own(self):
        x = torch.tensor([[20.0, 3.0, -9.0]], requires_grad=True)
        codes = starquant.quantize(x, torch.ones(1, 1), torch.full((1, 1), 5.0), 4)
        (grad,) = torch.autograd.grad(codes.sum(), x)
        assert grad.tolist() == [[0, 1, 0]]

    def test_ste_round(self):
        x = torch.tensor([0.4, 0.6, -1.5, 2.5], requires_grad=True)
        y = starquant.ste_round(x)
        assert y.tolist() == [0, 1, -2, 2]
        assert torch.autograd.grad((y * torch.arange(4.0)).sum(), x)[0].tolist() == [0, 1, 2, 3]


class TestWrittenOutGradient:
    """`FakeQuantize` against autograd through the equations themselves."""

    @given(rows=st.integers(1, 5), columns=st.integers(1, 9), bits=st.integers(2, 8), symmetric=st.booleans(),
           kind=st.sampled_from(["both", "positive", "negative", "zero row", "ties", "few values"]), seed=seeds)
    def test_equal(self, rows, columns, bits, symmetric, kind, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
        c = torch.randn(rows, columns, generator=g, dtype=torch.float64)
        x = {"both": x, "positive": x.abs(), "negative": -x.abs(), "zero row": x * (torch.arange(rows) > 0)[:, None],
             "ties": x.sign() * 3, "few values": x.round()}[kind].requires_grad_()
        scale, zero_point = starquant.quant_params(x, bits, symmetric)
        plain = starquant.dequantize(starquant.quantize(x, scale, zero_point, bits), scale, zero_point)
        (want,) = torch.autograd.grad((plain * c).sum(), x)
        fast = starquant.FakeQuantize.apply(x, bits, symmetric, torch.inf)
        (got,) = torch.autograd.grad((fast * c).sum(), x)
        assert torch.equal(fast, plain)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
