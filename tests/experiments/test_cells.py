"""Cells: what determines one, and the text that it is calibrated on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.folder import write_json
from experiments.cells import Run, digest, switch_gates_off, weights_digest
from experiments.rows import NO_TAC, RTN
from runtime.layers import Grid, QuantLinear, Weight
from runtime.processes import Refused
from tiny import metrics


def test_sequences_and_problems_are_counted_apart():
    run = Run("tiny", 1.0, 1, False, "cpu", segments=8, sequences=2)
    values = run.measure(RTN, 10)
    assert [len(values[k]) for k in ("nelbo", "kl", "math", "code", "cloze")] == [6, 6, 1, 1, 1]
    # the same sequences as with two problems
    more = metrics.scores(run.model(), 2, 10, quick=True)[0]["nelbo"]
    torch.testing.assert_close(run.reference(10)[0]["nelbo"], more, rtol=1e-4, atol=1e-5)
    assert run.key({}, 1) != Run("tiny", 1.0, 1, False, "cpu", segments=8).key({}, 1)


def test_what_determines_a_cell_is_in_its_key():
    run = Run("tiny", 1.0, 2, True, "cpu")
    keys = {digest(run.key(s, seed)) for s in ({}, NO_TAC, {"gates": "off"}, None) for seed in (1, 2)}
    others = (Run("tiny", 8.0, 2, True, "cpu"), Run("tiny", 1.0, 3, True, "cpu"),
              Run("tiny", 1.0, 2, False, "cpu"), Run("tiny", 1.0, 2, True, "cpu", segments=32),
              Run("tiny", 1.0, 2, True, "cpu", sequences=3), Run("tiny", 1.0, 2, True, "cuda:1"))
    assert len(keys | {digest(r.key({}, 1)) for r in others}) == 14
    assert others[-1].key({}, 1) == Run("tiny", 1.0, 2, True, "cuda").key({}, 1)
    assert run.key({"tac_block": 16}, 1) == run.key({}, 1)  # a default, written out


def test_calibration_text_is_what_the_row_says():
    run = Run("tiny", 1.0, 2, True, "cpu", segments=8)
    ids, region = run.calibration_set({"text": "random", "segments": 5}, 1)
    assert ids.shape == region.shape == (5, 64)
    assert region.all()
    assert int(ids.max()) < run.model().mask_id
    english, _ = run.calibration_set({"text": "english"}, 1)
    own, region = run.calibration_set({}, 1)
    assert english.shape == own.shape == (8, 64)
    assert not region.all()  # prompts are not masked


def test_gates_off_is_all_of_the_same_basis():
    codes = torch.ones(4, 8, dtype=torch.int8)
    layer = QuantLinear(weight=Weight(codes, torch.ones(4)), grid=Grid(), P=[torch.eye(8)], d_m=2, d_u=2)
    model = torch.nn.Sequential(layer)
    x, state = torch.ones(3, 8), torch.tensor([True, False, True])
    assert float(layer(x, state).amax()) == pytest.approx(6)
    switch_gates_off(model)
    assert float(layer(x, state).amin()) == pytest.approx(8)


def test_shards_have_a_digest_as_one_file_has(small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    run = Run(str(folder), 1.0, 2, True, "cpu")
    tensors, key = load_file(folder / "model.safetensors"), run.key({}, 1)
    weights_digest.cache_clear()
    names = {name: f"model-{i:05d}-of-{len(tensors) - 1:05d}.safetensors" for i, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    (folder / "model.safetensors").unlink()
    run.check()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Refused, match=r"has no tokenizer\.json"):
        run.check()
    assert run.key({}, 1)["weights"] != key["weights"]
