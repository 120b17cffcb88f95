"""Integers are exact: packing, the integer matmul under Hopper's rules, and the integer linear = its reference."""


import numpy as np
import pytest
import torch
from conftest import checked_int_mm
from hypothesis import given
from hypothesis import strategies as st

import kernels
import starquant

pytestmark = pytest.mark.usefixtures("strict_int_mm")
seeds = st.integers(0, 2**32 - 1)


def integers(low, high, *shape, seed=0, dtype=np.int8):
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype))


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def exact(a, w):
    """Σ_k a_mk w_nk in int64."""
    return torch.from_numpy(a.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)


@pytest.fixture
def use(request, monkeypatch):
    """Sends `int_matmul` along one of its two routes."""
    monkeypatch.setattr(kernels, "backend", lambda device: request.param)
    return request.param


class TestPacking:
    @given(n=st.integers(0, 9), k=st.integers(0, 17), seed=seeds)
    def test_round_trip(self, n, k, seed):
        codes = integers(-8, 7, n, k, seed=seed)
        packed = kernels.pack_int4(codes)
        assert packed.dtype == torch.uint8
        assert packed.shape == (n, (k + 1) // 2)
        unpacked = kernels.unpack_int4(packed, k)
        assert unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes)

    def test_expected_bytes(self):
        """Even column low nibble, odd column high, two's complement; the odd last column is filled with 0."""
        codes = torch.tensor([[1, 2, 7, -8, -1], [0, -1, -8, 7, 5]], dtype=torch.int8)
        assert kernels.pack_int4(codes).tolist() == [[0x21, 0x87, 0x0F], [0xF0, 0x78, 0x05]]

    def test_every_byte(self):
        packed = torch.arange(256, dtype=torch.uint8)[None]
        codes = kernels.unpack_int4(packed, 512)
        assert codes[0, 0::2].tolist() == [(b & 15) - 16 * ((b & 15) > 7) for b in range(256)]
        assert codes[0, 1::2].tolist() == [(b >> 4) - 16 * (b > 127) for b in range(256)]
        assert torch.equal(kernels.pack_int4(codes), packed)

    @pytest.mark.parametrize(("n", "k"), [(0, 8), (1, 1), (7, 13), (1030, 16)])
    def test_row_sums_of_packed_and_other_codes(self, n, k):
        narrow, wide = integers(-8, 7, n, k), integers(-128, 127, n, k, seed=1)
        packed = kernels.pack_int4(narrow)
        packed[:, -1] |= 16 * 7 * (k % 2)  # what fills the last byte up does not count
        for codes, stored in ((narrow, packed), (narrow, narrow), (wide, wide)):
            sums = kernels.row_sums(stored, k)
            assert sums.dtype == torch.int32
            assert sums.tolist() == codes.numpy().sum(-1, dtype=np.int64).tolist()

    def test_strided_input(self):
        codes = integers(-8, 7, 7, 5)
        assert torch.equal(kernels.unpack_int4(kernels.pack_int4(codes.t()), 7), codes.t())
        packed = kernels.pack_int4(integers(-8, 7, 6, 8))
        assert torch.equal(kernels.unpack_int4(packed[::2], 8), kernels.unpack_int4(packed, 8)[::2])

    @pytest.mark.parametrize("bad", [8, -9, 127, -128])
    def test_out_of_range_is_refused(self, bad):
        with pytest.raises(ValueError, match=r"\[-8, 7\]"):
            kernels.pack_int4(torch.tensor([[0, bad]], dtype=torch.int8))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32])
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(ValueError, match="int8"):
            kernels.pack_int4(torch.zeros(2, 2, dtype=dtype))


shapes = st.tuples(st.integers(0, 70), st.integers(1, 40), st.integers(1, 40))


