"""The one description of what a quantized model stores, against the modules, the files and the counts of bytes."""

import io
import json
import shutil
import sys

import pytest
import torch
from arguments import fast, quick
from safetensors.torch import load_file

import calibrate
from calibrate import quantize_model
from checkpoint import storage
from checkpoint.families import FUSED, NAMES, linear_shapes, read_config
from checkpoint.folder import INDEX, SINGLE
from checkpoint.loading import stored_bytes
from checkpoint.storage import Block, Linear, Tensor
from experiments import twins
from methods import METHODS, QuantConfig
from methods.storage import memory_table, stored_block
from model import DiffusionLM, load_model
from runtime import processes
from runtime.processes import Refused
from starquant import Across, Blocks, Dense, Diagonal, Kronecker

NAMED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8"}
VARIANTS = [*((m, {}) for m in METHODS), ("rtn", {"weights": "asymmetric", "wbits": 8}),
            ("starquant", {"transform": "dense", "tac": "none"}), ("starquant", {"transform": "none", "tac_block": 3}),
            ("starquant+", {"balance": "kronecker", "tac": "ridge"}), ("starquant+", {"balance": "dense"}),
            ("starquant+", {"balance_block": 16, "rounding": "nearest", "centre": "none"}),
            ("quarot", {"kv_bits": 4, "abits": 8}), ("dllmquant++", {"kv_bits": 4, "softmax_bits": 8})]


@pytest.fixture(scope="module")
def full(small_folder):
    return load_model(small_folder, "cpu").requires_grad_(False)


def tokens():
    return torch.randint(0, 99, (3, 12), generator=torch.Generator().manual_seed(0))


def described(tensors) -> dict:
    return {name: Tensor(tuple(t.shape), NAMED[t.dtype]) for name, t in tensors.items()}


def run(folder, out, *more) -> int:
    return calibrate.main(["--model", str(folder), "--out", str(out), "--segments", "3", "--length", "12",
                           *fast("--method", "rtn", *more, epochs=0)])


@pytest.mark.parametrize(("method", "settings"), VARIANTS)
def test_describes_the_modules_of_every_method(method, settings, full):
    config = quick(method, epochs=0, **settings)
    block = quantize_model(full, tokens(), config).blocks[1]
    want = stored_block(full.config, config)
    for name in FUSED:
        tensors = described(getattr(block, name).state_dict())
        assert want.linears[name].tensors() == tensors
        # and a folder's headers, which do not name the parts, are understood as the same
        (C, d), shapes = linear_shapes(full.config)[name], {k: t.shape for k, t in tensors.items()}
        read = Linear.read(shapes, C, d, config.wbits)
        assert read.factors == tuple(want.linears[name].factors)
        assert [*map(type, read.factors)] == [*map(type, want.linears[name].factors)]
        assert {k: t.shape for k, t in read.tensors().items()} == shapes
    got = {k: t for k, t in described(block.state_dict()).items() if "norm" not in k}
    assert {k: t for k, t in want.tensors(full.config).items() if "norm" not in k} == got


def test_memory_of_every_method_is_counted(full):
    for method in METHODS:
        calibrated = quantize_model(full, tokens(), quick(method, epochs=0))
        left_in_fp32 = sum(2 * p.numel() for p in calibrated.parameters())  # 2 bytes more than the table counts
        assert twins.residents(calibrated) == memory_table(full.config, method=method)["total"] + left_in_fp32


