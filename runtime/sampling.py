"""The forward process of masked diffusion, and its reverse: LLaDA's sampler, Dream's, and decoding by a threshold.

The sequence is prompt + [MASK] x gen_length. In each pass the model predicts every masked token that may be committed,
some predictions are committed, and the others stay masked.

| algorithm | confidence of a prediction | how many are committed in a pass |
|---|---|---|
| `low_confidence` | its probability | LLaDA: blocks of `block_length` are finished left to right, the same |
| `random` | a random number | number in each pass, the remainder in the first passes |
| `maskgit_plus` | its probability | Dream: time runs from 1 to `eps` in equal steps t -> s; |
| `topk_margin` | p(best) − p(second) | of the tokens still masked the share 1 − s/t, rounded down; |
| `entropy` | negative entropy | all of them in the last pass |
| `origin` | none | Dream: every masked token by itself with probability 1 − s/t |

These are the official code (LLaDA's `generate.py`, Dream's `generation_utils.py`) to the letter, with the order of its
random draws. The head of the model runs only at the masked positions that may be committed: those before the end of the
current block, or all of them in Dream's schedule.

Parallel decoding
    With `threshold` τ or `factor` f there is no fixed number of passes. Each pass commits at least one masked position
    of the current block: with τ all whose confidence reaches it; with f the n surest, for the largest n such that
    (n + 1)(1 − c_n) < f, where c_n is the n-th largest confidence. The confidence is the probability of the predicted
    token, so that the algorithm is `low_confidence` or `maskgit_plus`. Both rules are Fast-dLLM's (arXiv 2505.22618).
    Its code differs from its paper where all but the least sure position pass the test of f: it commits that one, too.
"""

from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from numbers import Integral, Real

import torch

from runtime.graphs import GraphedModel
from runtime.processes import Refused

END_OF_TURN = {"llada": "<|eot_id|>", "dream": "<|im_end|>", "a2d": "<|im_end|>"}
LLADA = ("low_confidence", "random")
DREAM = ("origin", "maskgit_plus", "topk_margin", "entropy")
PROBABILITY = {"low_confidence", "maskgit_plus"}  # algorithms whose confidence a threshold can be compared with


def stratified_ratios(n: int, generator: torch.Generator, low: float = 0.0) -> torch.Tensor:
    """n masking ratios t in (low, 1], one in each of n equal strata, in random order: every t is represented."""
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return 1 - (1 - low) * u


def mask_tokens(ids, region, t, mask_id: int, generator: torch.Generator) -> torch.Tensor:
    """Forward process of masked diffusion: each token of `region` is replaced by [MASK] with probability t[row]."""
    hit = (torch.rand(ids.shape, generator=generator) < t[:, None]) & region
    return torch.where(hit, mask_id, ids)