class TestIntegerMatmul:
    @given(shape=shapes, seed=seeds)
    def test_int_mm_is_exact_for_any_shape(self, shape, seed):
        M, K, N = shape
        a, w = integers(-128, 127, M, K, seed=seed), integers(-128, 127, N, K, seed=seed + 1)
        got = kernels.int_mm(a, w)
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), exact(a, w))

    @given(shape=shapes, seed=seeds)
    def test_float_mm_is_exact_for_any_shape(self, shape, seed):
        M, K, N = shape
        a, w = integers(-128, 127, M, K, seed=seed), integers(-128, 127, N, K, seed=seed + 1)
        got = kernels.float_mm(a, w)
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), exact(a, w))

    @pytest.mark.parametrize("use", ["int_mm", "float"], indirect=True)
    @pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (17, 13, 7), (32, 8, 8), (33, 9, 31), (1, 4096, 3)])
    @pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127), (-8, -8)])
    def test_extreme_codes(self, use, M, K, N, left, right):
        a, w = torch.full((M, K), left, dtype=torch.int8), torch.full((N, K), right, dtype=torch.int8)
        assert torch.equal(kernels.int_matmul(a, w), torch.full((M, N), K * left * right, dtype=torch.int32))

    def test_float_mm_beyond_the_exact_range_of_fp32(self):
        """2^24 + 1 = an odd sum that fp32 cannot hold."""
        a, w = torch.full((1, 1025), 127, dtype=torch.int8), torch.full((1, 1025), 127, dtype=torch.int8)
        a[0, 0] = 126
        w[0, 0] = 1
        want = 1024 * 127 * 127 + 126
        assert kernels.float_mm(a.repeat(3, 1), w).tolist() == [[want]] * 3
        wide = torch.full((1, 300_001), 8, dtype=torch.int8)
        wide[0, 0] = 1
        assert kernels.float_mm(wide, wide, largest=64).item() == 300_000 * 64 + 1

    @pytest.mark.parametrize("use", ["int_mm", "float"], indirect=True)
    @pytest.mark.parametrize("stride", [(0, 1), (1, 1), (16, 1)])
    def test_single_rows_with_any_stride(self, use, stride):
        """A (1, K) tensor may carry stride 0 or 1 in its first dimension and still call itself contiguous."""
        storage, w = integers(-128, 127, 16), integers(-128, 127, 24, 16, seed=1)
        a = torch.as_strided(storage, (1, 16), stride)
        assert torch.equal(kernels.int_matmul(a, w).long(), exact(a, w))
        assert torch.equal(kernels.int_matmul(w, a).long(), exact(w, a))

    @pytest.mark.parametrize("use", ["int_mm", "float"], indirect=True)
    def test_expanded_and_sliced_operands(self, use):
        row, w = integers(-128, 127, 1, 16), integers(-128, 127, 40, 32, seed=1)
        for a, b in ((row.expand(40, 16), w[:, 16:]), (w[::2, ::2], row.expand(8, 16)), (w.t()[:, :16], w[:8, 3:19])):
            assert torch.equal(kernels.int_matmul(a, b).long(), exact(a, b))

    def test_an_aligned_weight_is_not_copied(self, monkeypatch):
        w, seen = integers(-8, 7, 32, 16), []
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(b.data_ptr()) or checked_int_mm(a, b))
        kernels.int_mm(integers(-8, 7, 5, 16), w)
        assert seen == [w.data_ptr()]


rows_of_floats = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9)


