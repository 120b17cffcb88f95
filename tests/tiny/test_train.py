"""Training: the loss is the bound it claims to be, and the command makes a folder that loads and can be continued."""

import json
import math

import torch

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
    for step in range(len(train.MIX)):
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
