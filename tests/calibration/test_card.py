"""A quantized folder is ready for the hub: its card, its name, its license, by the hub's own library."""

import json
import shutil
from pathlib import Path

import pytest
from arguments import fast
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import calibrate
from calibration.card import inherited, model_card
from checkpoint.folder import resolve, write_text
from methods import METHODS

CONFIG = {"method": "rtn", "wbits": 4, "abits": 4, "seed": 0, "head_bits": 16, "embed_bits": 0}
RUN = {"model": "GSAI-ML/LLaDA-8B-Base", "version": "1", "config": CONFIG,
       "text": {"data": "winogrande", "segments": 128, "length": 256, "sha256": "0"}}
ROWS = [{"model": "16-bit", "segments": 16, "nelbo": (2.0, 1.9, 2.1), "bytes": 10**7},
        {"model": "RTN W4A4", "segments": 16, "nelbo": (2.5, 2.4, 2.6), "kl": (0.5, 0.4, 0.6), "bytes": 10**6}]


@pytest.fixture(scope="module")
def written(small_folder, tmp_path_factory):
    """(the source, with card, license and code files; its quantized folder)"""
    base = tmp_path_factory.mktemp("card")
    shutil.copytree(small_folder, base / "German")
    source = base / "German"
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\n# A German model\n")
    (source / "LICENSE.txt").write_text("Apache License, Version 2.0")
    raw = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}}
    (source / "config.json").write_text(json.dumps(raw))
    code = calibrate.main(["--model", str(source), "--out", str(base / "q"), "--segments", "4", "--length", "12",
                           *fast("--method", "rtn", "--problems", "2")])
    assert code == 0
    return source, base / "q"


def test_the_folder_says_what_it_is(written):
    source, out = written
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("apache-2.0", "de", "text-generation")
    assert {"star-quant", "quantized", "rtn", "w4a4"} <= set(data["tags"])
    assert "base_model" not in data  # a folder has no id on the hub
    assert (out / "LICENSE.txt").read_text() == (source / "LICENSE.txt").read_text()
    assert card.text.strip().startswith("# German, rtn W4A4")
    assert "4 segments of 12 tokens" in card.text
    assert "| RTN W4A4 |" in card.text  # what the closing table measured
    assert str(source.parent) not in card.content  # no path of this machine
    assert str(source.parent) not in (out / "starquant.json").read_text()


def test_nothing_points_to_files_that_are_not_there(written):
    config = json.loads((written[1] / "config.json").read_text())
    assert "auto_map" not in config
    assert config["quantization_config"]["quant_method"] == "starquant"


@pytest.mark.parametrize("method", METHODS)
def test_every_default_folder_is_a_name_of_the_hub(method):
    for model, name in (("tiny", "tiny"), ("GSAI-ML/LLaDA-8B-Base", "LLaDA-8B-Base"), ("./Müller & co/", "M-ller-co")):
        out = calibrate.parse(["--model", model, "--method", method, "--stress", "0.5"]).out
        validate_repo_id(out.name)
        assert out == Path("out") / f"{name}-stress0.5-{method.replace('+', '-plus')}-w4a4"


def test_the_default_folder_of_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert calibrate.parse(["--model", "."]).out == Path("out/mine-starquant-w4a4")


def test_a_model_of_the_hub_is_the_base_model(tmp_path):
    card = ModelCard(model_card(RUN, tmp_path, 10**9, ROWS))
    assert card.data.base_model == "GSAI-ML/LLaDA-8B-Base"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.license is None  # nobody said one
    assert "On 16 segments of the same text" in card.text
    assert "Nothing was measured" in model_card(RUN, tmp_path, 10**9)


@pytest.mark.parametrize(("files", "license"), [
    ({"LICENSE": "MIT License\n"}, "mit"), ({"LICENSE.md": "# Apache License"}, "apache-2.0"),
    ({"LICENSE": "You may use it on Mondays."}, "other"), ({"README.md": "---\nlicense: [\n---\n"}, None),
    ({"README.md": "---\nlicense: cc-by-4.0\n---\n", "LICENSE": "MIT License"}, "cc-by-4.0"), ({}, None)])
def test_the_license_is_the_source_s(files, license, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert inherited(tmp_path).get("license") == license


def test_the_embedded_model_has_a_license():
    assert inherited(resolve("tiny")) == {"license": "mit", "language": "en"}


@pytest.mark.parametrize(("bits", "words"), [
    ({}, "embedding, head and norms are as in the source"),
    ({"head_bits": 8}, "the embedding has 8 bits, the head 8, and norms are as in the source"),
    ({"head_bits": 8, "embed_bits": 4}, "the embedding has 4 bits, the head 8, and norms are as in the source")])
def test_the_model_card_says_what_was_kept(bits, words, tmp_path):
    assert words in model_card(RUN | {"config": CONFIG | bits}, tmp_path, 10**6)


def test_text_is_written_as_utf_8_whatever_the_system_s_code_page(tmp_path, monkeypatch):
    plain = Path.write_text  # on Windows, no encoding means the code page
    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding="cp1252", **more: plain(
        path, text, encoding=encoding, **more))
    write_text(tmp_path / "README.md", model_card(RUN | {"model": "用户"}, tmp_path, 1))
    assert "用户" in (tmp_path / "README.md").read_text(encoding="utf-8")
