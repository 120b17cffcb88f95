"""Denoising: LLaDA's semi-autoregressive sampler, one step at a time.

The sequence is prompt + [MASK] x gen_length, split into blocks of `block_length` that are finished left to right. In
each step the model predicts every masked token of the whole sequence at once; of the predictions inside the current
block the most confident (`low_confidence`) or random ones (`random`) are committed, the others stay masked. This is
LLaDA's `generate.py` to the letter, including the order of its random draws.
"""

from dataclasses import dataclass

import torch

from graphs import GraphedModel


@dataclass
class Step:
    """The sequence after a denoising step, and what the step committed."""

    index: int  # 0 .. steps − 1
    ids: torch.Tensor  # (B, L)
    committed: torch.Tensor  # (B, L) bool


def gumbel_max(logits, temperature: float, generator=None):
    """Logits whose argmax is a sample at `temperature`; float64, because float32 noise degrades text
    (arXiv 2409.02908). Temperature 0 returns the logits themselves."""
    if temperature == 0:
        return logits
    logits = logits.double()
    noise = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    # exp(logits) / (−log U)^T
    return logits.exp() / (-noise.log()) ** temperature


def tokens_per_step(masked, steps: int):
    """How many tokens each step commits, (B, steps): n // steps, and one more in the first n % steps steps."""
    n = masked.sum(-1, keepdim=True)
    return n // steps + (torch.arange(steps, device=masked.device) < n % steps)


def guided_logits(model, ids, prompt, cfg_scale: float, attention_mask=None):
    """Classifier-free guidance: un + (cfg + 1)(cond − un), where `un` sees a fully masked prompt."""
    if cfg_scale <= 0:
        return model(ids, attention_mask)
    both = torch.cat((ids, ids.masked_fill(prompt, model.mask_id)))
    mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    conditional, unconditional = model(both, mask).chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


@torch.no_grad()
def denoise(model, prompt_ids, steps: int, gen_length: int, block_length: int | None = None, temperature: float = 0.0,
            cfg_scale: float = 0.0, attention_mask=None, algorithm: str = "low_confidence", suppress_eos: bool = False,
            generator=None, cuda_graph: bool = True):
    """Yield a `Step` after each denoising step; the arguments are those of `generate`."""
    if cuda_graph and prompt_ids.is_cuda:
        model = GraphedModel(model)
    block_length = block_length or gen_length
    if min(steps, gen_length, block_length) < 1:
        raise ValueError("steps, gen_length and block_length must be at least 1.")
    if gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} is not a multiple of block_length {block_length}.")
    if steps % (gen_length // block_length):
        raise ValueError(f"steps {steps} is not a multiple of the {gen_length // block_length} blocks.")
    if algorithm not in ("low_confidence", "random"):
        raise ValueError(f"algorithm {algorithm!r} is not one of low_confidence, random.")
    B, start = prompt_ids.shape
    ids = torch.cat((prompt_ids, prompt_ids.new_full((B, gen_length), model.mask_id)), 1)
    if attention_mask is not None:
        attention_mask = torch.cat((attention_mask, attention_mask.new_ones(B, gen_length)), 1)
    prompt = ids != model.mask_id
    steps_per_block, index = steps // (gen_length // block_length), 0
    for end in range(start + block_length, start + gen_length + 1, block_length):
        counts = tokens_per_step(ids[:, end - block_length : end] == model.mask_id, steps_per_block)
        for count in counts.T:
            masked = ids == model.mask_id
            logits = guided_logits(model, ids, prompt, cfg_scale, attention_mask)
            if suppress_eos and model.config.eos_id is not None:
                logits[..., model.config.eos_id] = -torch.inf
            x0 = gumbel_max(logits, temperature, generator).argmax(-1)
            if algorithm == "low_confidence":
                confidence = torch.softmax(logits, -1).gather(-1, x0[..., None])[..., 0]
            else:
                confidence = torch.rand(x0.shape, device=x0.device, generator=generator)
            confidence = confidence.masked_fill(~masked, -torch.inf)
            confidence[:, end:] = -torch.inf
            # the `count` most confident positions of each row
            rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            committed = (rank < count[:, None]) & masked
            ids = torch.where(committed, x0, ids)
            yield Step(index, ids, committed)
            index += 1


def generate(model, prompt_ids, steps: int, gen_length: int, block_length: int | None = None, temperature: float = 0.0,
             cfg_scale: float = 0.0, attention_mask=None, algorithm: str = "low_confidence", suppress_eos: bool = False,
             generator=None, cuda_graph: bool = True):
    """Prompt (B, P) -> prompt + generated tokens (B, P + gen_length).

    attention_mask (B, P): 0 marks left padding. temperature 0 is greedy; cfg_scale > 0 guides away from the empty
    prompt (twice the cost). cuda_graph: on a GPU, replay the blocks as one CUDA graph. Raises ValueError if blocks do
    not divide gen_length or steps.
    """
    for _step in denoise(model, prompt_ids, steps, gen_length, block_length, temperature, cfg_scale, attention_mask,
                        algorithm, suppress_eos, generator, cuda_graph):
        pass
    return _step.ids