@pytest.mark.parametrize(("shapes", "factors"), [
    ({"transform_0": (64,), "transform_1P1": (8, 8), "transform_1P2": (8, 8)},
     (Diagonal((64,)), Kronecker((8, 8), (8, 8)))),
    ({"transform_0": (4, 16, 16), "transform_1": (4, 4)}, (Blocks((4, 16, 16)), Across((4, 4)))),
    ({"transform_0": (64, 64)}, (Dense((64, 64)),)),
    # shapes that do not fit the width 64: the description holds one that does, so that the checker refuses them
    ({"transform_0": (5, 64, 64)}, (Blocks((1, 64, 64)),)), ({"transform_0": (7, 7)}, (Across((64, 64)),)),
    ({"transform_0": ()}, (Across((64, 64)),)), ({"transform_0": (0,)}, (Diagonal((64,)),)),
    ({"transform_0P1": (9, 9), "transform_0P2": (8, 8)}, (Kronecker((64, 64), (1, 1)),)),
    ({"transform_0P1": (), "transform_0P2": (8, 8)}, (Kronecker((64, 64), (1, 1)),))])
def test_factors_are_read_from_headers(shapes, factors):
    assert Linear.read(shapes, 96, 64, 4).factors == factors


def test_blocks_of_tac_that_do_not_fill_the_width_are_described_as_one(full):
    c = full.config
    assert Block.read({"tac.M": (16, 4, 4), "tac.bias": (16, 4)}, c, 4).tac == 4
    assert Block.read({"tac.M": (12, 5, 5), "tac.bias": (12, 5)}, c, 4).tac == 64
    assert Block.read({"tac.bias": (12, 5)}, c, 4).tac == 64
    assert Block.read({}, c, 4).tac == 0


def test_outer_part_of_a_tied_model_is_one_matrix(full):
    raw = full.config.raw | {"weight_tying": True}
    names, c = NAMES["llada"], read_config(raw)
    assert list(storage.outer(c)) == [f"{names.embed}.weight", f"{names.final_norm}.weight"]
    assert list(storage.outer(c, 8, 8)) == [f"{names.embed}.weight_packed", f"{names.embed}.weight_scale",
                                            f"{names.final_norm}.weight"]


# ---- what is written, what is counted, what is said ------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--set", "head_bits=8"], ["--set", "head_bits=8", "--set", "embed_bits=4"],
                                  ["--method", "dllmquant++", "--set", "kv_bits=4"]])
def test_the_closing_table_counts_what_the_index_states(more, small_folder, tmp_path):
    assert run(small_folder, tmp_path / "q", *more) == 0
    size = json.loads((tmp_path / "q" / INDEX).read_text())["metadata"]["total_size"]
    for weights in ("packed", "int8"):
        assert stored_bytes(load_model(tmp_path / "q", "cpu", weights=weights)) == size
    assert stored_bytes(load_model(small_folder, "cpu")) == sum(
        t.nbytes for t in load_file(small_folder / SINGLE).values())


