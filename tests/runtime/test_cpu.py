"""The integer product as a CPU takes it for few tokens: the weight first, the activations transposed once; and weights
unpacked by halves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import exact, integers, randn, seeds

import kernels


def plain_int_mm(a, b):
    """Exact, of any shape and layout; operands that PyTorch's own has got wrong on a CPU are refused."""
    assert a.dtype == b.dtype == torch.int8
    assert 0 not in a.stride() + b.stride()
    assert 1 not in a.shape + b.shape, "strides of single rows and columns may be anything"
    return (a.long() @ b.long()).to(torch.int32)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", plain_int_mm)
    kernels.backend.cache_clear()  # what it finds of one product does not hold for another
    yield
    kernels.backend.cache_clear()


def test_for_few_tokens_on_a_cpu_alone():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert kernels.weights_first(cpu, 256)
    assert not kernels.weights_first(cpu, 257)
    assert not kernels.weights_first(gpu, 1)


@given(M=st.integers(0, 70), K=st.integers(1, 40), N=st.integers(1, 40), seed=seeds)
def test_exact_for_any_shape(M, K, N, seed):
    a, w = integers(-128, 127, M, K, seed=seed), integers(-128, 127, N, K, seed=seed + 1)
    assert torch.equal(kernels.int_mm(a, w).long(), exact(a, w))
    assert torch.equal(kernels.int_mm(a, w, kernels.padded(a)).long(), exact(a, w))


@pytest.mark.parametrize("wrong", ["weight first", "activations first"])
def test_the_self_check_sees_either_order(wrong, monkeypatch):
    def faulty(a, b):
        weight_is_first = b.stride(1) == 1  # the other order has a transposed weight there
        return plain_int_mm(a, b) + int(weight_is_first == (wrong == "weight first"))

    assert kernels._self_check("cpu")
    monkeypatch.setattr(torch, "_int_mm", faulty)
    assert not kernels._self_check("cpu")


@pytest.mark.parametrize("M", [1, 5, 256, 257, 300])
def test_torchs_own_product_is_exact_in_either_order_where_it_serves(M, monkeypatch):
    monkeypatch.undo()
    kernels.backend.cache_clear()
    a, w = integers(-128, 127, M, 40), integers(-128, 127, 24, 40, seed=1)
    assert torch.equal(kernels.int_matmul(a, w).long(), exact(a, w))


@pytest.mark.parametrize(("M", "weight_is_first"), [(256, True), (257, False)])
def test_an_aligned_weight_is_not_copied(M, weight_is_first, monkeypatch):
    seen, w = [], integers(-8, 7, 32, 48)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append((a.data_ptr(), b.data_ptr())) or plain_int_mm(a, b))
    kernels.int_mm(integers(-8, 7, M, 48), w)
    assert [pair.index(w.data_ptr()) for pair in seen] == [0 if weight_is_first else 1]


def test_activations_are_laid_out_once_for_all_slices(monkeypatch):
    calls, padded = [], kernels.padded
    monkeypatch.setattr(kernels, "padded", lambda a: calls.append(a.shape) or padded(a))
    monkeypatch.setattr(kernels, "SLICE", 16 * 64)
    w = integers(-8, 7, 80, 64)
    kernels.int_linear(randn(5, 64), kernels.pack_int4(w), torch.ones(80), kernels.row_sums(w), 4, 4, use="int_mm")
    assert calls == [(5, 64)]


class TestHalves:
    @given(n=st.integers(1, 9), k=st.integers(1, 17), seed=seeds)
    def test_columns_are_in_one_order_and_codes_16_fold(self, n, k, seed):
        codes = integers(-8, 7, n, k, seed=seed)
        out = torch.empty(n, 2 * ((k + 1) // 2), dtype=torch.int8)
        assert kernels.unpack_halves(kernels.pack_int4(codes), out) is out
        assert torch.equal(out.int(), 16 * kernels.halves(codes).int())
        assert torch.equal(kernels.halves(codes)[:, : (k + 1) // 2], codes[:, 0::2])

    @given(M=st.sampled_from([1, 5, 256, 257]), K=st.integers(1, 40), N=st.integers(1, 20), seed=seeds,
           bits=st.sampled_from([4, 8]), use=st.sampled_from(["int_mm", "float"]))
    def test_packed_weights_give_the_bits_of_unpacked_ones(self, M, K, N, bits, seed, use):
        x, w = randn(M, K, seed=seed), integers(-8, 7, N, K, seed=seed)
        rest = randn(N, seed=1).abs(), kernels.row_sums(w), bits, 4, randn(N, seed=2), integers(-8, 7, N).int(), use
        assert torch.equal(kernels.int_linear(x, kernels.pack_int4(w), *rest), kernels.int_linear(x, w, *rest))

    @pytest.mark.parametrize("use", ["int_mm", "float"])
    def test_extreme_codes(self, use):
        """In fp32, where 16-fold sums go beyond 2²⁴."""
        K = 2**17
        x, w = torch.ones(2, K), torch.full((3, K), -8, dtype=torch.int8)
        x[:, 0] = -1
        args = torch.ones(3), kernels.row_sums(w), 4, 4, None, None, use
        assert torch.equal(kernels.int_linear(x, kernels.pack_int4(w), *args), kernels.int_linear(x, w, *args))


@pytest.mark.parametrize("M", [5, 300])
def test_each_state_gets_its_shift_behind_the_bias(M):
    x, w, state = randn(M, 32), integers(-8, 7, 20, 32), torch.arange(M) % 3 == 0
    args = randn(20, seed=1).abs(), kernels.row_sums(w), 4, 4
    bias, shift = randn(20, seed=2), randn(2, 20, seed=3)
    want = kernels.int_linear(x, w, *args) + bias + shift[state.long()]
    assert torch.equal(kernels.int_linear(x, w, *args, bias, shift=shift, state=state), want)
