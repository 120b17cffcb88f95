"""Integers are exact: packing, the integer matmul under Hopper's rules, and the integer linear = its reference."""

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import checked_int_mm
from hypothesis import given
from hypothesis import strategies as st

import kernels
import starquant
from layers import QuantLinear
from starquant import Kronecker

pytestmark = pytest.mark.usefixtures("strict_int_mm")
seeds = st.integers(0, 2**32 - 1)


def integers(low, high, *shape, seed=0, dtype=np.int8):
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype))


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def exact(a, w):
    """Σ_k a_mk w_nk in int64."""
    return torch.from_numpy(a.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)


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

    @pytest.mark.parametrize("use", ["int_mm", "float"])
    @pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (17, 13, 7), (32, 8, 8), (33, 9, 31), (1, 4096, 3)])
    @pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127), (-8, -8)])
    def test_extreme_codes(self, use, M, K, N, left, right):
        a, w = torch.full((M, K), left, dtype=torch.int8), torch.full((N, K), right, dtype=torch.int8)
        assert torch.equal(kernels.int_matmul(a, w, use=use), torch.full((M, N), K * left * right, dtype=torch.int32))

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

    @pytest.mark.parametrize("use", ["int_mm", "float"])
    @pytest.mark.parametrize("stride", [(0, 1), (1, 1), (16, 1)])
    def test_single_rows_with_any_stride(self, use, stride):
        """A (1, K) tensor may carry stride 0 or 1 in its first dimension and still call itself contiguous."""
        storage, w = integers(-128, 127, 16), integers(-128, 127, 24, 16, seed=1)
        a = torch.as_strided(storage, (1, 16), stride)
        assert torch.equal(kernels.int_matmul(a, w, use=use).long(), exact(a, w))
        assert torch.equal(kernels.int_matmul(w, a, use=use).long(), exact(w, a))

    @pytest.mark.parametrize("use", ["int_mm", "float"])
    def test_expanded_and_sliced_operands(self, use):
        row, w = integers(-128, 127, 1, 16), integers(-128, 127, 40, 32, seed=1)
        for a, b in ((row.expand(40, 16), w[:, 16:]), (w[::2, ::2], row.expand(8, 16)), (w.t()[:, :16], w[:8, 3:19])):
            assert torch.equal(kernels.int_matmul(a, b, use=use).long(), exact(a, b))

    def test_an_aligned_weight_is_not_copied(self, monkeypatch):
        w, seen = integers(-8, 7, 32, 16), []
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(b.data_ptr()) or checked_int_mm(a, b))
        kernels.int_mm(integers(-8, 7, 5, 16), w)
        assert seen == [w.data_ptr()]


