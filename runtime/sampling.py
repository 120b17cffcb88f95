"""Denoising, one step at a time: LLaDA's semi-autoregressive sampler and Dream's sampler.

The sequence is prompt + [MASK] x gen_length. In each step the model predicts every masked token of the whole sequence
at once, some predictions are committed, the others stay masked.

| algorithm | confidence of a prediction | how many are committed |
|---|---|---|
| `low_confidence` | its probability | LLaDA: blocks of `block_length` are finished left to right, the same |
| `random` | a random number | number in each step, the remainder in the first steps |
| `maskgit_plus` | its probability | Dream: time runs from 1 to `eps` in equal steps t -> s; |
| `topk_margin` | p(best) − p(second) | of the tokens still masked the share 1 − s/t, rounded down; |
| `entropy` | negative entropy | all of them in the last step |
| `origin` | – | Dream: every masked token by itself with probability 1 − s/t |

Both are the official code (LLaDA's `generate.py`, Dream's `generation_utils.py`) to the letter, including the order of
their random draws.
"""

from dataclasses import dataclass
from functools import wraps

import torch

from runtime.graphs import GraphedModel

END_OF_TURN = {"llada": "<|eot_id|>", "dream": "<|im_end|>", "a2d": "<|im_end|>"}
LLADA = ("low_confidence", "random")
DREAM = ("origin", "maskgit_plus", "topk_margin", "entropy")


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


def guided_logits(model, ids, prompt, cfg_scale: float, attention_mask=None, where=None):
    """Classifier-free guidance: un + (cfg + 1)(cond − un), where `un` sees a fully masked prompt (True in `prompt`).

    Logits (B, L, V), or (N, V) of the True positions of `where`.
    """
    if cfg_scale <= 0:
        return model(ids, attention_mask, where)
    both = torch.cat((ids, ids.masked_fill(prompt, model.mask_id)))
    mask, where = (None if x is None else x.repeat(2, 1) for x in (attention_mask, where))
    conditional, unconditional = model(both, mask, where).chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def most_confident(confidence, count: int):
    """True at the `count` largest entries of each row of confidence (B, L); ties as `topk` breaks them, which the
    official code calls: end-of-text held back by `confidence_eos_eot_inf` or a nucleus of one token ties exactly."""
    return torch.zeros_like(confidence, dtype=torch.bool).scatter(-1, confidence.topk(count).indices, True)

# ---- LLaDA ---------------------------------------------------------------------------------------------------------


def block_schedule(start: int, steps: int, gen_length: int, block_length: int):
    """(end of the current block, tokens to commit) of each step."""
    steps_per_block = steps // (gen_length // block_length)
    n, remainder = divmod(block_length, steps_per_block)
    for end in range(start + block_length, start + gen_length + 1, block_length):
        for i in range(steps_per_block):
            yield end, n + (i < remainder)


def llada_choice(logits, algorithm, temperature, never_confident, generator):
    """Predicted tokens and their confidence, each (B, L). Tokens of `never_confident` are predicted but go last."""
    noisy = gumbel_max(logits, temperature, generator)
    x0 = noisy.argmax(-1)
    if algorithm == "random":
        return x0, torch.rand(x0.shape, device=x0.device, generator=generator)
    if never_confident:  # an empty index would still make the CPU wait for the GPU
        logits[..., never_confident] = -torch.inf
    return x0, torch.softmax(logits, -1).gather(-1, x0[..., None])[..., 0]

# ---- Dream ---------------------------------------------------------------------------------------------------------


def time_schedule(steps: int, eps: float, device=None):
    """The share 1 − s/t of the masked tokens that each step commits; 1 in the last."""
    t = torch.linspace(1, eps, steps + 1, device=device)
    return [1 - t[i + 1] / t[i] for i in range(steps - 1)] + [1]


def filtered_probs(logits, temperature: float, top_p: float | None, top_k: int | None):
    """The distribution that Dream samples from, (N, V): tempered, then cut to the nucleus, then to the top k.

    Both cuts also act at temperature 0, where they change confidences but not tokens.
    """
    if temperature > 0:
        logits = logits / temperature
    lowest = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        outside = ordered.softmax(-1).cumsum(-1) > top_p
        outside = torch.cat((torch.zeros_like(outside[:, :1]), outside[:, :-1]), -1)  # keep the one that crosses top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), lowest)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, lowest)
    return logits.softmax(-1)