class TestQuantizeRows:
    def check(self, x, bits):
        codes, scale, zero = kernels.quantize_rows(x, bits)
        s, z = starquant.quant_params(x.float(), bits)
        half = 2 ** (bits - 1)
        assert codes.dtype == torch.int8
        assert torch.equal(codes.float(), starquant.quantize(x.float(), s, z, bits) - half)
        assert torch.equal(zero, z - half)
        assert torch.equal(scale, s)

    @given(row=rows_of_floats, bits=st.integers(2, 8))
    def test_the_integers_of_eq2(self, row, bits):
        self.check(torch.tensor([row]), bits)

    @given(seed=seeds, bits=st.integers(2, 8), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def test_the_integers_of_eq2_in_any_dtype(self, seed, bits, dtype):
        self.check((randn(6, 33, seed=seed) * 5).to(dtype), bits)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("row", [[0, 0], [3e38, -3e38], [1e-40, -1e-41], [1e-45, 0], [2, 2], [-5, -1]])
    def test_extremes(self, row, bits):
        x = torch.tensor([row], dtype=torch.float32)
        self.check(x, bits)
        codes, scale, zero = kernels.quantize_rows(x, bits)
        assert bool(torch.isfinite(scale).all() & torch.isfinite(zero).all())
        assert bool(((codes - zero)[x == 0] == 0).all())

    def test_no_rows(self):
        codes, scale, zero = kernels.quantize_rows(torch.zeros(0, 5), 4)
        assert (codes.shape, scale.shape, zero.shape) == ((0, 5), (0, 1), (0, 1))


def reference_accumulators(x, weight, weight_zero, bits):
    """Σ_k (X_int − z)(W_int − z_w) in int64 from the codes of `starquant`."""
    scale, zero = starquant.quant_params(x, bits)
    left = (starquant.quantize(x, scale, zero, bits) - zero).long()
    right = weight.long() - (0 if weight_zero is None else weight_zero.long()[:, None])
    return exact(left, right), scale


class TestIntLinear:
    @given(shape=shapes, bits=st.integers(2, 8), wbits=st.integers(2, 8), seed=seeds, asymmetric=st.booleans(),
           use=st.sampled_from(["int_mm", "float"]))
    def test_same_accumulators_and_same_output_as_the_reference(self, shape, bits, wbits, seed, asymmetric, use):
        (M, K, N), half = shape, 2 ** (wbits - 1)
        x, weight = randn(M, K, seed=seed) * 3 + 1, integers(-half, half - 1, N, K, seed=seed)
        weight_scale, bias = randn(N, seed=seed + 1).abs() + 0.1, randn(N, seed=seed + 2)
        weight_zero = integers(-half, half - 1, N, seed=seed + 3, dtype=np.int32) if asymmetric else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "backend", lambda device: use)
            got = kernels.int_linear(x, weight, weight_scale, bits, weight_zero, bias)
        acc, scale = reference_accumulators(x, weight, weight_zero, bits)
        # equal accumulators times equal scales are equal bit by bit
        assert torch.equal(got, acc.float() * scale * weight_scale + bias)
        # and the fake-quantized linear in float64 is the same up to fp32 rounding
        zero = 0 if weight_zero is None else weight_zero[:, None]
        w_hat = weight_scale.double()[:, None] * (weight.double() - zero)
        want = starquant.fake_quantize(x, bits).double() @ w_hat.T + bias
        size = starquant.fake_quantize(x, bits).abs().double() @ w_hat.abs().T + bias.abs()
        assert bool(((got - want).abs() <= 1e-6 * size + 1e-12).all())

    @pytest.mark.parametrize("use", ["int_mm", "float"], indirect=True)
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_accumulators_read_back_as_integers(self, use, bits):
        """Rows whose step is exactly 2^b − 1: the output is an integer product, no rounding anywhere."""
        levels, rng = 2**bits - 1, np.random.default_rng(bits)
        for zero in (0, 1, levels // 2, levels):
            steps = rng.integers(-zero, levels - zero, (3, 21), endpoint=True)
            steps[:, 0], steps[:, 1] = -zero, levels - zero
            x, weight = torch.from_numpy(steps * levels).float(), integers(-8, 7, 5, 21)
            got = kernels.int_linear(x, weight, torch.ones(5), bits)
            assert torch.equal(got.long(), exact(torch.from_numpy(steps), weight) * levels)

    @pytest.mark.parametrize("K", [9, 32])
    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_packed_weights_change_no_bit(self, K, asymmetric):
        """9 channels end half-way in a byte."""
        x, weight, scale, bias = randn(5, K), integers(-8, 7, 43, K), randn(43, seed=1).abs(), randn(43, seed=2)
        zeros = integers(-8, 7, 43, seed=3, dtype=np.int32) if asymmetric else None
        want = kernels.int_linear(x, weight, scale, 4, zeros, bias)
        assert torch.equal(kernels.int_linear(x, kernels.pack_int4(weight), scale, 4, zeros, bias), want)

    def test_a_clipped_token_is_quantized_on_its_smaller_range(self):
        x, weight, clip = randn(5, 32), integers(-8, 7, 7, 32), torch.tensor([0.8, 0.6])
        low, high = x.amin(-1, keepdim=True) * 0.8, x.amax(-1, keepdim=True) * 0.6
        want = kernels.int_linear(x.clamp(low, high), weight, torch.ones(7), 4)
        assert torch.equal(kernels.int_linear(x, weight, torch.ones(7), 4, clip=clip), want)

    def test_activations_that_ask_for_gradients_are_served(self):
        """As those of a model built in memory do, whose norms have parameters."""
        x, weight = randn(3, 8).requires_grad_(), integers(-8, 7, 5, 8)
        got = kernels.int_linear(x, weight, torch.ones(5), 4)
        assert not got.requires_grad
        assert torch.equal(got, kernels.int_linear(x.detach(), weight, torch.ones(5), 4))

    def test_nan_stays_nan_in_its_token(self):
        x, weight = randn(3, 8), integers(-8, 7, 5, 8)
        x[1, 2] = torch.nan
        got = kernels.int_linear(x, weight, torch.ones(5), 4)
        assert got.isnan().all(-1).tolist() == [False, True, False]
        assert not got[[0, 2]].isnan().any()
