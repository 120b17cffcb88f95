"""Tokenizers and chat templates against the real tokenizer files of Dream and LLaDA."""

import json
import lzma
import shutil
import unicodedata
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoint.folder import mask_token_id
from checkpoint.tokenizer import chat_prompt, load_tokenizer
from runtime.processes import Refused

REAL = Path(__file__).parents[1] / "fixtures" / "hf-configs"
DREAM, LLADA = REAL / "Dream-7B-Instruct", REAL / "LLaDA-8B-Instruct"
VOCABULARY = "36c3749fd3c87e2402f612459b45ae4e6ce5488a3ecde47a8a3ea3ed3d5dda5a"  # of the real vocab.json, by id


@pytest.fixture(scope="module")
def dream_folder(tmp_path_factory):
    """Dream's tokenizer files as on the hub; vocab.json is the bytes' letters and the merges, in order."""
    folder = tmp_path_factory.mktemp("dream")
    merges = lzma.decompress((DREAM / "merges.txt.xz").read_bytes()).decode()
    (folder / "merges.txt").write_text(merges, encoding="utf8")
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += ["".join(line.split()) for line in merges.splitlines() if not line.startswith("#version")]
    assert sha256("\n".join(words).encode()).hexdigest() == VOCABULARY
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(DREAM / name, folder)
    return folder


@pytest.fixture(scope="module")
def dream(dream_folder):
    return load_tokenizer(dream_folder)


@pytest.fixture(scope="module")
def merge_rank():
    lines = lzma.decompress((DREAM / "merges.txt.xz").read_bytes()).decode().splitlines()[1:]
    return {tuple(line.split()): i for i, line in enumerate(lines)}


def test_known_ids(dream):
    """The examples in the docstring of Dream's own tokenizer class."""
    assert dream.encode("Hello world").ids == [9707, 1879]
    assert dream.encode(" Hello world").ids == [21927, 1879]


@pytest.mark.parametrize("word", ["tokenization", " quantized", "Übergröße", "数学", "naïve", "!!!", "\n\n"])
def test_merges_like_plain_bpe(dream, merge_rank, word):
    """One pre-token each: merging the best-ranked pair until none is left gives the same pieces."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    pieces = [letters[b] for b in word.encode()]
    while True:
        pairs = [(merge_rank.get(p, 1e9), i) for i, p in enumerate(pairwise(pieces))]
        if not pairs or min(pairs)[0] == 1e9:
            break
        i = min(pairs)[1]
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    assert dream.encode(word).tokens == pieces


@pytest.mark.parametrize(("text", "pieces"), [
    ("12345", ["1", "2", "3", "4", "5"]),  # digits one by one
    ("I'LL", ["I", "'LL"]),  # contractions in any case
    ("a\n\n  b", ["a", "ĊĊ", "Ġ", "Ġb"]),  # line ends together, one space with the word
    ("x.y", ["x", ".y"]),  # a word takes one leading symbol
    ("+= ", ["+=", "Ġ"]),
])
def test_splitting(dream, text, pieces):
    assert [piece for piece, _ in dream.pre_tokenizer.pre_tokenize_str(text)] == pieces


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_round_trip(dream, text):
    """Decoding gives back the text, composed (NFC): every byte has a token."""
    normal = unicodedata.normalize("NFC", text)
    ids = dream.encode(text).ids
    assert dream.decode(ids, skip_special_tokens=False) == normal
    assert all(i < 151643 for i in ids) or "<" in text


def test_special_tokens(dream):
    listed = json.loads((DREAM / "added_tokens.json").read_text())
    assert {t: dream.token_to_id(t) for t in listed} == listed
    assert dream.get_vocab_size() == 151667
    ids = dream.encode("<|im_start|>user\nHi <|mask|><tool_call><|im_end|>").ids
    assert ids == [151644, 872, 198, 13048, 220, 151666, 151657, 151645]
    assert dream.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi <|mask|><tool_call><|im_end|>"
    assert dream.decode(ids) == "user\nHi <tool_call>"  # <tool_call> is no special token
    assert dream.encode("e\u0301").ids == dream.encode("é").ids


def test_tokenizer_json_gets_the_tokens_it_lacks(tmp_path):
    """LLaDA-Base's tokenizer.json may lack the chat tokens that tokenizer_config.json lists."""
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    config = {"added_tokens_decoder": {"2": {"content": "<|eot_id|>", "special": True}, "3": {"content": "<q>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|eot_id|><q>b").ids == [0, 2, 3, 1]
    assert "<|eot_id|>" not in tokenizer.decode([0, 2, 3, 1])
    config["added_tokens_decoder"]["7"] = {"content": "<late>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="'<late>' should have id 7, but the vocabulary gives it 4"):
        load_tokenizer(tmp_path)


def test_training_truncation_is_lifted(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("aaaaa").ids == [0] * 5


def test_no_tokenizer_and_broken_ones(tmp_path):
    assert load_tokenizer(LLADA) is None  # its tokenizer.json is not there
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(Refused, match=r"vocab\.json is not a tokenizer"):
        load_tokenizer(tmp_path)  # merges.txt is missing
    (tmp_path / "merges.txt").write_text("h i\n")
    (tmp_path / "vocab.json").write_text('{"h": 0, "i": 1, "hi": "x"}')  # the library panics
    with pytest.raises(Refused, match=r"vocab\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(Refused, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text('{"<x>": "one"}')
    with pytest.raises(Refused, match="added tokens cannot be read"):
        load_tokenizer(tmp_path)


def test_mask_token_of_the_tokenizer(tmp_path):
    assert mask_token_id(DREAM) == 151666
    with pytest.raises(Refused, match="has no mask token"):
        mask_token_id(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 9, "content": "<|mask|>"}]}')
    assert mask_token_id(tmp_path) == 9
    (tmp_path / "tokenizer_config.json").write_text(
        '{"mask_token": {"content": "[M]"}, "added_tokens_decoder": {"5": {"content": "[M]"}}}')
    assert mask_token_id(tmp_path) == 5


# ---- chat ----------------------------------------------------------------------------------------------------------

MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant")),
                                           "content": st.text(max_size=12)}), min_size=1, max_size=4)


def official(folder, messages):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=True, bos_token=config["bos_token"])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(MESSAGES)
def test_chat_equals_the_official_template(messages):
    for family, folder in (("llada", LLADA), ("dream", DREAM)):
        assert chat_prompt(family, messages) == official(folder, messages)


def test_chat_text():
    hello = [{"role": "user", "content": " Hi \n"}]
    assert chat_prompt("llada", hello) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert chat_prompt("dream", hello).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


@pytest.mark.parametrize(("family", "messages", "sentence"), [
    ("a2d", [{"role": "user", "content": "x"}], "no chat template is known for family 'a2d'"),
    ("llada", [], "at least one message"),
    ("dream", [{"role": "tool", "content": "x"}], "needs a role"),
    ("dream", [{"role": "user", "content": None}], "a text as content"),
])
def test_chat_refuses(family, messages, sentence):
    with pytest.raises(Refused, match=sentence):
        chat_prompt(family, messages)
