"""`write` and `stream`: from texts to texts."""

import pytest
import torch
from official import MODELS
from tokenizers import Tokenizer

import model
from model import generate, load_model, stream, write
from runtime.processes import Refused

TEXTS = ("Ann has 4 boxes of 6 eggs. Then Ann sells 5. How many eggs?\n", "Ben has 3 pens.\n")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


def test_a_batch_is_what_each_text_gets_alone(tiny):
    alone = [write(tiny, text, gen_length=24) for text in TEXTS]
    assert alone[0] == "4*6=24\n24-5=19\n#### 19"
    assert write(tiny, list(TEXTS), gen_length=24) == alone
    ids = torch.tensor([tiny.tokenizer.encode(TEXTS[1]).ids])
    out = generate(tiny, ids, None, 24, threshold=0.9)[0, ids.shape[1] :].tolist()
    end = out.index(tiny.config.eos_id)
    assert write(tiny, TEXTS[1], 24, threshold=0.9) == tiny.tokenizer.decode(out[:end])


def test_a_stream_fills_in_what_is_masked(tiny):
    parts = list(stream(tiny, TEXTS[0], gen_length=24))
    assert len(parts) == 24
    assert parts[0].count("░") >= 20
    assert parts[-1] == write(tiny, TEXTS[0], gen_length=24)


def test_a_question_goes_through_the_chat_template(tiny, monkeypatch):
    seen, tokenizer = [], Tokenizer.from_str(tiny.tokenizer.to_str())
    with pytest.raises(Refused, match="ask without chat"):
        write(tiny, "How many?", chat=True)
    tokenizer.add_special_tokens(["<|eot_id|>"])
    monkeypatch.setattr(tiny, "tokenizer", tokenizer)
    monkeypatch.setattr(model, "denoise", lambda m, ids, *a, **k: seen.append(ids) or iter(()))
    list(stream(tiny, "How many?", chat=True))
    want = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|><|start_header_id|>" \
           "assistant<|end_header_id|>\n\n"
    assert tiny.tokenizer.decode(seen[0][0].tolist(), skip_special_tokens=False) == want


@pytest.mark.parametrize("texts", [None, 3, [], [3], "", ["a", ""], {"a": 1}])
def test_what_are_no_texts_is_refused(tiny, texts):
    with pytest.raises(Refused, match="texts must be a text or a list of texts"):
        write(tiny, texts)


def test_what_is_no_model_is_refused():
    with pytest.raises(Refused, match="model is of type str; give what load_model"):
        write("tiny", "x")


def test_a_model_without_a_tokenizer_is_named():
    with pytest.raises(Refused, match=r"has no tokenizer\.json"):
        write(MODELS["llada"], "x")
