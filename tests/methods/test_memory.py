"""What a quantized model takes: the table of its bytes against real tensors, and embedding and head in integers."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arguments import quick
from hypothesis import given
from hypothesis import strategies as st
from references import fake_quantized

from calibrate import quantize_model
from checkpoint import published
from checkpoint.families import FUSED, NAMES, read_config
from checkpoint.folder import SINGLE, write_json, write_tensors
from checkpoint.loading import block_tensors, outer_tensors
from experiments import twins
from methods.rtn import quantize_outer
from methods.storage import memory_table
from model import DiffusionLM, load_model
from runtime.layers import QuantEmbedding, quantize_weight

ROOT = Path(__file__).parents[2]
FIXTURES = {name: str(ROOT / "tests" / "fixtures" / name) for name in ("llada", "dream")}


def quantized(name, head_bits=8, embed_bits=None):
    model = load_model(FIXTURES[name], device="cpu", dtype=torch.bfloat16).requires_grad_(False)
    return twins.quantized_twin(model, 0, head_bits, embed_bits)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FIXTURES))
@pytest.mark.parametrize(("head_bits", "embed_bits"), [(16, None), (8, None), (8, 4)])
@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_memory_table_counts_the_bytes_of_a_real_model(name, head_bits, embed_bits, weights):
    model = quantized(name, head_bits, embed_bits)
    model = twins.unpacked(model) if weights == "int8" else model
    sizes = memory_table(model.config, head_bits=head_bits, embed_bits=embed_bits, weights=weights)
    assert sizes["total"] == twins.residents(model)
    packed = [getattr(b, f).weight_packed.nbytes for b in model.blocks for f in FUSED]
    assert sizes["linears"] == sum(packed)
    assert sizes["sixteen_bit"] == twins.residents(load_model(FIXTURES[name], device="cpu", dtype=torch.bfloat16))
    plus = memory_table(model.config, head_bits=head_bits, embed_bits=embed_bits, weights=weights, method="starquant+")
    assert plus["total"] == twins.residents(twins.plus_twin(model))
    ids = torch.tensor([[1, 5, model.mask_id, 7]])
    assert torch.equal(twins.plus_twin(model)(ids), twins.plus_twin(quantized(name, head_bits, embed_bits))(ids))


@pytest.mark.parametrize("name", [*FIXTURES, "tiny"])
def test_memory_table_counts_the_bytes_of_a_calibrated_model(name):
    model = DiffusionLM(replace(load_model(FIXTURES.get(name, name), device="cpu").config, n_layers=1))
    tokens = torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    for method in ("starquant", "starquant+"):
        calibrated = quantize_model(model, tokens, quick(method, epochs=0))
        sixteen_bit = twins.residents(model.embed) + (not model.config.tied) * twins.residents(model.head)
        want = memory_table(model.config, method=method)
        assert twins.residents(calibrated) == want["total"] + fp32_norms(calibrated) + sixteen_bit // 2  # fp32 here


# bytes that the published index files state as total_size
@pytest.mark.parametrize(("name", "size"), [("llada-8b", 16031162368), ("dream-7b", 15231233024)])
def test_sixteen_bit_size_is_the_published_one(name, size):
    assert memory_table(read_config(published.SHAPES[name]))["sixteen_bit"] == size


@pytest.mark.parametrize(("name", "method", "embed_bits"), [
    ("llada-8b", "starquant", 8), ("llada-8b", "starquant", 4), ("dream-7b", "starquant", 4),
    ("llada-8b", "starquant+", 4), ("dream-7b", "starquant+", 4)])
def test_saving_at_published_shapes(name, method, embed_bits):
    """Dream with 8-bit embedding and head stays at 3.48x: its vocabulary is 14 % of the model, so 3.5x needs less;
    what `starquant+` adds needs it, too."""
    sizes = memory_table(read_config(published.SHAPES[name]), head_bits=8, embed_bits=embed_bits, method=method)
    assert sizes["sixteen_bit"] / sizes["total"] >= 3.5


# ---- embedding and head in integers --------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 33), st.sampled_from([4, 8]))
def test_embedding_rounds_each_row_to_its_own_grid(seed, V, D, bits):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(V).flip(0)[None]
    codes, scale, zero = quantize_weight(weight, bits)[:3]
    assert zero is None
    out = QuantEmbedding.fold(weight, bits)(ids)[0]
    assert torch.equal(out, scale.flip(0)[:, None] * codes.flip(0))
    assert ((out - weight.flip(0)).abs() <= scale.flip(0)[:, None] * 0.5001).all()


@pytest.mark.parametrize("name", list(FIXTURES))
@pytest.mark.parametrize("embed_bits", [None, 4])
def test_integer_head_survives_a_checkpoint(tmp_path, name, embed_bits):
    model = load_model(FIXTURES[name], device="cpu").requires_grad_(False)
    model = twins.quantized_twin(model, 0, 8, embed_bits)
    write_quantized(model, tmp_path, embed_bits or 8)
    for weights in ("packed", "int8"):
        again = load_model(tmp_path, device="cpu", weights=weights)
        ids = torch.tensor([[1, 5, model.mask_id, 7, model.mask_id]])
        assert torch.equal(again(ids), model(ids))
        assert twins.residents(again) == memory_table(model.config, head_bits=8, embed_bits=embed_bits,
                                                      weights=weights)["total"] + fp32_norms(again)


def fp32_norms(model) -> int:
    """Norm gains are fp32 in a model loaded for the CPU: two bytes more each than the table counts."""
    return sum(2 * m.weight.numel() for m in model.modules() if type(m).__name__ == "RMSNorm")


def write_quantized(model, folder, embed_bits):
    c, tensors = model.config, outer_tensors(model)
    for i, block in enumerate(model.blocks):
        tensors |= block_tensors(block, i)
    write_tensors(folder / SINGLE, tensors)
    gates = {f: {"d_m": getattr(model.blocks[0], f).d_m, "d_u": getattr(model.blocks[0], f).d_u} for f in FUSED}
    write_json(folder / "config.json", c.raw | {"quantization_config": {
        "weight_bits": 4, "activation_bits": 4, "head_bits": 8, "embed_bits": embed_bits,
        "linears": gates}})


def test_integer_head_is_the_float_head_up_to_two_8_bit_roundings():
    model = load_model(FIXTURES["llada"], device="cpu").requires_grad_(False)
    hidden = model.hidden(torch.arange(40)[None] % 200)
    want, head = model.head(hidden), quantize_outer(model).head
    got = head(hidden)
    assert torch.allclose(got, fake_quantized(head, hidden), rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    # a uniform 8-bit grid over 6.5 standard deviations leaves (6.5 / 255)² / 12 of the energy: 43 dB, twice: 40 dB
    assert 10 * (want.square().sum() / (want - got).square().sum()).log10() > 37


def test_tied_head_shares_the_embedding():
    model = load_model(FIXTURES["llada"], device="cpu").requires_grad_(False)
    model.config = copy.copy(model.config)
    object.__setattr__(model.config, "tied", True)
    model.head.weight = model.embed.weight
    quantize_outer(model, 8)
    assert model.head.weight_packed is model.embed.weight_packed
    assert not any(k.startswith(NAMES["llada"].head) for k in outer_tensors(model))


LOAD = """
import resource, sys, torch
from model import load_model
torch.set_num_threads(1)
load_model(sys.argv[1], device="cpu", dtype=torch.bfloat16)  # libraries and buffers that stay
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[2], device="cpu", dtype=torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_while_loading(tmp_path):
    """The process grows by at most 1.2x of the model, counting the file's pages, which a CPU maps into it, too."""
    raw = published.LLADA_8B | {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "n_layers": 24, "mlp_hidden_size": 1536,
                          "vocab_size": 16000, "embedding_size": 16000, "mask_token_id": 15000, "eos_token_id": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.SHAPES, "small", raw)
        model = twins.random_model("small", torch.device("cpu"), torch.bfloat16, 0)
    model = twins.quantized_twin(model)
    write_quantized(model, tmp_path, 8)
    done = subprocess.run([sys.executable, "-c", LOAD, FIXTURES["llada"], str(tmp_path)], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    assert int(done.stdout) * 1024 <= 1.2 * twins.residents(model)
