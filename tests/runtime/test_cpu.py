"""The compiled path gives the bits of the readable one, or the readable one serves."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import integers, randn, seeds

from experiments.twins import plus_twin, quantized_twin
from model import load_model
from runtime import cpu
from runtime.layers import Centre, Grid, QuantLinear, Weight, quantize_weight
from starquant import Across, Blocks, Dense, Diagonal, Kronecker

ROOT = Path(cpu.__file__).parents[1]
FLAGS, AT_ONCE = cpu.FLAGS, ("-O0", *cpu.FLAGS[1:])  # which say what the bits are; compiling takes a sixth of the time


def can_compile() -> bool:
    """Whether the machine has what the file needs. A file that does not compile, or differs, fails its tests."""
    try:
        return cpu.load() is not None
    except OSError:  # no compiler
        return False
    except RuntimeError as error:
        return not any(lack in str(error) for lack in ("no integer dot product", "omp.h", "-fopenmp"))


compiled = pytest.mark.skipif(not can_compile(), reason="needs a C compiler with OpenMP and a processor that "
                              "cpu_kernels.c knows")


def linear(K, N, abits=4, wbits=4, symmetric=True, block=0, clip=False, bias=False, centre=False, gates=False, P=(),
           seed=0):
    rand = partial(randn, seed=seed)
    return QuantLinear(
        weight=quantize_weight(rand(N, K), wbits, symmetric), P=P, bias=rand(N) if bias else None,
        grid=Grid(abits, torch.tensor([0.8, 0.9]) if clip else None,
                  0.2 * rand(K // block, block, block) if block else None),
        d_m=K // 3 if gates else 0, d_u=K // 4 if gates else 0,
        centre=Centre(rand(2, K), rand(2, N)) if centre else None)


def states(M, seed=0):
    return integers(0, 1, M, seed=seed).bool()


def check(layer, x, state=None):
    """Both paths give the same bits, of which NaN's may differ, and leave x as it was."""
    before = x.clone()
    want = cpu.readable(layer, x, state)
    got = cpu.run(cpu.compiled(), layer, x, state)
    assert got.dtype == want.dtype == x.dtype
    assert torch.equal(torch.nan_to_num(got, 12345.0), torch.nan_to_num(want, 12345.0))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    return got


