"""Figures: the numbers behind them, on the embedded model with few passages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from experiments import figures, tables
from model import load_model

ROOT = Path(__file__).parents[2]


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
    x, state, rope, _ = tiny.prepare(ids)
    for block in tiny.blocks[: numbers["block"]]:
        x = block(x, state, rope)
    want = tiny.blocks[numbers["block"]].attn_norm(x)[state].square().mean().sqrt()
    assert numbers["rms"]["masked"][0] == pytest.approx(float(want), rel=1e-5)


def test_figure_3_is_zero_for_the_model_itself(tiny, monkeypatch):
    monkeypatch.setattr(figures, "VARIANTS", {"RTN": {"method": "rtn"}, "itself": {}})
    quantize = figures.quantize_model
    monkeypatch.setattr(figures, "quantize_model",
                        lambda m, t, c, r: quantize(m, t[:8], c, r[:8]) if c.method == "rtn" else m)
    monkeypatch.setitem(figures.LOOKS, "itself", figures.LOOKS["STaR-Quant"])
    _, numbers = figures.figure_3(tiny)
    assert set(numbers["itself"]["same"] + numbers["itself"]["own"]) == {0.0}
    assert min(numbers["RTN"]["same"]) > 1e-4
    assert numbers["RTN"]["same"][0] == numbers["RTN"]["own"][0]  # the first step's state is the same


def test_figure_4_quantiles_are_ordered(tiny):
    _, numbers = figures.figure_4(tiny)
    heights = torch.tensor([numbers[k] for k in ("median", "99 %", "99.9 %", "maximum")])
    assert bool((heights.diff(dim=0) > 0).all())


def test_figure_6_without_tables_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert evaluate.main(["--figure", "6", "--out", str(tmp_path)]) == 2
    assert "run evaluate.py --table first" in capsys.readouterr().err
    assert evaluate.main(["--figure", "hero", "--out", str(tmp_path)]) == 2
    assert "run evaluate.py --table 1" in capsys.readouterr().err
    row = {"setting": "RTN", "kl": [0.05, 0.04, 0.06]}
    (tmp_path / "table-1.json").write_text(json.dumps({"rows": [{"setting": "16-bit"}, row]}))
    assert evaluate.main(["--figure", "6", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path), "figure": "figure-6"}
    assert json.loads((tmp_path / "figure-6.json").read_text()) == {"RTN": {"W4A4": [0.05, 0.04, 0.06]}}
    assert (tmp_path / "figure-6.png").stat().st_size > 5000
    assert (tmp_path / "figure-6.svg").read_text().count("W4A4")


def test_the_published_picture_shows_every_row_of_table_1(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--figure", "hero"]) == 0
    numbers = json.loads((tmp_path / "out" / "figures" / "hero.json").read_text())
    assert list(numbers["plain"]) == list(numbers["stressed"]) == list(tables.SETTINGS)
    assert (tmp_path / "out" / "figures" / "hero.png").stat().st_size > 5000


def test_a_figure_carries_its_model_and_stress(small_folder, tmp_path):
    assert evaluate.main(["--figure", "4", "--model", str(small_folder), "--stress", "2", "--device", "cpu", "--out",
                          str(tmp_path)]) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"figure-4-small-stress2.{kind}" for kind in ("json", "png",
                                                                                                         "svg")]


def test_every_method_looks_the_same_everywhere_and_like_no_other():
    assert set(tables.SETTINGS) <= figures.LOOKS.keys()
    assert set(figures.VARIANTS) <= figures.LOOKS.keys()
    assert len({(look.color, look.linestyle) for look in figures.LOOKS.values()}) == len(figures.LOOKS)


def test_matplotlib_is_imported_for_figures_alone():
    code = "import sys, evaluate; evaluate.parse(['--table', '1']); print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
