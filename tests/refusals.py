"""What a refusal is: one sentence that names the thing, exit code 2, no traceback, and nothing written."""

from pathlib import Path

import bench
import calibrate
import evaluate

ASK = ["--prompt", "x", "--steps", "1", "--gen-length", "1", "--device", "cpu"]
COMMANDS = {"calibrate": calibrate.main, "evaluate": evaluate.main, "bench": bench.main}


def tree(folder: Path) -> dict:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


def refused(command, arguments, words, tmp_path, capsys):
    before = tree(tmp_path)
    capsys.readouterr()
    try:
        code = COMMANDS[command](arguments)
    except SystemExit as end:  # argparse
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert any(w in err for w in words.split("|")), err
    assert err.startswith(f"{command}.py: "), err
    assert err.endswith(".\n"), err
    assert err.count("\n") == 1, err
    assert out == ""
    assert tree(tmp_path) == before
