"""A quantized block whose norms, SiLU and sums run inside its linears' kernels, against the lines of `model.Block`."""

import pytest
import torch
from kernel_checks import a_block

from calibration.streams import run_block
from runtime import checks, cuda, fusion, products
from runtime.layers import rebuilt


@pytest.fixture
def launched(on_cpu, monkeypatch):
    """The names of the kernels that were launched; all of them serve."""
    names, launch = [], cuda._launch
    monkeypatch.setattr(cuda, "_launch", lambda name, *rest, **kwargs: (names.append(name),
                                                                        launch(name, *rest, **kwargs)))
    monkeypatch.setattr(checks, "glues", lambda *_: True)
    monkeypatch.setattr(products, "serves", lambda *_: True)
    monkeypatch.setattr(products, "slice_width", lambda M, N, *_: N)
    return names


@pytest.mark.parametrize(("method", "dtype", "kernels"), [
    ("starquant", torch.bfloat16, ["rotated_codes"]), ("starquant", torch.float32, ["quantize_rows"]),
    ("starquant+", torch.bfloat16, ["centred_blocks", "rotated_codes", "feedback"])])
def test_a_block_is_the_same_in_fewer_kernels(launched, monkeypatch, method, dtype, kernels):
    block, inputs = a_block(method, dtype)
    fused = block(*inputs)
    few = list(launched)
    launched.clear()
    monkeypatch.setattr(fusion, "serves", lambda *_: False)
    assert torch.equal(fused, block(*inputs))
    linears, glue = 4 * (*kernels, "unpack_int4", "epilogue"), ["rms_norm", "rms_norm", "rope", "silu_up"]
    assert sorted(launched) == sorted([*linears, *glue])
    # what no kernel for codes can take first: a norm where blocks of 64 come first, all where codes are made in fp32
    apart = {"starquant": [], "starquant+": glue[:2]}[method] if dtype == torch.bfloat16 else [*glue[:2], "silu_up"]
    assert sorted(few) == sorted([*linears, "rope", *apart])


@pytest.mark.parametrize("P", ["a mean", "across"])
def test_what_comes_before_a_linear_runs_by_itself_where_its_kernels_cannot(launched, P):
    """A mean without blocks is taken off between them; a rotation across blocks takes what it is given."""
    block, (x, state, _) = a_block("starquant+", torch.bfloat16)
    linear, before = block.qkv, cuda.Before(block.attn_norm.weight, block.attn_norm.eps)
    linear.kinds, linear.mean = linear.kinds[1:], linear.mean if P == "a mean" else None
    linear.transform_0 = linear.transform_1
    y = products.linear(linear, x, state, before, residual=block.qkv(x, state))
    assert launched.count("rms_norm") == 1
    assert torch.equal(y, block.qkv(x, state) + linear(block.attn_norm(x), state))


def test_who_watches_a_part_of_a_block_sees_it(launched):
    block, (x, state, rope) = a_block("starquant", torch.bfloat16)
    assert fusion.serves(block, x)
    out, seen = run_block(block, x, state, rope, watch=("out", "gate_up"))
    assert seen["gate_up"].shape == x.shape
    assert torch.equal(out, block(x, state, rope))
    hook = block.ffn_norm.register_forward_hook(lambda *_: None)
    assert not fusion.serves(block, x)
    hook.remove()
    assert fusion.serves(block, x)
    assert not fusion.serves(rebuilt(block, down=torch.nn.Linear(4, 4)), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fusion.serves(block, x)
