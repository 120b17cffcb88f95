"""The whole way of a checkpoint of one's own: German, with its own tokenizer and a text saved on Windows."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arguments import fast
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import calibrate
from calibration.output import Output
from checkpoint.families import read_config
from checkpoint.folder import sha256
from model import DiffusionLM, load_model, write

ROOT = Path(__file__).parents[1]
WORDS = [("Der alte Müller", "Die Köchin", "Mein Großvater", "Das Mädchen aus Köln"),
         ("öffnet", "verkauft", "zählt", "schätzt", "vergisst"),
         ("drei Äpfel", "siebzehn Brötchen", "den größten Schlüssel", "ein Stück Käse"),
         ("am Flussufer", "vor der Kirche", "über der Werkstatt", "auf dem Marktplatz")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the model "Müller LLaDA" and text.txt, with a byte order mark and CRLF ends of line."""
    here, rng = tmp_path_factory.mktemp("german"), random.Random(0)
    lines = [" ".join(map(rng.choice, WORDS)) + "." for _ in range(200)]
    (here / "text.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|mdm_mask|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # as LLaDA's own code writes it under transformers 4.57.1, with every default
    fixtures = ROOT / "tests" / "fixtures"
    written = json.loads((fixtures / "transformers-configs.json").read_text())["4.57.1"]["any"]
    raw = written | json.loads((fixtures / "llada" / "config.json").read_text()) | {
        "d_model": 48, "n_layers": 2, "mlp_hidden_size": 80, "vocab_size": 336, "embedding_size": 336,
        "eos_token_id": 0, "pad_token_id": 0, "mask_token_id": 1}
    folder = here / "Müller LLaDA"
    torch.manual_seed(0)
    DiffusionLM(read_config(raw), tokenizer).save(folder, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\n# Müller\n")
    (folder / "LICENSE").write_text("Apache License, Version 2.0")
    return here


def test_it_is_quantized_interrupted_resumed_judged_and_ready_for_the_hub(here, tmp_path, monkeypatch, capsys):
    def command(out, *more):
        return calibrate.main(["--model", "Müller LLaDA", "--data", "text.txt", "--out", out, "--length", "32",
                               "--segments", "12", *fast("--abits", "8", "--problems", "4", *more, epochs=0)])

    def checksums(out):
        return {file.name: sha256(file) for file in Path(out).iterdir() if file.name != "starquant.json"}

    def write_and_stop(self, *block, plain=Output.write_block):
        plain(self, *block)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(here)
    assert command("whole") == 0
    printed, said = capsys.readouterr()
    assert "text.txt: byte order marks, CRLF ends of line" in said
    assert "| starquant W4A8 |" in printed
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_block", write_and_stop)
        assert command("q") == 130
    assert [file.name for file in Path("q").glob("model-*")] == ["model-00001-of-00003.safetensors"]
    assert command("q", "--resume") == 0
    assert checksums("q") == checksums("whole")

    # judged on its text by the command in another folder, beside modules of other people that are called like ours
    for name in ("model.py", "evaluate.py", "data.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--model", here / "q", "--against",
                           here / "Müller LLaDA", "--data", here / "text.txt", "--segments", "4", "--length", "32",
                           "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])[str(here / "q")]
    assert 0 < measured["kl"][0] < 1
    assert {"nelbo", "nelbo_difference", "tokens"} <= measured.keys()

    monkeypatch.chdir(tmp_path)
    assert write(load_model(here / "q", "cpu"), "Der alte Müller", gen_length=8)

    files = {file.name for file in (here / "q").iterdir()}
    index = json.loads((here / "q" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) | {"README.md", "LICENSE", "config.json", "tokenizer.json"} <= files
    assert "auto_map" not in json.loads((here / "q" / "config.json").read_text())
    card = ModelCard.load(here / "q" / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", "de")
    assert "w4a8" in card.data.tags
    assert "Calibration text: text.txt, 12 segments of 32 tokens" in card.text
    assert "| starquant W4A8 |" in card.text