@compiled
class TestBits:
    @given(M=st.integers(1, 70), n=st.integers(1, 5), block=st.sampled_from([0, 1, 3, 8, 20, 64]), N=st.integers(1, 90),
           odd=st.integers(1, 60), abits=st.integers(2, 8), wbits=st.sampled_from([2, 3, 4, 5, 8]), clip=st.booleans(),
           symmetric=st.booleans(), bias=st.booleans(), centre=st.booleans(), gates=st.booleans(), seed=seeds,
           dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def test_of_the_readable_path(self, M, n, block, N, odd, abits, wbits, clip, symmetric, bias, centre, gates, dtype,
                                  seed):
        K = n * block or odd
        layer = linear(K, N, abits, wbits, symmetric, block, clip, bias, centre, gates, seed=seed)
        x = randn(M, K, seed=seed) * 4 * randn(M, 1, seed=seed + 1).exp()
        check(layer, x.to(dtype), states(M, seed))

    @pytest.mark.parametrize("M", [1, 7, 8, 9, 33, 128])
    @pytest.mark.parametrize("wbits", [4, 8])
    def test_of_wide_layers(self, M, wbits):
        check(linear(576, 200, wbits=wbits, block=64, clip=True, centre=True), randn(M, 576).bfloat16(), states(M))

    @given(n=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 24]), b=st.sampled_from([1, 5, 8, 12, 16, 64]),
           kinds=st.lists(st.sampled_from(["dense", "diagonal", "kronecker", "blocks", "across"]), max_size=3),
           M=st.integers(1, 40), half=st.booleans(), options=st.booleans(), seed=seeds)
    def test_behind_a_transform_of_whole_numbers(self, n, b, kinds, M, half, options, seed):
        """Whose sums are exact in every order."""
        draw = partial(integers, -2, 2, dtype=np.float32)
        P = [{"dense": lambda s: Dense(draw(n * b, n * b, seed=s)), "diagonal": lambda s: Diagonal(draw(n * b, seed=s)),
              "kronecker": lambda s: Kronecker(draw(n, n, seed=s), draw(b, b, seed=s + 9)),
              "blocks": lambda s: Blocks(draw(n, b, b, seed=s)), "across": lambda s: Across(draw(n, n, seed=s))
              }[kind](seed + i).to(torch.bfloat16 if half else torch.float32) for i, kind in enumerate(kinds)]
        layer = linear(n * b, 20, block=b * options, gates=options, P=P, seed=seed)
        check(layer, draw(M, n * b, seed=seed).to(torch.bfloat16 if half else torch.float32), states(M, seed))

    def test_behind_a_transform_of_real_numbers(self):
        """Sums that differ in their last bits move a code that stands between two."""
        layer = linear(576, 20, gates=True, P=[Kronecker(randn(24, 24), randn(24, 24, seed=1))])
        x, state = randn(100, 576), states(100)
        got, want = cpu.run(cpu.compiled(), layer, x, state), cpu.readable(layer, x, state)
        assert (got != want).any(1).sum() < 10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("method", ["starquant", "starquant+"])
    def test_of_the_logits_of_a_model(self, method, dtype, monkeypatch):
        """Its transforms permute channels and turn their signs, so that a sum has one number that is not 0."""
        model, g = quantized_twin(load_model("tiny", "cpu", dtype), embed_bits=8), torch.Generator().manual_seed(0)
        model = plus_twin(model) if method == "starquant+" else model
        for name, tensor in model.named_buffers():
            if "transform_" in name:
                n = tensor.shape[-1]
                tensor.copy_(torch.eye(n)[torch.randperm(n, generator=g)] * (2 * integers(0, 1, n) - 1))
        ids = torch.randint(model.mask_id, (2, 50), generator=g)
        ids[torch.rand(2, 50, generator=g) < 0.5] = model.mask_id
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "readable", lambda *_: pytest.fail("a linear that the C file does not serve"))
            logits = model(ids)
        monkeypatch.setattr(cpu, "compiled", lambda: None)
        assert torch.equal(model(ids), logits)
        assert logits.isfinite().all()

    def test_a_factor_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"a Kronecker factor of \(6, 6\), \(8, 8\) does not fit a width of 50"):
            cpu.linear(linear(50, 20, P=[Kronecker(randn(6, 6), randn(8, 8, seed=1))]), randn(9, 50))

    def test_of_packed_and_unpacked_weights(self):
        layer, x = linear(95, 40, bias=True), randn(10, 95)
        assert torch.equal(check(layer, x), check(copy.deepcopy(layer).unpack_weights(), x))

    def test_of_the_largest_sums(self):
        """Packed codes count 16-fold, which int32 holds up to `WIDEST` channels."""
        codes = torch.full((3, cpu.WIDEST), -8, dtype=torch.int8)
        x = torch.ones(2, cpu.WIDEST)
        x[1, 0] = -1
        check(QuantLinear(weight=Weight(codes, torch.ones(3)), grid=Grid(8)), x)

    @pytest.mark.parametrize("value", [0.0, -0.0, 1e-41, 1e38, 3e38, -3e38, float("inf"), -float("inf")])
    @pytest.mark.parametrize("block", [0, 8])
    def test_of_awkward_numbers(self, value, block):
        x = randn(6, 32)
        x[1] = value
        x[2, 5] = value
        x[3] *= 1e-38
        x[4, ::2], x[4, 1::2] = value, -value
        x[5] = x[5].abs()
        check(linear(32, 5, block=block, clip=True), x)

    @pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7FFFFFFF, 0x7F800001, -1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("block", [0, 8])
    def test_a_token_with_nan_is_nan_and_no_other(self, bits, dtype, block):
        x = randn(20, 32)
        x[3, 7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        y = check(linear(32, 40, block=block, bias=True), x.to(dtype))
        assert y[3].isnan().all()
        assert not y[:3].isnan().any()
        assert not y[4:].isnan().any()

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_of_any_number_of_threads(self, threads, monkeypatch):
        layer, x, state = linear(128, 300, symmetric=False, block=64, centre=True), randn(50, 128), states(50)
        monkeypatch.setattr(cpu, "SMALL", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        check(layer, x, state)

    def test_a_small_product_takes_one_thread(self, monkeypatch):
        """Beside other work a second thread makes it up to sixty times as slow."""
        asked, layer = [], linear(192, 1152)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        for M in (64, 512):
            cpu.run(SimpleNamespace(linear=lambda *arguments: asked.append(arguments[-1])), layer, randn(M, 192), None)
        assert asked == [1, 2]

    def test_of_strided_tokens_and_of_none(self):
        layer = linear(24, 10, gates=True)
        x, state = randn(24, 14).t(), states(28)[::2]
        assert torch.equal(cpu.linear(layer, x, state), cpu.readable(layer, x, state))
        assert cpu.linear(layer, x[:0], state[:0]).shape == (0, 10)
        assert cpu.linear(layer, x[:0].reshape(2, 0, 24), state[:0].reshape(2, 0)).shape == (2, 0, 10)

    def test_without_a_state(self):
        check(linear(24, 10), randn(5, 24))

    def test_of_a_layer_in_16_bit(self):
        check(linear(64, 10, bias=True, centre=True, clip=True, block=8).bfloat16(), randn(5, 64).bfloat16(), states(5))


@compiled
class TestWhatIsKept:
    """A layer's addresses are those of its present tensors."""

    def test_tensors_that_are_replaced(self):
        layer, x = linear(64, 10, block=8, clip=True, bias=True), randn(5, 64)
        first = check(layer, x)
        layer.feedback = None
        second = check(layer, x)
        layer.clip = torch.tensor([0.5, 0.5])
        third = check(layer, x)
        layer.unpack_weights()
        assert torch.equal(check(layer, x), third)
        layer.abits = 8
        assert len({y.sum().item() for y in (first, second, third, check(layer, x))}) == 4

    def test_tensors_that_change_in_place(self):
        layer, x = linear(64, 10, bias=True), randn(5, 64)
        before = check(layer, x)
        layer.bias += 1
        layer.load_state_dict(linear(64, 10, bias=True, seed=5).state_dict() | {"bias": layer.bias})
        assert not torch.equal(check(layer, x), before)

    def test_copies(self):
        layer, x = linear(64, 10, bias=True), randn(5, 64)
        want, other = check(layer, x), copy.deepcopy(layer)
        layer.bias.zero_()
        assert torch.equal(check(other, x), want)

    def test_a_tensor_of_the_wrong_size_is_refused(self):
        layer = linear(64, 10, bias=True)
        layer.bias = torch.zeros(9)
        with pytest.raises(ValueError, match=r"bias of shape \(9,\) does not fit a linear of 64 to 10 channels"):
            cpu.linear(layer, randn(5, 64))


class TestWhoServes:
    @pytest.fixture
    def counted(self, monkeypatch):
        calls, readable = [], cpu.readable
        monkeypatch.setattr(cpu, "readable", lambda *args: calls.append(1) or readable(*args))
        return calls

    def test_the_readable_path_takes_other_dtypes(self, counted):
        assert cpu.linear(linear(24, 10), randn(5, 24).double()).dtype == torch.float64
        assert counted

    def test_the_readable_path_takes_wider_layers(self, counted, monkeypatch):
        monkeypatch.setattr(cpu, "WIDEST", 23)
        cpu.linear(linear(24, 10), randn(5, 24))
        assert counted

    @pytest.mark.parametrize("tensors", [{"centre": True}, {"gates": True}])
    def test_a_state_that_is_missing_is_an_error_and_no_crash(self, tensors):
        with pytest.raises((TypeError, AttributeError)):
            cpu.linear(linear(24, 10, **tensors), randn(5, 24))

    @pytest.mark.parametrize("tensors", [{"centre": True}, {"gates": True}])
    def test_a_state_of_other_tokens_is_an_error_and_no_crash(self, tensors):
        with pytest.raises((RuntimeError, IndexError)):
            cpu.linear(linear(24, 10, **tensors), randn(5, 24), states(4))

    @pytest.mark.parametrize("sizes", [(20, 5), (-1, 3), (3, -1)])
    def test_gates_that_do_not_fit_are_an_error_and_no_crash(self, sizes):
        layer = linear(24, 10)
        layer.d_m, layer.d_u = sizes
        with pytest.raises(ValueError, match="do not fit into 24"):
            cpu.linear(layer, randn(5, 24), states(5))

    @compiled
    def test_a_state_that_is_not_needed_is_not_read(self):
        layer, x = linear(24, 10), randn(5, 24)
        given = []
        library = SimpleNamespace(linear=lambda *arguments: given.append(arguments[2]))
        cpu.run(library, layer, x, states(3))
        cpu.run(library, linear(24, 10, gates=True), x, states(5))
        assert given[0] is None is not given[1]

    @compiled
    def test_another_tensor_at_the_same_address_is_another(self):
        layer, x = linear(24, 10, bias=True), randn(5, 24)
        cpu.linear(layer, x)
        layer.bias = layer.bias[:5]
        with pytest.raises(ValueError, match="bias of shape"):
            cpu.linear(layer, x)

    @compiled
    def test_the_compiled_path_takes_the_rest(self, counted):
        cpu.linear(linear(24, 10, gates=True, centre=True), randn(5, 24), states(5))
        cpu.linear(linear(24, 10), randn(5, 24).bfloat16())
        assert not counted


def test_new_storage_of_a_tensor_is_seen():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    layer, x = QuantLinear.fold(weight), torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    layer.weight_scale.data = 2 * layer.weight_scale.data
    assert torch.equal(layer(x), 2 * y)