class TestBackend:
    @pytest.fixture(autouse=True)
    def fresh(self):
        kernels.backend.cache_clear()
        yield
        kernels.backend.cache_clear()

    @pytest.mark.parametrize("faster", ["int_mm", "float"])
    def test_a_cpu_takes_the_faster_product(self, monkeypatch, faster):
        """The one with int8 dot products `_int_mm`, the one without them fp32."""
        seconds = {kernels.int_mm: 1.0, kernels.float_mm: 3.0 if faster == "int_mm" else 0.1}
        monkeypatch.setattr(kernels, "_seconds", lambda multiply, a, w: seconds[multiply])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu") == faster

    @pytest.mark.parametrize("fault", ["saturates", "wrong in large shapes", "refused"])
    def test_a_cpu_whose_product_fails_its_self_check_takes_the_float_route(self, monkeypatch, fault):
        """int8 dot products of the first kind saturate at 16 bit: right for 4-bit codes and wrong for 8-bit ones."""
        def broken(a, b):
            if fault == "refused":
                raise NotImplementedError("not for this CPU")
            exact = checked_int_mm(a, b)
            return exact.clamp(-(2**15), 2**15 - 1) if fault == "saturates" else exact + (a.shape[1] >= 512)

        monkeypatch.setattr(kernels, "_seconds", lambda multiply, a, w: float(multiply is not kernels.int_mm))
        monkeypatch.setattr(torch, "_int_mm", broken)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu") == "float"

    def test_seconds_are_the_least_after_a_first_one_that_does_not_count(self, monkeypatch):
        clock = itertools.accumulate(itertools.chain.from_iterable((5.0, s) for s in (1, 7, 4, 6, 9, 8)))
        monkeypatch.setattr(kernels.time, "perf_counter", lambda: next(clock))
        assert kernels._seconds(lambda a, w: None, 0, 0) == 4

    def test_a_device_that_passes_its_self_check_takes_int_mm(self):
        assert kernels.backend("cpu:0") == "int_mm"

    @pytest.mark.parametrize("fault", ["wrong", "transposed layout", "refused"])
    def test_a_device_that_fails_it_falls_back_with_one_warning(self, monkeypatch, fault):
        def broken(a, b):
            if fault == "refused":
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
            out = checked_int_mm(a, b)
            if fault == "wrong":
                out[32:] = 0  # only rows beyond the first tile
                return out
            return (a.long() @ b.t().reshape(b.shape).long()).to(torch.int32)

        monkeypatch.setattr(torch, "_int_mm", broken)
        with pytest.warns(UserWarning, match="_int_mm fails its self-check on cpu:0") as caught:
            assert kernels.backend("cpu:0") == "float"
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu:0") == "float"

    def test_a_shape_that_is_refused_later_falls_back_with_one_warning(self, monkeypatch):
        def choosy(a, b):
            if b.shape[1] == 48:
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nand more")
            return checked_int_mm(a, b)

        monkeypatch.setattr(torch, "_int_mm", choosy)
        monkeypatch.setattr(kernels, "_REFUSED", set())
        # the fallback, marked
        monkeypatch.setattr(kernels, "float_mm", lambda a, w, largest: a.long() @ w.long().t() + 1000)
        a, served, refused = integers(-8, 7, 5, 32), integers(-8, 7, 16, 32), integers(-8, 7, 48, 32)
        assert torch.equal(kernels.int_matmul(a, served, use="int_mm").long(), a.long() @ served.long().t())
        want = a.long() @ refused.long().t() + 1000
        with pytest.warns(UserWarning, match=r"refuses 5 x 32 times 32 x 48 \(CUBLAS_STATUS_NOT_SUPPORTED [^\n]*\)"):
            assert torch.equal(kernels.int_matmul(a, refused, use="int_mm"), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(kernels.int_matmul(a, refused, use="int_mm"), want)
            assert torch.equal(kernels.int_matmul(a, served, use="int_mm").long(), a.long() @ served.long().t())

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                       RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                                       RuntimeError("operation not permitted when stream is capturing")])
    def test_what_may_pass_is_not_a_refusal(self, monkeypatch, error):
        def hungry(a, b):
            raise error

        monkeypatch.setattr(torch, "_int_mm", hungry)
        monkeypatch.setattr(kernels, "_REFUSED", set())
        with pytest.raises(type(error), match=str(error)):
            kernels.int_matmul(integers(-8, 7, 5, 32), integers(-8, 7, 16, 32), use="int_mm")
        assert not kernels._REFUSED

    def test_int_matmul_asks_the_backend(self, monkeypatch):
        a, w = integers(-8, 7, 3, 9), integers(-8, 7, 5, 9, seed=1)
        for name in ("int_mm", "float_mm"):
            monkeypatch.setattr(kernels, name, lambda *args, name=name: name)
        for chosen in ("int_mm", "float"):
            monkeypatch.setattr(kernels, "backend", lambda device, chosen=chosen: chosen)
            assert kernels.int_matmul(a, w) == {"int_mm": "int_mm", "float": "float_mm"}[chosen]


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
        weight_sum = weight.sum(-1, dtype=torch.int32)
        got = kernels.int_linear(x, weight, weight_scale, weight_sum, bits, wbits, bias, weight_zero, use)
        acc, scale = reference_accumulators(x, weight, weight_zero, bits)
        # equal accumulators times equal scales are equal bit by bit
        assert torch.equal(got, acc.float() * scale * weight_scale + bias)
        # and the fake-quantized linear in float64 is the same up to fp32 rounding
        zero = 0 if weight_zero is None else weight_zero[:, None]
        w_hat = weight_scale.double()[:, None] * (weight.double() - zero)
        want = starquant.fake_quantize(x, bits).double() @ w_hat.T + bias
        size = starquant.fake_quantize(x, bits).abs().double() @ w_hat.abs().T + bias.abs()
        assert bool(((got - want).abs() <= 1e-6 * size + 1e-12).all())

    @pytest.mark.parametrize("use", ["int_mm", "float"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_accumulators_read_back_as_integers(self, use, bits):
        """Rows whose step is exactly 2^b − 1: the output is an integer product, no rounding anywhere."""
        levels, rng = 2**bits - 1, np.random.default_rng(bits)
        for zero in (0, 1, levels // 2, levels):
            steps = rng.integers(-zero, levels - zero, (3, 21), endpoint=True)
            steps[:, 0], steps[:, 1] = -zero, levels - zero
            x, weight = torch.from_numpy(steps * levels).float(), integers(-8, 7, 5, 21)
            got = kernels.int_linear(x, weight, torch.ones(5), weight.sum(-1, dtype=torch.int32), bits, 4, use=use)
            assert torch.equal(got.long(), exact(torch.from_numpy(steps), weight) * levels)

    @pytest.mark.parametrize("size", [1, 300, 2**22])
    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_slices_of_packed_weights_change_no_bit(self, size, asymmetric, monkeypatch):
        """16, 32 and all of 43 columns at a time; 9 channels end half-way in a byte."""
        x, weight, scale, bias = randn(5, 9), integers(-8, 7, 43, 9), randn(43, seed=1).abs(), randn(43, seed=2)
        sums, zeros = kernels.row_sums(weight), integers(-8, 7, 43, seed=3, dtype=np.int32) if asymmetric else None
        want = kernels.int_linear(x, weight, scale, sums, 4, 4, bias, zeros, "float")
        monkeypatch.setattr(kernels, "SLICE", size)
        for given_weight in (weight, kernels.pack_int4(weight)):
            got = kernels.int_linear(x, given_weight, scale, sums, 4, 4, bias, zeros, "int_mm")
            assert torch.equal(got, want)

    def test_slices_are_as_wide_as_the_product_wants_them(self, monkeypatch):
        seen, weight = [], integers(-8, 7, 150, 96)
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(b.shape[1]) or checked_int_mm(a, b))
        monkeypatch.setattr(kernels, "SLICE", 96 * 70)
        kernels.int_linear(randn(3, 96), weight, torch.ones(150), kernels.row_sums(weight), 4, 4, use="int_mm")
        assert seen == [64, 64, 32]  # the last one, 22, padded

    def test_activations_that_ask_for_gradients_are_served(self):
        """As those of a model built in memory do, whose norms have parameters."""
        x, weight = randn(3, 8).requires_grad_(), integers(-8, 7, 5, 8)
        got = kernels.int_linear(x, weight, torch.ones(5), kernels.row_sums(weight), 4, 4)
        assert torch.equal(got, kernels.int_linear(x.detach(), weight, torch.ones(5), kernels.row_sums(weight), 4, 4))

    def test_nan_stays_nan_in_its_token(self):
        x, weight = randn(3, 8), integers(-8, 7, 5, 8)
        x[1, 2] = torch.nan
        got = kernels.int_linear(x, weight, torch.ones(5), kernels.row_sums(weight), 4, 4)
        assert got.isnan().all(-1).tolist() == [False, True, False]
        assert not got[[0, 2]].isnan().any()

    @pytest.mark.parametrize(("use", "calls"), [("int_mm", 1), ("float", 0)])
    def test_takes_the_route_it_is_told(self, use, calls, monkeypatch):
        seen, weight = [], integers(-8, 7, 5, 9)
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(a) or checked_int_mm(a, b))
        kernels.int_linear(randn(3, 9), weight, torch.ones(5), weight.sum(-1, dtype=torch.int32), 4, 4, use=use)
        assert len(seen) == calls

    def test_zero_rows_give_the_bias(self):
        weight, bias, zeros = integers(-8, 7, 5, 9), randn(5), torch.zeros(2, 9)
        got = kernels.int_linear(zeros, weight, torch.ones(5), weight.sum(-1, dtype=torch.int32), 4, 4, bias)
        assert torch.equal(got, bias.expand(2, 5))


def orthogonal(n, seed=0):
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]).float()


