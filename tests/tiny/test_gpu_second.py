"""The script that trains a larger embedded model on a GPU runs without one, for a few seconds, and brings back all but
the weights."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_recipe_and_the_tables_come_back(tmp_path):
    environment = os.environ | {"DRY": "1", "OUT": str(tmp_path / "out"), "PY": sys.executable, "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "tests/tools/gpu_second.sh"], cwd=ROOT, env=environment, capture_output=True, check=True)
    steps = re.findall(r"(.*): rc 0, \d+ s\n", (tmp_path / "out" / "summary.txt").read_text())
    assert steps == ["train", "judge", "table-1-of-1"], (tmp_path / "out" / "log.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 3
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        files = {Path(name).name: archive.extractfile(name).read() for name in archive.getnames() if "." in name}
    table = json.loads(files["table-1-tiny-28m-quick-1x2.json"])
    assert len(table["rows"]) == 12
    assert len(files["cells.jsonl"].splitlines()) == 24  # likelihoods, and by a threshold
    assert files.keys() - {"cells.jsonl", "table-1-tiny-28m-quick-1x2.json"} == {
        "judge.json", "training.json", "config.json", "table-1-tiny-28m-quick-1x2.md"}
    assert not (ROOT / "out" / "tiny-28m").is_symlink()
