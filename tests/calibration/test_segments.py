"""Calibration text from parquet and the hub; token states of the model's own trajectory."""

import json
import shutil
import sys

import pytest
import torch
from arguments import fast

import calibrate
from calibrate import QuantConfig, quantize_model
from calibration import segments
from calibration.segments import read_texts, rollout
from model import generate, load_model
from runtime import processes
from tiny import tasks

ROWS = [{"sentence": "The trophy beat the _ .", "option1": "case", "option2": "bag", "answer": "2"},
        {"sentence": "The _ sank .", "option1": "ship", "option2": "sea", "answer": "1"}]


@pytest.fixture
def parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(ROWS * 20), tmp_path / "w.parquet")
    return tmp_path / "w.parquet"


class TestText:
    def test_parquet_and_jsonl_give_the_same_texts(self, parquet, tmp_path):
        (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, ROWS * 20)))
        assert segments.read_texts(parquet)[:2] == ["The trophy beat the bag .", "The ship sank ."]
        assert segments.read_texts(parquet) == segments.read_texts(tmp_path / "w.jsonl")

    def test_without_pyarrow_the_sentence_names_it(self, parquet, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(processes.Refused, match="python -m pip install pyarrow"):
            segments.read_texts(parquet)

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and then nonsense PAR1"])
    def test_broken_parquet(self, content, tmp_path):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        (tmp_path / "w.parquet").write_bytes(content)
        with pytest.raises(processes.Refused, match="as parquet"):
            segments.read_texts(tmp_path / "w.parquet")

    def test_winogrande_comes_from_the_hub_once_asked_for(self, parquet, small_folder, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **what: asked.append(what) or str(parquet))
        monkeypatch.chdir(tmp_path)
        assert calibrate.main(["--model", str(small_folder), "--method", "rtn", "--device", "cpu", "--problems", "0",
                               "--data", "winogrande", "--length", "8", "--out", str(tmp_path / "q")]) == 0
        assert asked == [{**segments.WINOGRANDE, "local_files_only": True}]  # in the tests nothing is online

    def test_a_file_of_that_name_comes_first(self, tmp_path, monkeypatch):
        (tmp_path / "winogrande").write_text("x")
        monkeypatch.chdir(tmp_path)
        assert segments.find_texts("winogrande").read_text() == "x"

    def test_offline_it_is_one_sentence(self, small_folder, tmp_path, monkeypatch, capsys):
        def refuse(**_):
            raise ConnectionError("no network\nat all")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
        monkeypatch.chdir(tmp_path)
        assert calibrate.main(["--model", str(small_folder), "--data", "winogrande", "--out", "q"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "--data FILE" in message
        assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("arguments", "sentence"), [
    ([], "WinoGrande could not be downloaded"), (["--data", "nowhere.txt"], "nowhere.txt cannot be read")])
def test_text_is_asked_for_before_a_model_is_downloaded(arguments, sentence, tmp_path, monkeypatch, capsys):
    def refuse(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloads"))
    monkeypatch.chdir(tmp_path)
    assert calibrate.main(["--model", "llada-8b", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_default_text_is_winogrande_in_segments_of_256(small_folder, tmp_path, monkeypatch):
    """A model that does not know the embedded tasks, and a command that says nothing of text or length."""
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(small_folder / name, tmp_path / "m")
    rows = [{"sentence": f"Number {i} was so good that the _ liked it .", "option1": "cat", "option2": "dog",
             "answer": str(i % 2 + 1)} for i in range(100)]
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **asked: str(tmp_path / "w.jsonl"))
    arguments = ["--model", str(tmp_path / "m"), "--method", "rtn", "--segments", "3", "--device", "cpu"]
    assert calibrate.main([*arguments, "--out", str(tmp_path / "q")]) == 0
    assert calibrate.main([*arguments, "--out", str(tmp_path / "same"), "--data", str(tmp_path / "w.jsonl"), "--length",
                           "256"]) == 0
    runs = [json.loads((tmp_path / out / "starquant.json").read_text())["run"] for out in ("q", "same")]
    assert runs[0]["text"]["sha256"] == runs[1]["text"]["sha256"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


class TestRollout:
    def test_states_lie_on_the_trajectory_at_the_asked_share(self, tiny):
        tokens, _ = tasks.calibration_set(tiny.tokenizer, 8, 24, 0)
        ratios = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.3, 0.25, 0.1, 0.01])
        states = rollout(tiny, tokens, ratios, at_once=3)
        final = generate(tiny, tokens[:, :12], 12, 12)
        masked = states == tiny.mask_id
        assert torch.equal(states[:, :12], tokens[:, :12])
        assert torch.equal(torch.where(masked, final, states), final)
        assert masked.sum(-1).tolist() == [12, 11, 9, 6, 4, 3, 2, 1]

    def test_command_and_function_calibrate_on_it(self, small_folder, tmp_path):
        full = load_model(small_folder, "cpu")
        tokens, region = tasks.calibration_set(full.tokenizer, 6, 16, 0)
        config = QuantConfig(epochs=0, states="rollout")
        mine = quantize_model(full, tokens, config, region)
        assert calibrate.main(["--model", str(small_folder), "--states", "rollout", "--segments", "6", "--length", "16",
                               "--out", str(tmp_path / "q"), *fast(epochs=0)]) == 0
        ids = torch.where(torch.arange(16) % 3 == 0, full.mask_id, tokens)
        assert torch.equal(mine(ids), load_model(tmp_path / "q", "cpu")(ids))
        other = quantize_model(full, tokens, QuantConfig(epochs=0), region)
        assert not torch.equal(mine(ids), other(ids))


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", b"\xef\xbb\xbfone\r\ntwo"), ("a.jsonl", b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r\n')])
def test_marks_of_other_systems_are_normalized_and_said(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == ["one\ntwo"]
    assert f"{name}: byte order marks, CRLF ends of line and" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_replaced(tmp_path, capsys):
    """A text cut inside an emoji is valid JSON, but no tokenizer takes it."""
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert read_texts(tmp_path / "a.jsonl") == ["cut \ufffd", "whole \U0001f600"]
    assert "halves of surrogate pairs were normalized" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("plain")
    assert read_texts(tmp_path / "a.txt") == ["plain"]
    assert capsys.readouterr().err == ""


def test_masks_cover_the_trajectory_and_stay_in_the_region():
    tokens = torch.zeros(64, 200, dtype=torch.long)
    region = torch.arange(200).expand(64, -1) >= 100
    noisy = segments.masked_copies(tokens, region, 7, QuantConfig(seed=3))
    ratio = (noisy == 7)[:, 100:].float().mean(-1)
    assert not (noisy == 7)[:, :100].any()
    assert ratio.min() < 0.1
    assert ratio.max() > 0.9
    assert torch.histc(ratio, 4, 0, 1).min() >= 10
