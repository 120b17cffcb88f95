"""How good a model is on tokens that it is given: NELBO, KL from another model, trajectories, intervals.

Every measure is one value per example, so that models are compared in pairs and intervals come from a bootstrap over
examples. Masks depend only on the seed: two models see the same ones.

Memory: the head runs at masked tokens alone, a few at a time. What a model predicted is kept as its head and the hidden
states that enter it. So two models need not be in memory together, and a model may be read block by block.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from runtime import sampling
from runtime.processes import AT_ONCE, Bar, batches

SCORES = 2**25  # logits at once, of which KL holds some copies: 128 MiB each in fp32
TOKENS = 2**13  # in a forward pass at once, unless one sequence has more
DRAWS, LEVEL = 2000, 0.95  # of a bootstrap


def progress_bar(total: int, what: str):
    """A bar of the time left, moved by parts of `total`, whose sum may exceed it by what floating point rounds."""
    return Bar(total=total + 1e-6, desc=what, leave=False, bar_format="{l_bar}{bar}| [{elapsed}<{remaining}]")


def at_once(length: int) -> int:
    """How many sequences of that length go through a model at once."""
    return max(1, min(AT_ONCE, TOKENS // length))


# ---- likelihoods -----------------------------------------------------------------------------------------------------


class Copies(NamedTuple):
    """Masked copies of n segments (n, L), on which NELBO and KL are estimated; N of their tokens are masked."""

    n: int
    noisy: torch.Tensor  # (samples · n, L)
    tokens: torch.Tensor  # (N,) what stands under the masks, row by row
    segment: torch.Tensor  # (N,) which segment that is, 0 to n − 1
    weight: torch.Tensor  # (N,) 1 / (samples · t · |region|)


def judged_copies(ids, region, mask_id: int, samples: int = 2, seed: int = 0) -> Copies:
    """`samples` copies of every segment ids (n, L), each with a share t of its region masked; t is stratified.

    region (n, L) bool: where [MASK] may stand, None for everywhere.
    """
    region = torch.ones_like(ids, dtype=torch.bool) if region is None else region
    g, copies = torch.Generator().manual_seed(seed), []
    for _ in range(samples):
        t = sampling.stratified_ratios(len(ids), g, 1e-3)
        noisy = sampling.mask_tokens(ids, region, t, mask_id, g)
        where = noisy == mask_id
        segment = where.nonzero()[:, 0]
        copies.append((noisy, ids[where], segment, 1 / (samples * t * region.sum(-1))[segment]))
    return Copies(len(ids), *map(torch.cat, zip(*copies, strict=True)))


class Predictions(NamedTuple):
    """What a model predicts for N masked tokens: its head, and the hidden states that enter it."""

    logits: Callable  # (k, D) -> (k, V)
    hidden: torch.Tensor  # (N, D)
    vocabulary: int  # V

    def log_probabilities(self, rows: slice):
        """log p(· | x_t) of some of the tokens, (k, V) fp32."""
        return F.log_softmax(self.logits(self.hidden[rows]).float(), -1)


@torch.no_grad()
def predictions(outer, blocks: Iterable, noisy, progress=lambda: None) -> Predictions:
    """What a model predicts for the masked tokens of noisy (C, L); outer: the model, whose own blocks are not used.

    Nothing is kept of a block that has run, so `blocks` may read them one at a time. progress: called after each.
    """
    x, state, rope, _ = outer.prepare(noisy.to(outer.device))
    for block in blocks:
        x = torch.cat([block(x[rows], state[rows], rope) for rows in batches(len(x), at_once(x.shape[1]))])  # (C, L, D)
        progress()
    return Predictions(outer.logits, outer.predicting(outer.norm(x))[state], outer.config.vocab_size)


@torch.no_grad()
def likelihoods(copies: Copies, model: Predictions, reference: Predictions | None = None) -> dict[str, torch.Tensor]:
    """`nelbo` and, given a reference, `kl`: nats per token of the region, one value per segment, (n,).

    nelbo: E_t [ Σ over masked i of −log p(x_i | x_t) / t ] / |region| (LLaDA, Eq. 3). Its mean over a data set bounds
    the negative log-likelihood per token from above.
    kl: the same expectation of KL(p_ref(· | x_t) ‖ p(· | x_t)). On text that the reference wrote, the expected rise of
    NELBO is this KL. KL is never negative and does not depend on which token came, so its interval is far narrower.
    """
    totals = {name: torch.zeros(copies.n) for name in ("nelbo", *(["kl"] if reference else []))}
    for rows in batches(len(copies.tokens), max(1, SCORES // model.vocabulary)):
        got = model.log_probabilities(rows)
        per_token = {"nelbo": F.nll_loss(got, copies.tokens[rows].to(got.device), reduction="none")}
        if reference:
            want = reference.log_probabilities(rows).to(got.device)
            per_token["kl"] = (want.exp() * (want - got)).sum(-1)
        for name, values in per_token.items():
            totals[name].index_add_(0, copies.segment[rows], values.cpu() * copies.weight[rows])
    return totals

# ---- trajectories ----------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """Greedy denoising of n prompts: the final tokens (n, G), and the pass, from 0, that committed each, (n, G)."""

    tokens: torch.Tensor
    when: torch.Tensor

    @property
    def passes(self):
        """How many passes each answer took, (n,): a row of a batch waits for no other one."""
        return self.when.amax(-1).float() + 1


def trajectory(model, prompt, steps: int | None, gen_length: int, threshold: float | None = None, attention_mask=None,
               progress=lambda n: None) -> Trajectory:
    """What a model writes after prompts (n, P), and in which order; steps is None with a threshold.

    progress: called in every pass with the number of answers that it wrote, as a fraction.
    """
    parts = []
    for rows in batches(len(prompt), at_once(prompt.shape[1] + gen_length)):
        mask = None if attention_mask is None else attention_mask[rows].to(model.device)
        ids = prompt[rows].to(model.device)
        when = torch.zeros(len(ids), gen_length, dtype=torch.long)
        for step in sampling.denoise(model, ids, steps, gen_length, attention_mask=mask, threshold=threshold):
            committed = step.committed[:, -gen_length:].cpu()
            when[committed] = step.index
            progress(int(committed.sum()) / gen_length)
        parts.append(Trajectory(step.ids[:, -gen_length:].cpu(), when))
    return Trajectory(*map(torch.cat, zip(*parts, strict=True)))


def fidelity(first: Trajectory, second: Trajectory) -> dict[str, torch.Tensor]:
    """Two trajectories of the same prompts, a token a step: per example, how far they agree.

    tokens: share of positions with the same final token; positions: share of positions committed at the same step;
    divergence: first step at which a committed position or token differs, as a share of the steps (1 = never).
    """
    same_token, same_step = first.tokens == second.tokens, first.when == second.when
    steps = int(torch.maximum(first.when, second.when).max()) + 1
    earliest = torch.minimum(first.when, second.when).masked_fill(same_token & same_step, steps).amin(-1)
    return {"tokens": same_token.float().mean(-1), "positions": same_step.float().mean(-1),
            "divergence": earliest.float() / steps}

# ---- intervals and tables --------------------------------------------------------------------------------------------


def bootstrap(*values, of=lambda mean: mean) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval of the mean: (mean, low, high).

    values: (n,) over examples, or (S, n) over S calibration seeds; then seeds are drawn and, within each, its examples.
    They may be paired differences. Several are drawn together, and `of` computes what is wanted from their means.
    """
    g = torch.Generator().manual_seed(0)
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])  # (k, n) or (k, S, n)
    values = values[:, None] if values.ndim == 2 else values
    _, S, n = values.shape
    seeds = torch.randint(S, (DRAWS, S, 1), generator=g) if S > 1 else 0
    examples = torch.randint(n, (DRAWS, S, n), generator=g)
    drawn = of(*(v[seeds, examples].mean((-1, -2)) for v in values))
    # a draw whose ratio is 0/0 says nothing
    low, high = torch.nanquantile(drawn, torch.tensor([1 - LEVEL, 1 + LEVEL], dtype=torch.float64) / 2)
    return float(of(*values.mean((-1, -2)))), float(low), float(high)


def interval(triple, scale: float, digits: int, sign: str = "") -> str:
    """A mean and half its interval (mean, low, high) as text."""
    mean, low, high = triple
    return f"{scale * mean:{sign}.{digits}f} ± {scale * (high - low) / 2:.{digits}f}"


def markdown_table(header, rows) -> str:
    """A table in Markdown, of whatever `str` writes."""
    head, *lines = (f"| {' | '.join(map(str, row))} |" for row in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *lines])
