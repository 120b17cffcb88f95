"""Samplers: LLaDA's end-of-text options, and options and prompts that are refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official import EOS, EOT, MODELS, PROMPT, biased

from model import generate
from runtime.processes import Refused

LLADA = MODELS["llada"]


def test_logits_eos_inf_never_predicts_end_of_text():
    model = biased(LLADA, EOS, 30.0)
    assert bool((generate(model, PROMPT, 4, 8)[:, -8:] == EOS).all())
    assert not bool((generate(model, PROMPT, 4, 8, logits_eos_inf=True) == EOS).any())
    assert bool((generate(model, PROMPT, 4, 8, logits_eos_inf=True, eos_id=7)[:, -8:] == EOS).all())


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("token", [EOS, EOT])
def test_confidence_eos_eot_inf_is_the_official_rule(token, temperature):
    """The rule written out as the official code has it, in place and in its order; it makes a difference."""
    model, ids = biased(LLADA, token, 4.0 if token == EOS else 9.0), F.pad(PROMPT, (0, 8), value=250)
    torch.manual_seed(0)
    for _ in range(8):
        logits = noisy = model(ids)
        if temperature:
            noise = torch.rand_like(logits, dtype=torch.float64)
            noisy = logits.double().exp() / (-torch.log(noise)) ** temperature
        x0 = noisy.argmax(-1)
        noisy[:, :, EOS] = logits[:, :, EOT] = -torch.inf
        p = logits.softmax(-1).gather(-1, x0[..., None])[..., 0].masked_fill(ids != 250, -torch.inf)
        best = int(p[0].topk(1).indices)  # end of text ties at 0
        ids[0, best] = x0[0, best]
    args = {"steps": 8, "gen_length": 8, "temperature": temperature}
    torch.manual_seed(0)
    assert torch.equal(ids, generate(model, PROMPT, confidence_eos_eot_inf=True, eot_id=EOT, **args))
    torch.manual_seed(0)
    # at temperature > 0 the official code forgets EOS
    assert torch.equal(ids, generate(model, PROMPT, **args)) == (temperature > 0 and token == EOS)


@pytest.mark.parametrize(("family", "options", "sentence"), [
    ("llada", {"algorithm": "best"}, "is not one of low_confidence, random, origin"),
    ("llada", {"block_length": 5}, "gen_length 8 is not a multiple of block_length 5"),
    ("llada", {"block_length": 2, "steps": 6}, "steps 6 is not a multiple of the 4 blocks"),
    ("llada", {"steps": 0}, "at least 1"), ("llada", {"gen_length": 0}, "at least 1"),
    ("llada", {"block_length": 0}, "at least 1"), ("llada", {"temperature": -1}, "temperature"),
    ("dream", {"eps": 1.0}, "eps"), ("dream", {"top_p": 0.0}, "top_p"), ("dream", {"top_k": 0}, "top_k"),
    ("dream", {"alg_temp": -1.0}, "alg_temp"),
    ("llada", {"top_p": 0.9}, "'low_confidence' has no option top_p"),
    ("llada", {"alg_temp": 0.1}, "'low_confidence' has no option alg_temp"),
    ("dream", {"block_length": 4}, "'entropy' has no option block_length"),
    ("dream", {"logits_eos_inf": True}, "'entropy' has no option logits_eos_inf"),
    ("dream", {"eos_id": 7}, "'entropy' has no option eos_id"),
    ("llada", {"eps": 0.5}, "'low_confidence' has no option eps"),
    ("llada", {"confidence_eos_eot_inf": True}, "give eot_id"),
    ("llada", {"steps": None}, "give steps, the number of passes, or a threshold or factor"),
    ("llada", {"threshold": 0.9}, "give None for steps"), ("llada", {"factor": 1.0}, "give None for steps"),
    ("llada", {"steps": None, "threshold": 0.9, "factor": 1.0}, "give one of them"),
    *((family, {"steps": None, **options}, "is above 0 and needs an algorithm") for family, options in (
        ("llada", {"threshold": 0.0}), ("llada", {"threshold": math.nan}), ("llada", {"factor": 0}),
        ("llada", {"threshold": 0.9, "algorithm": "random"}), ("dream", {"threshold": 0.9, "algorithm": "entropy"}),
        ("dream", {"threshold": 0.9, "alg_temp": 0.5}))),
    *(("llada", {"attention_mask": mask}, f"no tensor of the prompt's shape \\{list(PROMPT.shape)}")
      for mask in (torch.ones(1, 3), PROMPT.tolist())),
    *((family, {name: value}, f"{name} .*finite") for family, names in (
        ("llada", ("temperature", "cfg_scale")), ("dream", ("temperature", "cfg_scale", "alg_temp")))
      for name in names for value in (math.nan, math.inf)),
    ("llada", {"temperature": None}, "temperature None is no number"),
    ("llada", {"cfg_scale": "1"}, "cfg_scale '1' is no number"),
    ("llada", {"steps": 4.0}, "steps 4.0 is no whole number"), ("dream", {"gen_length": "8"}, "'8' is no whole number"),
    ("llada", {"temperature": "hot"}, "temperature 'hot' is no number"),
    ("llada", {"steps": None, "threshold": "0.9"}, "threshold '0.9' is no number"),
    ("llada", {"steps": None, "factor": "1"}, "factor '1' is no number"),
    ("llada", {"steps": 5000, "gen_length": 5000}, "tokens is longer than the model's"),
])
def test_options_are_refused_in_a_sentence(family, options, sentence):
    with pytest.raises(Refused, match=sentence):
        generate(MODELS[family], PROMPT, **{"steps": 8, "gen_length": 8, **options})


@pytest.mark.parametrize("prompt", ["a text", [[1, 2]], torch.ones(1, 3), None])
def test_what_are_no_token_ids_is_refused_in_a_sentence(prompt):
    with pytest.raises(Refused, match="must be an integer tensor of token ids"):
        generate(LLADA, prompt, 8, 8)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("prompt", "sentence"), [
    (torch.tensor(1), r"has shape \[\], not"), (torch.tensor([1, 2]), r"has shape \[2\], not"),
    (torch.ones(0, 3).long(), "a batch of at least 1"), (torch.tensor([[-1]]), "not between 0 and 255"),
    (torch.tensor([[1, 256]]), "not between 0 and 255")])
def test_a_prompt_that_no_model_can_read_is_refused_in_a_sentence(family, prompt, sentence):
    with pytest.raises(Refused, match=sentence):
        generate(MODELS[family], prompt, 8, 8)


def test_ids_of_32_bits_and_numbers_of_numpy_are_whole_numbers():
    n = np.int64(8)
    assert torch.equal(generate(LLADA, PROMPT.int(), n, n, temperature=np.float32(0)), generate(LLADA, PROMPT, 8, 8))


def test_a_forgotten_argument_is_one_of_the_function_that_was_called():
    with pytest.raises(TypeError, match=r"generate\(\): missing a required argument: 'gen_length'"):
        generate(LLADA, PROMPT, 8)
    with pytest.raises(TypeError, match=r"generate\(\): got an unexpected keyword argument 'stepz'"):
        generate(LLADA, PROMPT, 8, 8, stepz=3)
