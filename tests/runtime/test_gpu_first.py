"""The script of the first minutes on a GPU runs without one, on tiny shapes: no step fails, every file is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_measuring_step_runs_dry(tmp_path):
    environment = os.environ | {"DRY": "1", "OUT": str(tmp_path), "PY": sys.executable}
    done = subprocess.run(["bash", "tests/tools/gpu_first.sh", "probe", "micro", "calib"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in summary] == ["probe: rc 0", "micro: rc 0", "calib: rc 0"], done.stdout
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("probe", "micro", "calib")}
    assert all(results["probe"]["int_mm"].values())
    # what fails is a sentence in place of a number
    measured = [value for row in results["micro"]["passes"] for value in row.values()]
    assert all(isinstance(value, int | float) for value in measured), results["micro"]
    assert all(isinstance(run, dict) for run in results["calib"].values()), results["calib"]
