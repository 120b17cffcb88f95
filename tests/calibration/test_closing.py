"""The closing table of a model that knows no tasks: held-out segments of its text, the models read block by block."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import calibrate
import evaluate
from calibrate import QuantConfig, quantize_model
from calibration import closing
from calibration.closing import SEED
from calibration.segments import calibration_texts, held_out_segments, text_segments
from model import load_model
from runtime.measures import bootstrap
from tiny import metrics, tasks


@pytest.fixture(scope="module")
def folder(small_folder, tmp_path_factory):
    """A model of a family that is read, without the embedded tasks, beside texts of two lengths."""
    here = tmp_path_factory.mktemp("foreign")
    shutil.copytree(small_folder, here / "m")
    (here / "m" / "training.json").unlink()
    text = tasks.english_documents("eval")[0]
    (here / "long.txt").write_text(text[:20000])
    (here / "short.txt").write_text(text[:500])
    return here


def run(folder, text, out, *more):
    return calibrate.main(["--model", str(folder / "m"), "--data", str(folder / text), "--out", str(out), "--length",
                           "24", "--segments", "9", "--device", "cpu", "--method", "quarot", *more])


@pytest.mark.parametrize(("dtype", "head_bits"), [("fp32", 16), ("bf16", 16), ("fp32", 8)])
def test_it_is_what_the_whole_models_give(dtype, head_bits, folder, tmp_path, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(closing, "load_outer", lambda *a, load=closing.load_outer: loaded.append(a[0]) or load(*a))
    more = "--problems", "5", "--dtype", dtype, "--set", f"head_bits={head_bits}"
    assert run(folder, "long.txt", tmp_path / "q", *more) == 0
    assert len(loaded) == (1 if head_bits == 16 else 2)  # in 16 bit, the models share embedding and head
    out = capsys.readouterr().out
    rows = {row["model"]: row for row in json.loads(out.splitlines()[-1])["table"]}
    assert list(rows) == ["16-bit", "RTN W4A4", "quarot W4A4"]
    assert "On 5 segments of 24 tokens" in out
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    full = load_model(folder / "m", "cpu", dtype)
    segments = held_out_segments(full.tokenizer, calibration_texts(str(folder / "long.txt")), 5, 24, SEED, (9, 0))
    whole = torch.ones_like(segments, dtype=torch.bool)
    models = {"RTN W4A4": quantize_model(full, segments, QuantConfig("rtn")),
              "quarot W4A4": load_model(tmp_path / "q", "cpu", dtype)}
    for name, model in models.items():
        want = metrics.losses(model, segments, whole, 2, SEED, reference=full)
        for measure in ("kl", "nelbo"):
            assert rows[name][measure] == pytest.approx(bootstrap(want[measure]), rel=1e-5), (name, measure)
    assert rows["16-bit"].keys() == {"model", "segments", "nelbo", "bytes"}
    sizes = [json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["metadata"]["total_size"],
             (folder / "m" / "model.safetensors").stat().st_size]
    assert rows["quarot W4A4"]["bytes"] == sizes[0]
    assert 0 < sizes[1] - rows["16-bit"]["bytes"] < 10_000  # the header of the file


def test_a_model_that_knows_the_tasks_is_judged_on_the_text_that_is_given(folder, small_folder, tmp_path, capsys):
    assert calibrate.main(["--model", str(small_folder), "--data", str(folder / "long.txt"), "--length", "24",
                           "--problems", "3", "--method", "rtn", "--out", str(tmp_path / "q"), "--device", "cpu"]) == 0
    assert "On 3 segments of 24 tokens from the same text" in capsys.readouterr().out


def test_the_next_command_runs_from_every_folder(monkeypatch, tmp_path):
    root = Path(calibrate.__file__).parent
    monkeypatch.chdir(root)
    assert closing.evaluation() == "python evaluate.py"
    monkeypatch.chdir(tmp_path)
    assert closing.evaluation() == f"python {root}/evaluate.py"


def test_problems_0_leaves_it_out(folder, tmp_path, capsys):
    assert run(folder, "long.txt", tmp_path / "q", "--problems", "0") == 0
    assert "table" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_text_that_has_no_more_segments_is_calibrated_on_all_the_same(folder, tmp_path, capsys):
    assert run(folder, "short.txt", tmp_path / "q") == 0
    out = capsys.readouterr().out
    assert "There is no closing table: the text has fewer than two segments of 24 tokens" in out
    assert json.loads(out.splitlines()[-1])["table"] == []


def test_held_out_segments_overlap_neither_each_other_nor_those_of_calibration(folder):
    class Numbers:
        """A tokenizer whose tokens are their own places."""

        def encode_batch(self, texts):
            return [type("Encoding", (), {"ids": list(range(1000))})]

    used, _ = text_segments(Numbers(), ["x"], "x", 20, 16, 7)
    held = held_out_segments(Numbers(), ["x"], 30, 16, 1, (20, 7))
    assert 2 < len(held) <= 30
    places = held.flatten().tolist()
    assert len(set(places)) == len(places)
    assert not set(places) & set(used.flatten().tolist())
    assert len(held_out_segments(Numbers(), ["x"], 3, 16, 1)) == 3
    assert len(held_out_segments(Numbers(), ["x"], 99, 16, 1)) == 1000 // 16


def test_a_quantized_model_of_the_tasks_is_judged_on_them(small_folder, tmp_path, capsys):
    assert calibrate.main(["--model", str(small_folder), "--method", "rtn", "--segments", "2", "--problems", "1",
                           "--device", "cpu", "--out", str(tmp_path / "q")]) == 0
    assert {"math", "code", "cloze"} <= json.loads(capsys.readouterr().out.splitlines()[-1])["table"][1].keys()
    assert evaluate.main(["--model", str(tmp_path / "q"), "--problems", "1", "--device", "cpu"]) == 0