def pad_left(rows: list[list[int]], pad: int):
    """Prompts of any lengths as ids (B, P), and an attention_mask (B, P) that is 0 where `pad` stands before one."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], dtype=torch.long)
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def check_length(config, length: int) -> None:
    """Refused if a sequence is longer than config.json says the model was trained on."""
    if config.positions and length > config.positions:
        raise Refused(f"a sequence of {length} tokens is longer than the model's {config.positions} positions.")


@dataclass
class Step:
    """The sequence after one pass of the model, and what the pass committed."""

    index: int  # of the pass, from 0
    ids: torch.Tensor  # (B, L)
    committed: torch.Tensor  # (B, L) bool


class Draft:
    """A batch of sequences while they are written: the prompt (B, P), and gen_length tokens that start as [MASK]."""

    def __init__(self, model, prompt_ids, gen_length: int, attention_mask, cfg_scale: float):
        shape, last, prompt_ids = list(prompt_ids.shape), model.config.vocab_size - 1, prompt_ids.long()
        if len(shape) != 2 or not shape[0]:
            raise Refused(f"the prompt has shape {shape}, not (batch, length) with a batch of at least 1.")
        # on a GPU such an id would end the process; tensors on the meta device hold no numbers
        if not prompt_ids.is_meta and ((prompt_ids < 0) | (prompt_ids > last)).any():
            raise Refused(f"the prompt holds a token id that is not between 0 and {last}, the model's last.")
        if attention_mask is not None and list(getattr(attention_mask, "shape", ())) != shape:
            raise Refused(f"attention_mask is no tensor of the prompt's shape {shape}.")
        check_length(model.config, prompt_ids.shape[1] + gen_length)
        self.model, self.cfg_scale, self.attention_mask, new = model, cfg_scale, None, (len(prompt_ids), gen_length)
        self.never = []  # tokens that are never predicted
        self.ids = torch.cat((prompt_ids, prompt_ids.new_full(new, model.mask_id)), 1)  # (B, L)
        self.prompt = self.ids != model.mask_id  # (B, L) bool, what was given
        if attention_mask is not None and not bool(attention_mask.bool().all()):  # without padding: no mask
            self.attention_mask = torch.cat((attention_mask, attention_mask.new_ones(new)), 1)

    @property
    def masked(self):
        """(B, L) bool: what is still to be written."""
        return self.ids == self.model.mask_id

    def predictions(self, where, predict, rows=slice(None)):
        """Predicted tokens and their confidence at the N True positions of `where`, both (B, L).

        predict(logits (N, V), where) gives both as (N,). Elsewhere the token is [MASK] and the confidence −∞.
        rows: those that the model sees; all others are False in `where`.
        """
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        logits = guided_logits(self.model, self.ids[rows], self.prompt[rows], self.cfg_scale, mask, where[rows])
        for token in self.never:
            logits[:, token] = -torch.inf
        tokens, confidence = predict(logits, where)
        x0 = self.ids.new_full(where.shape, self.model.mask_id).masked_scatter(where, tokens)
        return x0, confidence.new_full(where.shape, -torch.inf).masked_scatter(where, confidence)


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


def gumbel_max(logits, temperature: float, noise):
    """Logits whose argmax is a sample at `temperature` > 0; noise is uniform in [0, 1), of the shape of logits.

    Noise and result are float64, because float32 noise degrades text (arXiv 2409.02908).
    """
    # exp(logits) / (−log U)^T
    return logits.double().exp() / (-noise.log()) ** temperature


def held_back(model, temperature, logits_eos_inf, confidence_eos_eot_inf, eos_id, eot_id) -> tuple[list, list]:
    """Tokens that are never predicted and tokens that are committed last; ids that are None are the model's own."""
    end_of_turn = END_OF_TURN[model.config.family]
    eos_id = model.config.eos_id if eos_id is None else eos_id
    if eot_id is None and model.tokenizer is not None:
        eot_id = model.tokenizer.token_to_id(end_of_turn)
    if (logits_eos_inf or confidence_eos_eot_inf) and eos_id is None:
        raise Refused("config.json names no eos_token_id; give eos_id.")
    if confidence_eos_eot_inf and eot_id is None:
        raise Refused(f"the model has no tokenizer with {end_of_turn}; give eot_id.")
    # At temperature > 0 the official code reaches EoT alone: its EOS line hits the noisy copy, after the argmax.
    ends = [eot_id] if temperature > 0 else [eos_id, eot_id]
    return [eos_id] if logits_eos_inf else [], ends if confidence_eos_eot_inf else []


def llada_prediction(logits, where, algorithm, temperature, last: list[int], generator):
    """Predicted tokens and their confidence, both (N,), for logits (N, V) of the N True positions of `where` (B, L).

    The tokens of `last` get probability 0, so that they are committed last.
    """
    if temperature == 0:
        x0 = logits.argmax(-1)
    else:
        noise = torch.rand((*where.shape, logits.shape[-1]), dtype=torch.float64, device=logits.device,
                           generator=generator)  # (B, L, V), as the official code draws it: a seed gives its text
        x0 = gumbel_max(logits, temperature, noise[where]).argmax(-1)
    if algorithm == "random":
        return x0, torch.rand(where.shape, device=logits.device, generator=generator)[where]
    for token in last:
        logits[:, token] = -torch.inf
    return x0, torch.softmax(logits, -1).gather(-1, x0[:, None])[:, 0]


