"""`python calibrate.py --model llada-8b`, and nothing more, runs: here from a hub's cache that holds a small model."""

import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import calibrate
from calibration.segments import WINOGRANDE
from checkpoint.families import ALIASES, read_config
from checkpoint.folder import resolve
from model import DiffusionLM
from tiny import tasks, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub's cache: one block of random weights, 32 wide, under LLaDA-8B's name, and rows of WinoGrande's form."""
    here = tmp_path_factory.mktemp("cache")

    def snapshot(kind, name, revision):
        folder = here / f"{kind}--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        return folder / "snapshots" / revision

    model = snapshot("models", ALIASES["llada-8b"], "a" * 40)
    config = train.CONFIG | {"eos_token_id": 1022, "mask_token_id": 1023, "d_model": 32, "n_layers": 1, "n_heads": 2,
                             "n_kv_heads": 2, "mlp_hidden_size": 48}
    torch.manual_seed(0)
    DiffusionLM(read_config(config)).save(model, dtype=torch.bfloat16)
    shutil.copy(resolve("tiny") / "tokenizer.json", model)
    file = snapshot("datasets", WINOGRANDE["repo_id"], WINOGRANDE["revision"]) / WINOGRANDE["filename"]
    file.parent.mkdir(parents=True)
    words = " ".join(tasks.english_documents("eval")).split()
    sentences = [" ".join(words[i:i + 12]) + " _ ." for i in range(0, len(words), 12)]
    pyarrow.parquet.write_table(pyarrow.table({"sentence": sentences, "option1": ["it"] * len(sentences),
                                               "option2": ["them"] * len(sentences),
                                               "answer": ["1"] * len(sentences)}), file)
    return here


def test_it_runs_as_it_stands(tmp_path, cache, monkeypatch, capsys):
    """As a script, in another folder; standard error goes to a file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--model", "llada-8b"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "calibrate.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["method"], result["wbits"], result["abits"]) == ("starquant", 4, 4)
    assert (tmp_path / "out" / "llada-8b-starquant-w4a4" / "config.json").exists()
    assert [row["model"] for row in result["table"]] == ["16-bit", "RTN W4A4", "starquant W4A4"]
    # where it is, its size, the next command, what else to try: before the line of JSON
    wrote, following, better = out.splitlines()[-4:-1]
    assert wrote.startswith("Wrote out/llada-8b-starquant-w4a4: 0.")
    assert wrote.endswith(" MB in 16 bit.")
    assert following == (f"Next: python {Path(calibrate.__file__).parent}/evaluate.py "
                         "--model out/llada-8b-starquant-w4a4 --against llada-8b --data FILE")
    assert "--method starquant+" in better
    # no terminal: whole lines of plain text, one for the end of the calibration and at most one every 30 s before
    assert not any(ord(c) < 32 and c != "\n" for c in err)
    lines = [line for line in err.splitlines() if "step" in line]
    assert len(lines) <= 1 + result["seconds"] / 30
    assert lines[-1].startswith("block 1/1: 100%")
    about = json.loads((tmp_path / "out" / "llada-8b-starquant-w4a4" / "starquant.json").read_text())
    assert "128" in json.dumps(about)


def test_without_a_network_one_sentence_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert calibrate.main(["--model", "llada-8b"]) == 2
    assert time.monotonic() - start < 60  # five retries of the library take minutes
    (line,) = capsys.readouterr().err.splitlines()
    assert "WinoGrande could not be downloaded" in line
    assert "--data FILE" in line
    Path("text.txt").write_text("One sentence after the other. " * 20)
    assert calibrate.main(["--model", "llada-8b", "--data", "text.txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "GSAI-ML/LLaDA-8B-Base could not be downloaded" in line
    assert "--model FOLDER" in line
