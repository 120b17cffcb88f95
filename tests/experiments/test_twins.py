"""Checkpoints of published shape with random weights: they load, calibrate and hold what was planted."""

import json

import pytest
import torch
from arguments import fast

import bench
import calibrate
from checkpoint import published
from checkpoint.folder import Checkpoint
from model import load_model

SMALL = {
    "llada-8b": {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 6, "mlp_hidden_size": 96,
                 "vocab_size": 1100, "embedding_size": 1100, "mask_token_id": 1099, "eos_token_id": 1022},
    "dream-7b": {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 96, "vocab_size": 1100, "mask_token_id": 1099, "eos_token_id": 1022},
}


@pytest.fixture(params=SMALL)
def name(request, monkeypatch):
    monkeypatch.setitem(published.SHAPES, request.param, published.SHAPES[request.param] | SMALL[request.param])
    return request.param


def test_written_checkpoint_calibrates_from_text(name, tmp_path, capsys):
    folder, text = tmp_path / "twin", tmp_path / "text.txt"
    assert bench.main(["--model", name, "--random-weights", "--blocks", "2", "--gain", "40", "--write",
                       str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == sum(
        2 * torch.Size(s).numel() for s in Checkpoint(folder).shapes.values())
    model = load_model(folder, "cpu")
    assert len(model.blocks) == 2
    gains = model.blocks[1].ffn_norm.weight
    assert (int((gains == 40).sum()), int((gains == 1).sum())) == (published.OUTLIERS, 64 - published.OUTLIERS)
    assert float(model.blocks[0].down.weight.std()) == pytest.approx(0.02, rel=0.05)

    text.write_text("It was a bright cold day in April. " * 60)
    arguments = ["--model", str(folder), "--data", str(text), "--segments", "4", "--length", "16",
                 *fast("--out", str(tmp_path / "out"))]
    assert calibrate.main(arguments) == 0
    quantized, ids = load_model(tmp_path / "out", "cpu"), torch.arange(16)[None]
    assert quantized(ids).shape == (1, 16, 1100)
    assert bool(torch.isfinite(quantized(ids)).all())


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model", "gpt-2"], "shapes are known of"), (["--blocks", "33"], "between 1 and 32"),
    (["--blocks", "0"], "between 1 and 32")])
def test_refusals(arguments, words, tmp_path, capsys):
    assert bench.main(["--model", "llada-8b", *arguments, "--write", str(tmp_path / "new")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_filled_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert bench.main(["--model", "llada-8b", "--write", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