def block_schedule(start: int, steps: int, gen_length: int, block_length: int):
    """(end of the current block, tokens to commit) of each pass."""
    steps_per_block = steps // (gen_length // block_length)
    n, remainder = divmod(block_length, steps_per_block)
    for end in range(start + block_length, start + gen_length + 1, block_length):
        for i in range(steps_per_block):
            yield end, n + (i < remainder)


def llada_choices(draft: Draft, predict, schedule):
    """Predicted tokens and chosen positions, both (B, L), of each pass of LLaDA's sampler."""
    for end, count in schedule:
        where = draft.masked
        where[:, end:] = False
        x0, confidence = draft.predictions(where, predict)
        yield x0, most_confident(confidence, count) & where

# ---- Dream ---------------------------------------------------------------------------------------------------------


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


def dream_prediction(logits, where, algorithm, temperature, top_p, top_k, generator):
    """Predicted tokens and their confidence, both (N,), for logits (N, V); which positions they are does not matter."""
    probs = filtered_probs(logits, temperature, top_p, top_k)
    confidence, x0 = probs.max(-1)
    if temperature > 0 and len(probs):
        probs_sum_1 = probs / probs.sum(-1, keepdim=True)  # as torch.distributions.Categorical, whose draw this is
        # in bf16 Categorical may refuse such sums, and the official code then takes the best tokens, without a draw
        if ((probs_sum_1.sum(-1) - 1).abs() < 1e-6).all():
            x0 = torch.multinomial(probs_sum_1, 1, replacement=True, generator=generator)[:, 0]
            confidence = probs.gather(-1, x0[:, None])[:, 0]
    if algorithm == "topk_margin":
        best = probs.topk(2).values
        confidence = best[:, 0] - best[:, 1]
    if algorithm == "entropy":
        confidence = (probs * (probs + 1e-10).log()).sum(-1)
    return x0, confidence


def time_schedule(steps: int, eps: float, device=None):
    """The share 1 − s/t of the masked tokens that each pass commits; 1 in the last."""
    t = torch.linspace(1, eps, steps + 1, device=device)
    return [1 - t[i + 1] / t[i] for i in range(steps - 1)] + [1]


def draw_positions(confidence, count: int, alg_temp: float, generator):
    """True at `count` positions of each row of confidence (B, L), drawn with weights softmax(confidence / alg_temp).

    Where the confidence is −∞ nothing is left to commit. A row of such positions alone has no weights. The official
    code stops with an error there; here the row stays as it is.
    """
    done = confidence.isinf().all(-1, keepdim=True)
    weight = torch.softmax(confidence / alg_temp, -1).masked_fill(done, 1.0)
    chosen = torch.multinomial(weight, count, generator=generator)
    return torch.zeros_like(confidence, dtype=torch.bool).scatter(-1, chosen, True) & ~done


def dream_choices(draft: Draft, predict, shares, algorithm, alg_temp: float | None, generator):
    """Predicted tokens and chosen positions, both (B, L), of each pass of Dream's sampler.

    As many positions are chosen in every row as the mean row has left. A row with fewer (its prompt held fewer [MASK],
    it predicted one, or weights underflow at a tiny alg_temp) then loses tokens: the official code writes [MASK] over
    them, and so does this.
    """
    for share in shares:
        masked = draft.masked
        if algorithm == "origin":
            chance = torch.rand(int(masked.sum()), device=masked.device, generator=generator)
            chosen = torch.zeros_like(masked).masked_scatter(masked, chance < share)
            yield draft.predictions(chosen, predict)[0] if chosen.any() else draft.ids, chosen
            continue
        x0, confidence = draft.predictions(masked, predict)
        count = int(masked.sum() / len(masked) * share)
        yield x0, (draw_positions(confidence, count, alg_temp, generator) if alg_temp and count
                   else most_confident(confidence, count))

# ---- both ----------------------------------------------------------------------------------------------------------


