"""Monte-Carlo likelihood of an answer given a prompt, as LLaDA and Dream are evaluated.

A masked-diffusion model bounds −log p(answer | prompt) by the expectation, over random masks of the answer, of the
cross-entropy of the masked tokens divided by the masking ratio. LLaDA draws how many tokens are masked, which has the
lower variance and is exact for one token (LLaDA paper, Appendix B.5). Dream draws for each token by itself. Both
stratify the ratio.

Every request has a random generator of its own, seeded by its tokens. So its likelihood depends neither on the order of
requests, nor on how they are put into batches or shared among processes.
"""

import hashlib
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F

from runtime.processes import Refused
from runtime.sampling import generate, guided_logits


def llada_masks(length: int, samples: int, generator=None):
    """One stratified batch of masks (samples, length) bool and their weights length / (masked tokens), (samples,)."""
    k = torch.randint(1, length + 1, (), generator=generator)
    # x_j = round(k + j·L/b), wrapped into 1 .. L
    x = torch.round(torch.linspace(float(k), k + (samples - 1) * (length / samples), steps=samples)).long()
    x = (x - 1) % length + 1
    masks = torch.arange(length) < x[:, None]
    return torch.stack([m[torch.randperm(length, generator=generator)] for m in masks]), length / x


def dream_masks(prefix: int, length: int, samples: int, eps: float = 1e-3, generator=None):
    """One stratified batch of masks (samples, length) bool and their weights 1/p, (samples,).

    The first token of prefix + target and the last one are never masked.
    """
    t = (torch.rand(1, generator=generator) + torch.arange(samples) / samples) % 1
    p = (1 - eps) * t + eps
    masks = torch.rand((samples, prefix + length), generator=generator) < p[:, None]
    masks[:, 0] = masks[:, -1] = False
    return masks[:, prefix:], 1 / p


class Copy(NamedTuple):
    """A masked copy of a request."""

    request: int
    ids: torch.Tensor  # (P + L,) prompt and answer
    prompt: int  # P
    mask: torch.Tensor  # (L,) bool
    weight: float  # of its loss in the bound of the request


def _draw(model, i, prompt, answer, mc_num, mc_batch, generator) -> list[Copy]:
    """Request i with mc_num masks; equal masks are one copy with the sum of their weights."""
    if len(answer) == 0:
        raise Refused("an answer needs at least one token.")
    if mc_num < 1 or mc_num % mc_batch:
        raise Refused(f"mc_num {mc_num} is not a multiple of the {mc_batch} samples of a stratified batch.")
    dream = model.config.family == "dream"
    draws = [dream_masks(len(prompt), len(answer), mc_batch, generator=generator) if dream else
             llada_masks(len(answer), mc_batch, generator) for _ in range(mc_num // mc_batch)]
    masks, which = torch.cat([m for m, _ in draws]).unique(dim=0, return_inverse=True)
    weights = torch.zeros(len(masks), dtype=torch.float64)
    weights.index_add_(0, which, torch.cat([w for _, w in draws]).double() / mc_num)
    ids = torch.cat((prompt, answer)).cpu()
    # where nothing is masked there is no loss
    return [Copy(i, ids, len(prompt), *row) for row in zip(masks, weights.tolist(), strict=True) if row[0].any()]


@torch.no_grad()
def _losses(model, batch: list[Copy], cfg_scale: float):
    """Weighted cross-entropies Σ CE · weight of R copies, (R,) float64. Every copy is a row, padded to one length L.

    Rows that look the same to the model form a group, and the model runs once for each group. For example, with the
    choices A to D of a question as answers of one token, there are four rows and one group:

        row  the model sees  target          row  the model sees  target
        0    question [MASK]    A            2    question [MASK]    C
        1    question [MASK]    B            3    question [MASK]    D
    """
    R, L = len(batch), max(len(copy.ids) for copy in batch)
    ids = torch.full((R, L), int(model.mask_id == 0))  # the padding is any token that is not [MASK]
    masked, prompt, real = (torch.zeros(R, L, dtype=torch.bool) for _ in range(3))
    for row, copy in enumerate(batch):
        n = len(copy.ids)
        ids[row, :n], real[row, :n], prompt[row, : copy.prompt] = copy.ids, True, True
        masked[row, copy.prompt : n] = copy.mask
    noisy = ids.masked_fill(masked, model.mask_id)
    _, group_of_row = torch.cat((noisy, prompt, real), 1).unique(dim=0, return_inverse=True)  # (R,)
    groups = int(group_of_row.max()) + 1
    row_of_group = torch.zeros(groups, dtype=torch.long).scatter_(0, group_of_row, torch.arange(R))  # any of its rows
    noisy, prompt, asked = (x[row_of_group].to(model.device) for x in (noisy, prompt, masked))
    mask = None if bool(real.all()) else real[row_of_group].long().to(model.device)
    logits = guided_logits(model, noisy, prompt, cfg_scale, mask, asked).float()  # one row for each True of `asked`
    # which of these rows belongs to position i of group g, and so to the n masked tokens of all R rows
    logit_row = (asked.flatten().cumsum(0) - 1).view(groups, L)
    group_of_row, masked, targets = (x.to(model.device) for x in (group_of_row, masked, ids[masked]))
    ce = F.cross_entropy(logits[logit_row[group_of_row][masked]], targets, reduction="none").double()  # (n,)
    # on the CPU, which adds in order: a GPU adds in any order, and the last bits would change from run to run
    sums = torch.zeros(R, dtype=torch.float64).index_add_(0, masked.nonzero()[:, 0].cpu(), ce.cpu())
    return sums * torch.tensor([copy.weight for copy in batch], dtype=torch.float64)


def _score(model, requests: int, copies, batch_size: int, cfg_scale: float) -> list[float]:
    """What the copies' losses, `batch_size` at a time, leave of each request's log-likelihood 0."""
    out, copies = [0.0] * requests, iter(copies)
    while batch := list(islice(copies, batch_size)):
        for copy, loss in zip(batch, _losses(model, batch, cfg_scale).tolist(), strict=True):
            out[copy.request] -= loss
    return out


def request_generator(prompt, answer, seed: int) -> torch.Generator:
    """The random numbers of a request, determined by its tokens and the seed."""
    key = f"{seed}/{prompt.tolist()}/{answer.tolist()}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))


def log_likelihoods(model, requests, mc_num: int = 128, mc_batch: int = 16, batch_size: int = 32,
                    cfg_scale: float = 0.0, seed: int = 0) -> list[float]:
    """log p(answer | prompt) in nats of many requests [(prompt (P,), answer (L,)), ...], longest first.

    A request has mc_num masks, stratified in batches of mc_batch (the protocols of LLaDA and Dream call that the batch
    size). batch_size sequences go through the model at once, whichever requests they belong to. Dream's evaluation
    wants the answer to end with EOS. Raises Refused for an empty answer, and if mc_num is no multiple of mc_batch.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]) - len(requests[i][1]))
    copies = (copy for i in order for copy in _draw(model, i, *requests[i], mc_num, mc_batch,
                                                    request_generator(*requests[i], seed)))
    return _score(model, len(requests), copies, batch_size, cfg_scale)


def suffix_greedy_prediction(model, prefix, target, cfg_scale: float = 0.0) -> bool:
    """Whether greedy denoising of len(target) masks after prefix, the surest token in each step, gives the target."""
    n = len(target)
    ids = generate(model, prefix[None].to(model.device), n, n, cfg_scale=cfg_scale, algorithm="low_confidence")
    return torch.equal(ids[0, -n:], target.to(model.device))
