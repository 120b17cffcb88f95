"""What passes through a block: its streams, the inputs of its linears, and the files that keep them."""

import weakref
from pathlib import Path

import torch
from arguments import ids

import calibrate
from calibrate import QuantConfig, masked_copies, run_block
from calibration import preflight, streams
from checkpoint.families import FUSED
from model import load_model


def test_a_block_runs_no_further_than_the_input_that_is_wanted(small_folder):
    """An input is computed by a pass that ends at its linear, so qkv runs in four passes and down in one."""
    model, calls = load_model(small_folder, "cpu"), dict.fromkeys(FUSED, 0)
    noisy = ids(8, 24).clamp(max=900)
    x, state, rope, _ = model.prepare(noisy)
    for name in FUSED:
        getattr(model.blocks[0], name).register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1}))
    inputs = {name: streams.input_of(name, model.blocks[0], x, state, rope) for name in FUSED}
    assert list(calls.values()) == [4, 3, 2, 1]
    output, kept = run_block(model.blocks[0], x, state, rope, watch=FUSED)
    assert all(torch.equal(inputs[name], kept[name]) for name in FUSED)
    *_, y_fp = calibrate.quantize_block(model.blocks[0], x, x, state, rope, QuantConfig("rtn"), 0)
    assert torch.equal(y_fp, output)


def test_watch_returns_what_reaches_a_linear(small_folder):
    model, chunks = load_model(small_folder, "cpu"), []
    x, state, rope, _ = model.prepare(ids(5))
    with torch.no_grad(), model.blocks[0].register_forward_pre_hook(lambda _, args: chunks.append(len(args[0]))):
        whole, seen = run_block(model.blocks[0], x, state, rope, at_once=2, watch=("qkv", "down"))
        assert chunks == [2, 2, 1]
        assert torch.allclose(seen["qkv"], model.blocks[0].attn_norm(x))
        assert torch.allclose(whole, model.blocks[0](x, state, rope), atol=1e-5)
    assert seen["down"].shape == (5, 24, 96)


def test_streams_and_inputs_lie_in_files_of_that_folder(small_folder, tmp_path, monkeypatch):
    model, made = load_model(small_folder, "cpu"), []

    def record(*args, original=streams.activations):
        made.append(original(*args))
        return made[-1]

    for module in (calibrate, streams):
        monkeypatch.setattr(module, "activations", record)
    config = QuantConfig(method="dllmquant+")
    noisy = masked_copies(ids(8, 24), None, model.mask_id, config)
    whole = [r for *_, r in calibrate.calibrate_blocks(model, lambda: model.blocks, noisy, config)]
    in_memory = len(made)
    stream = calibrate.calibrate_blocks(model, lambda: model.blocks, noisy, config, spill=tmp_path)
    spilled = [r for *_, r in stream]
    assert [r["linears"] for r in whole] == [r["linears"] for r in spilled]
    files = [t.untyped_storage().filename for t in made]
    assert files[:in_memory] == [None] * in_memory
    assert {str(Path(f).parent) for f in files[in_memory:]} == {str(tmp_path)}
    # the stream; in each of 2 blocks confidence, the 16-bit output and 4 inputs, 4 inputs, the quantized output
    assert len(made) == 2 * in_memory == 2 * (1 + 2 * (1 + 5 + 4 + 1))


def test_most_bytes_at_once_are_what_the_preflight_says(small_folder, tmp_path, monkeypatch):
    model, live, most = load_model(small_folder, "cpu"), [], 0

    def record(*args, original=streams.activations):
        nonlocal most
        tensor = original(*args)
        live.append((weakref.ref(tensor), tensor.numel() * tensor.element_size()))
        most = max(most, sum(size for ref, size in live if ref() is not None))
        return tensor

    for module in (calibrate, streams):
        monkeypatch.setattr(module, "activations", record)
    config = QuantConfig(method="rtn")
    noisy = masked_copies(ids(8, 24), None, model.mask_id, config)
    list(calibrate.calibrate_blocks(model, lambda: model.blocks, noisy, config, spill=tmp_path))
    assert 0.7 * preflight.spilled_bytes(model.config, 8 * 24, 4) < most
    assert most <= preflight.spilled_bytes(model.config, 8 * 24, 4)
