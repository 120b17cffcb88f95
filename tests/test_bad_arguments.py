"""Bad arguments and texts, with good folders: one sentence that names the thing, exit code 2, nothing written.

Each case is (command, arguments, words that the sentence must hold). MODEL, QUANTIZED and OUT in arguments stand for
good folders and a fresh output folder.
"""

import json

import pytest
import torch
from refusals import ASK, refused, tree

import evaluate

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ARGUMENTS = [
    ("calibrate", ["--model", "no-such-model"], "model 'no-such-model' is neither a folder, a hub id"),
    ("calibrate", ["--model", "./nowhere/model"], "'./nowhere/model' is neither a folder"),
    ("calibrate", ["--model", "file.txt"], "model 'file.txt' is neither a folder"),
    *((command, [flag, ""], f"nothing is given for {flag}") for command, flag in (
        ("calibrate", "--model"), ("calibrate", "--data"), ("evaluate", "--data"), ("bench", "--out"))),
    ("evaluate", ["--prompt", "a\udcff"], "is no text in UTF-8"),
    ("calibrate", ["--model", "~nobody-here/model"], "'~nobody-here/model' is neither a folder"),
    ("calibrate", ["--model", "QUANTIZED"], "is quantized already; give the 16-bit model"),
    ("calibrate", ["--method", "magic"], "method 'magic' is not one of"),
    ("calibrate", ["--wbits", "1"], "wbits 1 is not between 2 and 8"),
    ("calibrate", ["--wbits", "-4"], "wbits -4 is not between 2 and 8"),
    ("calibrate", ["--abits", "9"], "abits 9 is not between 2 and 8"),
    ("calibrate", ["--wbits", "four"], "argument --wbits: invalid int value: 'four'"),
    ("calibrate", ["--colour", "red"], "unrecognized arguments: --colour red"),
    ("calibrate", ["--wbits"], "argument --wbits: expected one argument"),
    ("calibrate", ["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    ("calibrate", ["--resume", "--overwrite"], "not allowed with argument"),
    ("calibrate", ["--set", "epochs"], "expected NAME=VALUE"),
    ("calibrate", ["--set", "colour=red"], "expected NAME=VALUE"),
    ("calibrate", ["--set", "trained=1"], "expected NAME=VALUE"),
    ("calibrate", ["--set", "wbits=3"], "give --wbits instead"),
    ("calibrate", ["--inputs", "none"], "inputs 'none' is not one of quantized, fp"),
    ("calibrate", ["--states", "none"], "states 'none' is not one of masked, rollout"),
    ("calibrate", ["--set", "lr=fast"], "'fast' is not a float"),
    ("calibrate", ["--set", "lr=nan"], "lr nan is not between"),
    ("calibrate", ["--set", "epochs=-1"], "epochs -1 is not between"),
    ("calibrate", ["--set", "tac=always"], "tac 'always' is not one of"),
    ("calibrate", ["--set", "tac_block=0"], "tac_block 0 is not between"),
    ("calibrate", ["--method", "starquant+", "--set", "balance_block=0"], "balance_block 0 is not between"),
    ("calibrate", ["--set", "head_bits=5"], "head_bits 5 is not one of 16, 8, 4"),
    ("calibrate", ["--set", "weights=asymmetric", "--method", "gptq"], "is for starquant and rtn, not for gptq"),
    ("calibrate", ["--set", "allocation=closed_form", "--method", "starquant+"],
     "allocation is for starquant, not for starquant+"),
    ("calibrate", ["--set", "lr=.1", "--method", "rtn"], "lr is for starquant, flatquant and freeact, not for rtn"),
    ("calibrate", ["--set", "tac=statistics", "--method", "starquant+"], "tac 'statistics' is not one of none, ridge"),
    ("calibrate", ["--set", "state_fraction=1"], "state_fraction 1 gives each state the whole width"),
    ("calibrate", ["--set", "embed_bits=4"], "embed_bits 4 needs head_bits 8 or 4"),
    ("calibrate", ["--seed", "-1"], "seed -1 is not between"),
    ("calibrate", ["--segments", "0"], "--segments: must be at least 1 and below 1000000"),
    ("calibrate", ["--length", "1"], "--length: must be at least 2"),
    ("calibrate", ["--problems", "-1"], "--problems: must be at least 0"),
    ("calibrate", ["--segments", "999999", "--length", "256"], "of memory on cpu"),
    ("calibrate", ["--length", "257"], "knows sequences of at most 256 tokens"),
    ("calibrate", ["--stress", "0"], "stress 0 is not a positive number"),
    ("calibrate", ["--stress", "nan"], "stress nan is not a positive number"),
    ("calibrate", ["--device", "abacus"], "device 'abacus' is not available"),
    ("calibrate", ["--device", "meta"], "device 'meta' is not available"),
    *(pytest.param(command, ["--device", "cuda"], "device 'cuda' is not available", marks=NO_GPU)
      for command in ("calibrate", "evaluate", "bench")),
    *(("calibrate", ["--model", "MODEL", "--data", file], words) for file, words in (
        ("nowhere.txt", "nowhere.txt cannot be read"),
        ("folder.txt", "folder.txt cannot be read"),
        ("empty.txt", "empty.txt holds no text"),
        ("blank.txt", "blank.txt holds no text"),
        ("nul.txt", "nul.txt holds no text"),
        ("latin.txt", "not UTF-8 text; convert it first, from Latin-1 by iconv -f latin1 -t"),
        ("short.txt", "short.txt gives 4 tokens, too few for segments of 64; give at least 128 or lower --length"),
        ("a.csv", "a.csv is none of .txt, .jsonl and .parquet"),
        ("a.parquet", "cannot be read as parquet|needs pyarrow"),
        ("broken.jsonl", "broken.jsonl, row 2"),
        ("number.jsonl", "number.jsonl, row 1"),
        ("list.jsonl", "list.jsonl, row 1"),
        ("deep.jsonl", "deep.jsonl, row 1"))),
    ("calibrate", ["--out", "theirs"], "theirs exists and is not a folder of this program"),
    ("calibrate", ["--out", "theirs", "--overwrite"], "theirs exists and is not a folder of this program"),
    ("calibrate", ["--out", "theirs", "--resume"], "theirs exists and is not a folder of this program"),
    ("calibrate", ["--out", "MODEL", "--resume"], "exists and is not a folder of this program"),
    ("calibrate", ["--out", "MODEL", "--overwrite"], "exists and is not a folder of this program"),
    ("calibrate", ["--out", "QUANTIZED"], "add --resume to continue it or --overwrite to replace it"),
    ("calibrate", ["--out", "QUANTIZED", "--resume"], "segments was 9 and is 128, length was 24 and is 64 now"),
    ("calibrate", ["--out", "state-only", "--resume"], "state-only"),
    ("calibrate", ["--out", "bad-state", "--resume"], "starquant.json cannot be read as JSON"),
    ("calibrate", ["--out", "theirs/q", "--stress", "3"], "is not this model stressed"),
    ("calibrate", ["--model", "QUANTIZED", "--stress", "3"], "is quantized already"),
    ("calibrate", ["--stress", "-1"], "stress -1 is not a positive number"),
    ("calibrate", ["--stress", "1e39"], "stress 1e+39 makes weights infinite"),
    ("bench", ["--model", "gpt-2", "--write", "OUT"], "shapes are known of"),
    ("bench", ["--model", "llada-8b", "--blocks", "0", "--write", "OUT"], "between 1 and 32"),
    ("bench", ["--model", "llada-8b", "--blocks", "1", "--write", "theirs"], "theirs is not empty"),
    ("evaluate", ["--figure", "2"], "argument --figure: invalid choice: '2'"),
    ("evaluate", ["--figure", "4", "--model", "nowhere"], "neither a folder"),
    ("evaluate", ["--figure", "4", "--model", "QUANTIZED", "--out", "OUT"], "is quantized already"),
    ("evaluate", ["--figure", "4", "--stress", "0", "--out", "OUT"], "argument --stress: must be above 0"),
    ("evaluate", ["--table", "2", "--stress", "nan", "--out", "OUT"], "argument --stress: must be above 0"),
    ("bench", ["--model", "MODEL", "--points", "1x257x1"], "a sequence of 257 tokens is longer than the model's 256"),
    ("bench", ["--model", "MODEL", "--out", "theirs"], "--out theirs is a folder; give a file"),
    ("bench", ["--model", "llada-8b", "--gain", "nan", "--write", "OUT"], "argument --gain: must be above 0"),
    ("bench", ["--seed", "9223372036854775808"], "argument --seed: must be at least 0"),
    ("bench", ["--model", "llada-8b", "--predict", "--device", "cpu"], "--predict knows --model"),
    ("bench", ["--model", "QUANTIZED"], "is quantized already"),
    ("bench", ["--model", "nowhere"], "neither a folder"),
    ("bench", ["--points", "1x2"], "'1x2' is not BATCHxLENGTHxTOKENS"),
    ("evaluate", ["--model", "nowhere"], "neither a folder"),
    ("evaluate", ["--problems", "0"], "must be at least 1"),
    ("evaluate", ["--prompt", "x", "--steps", "0"], "must be at least 1"),
    ("evaluate", ["--table", "9"], "argument --table: invalid choice: '9'"),
    ("evaluate", ["--table", "1", "--seeds", "0"], "argument --seeds: must be at least 1"),
    ("evaluate", ["--table", "1", "--seeds", "1000000"], "argument --seeds: must be at least 1 and below 1000000"),
    ("evaluate", ["--tasks", " , "], "argument --tasks: names nothing; give names with commas between them"),
    ("evaluate", ["--table", "1", "--model", "QUANTIZED"], "is quantized already"),
    ("evaluate", ["--seed", "18446744073709551616"], "argument --seed: must be at least 0 and below 922337"),
    ("evaluate", ["--device", "abacus"], "not available"),
    ("evaluate", ["--out", "theirs"], "--out theirs is a folder; give a file"),
    *((command, arguments, f"{arguments[-2]} {at}: nothing can be written to") for command, arguments, at in (
        ("evaluate", ["--out", "file.txt/x.json"], "file.txt"),
        ("evaluate", ["--prompt", "x", "--out", "gone/x.json"], "gone"),
        ("evaluate", ["--tasks", "piqa", "--cache", "file.txt"], "file.txt"),
        ("evaluate", ["--table", "2", "--out", "file.txt"], "file.txt"),
        ("evaluate", ["--table", "2", "--out", "gone"], "gone"),
        ("evaluate", ["--figure", "4", "--out", "file.txt"], "file.txt"),
        ("evaluate", ["--figure", "6", "--out", "/proc/x"], "/proc/x"),
        ("evaluate", ["--data", "blank.txt", "--out", "/proc/x"], "/proc"),
        ("calibrate", ["--out", "file.txt"], "file.txt"), ("calibrate", ["--out", "file.txt/q"], "file.txt/q"),
        ("calibrate", ["--out", "/proc/x"], "/proc/x"), ("calibrate", ["--spill", "file.txt"], "file.txt"),
        ("bench", ["--out", "/proc/x.json"], "/proc"),
        ("bench", ["--model", "llada-8b", "--write", "gone"], "gone"))),
    ("bench", ["--model", "llada-8b"], "or add --random-weights"),
    ("evaluate", ["--model", "models/none"], "there is no folder models/none here"),
    ("calibrate", ["--out", "gone"], "gone exists and is not a folder|--out gone: nothing can be written to gone"),
    ("calibrate", ["--spill", "not-there"], "--spill not-there is no folder; make it first"),
]
FILES = {"empty.txt": b"", "blank.txt": b" \n\t\n", "nul.txt": b"\0" * 99, "latin.txt": "größer".encode("latin-1") * 99,
         "short.txt": b"too short", "a.csv": b"a,b\n", "a.parquet": b"PAR1",
         "broken.jsonl": b'{"text": "a"}\n{not json\n',
         "number.jsonl": b'{"text": 5}\n', "list.jsonl": b"[1]\n", "deep.jsonl": b"[" * 100_000, "file.txt": b"text"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in: whatever is written, unpickled or executed by mistake shows there."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    for name, inside in (("theirs", "notes.txt"), ("state-only", "starquant.json"), ("bad-state", "starquant.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("{}" if name == "state-only" else "mine")
    (tmp_path / "theirs" / "x-stress3").mkdir()
    (tmp_path / "theirs" / "model-stress3").mkdir()
    (tmp_path / "theirs" / "model-stress3" / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "at-all")  # a link to a disk that is not there
    return tmp_path


@pytest.mark.parametrize(("command", "arguments", "words"), ARGUMENTS)
def test_bad_arguments_are_refused(command, arguments, words, good, here, capsys):
    places = {"MODEL": str(good / "model"), "QUANTIZED": str(good / "quantized"), "OUT": str(here / "out")}
    given = [places.get(a, a) for a in arguments]
    if command == "calibrate":
        defaults = {"--model": str(good / "model"), "--out": str(here / "out"), "--device": "cpu", "--problems": "0"}
        given += [x for k, v in defaults.items() if k not in given for x in (k, v)]
    before = tree(good)
    refused(command, given, words, here, capsys)
    assert tree(good) == before


def test_what_was_measured_is_said_though_the_disk_is_full(good, tmp_path, monkeypatch, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "write_json", full)
    out = tmp_path / "deep" / "x.json"
    assert evaluate.main(["--model", str(good / "quantized"), *ASK, "--out", str(out)]) == 2
    printed, error = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["prompt"] == "x"
    assert error.endswith(f"evaluate.py: No space left on device: {out}.\n")


def test_the_table_is_long_enough():
    assert len(ARGUMENTS) >= 120