@pytest.mark.parametrize("more", [["--method", "starquant"], ["--method", "starquant+", "--wbits", "5"],
                                  ["--set", "head_bits=8", "--set", "embed_bits=4"],
                                  ["--method", "dllmquant++", "--set", "kv_bits=4"]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_is_saved_as_calibration_writes_it(more, tied, small_folder, tmp_path):
    source = small_folder
    if tied:
        source, more = tmp_path / "m", [m.replace("embed_bits=4", "embed_bits=8") for m in more]
        torch.manual_seed(0)
        DiffusionLM(read_config(json.loads((small_folder / "config.json").read_text()) | {"weight_tying": True})).save(
            source, torch.bfloat16)
        for name in ("tokenizer.json", "training.json"):
            shutil.copy(small_folder / name, source)
    assert run(source, tmp_path / "q", *more) == 0
    folders = [tmp_path / "q", tmp_path / "again", tmp_path / "int8"]
    load_model(folders[0], "cpu").save(folders[1])
    load_model(folders[0], "cpu", weights="int8").save(folders[2])
    shards = [sorted(p.name for p in folder.glob("*.safetensors")) for folder in folders]
    assert shards[0] == shards[1] == shards[2]
    assert len(shards[0]) == 3
    for name in shards[0]:
        want, *got = (load_file(folder / name) for folder in folders)
        for tensors in got:
            assert described(tensors) == described(want)
            assert all(torch.equal(tensors[k], want[k]) for k in want)
    want, *got = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert got == [want, want]
    ids = torch.tensor([[1, 2, 1023]])
    assert torch.equal(load_model(folders[1], "cpu")(ids), load_model(folders[0], "cpu")(ids))


def test_a_model_quantized_in_memory_is_saved_like_the_command_s(small_folder, tmp_path):
    assert run(small_folder, tmp_path / "q", "--set", "head_bits=8") == 0
    model = quantize_model(load_model(small_folder, "cpu"), tokens(), QuantConfig("rtn", head_bits=8))
    model.save(tmp_path / "again")
    config, again = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("q", "again"))
    assert config == again
    for path in (tmp_path / "q").glob("*.safetensors"):
        assert described(load_file(path)) == described(load_file(tmp_path / "again" / path.name))
    ids = torch.tensor([[1, 2, 1023]])
    assert torch.equal(load_model(tmp_path / "again", "cpu")(ids), model(ids))


def test_a_source_that_says_it_is_not_quantized_is_not(small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "m")
    raw = json.loads((small_folder / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | {"quantization_config": None, "auto_map": {"A": "b"}}))
    quantize_model(load_model(tmp_path / "m", "cpu"), tokens(), QuantConfig("rtn")).save(tmp_path / "q")
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written["quantization_config"]["method"] == "rtn"
    assert "auto_map" not in written


def test_a_save_never_leaves_two_models_in_a_folder(small_folder, full, tmp_path):
    quantized = quantize_model(full, tokens(), QuantConfig("rtn"))
    quantized.save(tmp_path / "q")
    with pytest.raises(Refused, match=f"holds {INDEX} of another model"):
        full.save(tmp_path / "q")
    shutil.copytree(small_folder, tmp_path / "full")
    with pytest.raises(Refused, match=f"holds {SINGLE} of another model"):
        quantized.save(tmp_path / "full")
    assert load_model(tmp_path / "full", "cpu").config == full.config


def test_quantized_layers_put_in_by_hand_are_refused(full, tmp_path):
    """Nothing says by which bits and gates they would be read."""
    with pytest.raises(Refused, match="no quantization_config"):
        twins.quantized_twin(full, head_bits=16).save(tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_an_index_beside_a_single_file_is_refused(small_folder, full, tmp_path):
    quantize_model(full, tokens(), QuantConfig("rtn")).save(tmp_path / "q")
    shutil.copy(small_folder / SINGLE, tmp_path / "q")
    with pytest.raises(Refused, match=rf"holds both {SINGLE} and {INDEX}") as refused:
        load_model(tmp_path / "q", "cpu")
    assert str(tmp_path / "q") in str(refused.value)


def test_equal_bits_of_a_tied_pair_are_no_contradiction(small_folder, tmp_path, capsys):
    raw = json.loads((small_folder / "config.json").read_text()) | {"weight_tying": True}
    DiffusionLM(read_config(raw)).save(tmp_path / "m", torch.bfloat16)
    for name in ("tokenizer.json", "training.json"):
        shutil.copy(small_folder / name, tmp_path / "m")
    assert run(tmp_path / "m", tmp_path / "q", "--set", "head_bits=8", "--set", "embed_bits=4") == 2
    assert "tied to its embedding, so embed_bits must equal head_bits" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert run(tmp_path / "m", tmp_path / "q", "--set", "head_bits=8", "--set", "embed_bits=8") == 0
    assert load_model(tmp_path / "q", "cpu").embed.bits == 8


def test_a_terminal_without_the_character_is_no_error(monkeypatch):
    """░ stands for a masked token; a Windows terminal in cp1252 has none."""
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="cp1252", write_through=True))
    assert processes.run("x", lambda args: print("a ░ b") or {}, None) == 0
    assert terminal.getvalue().splitlines()[0] == b"a ? b"
