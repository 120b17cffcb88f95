"""Training: the loss is the bound it claims to be, and the command makes a folder that loads and can be continued."""

import json
import math
import shutil

import pytest
import torch
from arguments import fast

import calibrate
from checkpoint.folder import sha256
from model import load_model
from tiny import train


def test_loss_is_the_weighted_cross_entropy_of_the_masked_tokens(small_folder):
    model = load_model(small_folder, "cpu")
    clean = torch.randint(1000, (3, 10), generator=torch.Generator().manual_seed(0))
    noisy, t = clean.clone(), torch.tensor([0.2, 0.5, 0.9])
    noisy[:, 4:7] = model.mask_id
    with torch.no_grad():
        logp = model(noisy).double().log_softmax(-1)
        want = sum(-logp[i, j, clean[i, j]] / t[i] for i in range(3) for j in (4, 5, 6)) / 30
        got = train.diffusion_loss(model, clean, noisy, (1 / t)[:, None].expand(3, 10), torch.tensor(30))
    assert math.isclose(got, want, rel_tol=1e-5)


def test_batches_are_determined_by_seed_and_step():
    tokenizer = load_model("tiny", "cpu").tokenizer
    for step in map(train.MIX.index, sorted({*train.MIX})):
        one, two = (train.training_batch(tokenizer, step, 256, 1023, 5) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        clean, noisy, weight, _ = one
        assert ((noisy == clean) | (noisy == 1023)).all()
        if train.MIX[step] == "chain":  # everything behind a cut is masked, the next four tokens are trained
            masked = noisy == 1023
            assert torch.equal(masked, masked.cummax(1).values)
            assert torch.equal(weight > 0, masked & (masked.cumsum(1) <= 4))
        else:
            assert (weight >= 1).all()


def test_command_trains_saves_and_continues(tmp_path, capsys):
    fast = ["--steps", "2", "--tokens", "256", "--device", "cpu"]
    train.main([*fast, "--out", str(tmp_path / "a")])
    train.main([*fast, "--out", str(tmp_path / "b")])
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")
    train.main([*fast, "--out", str(tmp_path / "c"), "--init", str(tmp_path / "a"), "--seed", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    record = json.loads((tmp_path / "c" / "training.json").read_text())
    assert record["steps"] == 4
    assert len(record["phases"]) == 2
    assert load_model(tmp_path / "c", "cpu").tokenizer.to_str() == load_model(tmp_path / "a", "cpu").tokenizer.to_str()
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--init", "/nowhere"], "neither a folder"),
    (["--steps", "0"], "--steps 0 is not between 1 and"),
    (["--tokens", "10"], "--tokens 10 is not between 96 and"),
    (["--device", "nope"], "device 'nope' is not available"),
    (["--minutes", "0"], "--minutes must be above 0"),
    (["--seed", "-1"], "--seed -1 is not between 0 and"),
    (["--out", "file"], "is not a folder")])
def test_bad_input_is_one_sentence_and_exit_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert train.main([*arguments, "--steps", "1"] if arguments[0] != "--steps" else arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_init_without_tokenizer_or_quantized_is_refused(small_folder, tmp_path, capsys):
    shutil.copytree(small_folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert train.main(["--init", str(tmp_path / "bare"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "has no tokenizer with" in capsys.readouterr().err
    assert calibrate.main(["--model", str(small_folder), "--out", str(tmp_path / "q"), "--segments", "4",
                           *fast("--method", "rtn")]) == 0
    assert train.main(["--init", str(tmp_path / "q"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "is quantized; give the 16-bit model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_history_is_trained_on(small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "old")
    (tmp_path / "old" / "training.json").unlink()
    assert train.main(["--init", str(tmp_path / "old"), "--steps", "1", "--tokens", "96", "--device", "cpu", "--out",
                       str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "training.json").read_text())["steps"] == 1


def test_what_is_there_is_not_replaced(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert train.main(["--steps", "1", "--tokens", "96", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    for out, sentence in (("file", "is not a folder"), ("sharded", "of another model")):
        assert train.main(["--steps", "1", "--tokens", "96", "--overwrite", "--out", str(tmp_path / out)]) == 2
        assert sentence in capsys.readouterr().err
