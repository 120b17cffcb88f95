"""Figures: the numbers behind them, on the embedded model with few passages."""

import importlib
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import evaluate
from experiments import animation, figures
from experiments.rows import SETTINGS
from model import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch, request):
    monkeypatch.setattr(figures, "PASSAGES", 2)
    if "tiny" in request.fixturenames and not request.cls:  # TestDenoising is about a whole answer
        monkeypatch.setattr(figures, "WRITTEN", 12)
    yield
    figures.plt.close("all")


def test_states_run_from_all_masked_to_one_masked(tiny):
    states = figures.denoising_states(tiny, figures.prompts_for(tiny))
    masked = [int((ids == tiny.mask_id).sum()) for ids in states]
    assert masked == [2 * n for n in range(figures.WRITTEN, 0, -1)]


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
                        lambda m, t, c, r, _: quantize(m, t[:8], c, r[:8]) if c.method == "rtn" else m)
    monkeypatch.setitem(figures.LOOKS, "itself", figures.LOOKS["STaR-Quant"])
    _, numbers = figures.figure_3(tiny)
    assert set(numbers["itself"]["same"] + numbers["itself"]["own"]) == {0.0}
    assert min(numbers["RTN"]["same"]) > 1e-4
    assert numbers["RTN"]["same"][0] == numbers["RTN"]["own"][0]  # the first step's state is the same


def test_figure_4_quantiles_are_ordered(tiny):
    _, numbers = figures.figure_4(tiny)
    heights = torch.tensor([numbers[k] for k in ("median", "99 %", "99.9 %", "maximum")])
    assert bool((heights.diff(dim=0) > 0).all())


def test_the_root_mean_squares_are_drawn_from_zero_and_the_block_is_named(tiny):
    figure, numbers = figures.figure_1(tiny)
    assert figure.axes[4].get_ylim()[0] == 0
    assert figure.axes[4].get_ylim()[1] > max(numbers["rms"]["masked"])
    assert f"block {numbers['block'] + 1} of {len(tiny.blocks)}" in figure.get_suptitle()


@pytest.mark.parametrize("number", ["3", "5"])
def test_the_published_numbers_are_drawn_whole(number):
    numbers = json.loads((ROOT / "results" / "figures" / f"figure-{number}.json").read_text())
    figure = getattr(figures, f"draw_{number}")(numbers)
    lines = [list(line.get_ydata()) for axis in figure.axes for line in axis.get_lines() if len(line.get_ydata()) > 2]
    if number == "3":
        assert lines == [values[kind] for kind in ("same", "own") for values in numbers.values()]
        assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    else:  # one panel a linear, one place a block
        assert lines == [[100 * v for v in shares[i::4]] for i in range(4) for shares in numbers.values()]


def test_no_mark_of_figure_6_hides_another():
    figure, points = figures.figure_6()
    drawn = [c.lines[0].get_xydata()[0].tolist() for c in figure.axes[0].containers]
    assert len(drawn) == len({x for x, _ in drawn}) == sum(map(len, points.values()))
    assert sorted(y for _, y in drawn) == sorted(v[0] for values in points.values() for v in values.values())


def test_figure_passes_draws_a_curve_a_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert evaluate.main(["--figure", "passes", "--out", str(tmp_path)]) == 2
    assert "passes.json does not exist" in capsys.readouterr().err
    numbers = {"threshold": [0.5, 0.9, 1.0], "methods": {"16-bit": {"passes": [3, 5, 24], "accuracy": [0.8, 0.9, 0.95]},
                                                         "RTN": {"passes": [4, 9, 24], "accuracy": [0.5, 0.6, 0.7]}}}
    (tmp_path / "passes.json").write_text(json.dumps(numbers))
    axis = figures.figure_passes()[0].axes[0]
    assert [line.get_xydata().tolist() for line in axis.get_lines()] == [
        [[3, 80], [5, 90], [24, 95]], [[4, 50], [9, 60], [24, 70]]]
    assert [text.get_text() for text in axis.texts] == ["τ = 0.5", "τ = 0.9", "τ = 1"]


