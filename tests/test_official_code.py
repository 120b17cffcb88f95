"""docs/official-code.md: loops like the authors' write through its adapter what the official code wrote."""

import ast
import re
from pathlib import Path

import pytest
import torch
from official import EOS, MODELS, PARITY, STORED

from calibrate import quantize_model
from methods import QuantConfig
from model import generate, load_model

PAGE = (Path(__file__).parent.parent / "docs" / "official-code.md").read_text()
ADAPTER, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
exec(compile(ADAPTER, "docs/official-code.md", "exec"), names := {})
Official = names["Official"]


def like_llada(model, prompt, steps, gen_length, block_length, mask_id, **_):
    """The most confident tokens first, block by block, through nothing but `.device` and `.logits`."""
    x = torch.full((1, prompt.shape[1] + gen_length), mask_id).to(model.device)
    x[:, :prompt.shape[1]] = prompt
    steps //= gen_length // block_length
    for end in range(prompt.shape[1] + block_length, x.shape[1] + 1, block_length):
        for i in range(steps):
            logits = model(x).logits
            best = logits.argmax(-1)
            sure = logits.softmax(-1).gather(-1, best[..., None])[..., 0].masked_fill(x != mask_id, -torch.inf)
            sure[:, end:] = -torch.inf
            count = block_length // steps + (i < block_length % steps)
            x[0, sure[0].topk(count).indices] = best[0, sure[0].topk(count).indices]
    return x


def like_dream(model, prompt, steps, max_new_tokens, mask_token_id, attention_mask=None, **_):
    """The entropy rule on logits that are shifted here, as Dream's sampler does."""
    x = torch.cat((prompt, torch.full((len(prompt), max_new_tokens), mask_token_id)), 1)
    pairs, positions = "full", None
    if attention_mask is not None:
        keep = torch.cat((attention_mask, torch.ones(len(x), max_new_tokens, dtype=torch.long)), 1)
        positions = (keep.cumsum(-1) - 1).masked_fill(keep == 0, 1)
        pairs = (keep[:, None, None] * keep[:, None, :, None]).bool()
    t = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = x == mask_token_id
        logits = model(x, pairs, positions).logits
        p = torch.cat((logits[:, :1], logits[:, :-1]), 1).softmax(-1)
        sure = (p * (p + 1e-10).log()).sum(-1).masked_fill(~masked, -torch.inf)
        left = masked.sum() / len(x)
        count = int(left * (1 - t[i + 1] / t[i])) if i < steps - 1 else int(left)
        chosen = torch.zeros_like(masked).scatter(1, sure.topk(count).indices, True)
        x = torch.where(chosen, p.argmax(-1), x)
    return x


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Both families' tiny checkpoints, quantized, written and read again."""
    folders = tmp_path_factory.mktemp("quantized")
    for family, model in MODELS.items():
        tokens = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
        quantize_model(model, tokens, QuantConfig("starquant", epochs=1)).save(folders / family)
    return {family: load_model(folders / family, "cpu") for family in MODELS}


def test_the_adapter_has_less_than_ten_lines():
    assert len(ADAPTER[ADAPTER.index("class"):].splitlines()) < 10


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_code(example):
    ast.parse(example)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_official_class(family):
    stored = STORED[family]
    got = Official(MODELS[family])(stored["fwd.L7.B3.input_ids"]).logits
    assert (got - stored["fwd.L7.B3.logits"]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("case", ["pure_32_32", "pure_32_steps5", "semi_32_b8"])
def test_llada_writes_what_the_official_code_wrote(case, quantized):
    options, prompt = PARITY["llada"]["generate"][case], STORED["llada"][f"gen.{case}.prompt"]
    assert torch.equal(like_llada(Official(MODELS["llada"]), prompt, **options), STORED["llada"][f"gen.{case}.out"])
    ours = generate(quantized["llada"], prompt, options["steps"], 32, options["block_length"])
    assert torch.equal(like_llada(Official(quantized["llada"]), prompt, **options), ours)


@torch.no_grad()
@pytest.mark.parametrize("case", ["entropy_24", "entropy_b2_nomask"])
def test_dream_writes_what_the_official_code_wrote(case, quantized):
    options, prompt = PARITY["dream"]["generate"][case], STORED["dream"][f"gen.{case}.prompt"]
    assert torch.equal(like_dream(Official(MODELS["dream"]), prompt, **options), STORED["dream"][f"gen.{case}.out"])
    ours = generate(quantized["dream"], prompt, options["steps"], 24, algorithm="entropy")
    assert torch.equal(like_dream(Official(quantized["dream"]), prompt, **options), ours)


@torch.no_grad()
def test_dream_with_padding(quantized):
    prompt = STORED["dream"]["gen.entropy_b2_nomask.prompt"].clone()
    mask = torch.ones_like(prompt)
    prompt[1, :3], mask[1, :3] = EOS, 0
    for model in (MODELS["dream"], quantized["dream"]):
        ours = generate(model, prompt, 8, 24, algorithm="entropy", attention_mask=mask)
        assert torch.equal(like_dream(Official(model), prompt, 8, 24, model.mask_id, mask), ours)
        assert not torch.equal(like_dream(Official(model), prompt, 8, 24, model.mask_id), ours)


def test_the_evaluation_may_call_eval_and_to(quantized):
    model = Official(quantized["llada"]).eval().to("cpu")
    assert model.device == torch.device("cpu")
