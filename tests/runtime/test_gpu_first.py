"""The script of the first minutes on a GPU runs without one, on tiny shapes: no step fails, every file is written."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import calibrate
import methods

ROOT = Path(__file__).parents[2]
STEPS = ("probe", "micro", "calib")
KEEP = '#!/bin/sh\ncp "$(dirname "$1")"/*.py "$OUT"\n'


def test_every_measuring_step_runs_dry(tmp_path, monkeypatch):
    """The shell script runs as it is; its programs run here, since a process for each would import torch once more."""
    (tmp_path / "python").write_text(KEEP)
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"DRY": "1", "OUT": str(tmp_path), "PY": str(tmp_path / "python")}
    done = subprocess.run(["bash", "tests/tools/gpu_first.sh", *STEPS], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=False)
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in summary] == [f"{name}: rc 0" for name in STEPS], done.stdout
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    before = [(module, dict(vars(module))) for module in (calibrate, methods.gptq, methods.plus, methods.sgat)]
    try:
        for name in STEPS:
            runpy.run_path(str(tmp_path / f"{name}.py"), run_name="__main__")
    finally:
        del sys.modules["common"]
        for module, names in before:  # calib replaces functions by timed ones
            vars(module).update(names)
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STEPS}
    assert all(results["probe"]["int_mm"].values())
    # what fails is a sentence in place of a number
    measured = [value for row in results["micro"]["passes"] for value in row.values()]
    assert all(isinstance(value, int | float) for value in measured), results["micro"]
    assert all(isinstance(run, dict) for run in results["calib"].values()), results["calib"]