def dream_choice(logits, algorithm, temperature, top_p, top_k, generator):
    """Predicted tokens and their confidence, each (N,), for logits (N, V)."""
    probs = filtered_probs(logits, temperature, top_p, top_k)
    drawn = temperature > 0 and len(probs) > 0
    if drawn:
        probs_sum_1 = probs / probs.sum(-1, keepdim=True)  # as torch.distributions.Categorical, whose draw this is
        # in bf16 Categorical may refuse such sums, and the official code then takes the best tokens, without a draw
        drawn = bool(((probs_sum_1.sum(-1) - 1).abs() < 1e-6).all())
    if drawn:
        x0 = torch.multinomial(probs_sum_1, 1, replacement=True, generator=generator)[:, 0]
        confidence = probs.gather(-1, x0[:, None])[:, 0]
    else:
        confidence, x0 = probs.max(-1)
    if algorithm == "topk_margin":
        best = probs.topk(2).values
        confidence = best[:, 0] - best[:, 1]
    if algorithm == "entropy":
        confidence = (probs * (probs + 1e-10).log()).sum(-1)
    return x0, confidence


def dream_step(logits, ids, masked, share, algorithm, temperature, top_p, top_k, alg_temp, mask_id, generator):
    """Predictions and chosen positions, each (B, L), of one step that commits `share` of the masked tokens.

    As many are chosen in every row as the mean row has left. A row with fewer (its prompt held fewer [MASK], it
    predicted one, or weights underflow at a tiny alg_temp) then loses tokens: the official code writes [MASK] over
    them, and so does this.
    """
    if algorithm == "origin":
        chance = torch.rand(int(masked.sum()), device=ids.device, generator=generator)
        chosen = torch.zeros_like(masked).masked_scatter(masked, chance < share)
        x0 = ids.clone()
        x0[chosen], _ = dream_choice(logits[chosen], algorithm, temperature, top_p, top_k, generator)
        return x0, chosen
    x0 = torch.full_like(ids, mask_id)
    confidence = torch.full(ids.shape, -torch.inf, dtype=logits.dtype, device=ids.device)
    x0[masked], confidence[masked] = dream_choice(logits[masked], algorithm, temperature, top_p, top_k, generator)
    count = int(masked.sum() / len(ids) * share)
    if not alg_temp or count == 0:
        return x0, most_confident(confidence, count)
    weight, done = torch.softmax(confidence / alg_temp, -1), ~masked.any(-1, keepdim=True)
    # a finished row has no weights: the official code stops with an error, here the row stays as it is
    chosen = torch.multinomial(weight.masked_fill(done, 1.0), count, generator=generator)
    return x0, torch.zeros_like(masked).scatter(-1, chosen, True) & ~done

# ---- both ----------------------------------------------------------------------------------------------------------


