"""Any model judged on any text: python evaluate.py --data FILE."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import evaluate
from calibration.segments import held_out_segments
from checkpoint.families import read_config
from experiments import judge
from model import DiffusionLM, load_model
from runtime import measures, sampling
from tiny import metrics, tasks


@pytest.fixture(scope="module")
def here(small_folder, tmp_path_factory):
    """Two models without the embedded tasks, one of them with a tokenizer of its own, and German text with CRLF."""
    here = tmp_path_factory.mktemp("judge")
    shutil.copytree(small_folder, here / "m")
    (here / "m" / "training.json").unlink()
    shutil.copytree(here / "m", here / "German")
    words = {f"wort{i}": i for i in range(1022)} | {"[UNK]": 1022, "<|mdm_mask|>": 1023}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(here / "German" / "tokenizer.json"))
    (here / "text.txt").write_bytes(b"".join(b"wort%d wort%d \r\n" % (i * 7 % 900, i * i % 800) for i in range(400)))
    (here / "short.txt").write_text("wort1 wort2 wort3")
    raw = json.loads((here / "m" / "config.json").read_text()) | {"vocab_size": 2048, "embedding_size": 2048}
    DiffusionLM(read_config(raw)).save(here / "wide", torch.bfloat16)
    shutil.copy(here / "m" / "tokenizer.json", here / "wide")
    return here


def run(*arguments):
    return evaluate.main([*map(str, arguments), "--device", "cpu"])


def test_the_measures_are_those_of_their_definitions(here, capsys):
    assert run("--model", here / "m", "--against", "tiny", "--data", here / "text.txt", "--segments", 3, "--length", 16,
               "--threshold", 0.05, "--seed", 4) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert {k: record[k] for k in ("segments", "length", "gen_length", "threshold", "seed")} == {
        "segments": 3, "length": 16, "gen_length": 8, "threshold": 0.05, "seed": 4}
    assert f"**{here / 'm'}** against tiny" in out
    ours, theirs = load_model(here / "m", "cpu"), load_model("tiny", "cpu")
    text = (here / "text.txt").read_text()
    ids = held_out_segments(ours.tokenizer, [text], 3, 16, 4)
    want = metrics.losses(ours, ids, torch.ones_like(ids, dtype=torch.bool), 2, 4, reference=theirs)
    paths = [measures.trajectory(m, ids[:, :8], 8, 8) for m in (ours, theirs)]
    want |= measures.fidelity(*paths)
    want["passes"] = torch.tensor([float(len(list(sampling.denoise(ours, row[None, :8], None, 8, threshold=0.05))))
                                   for row in ids])
    got = record[str(here / "m")]
    for name, values in want.items():
        assert got[name] == pytest.approx(measures.bootstrap(values), rel=1e-4), name
    assert record["tiny"].keys() == {"nelbo", "passes"}
    assert got["nelbo_difference"][0] == pytest.approx(got["nelbo"][0] - record["tiny"]["nelbo"][0], rel=1e-4)


def test_a_model_alone_with_a_tokenizer_of_its_own(here, capsys):
    assert run("--model", here / "German", "--data", here / "text.txt", "--segments", 2, "--length", 12) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[str(here / "German")].keys() == {"nelbo", "passes"}


def test_the_first_model_is_gone_when_the_second_comes(here, monkeypatch):
    """Of 16 bit only the head stays, beside its hidden states."""
    import gc
    import weakref

    alive, most = [], []

    def load(*arguments):
        gc.collect()
        most.append(sum(block() is not None for block in alive))
        model = load_model(*arguments)
        alive.extend(weakref.ref(block) for block in model.blocks)
        return model

    monkeypatch.setattr(judge, "load_model", load)
    small = ["--data", here / "text.txt", "--segments", 2, "--length", 8]
    assert run("--model", here / "m", "--against", "tiny", *small) == 0
    assert most == [0, 0]


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--model", "m"], "was not trained on the embedded tasks; give a text to judge it on: --data FILE."),
    (["--model", "tiny", "--against", "m"], "m was not trained on the embedded tasks"),
    (["--model", "m", "--against", "German", "--data", "text.txt"], "different vocabularies"),
    (["--model", "m", "--against", "wide", "--data", "text.txt"], "different vocabularies"),
    (["--model", "m", "--against", "German", "--prompt", "x"], "different vocabularies"),
    (["--model", "German", "--data", "short.txt", "--length", "4"], "too short for two segments of 4 tokens"),
    (["--model", "m", "--data", "text.txt", "--length", "257"], "257 tokens is longer than the model's 256 positions"),
    (["--model", "m", "--data", "text.txt", "--length", "16", "--gen-length", "9"], "--gen-length 9 needs a prompt"),
    (["--model", "m", "--data", "none.txt"], "none.txt cannot be read"),
    (["--model", "m", "--data", "text.txt", "--threshold", "0"], "--threshold: must be above 0"),
    (["--model", "m", "--data", "text.txt", "--segments", "1"], "--segments: must be at least 2"),
    (["--model", "m", "--data", "text.txt", "--problems", "9"], "--problems has no part in --data"),
    (["--model", "m", "--segments", "9"], "--segments has no part in judging a model"),
    (["--model", "m", "--prompt", "x", "--seed", "-1"], "--seed: must be at least 0"),
    (["--model", "m", "--prompt", "x", "--gen-length", "4", "--steps", "9"], "--steps 9 is more than the 4 tokens"),
    (["--model", "m", "--prompt", "x" * 3000], "positions")])
def test_what_cannot_be_judged_is_refused_before_anything_runs(arguments, sentence, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setattr(judge.measures, "predictions", None)
    try:
        code = run(*arguments)
    except SystemExit as stop:  # a flag that argparse refuses
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_tasks_of_the_embedded_model_count_passes(capsys):
    assert run("--problems", 1, "--threshold", 1.5) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny"]
    assert record["passes"] == [float(tasks.GEN_LENGTH)] * 3  # above every probability: a token a pass
    assert record["math_parallel"] == record["math"]