def sure_enough(confidence, threshold: float | None, factor: float | None):
    """True where Fast-dLLM commits: confidence (B, L), −∞ where nothing can be committed; at least one in each row."""
    if factor is None:
        return most_confident(confidence, 1) | (confidence >= threshold)
    n = confidence.argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1  # 1 for the surest of a row
    # (n + 1)(1 − c_n) < f
    return (n == 1) | ((n + 1) * (1 - confidence) < factor)


def parallel_choices(draft: Draft, predict, start: int, block_length: int, threshold: float | None,
                     factor: float | None):
    """Predicted tokens and chosen positions, both (B, L), of each pass of Fast-dLLM's parallel decoding.

    A row is in the block of its first masked position. It commits there what is `sure_enough`, so that no row depends
    on the others.
    """
    position, graphed = torch.arange(draft.ids.shape[1], device=draft.ids.device), isinstance(draft.model, GraphedModel)
    while draft.masked.any():
        block = draft.masked[:, start:].int().argmax(-1, keepdim=True) // block_length  # (B, 1)
        where = draft.masked & (position < start + (block + 1) * block_length)
        # a finished row needs no pass, but a CUDA graph keeps its shape
        x0, confidence = draft.predictions(where, predict, slice(None) if graphed else where.any(-1))
        yield x0, where & sure_enough(confidence, threshold, factor)


@torch.no_grad()
def denoise(model, prompt_ids, steps: int | None, gen_length: int, block_length: int | None = None,
            temperature: float = 0.0, cfg_scale: float = 0.0, attention_mask=None, algorithm: str | None = None,
            eps: float = 1e-3, top_p: float | None = None, top_k: int | None = None, alg_temp: float | None = None,
            threshold: float | None = None, factor: float | None = None, logits_eos_inf: bool = False,
            confidence_eos_eot_inf: bool = False, eos_id: int | None = None, eot_id: int | None = None, generator=None,
            cuda_graph: bool = True):
    """Yield a `Step` after each pass; the arguments are those of `generate`."""
    if not torch.is_tensor(prompt_ids) or prompt_ids.dtype not in (torch.int32, torch.int64):
        raise Refused("the prompt must be an integer tensor of token ids, (batch, length); model.write takes texts.")
    if cuda_graph and prompt_ids.is_cuda:
        model = GraphedModel(model)
    if algorithm is None and model.config.family == "dream":
        algorithm = "entropy" if threshold is None and factor is None else "maskgit_plus"
    algorithm = algorithm or "low_confidence"
    block_length = gen_length if block_length is None else block_length
    llada = {"logits_eos_inf": logits_eos_inf, "confidence_eos_eot_inf": confidence_eos_eot_inf, "eos_id": eos_id,
             "eot_id": eot_id}
    dream = {"eps": eps, "top_p": top_p, "top_k": top_k, "alg_temp": alg_temp}
    _check(algorithm, steps, gen_length, block_length, temperature, cfg_scale, threshold, factor, llada, dream)
    draft, start = Draft(model, prompt_ids, gen_length, attention_mask, cfg_scale), prompt_ids.shape[1]
    given = {"algorithm": algorithm, "temperature": temperature, "generator": generator}
    if algorithm in LLADA:
        draft.never, last = held_back(model, temperature, **llada)
        predict = partial(llada_prediction, last=last, **given)
    else:
        predict = partial(dream_prediction, top_p=top_p, top_k=top_k, **given)
    if steps is None:
        draft.never.append(model.mask_id)  # whoever predicts it for ever never ends
        choices = parallel_choices(draft, predict, start, block_length, threshold, factor)
    elif algorithm in LLADA:
        choices = llada_choices(draft, predict, block_schedule(start, steps, gen_length, block_length))
    else:
        choices = dream_choices(draft, predict, time_schedule(steps, eps, prompt_ids.device), algorithm, alg_temp,
                                generator)
    for index, (x0, chosen) in enumerate(choices):
        draft.ids = torch.where(chosen, x0, draft.ids)
        yield Step(index, draft.ids, chosen & ~draft.masked)  # a predicted [MASK] commits nothing


