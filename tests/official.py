"""The tiny checkpoints of LLaDA and Dream beside what the official code computes with them (tests/fixtures)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import load_model
from runtime import likelihood

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = {f: load_model(FIXTURES / f, "cpu") for f in ("llada", "dream")}
PARITY = {f: json.loads((FIXTURES / f / "parity.json").read_text()) for f in MODELS}
STORED = {f: load_file(FIXTURES / f / "parity.safetensors") for f in MODELS}
PROMPT = STORED["dream"]["gen.entropy_24.prompt"]
EOS, EOT = 248, 249


def biased(model, token, amount):
    """The model with `token` made likelier everywhere."""
    class Biased:
        config, mask_id, device, tokenizer = model.config, model.mask_id, model.device, None

        @torch.no_grad()
        def __call__(self, *args):
            logits = model(*args).clone()
            logits[..., token] += amount
            return logits

    return Biased()


def get_log_likelihood(model, prompt, answer, mc_num: int = 128, batch_size: int = 16, cfg_scale: float = 0.0,
                       generator=None) -> float:
    """log p(answer | prompt) in nats of one request, with the random draws of the official code in its order.

    LLaDA: `get_log_likelihood.py`, exact for one token with mc_num 1. Dream: the negative of `_eval_target_nll_mc`;
    give the target with its EOS. generator None takes torch's own, as seeded by torch.manual_seed.
    """
    drawn = likelihood._draw(model, 0, prompt, answer, mc_num, batch_size, generator)
    return likelihood._score(model, 1, drawn, batch_size, cfg_scale)[0]