def _check(steps, gen_length, block_length, algorithm, temperature, eps, top_p, top_k, alg_temp, only_llada):
    if algorithm not in LLADA + DREAM:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(LLADA + DREAM)}.")
    if min(steps, gen_length, block_length) < 1:
        raise ValueError("steps, gen_length and block_length must be at least 1.")
    if gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} is not a multiple of block_length {block_length}.")
    if algorithm in LLADA and steps % (gen_length // block_length):
        raise ValueError(f"steps {steps} is not a multiple of the {gen_length // block_length} blocks.")
    if temperature < 0 or not 0 <= eps < 1 or (top_p is not None and not 0 < top_p <= 1) or (
            top_k is not None and top_k < 1) or (alg_temp is not None and alg_temp < 0):
        raise ValueError("temperature and alg_temp must be at least 0, eps in [0, 1), top_p in (0, 1], "
                         "top_k at least 1.")
    foreign = {"block_length": block_length != gen_length, **only_llada} if algorithm in DREAM else {
        "top_p": top_p is not None, "top_k": top_k is not None, "alg_temp": alg_temp is not None}
    for name in (name for name, given in foreign.items() if given):
        raise ValueError(f"algorithm {algorithm!r} has no option {name}; leave it out.")


@torch.no_grad()
def denoise(model, prompt_ids, steps: int, gen_length: int, block_length: int | None = None, temperature: float = 0.0,
            cfg_scale: float = 0.0, attention_mask=None, algorithm: str | None = None, eps: float = 1e-3,
            top_p: float | None = None, top_k: int | None = None, alg_temp: float | None = None,
            logits_eos_inf: bool = False, confidence_eos_eot_inf: bool = False, eos_id: int | None = None,
            eot_id: int | None = None, generator=None, cuda_graph: bool = True):
    """Yield a `Step` after each denoising step; the arguments are those of `generate`."""
    if cuda_graph and prompt_ids.is_cuda:
        model = GraphedModel(model)
    family, block_length = model.config.family, gen_length if block_length is None else block_length
    algorithm = algorithm or ("entropy" if family == "dream" else "low_confidence")
    _check(steps, gen_length, block_length, algorithm, temperature, eps, top_p, top_k, alg_temp,
           {"logits_eos_inf": logits_eos_inf, "confidence_eos_eot_inf": confidence_eos_eot_inf})
    if eos_id is None:
        eos_id = model.config.eos_id
    if eot_id is None and model.tokenizer is not None:
        eot_id = model.tokenizer.token_to_id(END_OF_TURN[family])
    if (logits_eos_inf or confidence_eos_eot_inf) and eos_id is None:
        raise ValueError("config.json names no eos_token_id; give eos_id.")
    if confidence_eos_eot_inf and eot_id is None:
        raise ValueError(f"the model has no tokenizer with {END_OF_TURN[family]}; give eot_id.")
    # At temperature > 0 the official code reaches EoT alone: its EOS line hits the noisy copy, after the argmax.
    never_confident = ([eot_id] if temperature > 0 else [eos_id, eot_id]) if confidence_eos_eot_inf else []

    if prompt_ids.ndim != 2:
        raise ValueError(f"the prompt has shape {list(prompt_ids.shape)}, not (batch, length).")
    B, start = prompt_ids.shape
    ids = torch.cat((prompt_ids, prompt_ids.new_full((B, gen_length), model.mask_id)), 1)
    if attention_mask is not None:
        if attention_mask.shape != prompt_ids.shape:
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}, the prompt {[B, start]}.")
        whole = bool(attention_mask.bool().all())  # nothing is padding: no mask
        attention_mask = None if whole else torch.cat((attention_mask, attention_mask.new_ones(B, gen_length)), 1)
    prompt = ids != model.mask_id
    if algorithm in LLADA:
        schedule = block_schedule(start, steps, gen_length, block_length)
    else:
        schedule = time_schedule(steps, eps, ids.device)
    for index, amount in enumerate(schedule):
        masked = ids == model.mask_id
        logits = guided_logits(model, ids, prompt, cfg_scale, attention_mask)
        if algorithm in LLADA:
            end, count = amount
            if logits_eos_inf:
                logits[..., eos_id] = -torch.inf
            x0, confidence = llada_choice(logits, algorithm, temperature, never_confident, generator)
            confidence = confidence.masked_fill(~masked, -torch.inf)
            confidence[:, end:] = -torch.inf
            chosen = most_confident(confidence, count) & masked
        else:
            x0, chosen = dream_step(logits, ids, masked, amount, algorithm, temperature, top_p, top_k, alg_temp,
                                    model.mask_id, generator)
        ids = torch.where(chosen, x0, ids)
        yield Step(index, ids, chosen & (ids != model.mask_id))  # a predicted [MASK] commits nothing


@wraps(denoise, assigned=())
def generate(*args, **options):
    """Prompt (B, P) -> prompt + generated tokens (B, P + gen_length).

    algorithm: see the table above; None is `low_confidence`, for Dream `entropy` (as its authors evaluate it).
    attention_mask (B, P): 0 marks left padding. temperature 0 is greedy. cfg_scale > 0 guides away from the empty
    prompt, at twice the cost.
    LLaDA's: block_length (None: one block); logits_eos_inf never predicts end of text; confidence_eos_eot_inf commits
    end of text and end of turn last. eos_id and eot_id are the model's unless given.
    cuda_graph: on a GPU, replay the blocks as one CUDA graph.
    Dream's: eps, the time at which masking ends; top_p, top_k; alg_temp > 0 draws the positions by confidence.
    Raises ValueError for an option that the algorithm does not have, or if blocks divide neither gen_length nor steps.
    """
    for step in denoise(*args, **options):
        ids = step.ids
    return ids


def stratified_ratios(n: int, generator: torch.Generator, low: float = 0.0) -> torch.Tensor:
    """n masking ratios t in (low, 1], one in each of n equal strata, in random order: every t is represented."""
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return 1 - (1 - low) * u


def mask_tokens(ids, region, t, mask_id: int, generator: torch.Generator) -> torch.Tensor:
    """Forward process of masked diffusion: each token of `region` is replaced by [MASK] with probability t[row]."""
    hit = (torch.rand(ids.shape, generator=generator) < t[:, None]) & region
    return torch.where(hit, mask_id, ids)