class TestDenoising:
    def test_every_token_appears_in_its_pass_and_ends_as_text(self, tiny, monkeypatch):
        monkeypatch.setattr(figures, "quantize_model", lambda model, *_: model)
        svg, panels = figures.figure_denoising(tiny)
        assert [panel["title"] for panel in panels] == ["16 bit", "RTN, W4A4", "STaR-Quant, W4A4"]
        assert panels[1]["tokens"] == panels[0]["tokens"]
        assert "".join(panels[0]["tokens"]).rstrip("·") == "4*6=24⏎24-5=19⏎#### 19"
        assert sorted(panels[0]["when"]) == list(range(figures.WRITTEN))
        root = ElementTree.fromstring(svg)
        texts = [t for t in root.findall(".//{*}text") if "textLength" in t.attrib]
        assert "".join(t.text for t in texts) == 3 * "".join(t for t in panels[0]["tokens"] if t.strip())
        boxes = [r.get("class") for r in root.findall(".//{*}rect") if "b " in r.get("class", "")]
        assert boxes == [f"b b{n}" for panel in panels for n in panel["when"]]
        assert svg.count(">right<") == 3

    def test_it_is_small_stands_alone_and_is_what_is_published(self):
        folder = ROOT / "results" / "figures"
        svg = (folder / "denoising.svg").read_text()
        panels = [animation.Panel(**panel) for panel in json.loads((folder / "denoising.json").read_text())]
        assert animation.picture(figures.QUESTION, panels, figures.WRITTEN) == svg
        assert len(svg) < 60_000
        assert not re.search(r"<script|<image|@import|url\(|href", svg)
        assert figures.QUESTION in (ROOT / "README.md").read_text()

    def test_what_differs_is_red_and_a_full_line_goes_on_below(self):
        wrong = [False, True, False, False]
        panel = animation.Panel("RTN", ["12", "345", "⏎", "<"], [2, 0, 1, 3], wrong, "wrong", right=False)
        assert [place for *_, place, row in animation.placed(panel, 4)] == [0, 0, 3, 0]
        assert [row for *_, row in animation.placed(panel, 4)] == [0, 1, 1, 2]
        svg = animation.picture("A & B", [panel], 4)
        assert 'class="t t0 w"' in svg
        assert "A &amp; B" in svg
        assert ">&lt;<" in svg
        assert "@keyframes b2{0%{opacity:1}" + f"{animation.at(2, 4)}{{opacity:1;fill:#9e6a03}}" in svg


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
    assert list(numbers["plain"]) == list(numbers["stressed"]) == list(SETTINGS)
    assert (tmp_path / "out" / "figures" / "hero.png").stat().st_size > 5000
    svg = tmp_path / "out" / "figures" / "hero.svg"
    drawn = svg.read_bytes()
    assert evaluate.main(["--figure", "hero"]) == 0
    assert svg.read_bytes() == drawn  # its names of marks and clips, too


def test_a_figure_carries_its_model_and_stress(small_folder, tmp_path):
    assert evaluate.main(["--figure", "4", "--model", str(small_folder), "--stress", "2", "--device", "cpu", "--out",
                          str(tmp_path)]) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"figure-4-small-stress2.{kind}" for kind in ("json", "png",
                                                                                                         "svg")]


def test_every_method_looks_the_same_everywhere_and_like_no_other():
    assert set(SETTINGS) <= figures.LOOKS.keys()
    assert set(figures.VARIANTS) <= figures.LOOKS.keys()
    assert len({(look.color, look.linestyle) for look in figures.LOOKS.values()}) == len(figures.LOOKS)


def test_matplotlib_is_imported_for_figures_alone(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] in ("evaluate", "experiments"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    fresh = importlib.import_module("evaluate")
    assert fresh is not evaluate
    assert fresh.parse(["--table", "1"]).table == "1"
    with pytest.raises(ImportError, match="matplotlib"):
        importlib.import_module("experiments.figures")
