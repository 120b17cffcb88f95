"""The script of the first minutes on a GPU runs without one, on tiny shapes: no step fails, and every result comes back
also where one is killed."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from tools import gpu_steps

import methods.plus
from experiments import predict
from runtime import cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU run the script itself")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "tools" / "gpu_first.sh"
# in Python's place: it notes its arguments among the results, and dies in one step
NOTE = """#!/bin/sh
printf '%s\\t' "$@" >>"$RESULTS/calls"; echo >>"$RESULTS/calls"
[ "$2" != tf32 ] || kill -9 $$
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder that comes back from a dry run, in which no program ran."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "python").write_text(NOTE)
    (folder / "python").chmod(0o755)
    environment = os.environ | {"DRY": "1", "OUT": str(folder / "out"), "PY": str(folder / "python")}
    subprocess.run(["bash", SCRIPT], cwd=ROOT, env=environment, capture_output=True, check=True)
    return folder / "out"


@pytest.fixture(scope="module")
def calls(dry):
    """{step: arguments of its Python}, out of the archive."""
    with tarfile.open(dry / "results.tar.gz") as archive:
        noted = io.TextIOWrapper(archive.extractfile("gpu-unknown/calls")).read().splitlines()
    steps = [line.split(":")[0] for line in (dry / "summary.txt").read_text().splitlines()]
    return dict(zip(steps[1:], (line.rstrip("\t").split("\t") for line in noted), strict=True))  # `env` needs no Python


def test_a_step_that_is_killed_loses_itself_alone(dry, calls):
    assert sorted(path.name for path in dry.iterdir()) == ["log.txt", "results.tar.gz", "summary.txt"]
    ended = re.findall(r"(.*): rc (\d+), \d+ s\n", (dry / "summary.txt").read_text())
    assert {name: rc for name, rc in ended if rc != "0"} == {"tf32": "137"}
    assert list(calls)[-1] == "sanitize"


def test_what_is_left_out_for_time_is_said(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "BUDGET": "2"}
    subprocess.run(["bash", SCRIPT, "probe", "micro"], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert (tmp_path / "summary.txt").read_text() == "left out for lack of time: probe micro\n"


def test_results_go_where_predictions_look_for_them():
    named = re.search(r"grep -owE '(.*?)'", SCRIPT.read_text())[1]
    assert named.split("|") == list(predict.GPUS)


@pytest.fixture
def results(calls, tmp_path, monkeypatch):
    """results(step): run the step's Python here, since a process for each would import torch once more; its results."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")  # gpu_products.py sets it, and replaces these two
    for name in ("_launch", "_multiprocessors"):
        monkeypatch.setattr(cuda, name, getattr(cuda, name))

    def run(step):
        script, *arguments = calls[step]
        arguments = [str(tmp_path / Path(a).name) if before == "--out" else a
                     for before, a in zip(["", *arguments], arguments, strict=False)]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        assert code == 0
        return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    return run


def test_probe_and_sanitize(results):
    probe = results("probe")["probe"]
    assert all(probe["int_mm"].values())
    assert isinstance(probe["launch"], dict)
    parts = results("sanitize")["sanitize"]["parts"]
    assert parts.keys() == probe["parts"].keys()
    # no kernel ran, so that each differs from its twin; nothing else went wrong
    assert {said for part in parts.values() for said in part["said"].split()} <= {
        name for part in (*cuda.PARTS, *cuda.TILES.values()) for name in cuda.kernels_of(part)} | {"rotated_codes"}


def test_micro(results):
    rows = results("micro")["micro"]["passes"]
    # what fails is a sentence in place of a number
    assert all(isinstance(value, int | float) for row in rows for name, value in row.items() if name != "linear")
    assert {"kronecker, codes", "across, grid", "unpack_int4", "rounding_losses", "gptq_columns", "slices", "epilogue",
            "add_ends", "fake_quantize", "fake_quantize_gradient", "norm, kronecker, codes", "starquant, fused",
            "starquant, apart"} <= {name for row in rows for name in row}


def test_rows_stay_when_another_fails_or_the_step_is_killed(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel\nfor this")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setattr(gpu_steps, "of_a_weight", fail)
    monkeypatch.setattr(gpu_steps, "glue", die)
    with pytest.raises(KeyboardInterrupt):
        gpu_steps.main(["micro"])
    first, second, third = json.loads((tmp_path / "micro.json").read_text())["passes"]
    assert first["feedback"] > 0
    assert second["failed"] == "RuntimeError: no kernel"
    assert third["epilogue"] > 0


def test_a_stage_that_was_renamed_ends_the_step(monkeypatch):
    monkeypatch.delattr(methods.plus, "best_clip")
    with pytest.raises(AttributeError, match="best_clip"), gpu_steps.staged():
        pass


def test_calibration(results):
    results("calib")
    found = results("epochs")
    llada, dream = found["calib-llada-8b"], found["calib-dream-7b"]
    assert list(llada) == ["starquant+", "starquant+ again", "starquant, 1 epoch", "starquant, 2 epochs", "quarot",
                           "starquant, 15 epochs"]
    assert list(dream) == ["starquant+", "starquant+ again"]
    stages = {label: run["stages"].keys() for label, run in llada.items()}
    assert {"hessian", "gptq", "upper_factor", "shrunk_scale"} <= stages["quarot"] & stages["starquant+"]
    assert "fit_sgat" in stages["starquant, 15 epochs"]


def test_tf32(results):
    found = results("tf32")["tf32"]
    assert len(found) == 6
    for seed in range(3):
        one, two = (found[f"{kind}, seed {seed}"]["linears"] for kind in ("fp32", "tf32"))
        assert one == two  # on a CPU
        assert one["down"]["loss"] > 0


def test_products(results):
    found = results("products") | results("grouped")
    for name, least in (("products", 8), ("grouped", 2)):
        assert all(isinstance(us, float) for row in found[name]["rows"] for us in row["us"].values())
        assert min(len(row["us"]) for row in found[name]["rows"]) >= least


def test_fp8(results):
    assert [row["unit scales"] for row in results("fp8")["fp8"].values()] == [0]


def test_shapes_that_int_mm_accepts(results, capsys):
    results("refused")
    assert json.loads(capsys.readouterr().out).keys() == {"column-major", "row-major"}


def test_benchmark_and_calibration_of_the_embedded_model(results, tmp_path):
    (point,) = results("bench")["bench"]["denoising"]
    assert all("failed" not in entry for entry in point["models"].values())
    results("tiny")
    assert (tmp_path / "tiny" / "starquant.json").exists()


def test_tests_that_run_on_a_gpu_are_found(calls):
    """Those above the kernels: padding, graphs with and without it, and both of our methods."""
    found = subprocess.run([sys.executable, *calls["above"], "--collect-only", "-q"], cwd=ROOT, text=True, check=True,
                           capture_output=True).stdout
    for name in ("padding_does_not_reach_what_it_pads_in_bf16[dream]", "graphs_change_nothing[0.0-True-setting2]",
                 "every_method_calibrates_and_its_checkpoint_is_the_model[starquant+]"):
        assert f"<Function test_{name}>" in found
    assert "[1.0" not in found