def _check(algorithm, steps, gen_length, block_length, temperature, cfg_scale, threshold, factor, llada, dream):
    """Refused if options do not fit together; llada, dream: options by name that only their algorithms have."""
    eps, top_p, top_k, alg_temp = dream.values()
    if not (0 <= eps < 1 and (top_p is None or 0 < top_p <= 1) and (top_k is None or top_k >= 1)
            and (alg_temp is None or 0 <= alg_temp < torch.inf)):
        raise Refused("eps must be in [0, 1), top_p in (0, 1], top_k at least 1, alg_temp finite and at least 0.")
    whole = {"steps": steps, "gen_length": gen_length, "block_length": block_length}
    for name, value in {**whole, "temperature": temperature, "cfg_scale": cfg_scale, "threshold": threshold,
                        "factor": factor}.items():
        missing = value is None and name in ("steps", "threshold", "factor")
        if not missing and not isinstance(value, Integral if name in whole else Real):
            raise Refused(f"{name} {value!r} is no {'whole ' * (name in whole)}number.")
    if algorithm not in LLADA + DREAM:
        raise Refused(f"algorithm {algorithm!r} is not one of {', '.join(LLADA + DREAM)}.")
    parallel, usual = [rule for rule in (threshold, factor) if rule is not None], signature(denoise).parameters
    given = [name for name, value in (dream if algorithm in LLADA else llada).items() if value != usual[name].default]
    if algorithm in DREAM and not parallel and block_length != gen_length:
        given.append("block_length")
    if given:
        raise Refused(f"algorithm {algorithm!r} has no option {given[0]}; leave it out.")
    if min(1 if steps is None else steps, gen_length, block_length) < 1:
        raise Refused("steps, gen_length and block_length must be at least 1.")
    if gen_length % block_length:
        raise Refused(f"gen_length {gen_length} is not a multiple of block_length {block_length}.")
    if not 0 <= temperature < torch.inf or not cfg_scale < torch.inf:
        raise Refused("temperature must be finite and at least 0, cfg_scale finite.")
    if not parallel:
        if steps is None:
            raise Refused("give steps, the number of passes, or a threshold or factor.")
        if algorithm in LLADA and steps % (gen_length // block_length):
            raise Refused(f"steps {steps} is not a multiple of the {gen_length // block_length} blocks.")
    elif len(parallel) == 2:
        raise Refused("threshold and factor are two rules for the same choice; give one of them.")
    elif steps is not None:
        raise Refused("a threshold or factor decides itself how many passes there are; give None for steps.")
    elif algorithm not in PROBABILITY or alg_temp or not parallel[0] > 0:
        raise Refused(f"a threshold or factor is above 0 and needs an algorithm whose confidence is a probability, "
                      f"without alg_temp: {', '.join(sorted(PROBABILITY))}.")


@wraps(denoise, assigned=())
def generate(*args, **options):
    """Prompt (B, P) -> prompt + generated tokens (B, P + gen_length).

    Both families
        algorithm: `runtime/sampling.py` begins with a table of them. None is `low_confidence`, for Dream `entropy` (as
        its authors evaluate it), for Dream in parallel `maskgit_plus`. attention_mask (B, P): 0 marks left padding.
        temperature 0 is greedy. cfg_scale > 0 guides away from the empty prompt, at twice the cost. threshold or
        factor: decode in parallel; steps is then None. block_length: length of the blocks that are finished left to
        right; None is one block. cuda_graph: on a GPU, replay the blocks of the model as one CUDA graph.
    LLaDA
        logits_eos_inf never predicts end of text; confidence_eos_eot_inf commits end of text and end of turn last.
        eos_id and eot_id are the model's unless given.
    Dream
        eps: the time at which masking ends. top_p, top_k: cuts of the distribution. alg_temp > 0 draws the positions by
        confidence. Blocks are known to its parallel decoding alone.

    Raises Refused for an option that the algorithm does not have, for blocks that divide neither gen_length nor steps,
    and for a sequence that is longer than the model's positions.
    """
    try:
        signature(denoise).bind(*args, **options)
    except TypeError as error:  # would speak of denoise, which nobody called
        raise TypeError(f"generate(): {error}") from None
    for step in denoise(*args, **options):
        ids = step.ids
    return ids
