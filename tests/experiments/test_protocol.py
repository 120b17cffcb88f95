"""The protocol table and the paper's numbers; what `--tasks` refuses without lm-eval."""

import json
import runpy
import sys

import pytest
import torch

import evaluate
from checkpoint.families import ALIASES
from experiments import protocol
from model import load_model
from runtime.sampling import generate

# the averages that the paper prints beside its rows (Tables 1 and 5)
AVERAGES = {"LLaDA-8B": (58.99, 44.23, 48.09, 49.26, 51.03, 54.29, 57.07, 58.25),
            "LLaDA-1.5": (69.86, 53.12, 58.49, 59.94, 61.06, 64.31, 66.93, 68.94),
            "Dream-7B": (66.94, 49.53, 54.89, 56.19, 58.85, 61.90, 63.59, 65.35)}


@pytest.mark.parametrize("model", AVERAGES)
def test_rows_have_the_averages_that_the_paper_prints(model):
    rows = protocol.REPORTED[model].values()
    off = [round(abs(sum(row) / 9 - want), 3) for row, want in zip(rows, AVERAGES[model], strict=True)]
    assert max(off) <= 0.011  # the paper's own rounding


def test_every_model_has_a_setting_for_every_task():
    assert set(protocol.PROTOCOLS) == set(ALIASES)
    for settings in protocol.PROTOCOLS.values():
        assert tuple(settings) == protocol.BENCHMARKS
        assert all(s.mc_num % s.mc_batch == 0 for s in settings.values())
        assert [t for t, s in settings.items() if s.runs_code] == ["humaneval"]


def test_values_of_the_published_commands():
    llada, dream = protocol.PROTOCOLS["llada-8b"], protocol.PROTOCOLS["dream-7b"]
    assert {t: (s.shots, s.cfg, s.mc_num, s.mc_batch) for t, s in llada.items() if not s.generation} == {
        "truthfulqa_mc2": (0, 2.0, 128, 8), "arc_challenge": (0, 0.5, 128, 8), "hellaswag": (0, 0.5, 128, 8),
        "winogrande": (5, 0.0, 128, 8), "piqa": (0, 0.5, 128, 8), "mmlu": (5, 0.0, 1, 1), "ceval-valid": (5, 0.0, 1, 1)}
    assert llada["gsm8k"].generation == {"gen_length": 1024, "steps": 1024, "block_length": 1024}
    assert (dream["mmlu"].mc_batch, dream["gsm8k"].task, dream["gsm8k"].shots) == (32, "gsm8k_cot", 8)


@pytest.mark.parametrize("model", protocol.PROTOCOLS)
def test_generation_options_are_options_of_generate(model):
    tiny = load_model("tiny", "cpu")
    for task in ("humaneval", "gsm8k"):
        options = protocol.setting(model, task, gen_length=4).generation
        ids = generate(tiny, torch.tensor([[5, 6, 7]]), **options | ({"eot_id": 1021} if "llada" in model else {}))
        assert ids.shape == (1, 7)


@pytest.mark.parametrize(("name", "family", "want"), [
    ("llada-8b", "llada", "llada-8b"), ("GSAI-ML/LLaDA-1.5", "llada", "llada-1.5"),
    ("some/where/LLaDA-8B-Instruct", "llada", "llada-8b-instruct"), ("mine", "dream", "dream-7b"),
    ("tiny", "llada", "llada-8b"), ("Dream-org/Dream-v0-Instruct-7B", "dream", "dream-7b-instruct"),
])
def test_protocol_of(name, family, want):
    assert protocol.protocol_of(name, family) == want


@pytest.mark.parametrize("state", ["{}", '{"run": 3}', '{"run": {}}', '{"run": {"model": 5}}'])
def test_a_folder_that_does_not_say_its_source_is_judged_by_its_own_name(tmp_path, state):
    (tmp_path / "starquant.json").write_text(state)
    assert protocol.source_name("out/x", tmp_path) == "out/x"


def test_a_quantized_folder_is_judged_as_its_source(tmp_path):
    (tmp_path / "starquant.json").write_text(json.dumps({"run": {"model": "llada-1.5"}}))
    assert protocol.source_name("out/x", tmp_path) == "llada-1.5"
    assert protocol.source_name("out/x", tmp_path / "none") == "out/x"


def test_overrides():
    s = protocol.setting("llada-8b-instruct", "gsm8k", gen_length=64, steps=32)
    assert s.generation == {"gen_length": 64, "steps": 32, "block_length": 8}
    assert (protocol.setting("llada-8b", "mmlu", 16).mc_num, protocol.setting("llada-8b", "piqa", 16).mc_num) == (1, 16)
    assert protocol.setting("llada-8b", "boolq").shots is None


def test_table_puts_our_number_beside_the_paper_s():
    results = {t: {"acc,none": 0.5, "acc_stderr,none": 0.01} for t in protocol.BENCHMARKS}
    text = protocol.table("dream-7b", results)
    assert "| piqa | acc | 50.00 ± 1.00 | 75.66 | 66.26 |" in text
    assert "| average |  | 50.00 | 66.95 | 49.53 |" in text  # of the columns; the paper cuts instead of rounding
    assert "paper" not in protocol.table("llada-8b-instruct", results)  # the paper has no such model


def test_table_shows_other_publications_and_how_they_are_known():
    results = {t: {"acc,none": 0.5} for t in protocol.BENCHMARKS}
    head, _, *rows, _, note = protocol.table("llada-8b", results).splitlines()
    shown = {cells[0]: dict(zip(head.split(" | "), cells, strict=True))
             for cells in (row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows)}
    columns = [name for name in head.removesuffix(" |").split(" | ") if name.startswith("QDLM")]
    assert columns == [f"QDLM: {name}" for name in ("FP", "SmoothQuant W4A4", "QuaRot W4A4", "DuQuant W4A4")]
    assert [shown[task]["QDLM: QuaRot W4A4"] for task in ("winogrande", "gsm8k", "hellaswag")] == ["63.40", "62.90", ""]
    assert "second hand: FAIR-Calib" in note
    assert "own settings" in note
    assert "SoloQ" in protocol.table("dream-7b", results)
    assert "QDLM" not in protocol.table("dream-7b", results)


class TestRefusals:
    def refused(self, capsys, *arguments):
        try:
            code = evaluate.main(["--device", "cpu", *arguments])
        except SystemExit as stop:  # argparse's own way
            code = stop.code
        assert code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    def test_without_lm_eval_the_sentence_names_the_command(self, monkeypatch, capsys):
        monkeypatch.delitem(sys.modules, "experiments.harness", raising=False)
        monkeypatch.delattr("experiments.harness", raising=False)
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
        assert "pip install lm-eval" in self.refused(capsys, "--tasks", "piqa")

        with pytest.raises(SystemExit) as stop:  # the harness' own command
            runpy.run_module("experiments.harness", run_name="__main__")
        assert stop.value.code == 2
        said = "lm-evaluation-harness is missing; pip install lm-eval."
        assert capsys.readouterr().err == f"python -m experiments.harness: {said}\n"

    @pytest.mark.parametrize("flag", ["--limit", "--mc-num", "--batch-size", "--gen-length"])
    def test_numbers_below_one(self, flag, capsys):
        assert f"argument {flag}: must be at least 1" in self.refused(capsys, "--tasks", "piqa", flag, "0")
