"""Figures: the numbers behind them, on the embedded model with few passages."""

import json

import pytest
import torch

from experiments import figures
from model import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(figures, "PASSAGES", 4)
    yield
    figures.plt.close("all")


def test_states_run_from_all_masked_to_one_masked(tiny):
    states = figures.denoising_states(tiny, figures.prompts_for(tiny))
    masked = [int((ids == tiny.mask_id).sum()) for ids in states]
    assert masked == [4 * n for n in range(figures.WRITTEN, 0, -1)]


def test_figure_1_measures_the_linears_input(tiny):
    _, numbers = figures.figure_1(tiny)
    ids = figures.denoising_states(tiny, figures.prompts_for(tiny))[0]
    x, state, table, _ = tiny.prepare(ids)
    for block in tiny.blocks[: numbers["block"]]:
        x = block(x, state, table)
    want = tiny.blocks[numbers["block"]].attn_norm(x)[state].square().mean().sqrt()
    assert numbers["rms"]["masked"][0] == pytest.approx(float(want), rel=1e-5)


def test_figure_3_is_zero_for_the_model_itself(tiny, monkeypatch):
    monkeypatch.setattr(figures, "VARIANTS", {"RTN": figures.VARIANTS["RTN"], "itself": ({}, figures.RED, "s")})
    quantize = figures.quantize_model
    monkeypatch.setattr(figures, "quantize_model",
                        lambda m, t, c, r: quantize(m, t[:8], c, r[:8]) if c.method == "rtn" else m)
    _, numbers = figures.figure_3(tiny)
    assert set(numbers["itself"]["same"] + numbers["itself"]["own"]) == {0.0}
    assert min(numbers["RTN"]["same"]) > 1e-4
    assert numbers["RTN"]["same"][0] == numbers["RTN"]["own"][0]  # the first step's state is the same


def test_figure_4_quantiles_are_ordered(tiny):
    _, numbers = figures.figure_4(tiny)
    heights = torch.tensor([numbers[k] for k in ("median", "99 %", "99.9 %", "maximum")])
    assert bool((heights.diff(dim=0) > 0).all())


def test_figure_6_without_tables_says_so(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.main(["--only", "6", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "run evaluate.py --table first" in capsys.readouterr().err
    row = {"setting": "RTN", "kl": [0.05, 0.04, 0.06]}
    (tmp_path / "table-1.json").write_text(json.dumps({"rows": [{"setting": "16-bit"}, row]}))
    assert figures.main(["--only", "6", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "figure-6.json").read_text()) == {"RTN": {"W4A4": [0.05, 0.04, 0.06]}}
    assert (tmp_path / "figure-6.png").stat().st_size > 5000
    assert (tmp_path / "figure-6.svg").read_text().count("W4A4")