def factors(kind):
    diagonal = randn(24, seed=5).abs() + 0.5
    kronecker = Kronecker(orthogonal(4, 1), orthogonal(6, 2))
    blocks = torch.stack([orthogonal(8, s) * torch.linspace(0.5, 2, 8) for s in range(3)])
    return {"none": [], "diagonal": [diagonal], "dense": [orthogonal(24)], "kronecker": [kronecker],
            "block-diagonal": [blocks], "two": [diagonal, kronecker], "across blocks": [blocks, orthogonal(3)]}[kind]


KINDS = ("none", "diagonal", "dense", "kronecker", "block-diagonal", "two", "across blocks")


class TestQuantLinear:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("gates", [(0, 0), (2, 3)])
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_equals_its_reference_and_eq13(self, kind, bits, gates, with_bias, symmetric):
        x, weight = randn(2, 5, 24), randn(7, 24, seed=1)
        state = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
        bias = randn(7, seed=2) if with_bias else None
        layer = QuantLinear.fold(weight, factors(kind), *gates, abits=bits, wbits=bits, bias=bias, symmetric=symmetric)
        assert (layer.weight_zero is None) == symmetric
        y = layer(x, state)
        assert y.shape == (2, 5, 7)
        torch.testing.assert_close(y, layer.reference(x, state), rtol=1e-5, atol=1e-5)
        P = factors(kind) or torch.ones(24)
        want = starquant.sgat_linear(x, state, P, weight, *gates, bits, bits, bias, symmetric)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_many_bits_approach_the_full_precision_linear(self, kind):
        x, weight, bias = randn(64, 24), randn(7, 24, seed=1), randn(7, seed=2)
        layer, exact_y = QuantLinear.fold(weight, factors(kind), abits=8, wbits=8, bias=bias), F.linear(x, weight, bias)
        assert float((layer(x) - exact_y).norm() / exact_y.norm()) < 0.02

    def test_the_state_picks_the_gate(self):
        x, weight = randn(6, 24), randn(7, 24, seed=1)
        layer = QuantLinear.fold(weight, factors("dense"), 2, 3)
        mixed = layer(x, torch.tensor([1, 0, 1, 1, 0, 0]).bool())
        masked, unmasked = layer(x, torch.ones(6).bool()), layer(x, torch.zeros(6).bool())
        assert torch.equal(mixed[[0, 2, 3]], masked[[0, 2, 3]])
        assert torch.equal(mixed[[1, 4, 5]], unmasked[[1, 4, 5]])
        assert not torch.allclose(masked, unmasked, atol=1e-2)

    def test_asymmetric_weights(self):
        codes, zero = integers(-8, 7, 7, 24), integers(-8, 7, 7, dtype=np.int32)
        scale = randn(7).abs() + 0.1
        layer = QuantLinear(codes, scale, factors("kronecker"), 1, 1, zero=zero)
        x, state = randn(5, 24), torch.tensor([1, 0, 1, 0, 0]).bool()
        torch.testing.assert_close(layer.weight(), scale[:, None] * (codes.float() - zero[:, None]))
        torch.testing.assert_close(layer(x, state), layer.reference(x, state), rtol=1e-5, atol=1e-5)

    def test_both_backends_give_the_same_bits(self, monkeypatch):
        layer, x = QuantLinear.fold(randn(7, 24), factors("kronecker"), 1, 1), randn(5, 24, seed=1)
        state, outputs = torch.tensor([1, 0, 1, 0, 0]).bool(), []
        for chosen in ("int_mm", "float"):
            monkeypatch.setattr(kernels, "backend", lambda device, chosen=chosen: chosen)
            outputs.append(layer(x, state))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_output_dtype_is_the_inputs(self, dtype):
        layer = QuantLinear.fold(randn(7, 24), factors("dense"), bias=randn(7, seed=2))
        x = randn(5, 24, seed=1).to(dtype)
        assert layer(x).dtype == layer.reference(x).dtype == dtype
        assert torch.equal(layer(x), layer(x.float()).to(dtype))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_asymmetric_codes_fill_the_range_of_each_row(self, bits):
        weight = randn(7, 25) + 0.5
        layer = QuantLinear.fold(weight, wbits=bits, symmetric=False)
        assert (layer.codes().amin(1) == -(2 ** (bits - 1))).all()
        assert (layer.codes().amax(1) == 2 ** (bits - 1) - 1).all()
        torch.testing.assert_close(layer.weight(), starquant.fake_quantize(weight, bits))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_codes_are_those_of_the_symmetric_quantizer(self, bits):
        weight = randn(7, 25)
        layer = QuantLinear.fold(weight, wbits=bits)
        largest = 2 ** (bits - 1) - 1
        want = torch.round(weight / (weight.abs().amax(1, keepdim=True) / largest))
        assert torch.equal(layer.codes().float(), want)
        assert int(layer.codes().abs().max()) == largest
        assert layer.weight_packed.numel() == (7 * 13 if bits <= 4 else 7 * 25)
        torch.testing.assert_close(layer.weight(), starquant.fake_quantize(weight, bits, symmetric=True))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("wbits", "asymmetric", "with_bias"),
                             [(4, False, False), (4, True, True), (8, False, True), (3, True, False)])
    def test_rebuilt_from_its_tensors_bit_by_bit(self, kind, wbits, asymmetric, with_bias):
        half = 2 ** (wbits - 1)
        zero = integers(-half, half - 1, 7, dtype=np.int32) if asymmetric else None
        layer = QuantLinear(integers(-half, half - 1, 7, 24), randn(7).abs(), factors(kind), 2, 3, 4, wbits,
                            randn(7, seed=3) if with_bias else None, zero)
        tensors = {k: v.clone() for k, v in layer.state_dict().items()}
        assert "weight_sum" not in tensors
        again = QuantLinear.from_tensors(tensors, 24, 2, 3, 4, wbits)
        assert again.kinds == layer.kinds
        assert list(again.state_dict()) == list(tensors)
        assert all(torch.equal(again.state_dict()[k], v) for k, v in tensors.items())
        assert torch.equal(again.weight_sum, layer.weight_sum)
        assert again.weight_packed.data_ptr() == tensors["weight_packed"].data_ptr()
        x, state = randn(5, 24), torch.tensor([1, 0, 1, 0, 0]).bool()
        assert torch.equal(again(x, state), layer(x, state))
