"""The stressed model computes the same function, and its masked and unmasked activations have outlier channels."""

import json
from pathlib import Path

import pytest
import torch

from calibrate import run_block
from checkpoint.families import FUSED
from checkpoint.folder import sha256
from model import load_model
from runtime.processes import Refused
from tiny import stress

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture(family):
    """A tiny random checkpoint: LLaDA's layout, or Dream's with grouped queries and biases; and ids with [MASK]."""
    model = load_model(FIXTURES / family, "cpu", torch.float64)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (8, 16), generator=g)
    return model, torch.where(torch.rand(ids.shape, generator=g) < 0.5, model.mask_id, ids)


def linear_inputs(model, noisy):
    x, state, rope, _ = model.prepare(noisy)
    found = []
    for block in model.blocks:
        x, inputs = run_block(block, x, state, rope, watch=FUSED)
        found.append(inputs)
    return found, state


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("c", [3.0, 8.0, 1 / 6])
def test_the_function_stays_and_the_model_is_another(family, c):
    model, noisy = fixture(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stressed = stress.stress(model, c, noisy)
    other = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(5))
    for ids in (noisy, other):
        assert torch.allclose(stressed(ids), model(ids), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for old, new in zip(model.blocks, stressed.blocks, strict=True):
        assert all(not torch.equal(getattr(old, n).weight, getattr(new, n).weight) for n in FUSED)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_power_of_two_is_exact_in_16_bit(family):
    model, noisy = fixture(family)
    model = load_model(FIXTURES / family, "cpu", torch.bfloat16)
    stressed = stress.stress(model, 8.0, noisy)
    for old, new in zip(model.blocks, stressed.blocks, strict=True):
        for a, b in zip(old.parameters(), new.parameters(), strict=True):
            ratio = b.float() / a.float()
            assert set(ratio[a != 0].unique().tolist()) <= {8.0, 1.0, 1 / 8}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_most_state_disparate_channels_are_c_times_larger(family):
    model, noisy = fixture(family)
    (plain, state), (loud, _) = (linear_inputs(m, noisy) for m in (model, stress.stress(model, 5.0, noisy)))
    h, group = model.config.head_dim, model.config.n_heads // model.config.n_kv_heads
    for before, after in zip(plain, loud, strict=True):
        for name in FUSED:
            ratio = (after[name].square().sum((0, 1)) / before[name].square().sum((0, 1))).sqrt()
            scaled = ratio > 2
            assert torch.allclose(ratio[scaled], torch.tensor(5.0, dtype=ratio.dtype))
            assert torch.allclose(ratio[~scaled], torch.tensor(1.0, dtype=ratio.dtype))
            width = len(ratio) // (group if name == "out" else 1)
            assert int(scaled.sum()) == width // 32 * (group if name == "out" else 1)
            if name == "out":
                heads = scaled.view(-1, group, h)
                assert (heads == heads[:, :1]).all()  # the heads of a group share their value channel
            else:
                gap = (before[name][state].square().mean(0).sqrt() - before[name][~state].square().mean(0).sqrt()).abs()
                assert float(gap[scaled].min()) >= float(gap[~scaled].max())


@pytest.mark.parametrize(("name", "c", "words"), [("nothing", 8.0, "nothing"), (FIXTURES / "llada", -1.0, "positive")])
def test_refusals_write_nothing(tmp_path, name, c, words):
    with pytest.raises(Refused, match=words):
        stress.write_stressed(str(name), c, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_write_stressed_keeps_the_function(tmp_path, monkeypatch):
    model, noisy = fixture("llada")
    default = stress.stress
    monkeypatch.setattr(stress, "stress", lambda m, c: default(m, c, noisy))
    stress.write_stressed(str(FIXTURES / "llada"), 6.0, tmp_path / "s")
    assert json.loads((tmp_path / "s" / "config.json").read_text())["model_type"] == "llada"
    again = load_model(tmp_path / "s", "cpu", torch.float32)
    assert torch.allclose(again(noisy).double(), model(noisy), atol=1e-4)
    assert not torch.equal(again.blocks[0].attn_norm.weight.double(), model.blocks[0].attn_norm.weight)


def test_the_source_and_other_models_are_not_replaced(small_folder, tmp_path):
    before = sha256(small_folder / "model.safetensors")
    for source, c, out, words in ((small_folder, 8.0, small_folder, "is not this model stressed"),
                                  (small_folder, 1e39, tmp_path / "huge", "makes weights infinite")):
        with pytest.raises(Refused, match=words):
            stress.write_stressed(str(source), c, out)
    assert sha256(small_folder / "model.safetensors") == before
    assert not (tmp_path / "huge").exists()
    for _ in range(2):  # the same once more is written again
        stress.write_stressed(str(small_folder), 8.0, tmp_path / "s")
