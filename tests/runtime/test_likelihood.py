"""Likelihoods: the reference estimates, their exact expectation, and one answer whatever the batch."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from official import MODELS, PARITY, PROMPT, STORED, get_log_likelihood

from runtime.likelihood import (
    dream_masks,
    llada_masks,
    log_likelihoods,
    request_generator,
    suffix_greedy_prediction,
)
from runtime.sampling import guided_logits


@pytest.mark.parametrize("case", PARITY["llada"]["loglik"], ids=lambda c: c["id"])
def test_llada_likelihood_parity(case):
    torch.manual_seed(case["seed"])
    stored = [STORED["llada"][f"ll.{case['id']}.{part}"] for part in ("prompt", "answer")]
    ours = get_log_likelihood(MODELS["llada"], *stored, case["mc_num"], case["batch_size"], case["cfg_scale"])
    assert ours == pytest.approx(case["value"], rel=1e-5)


@pytest.mark.parametrize("case", PARITY["dream"]["nll"], ids=lambda c: c["id"])
def test_dream_likelihood_parity(case):
    torch.manual_seed(case["seed"])
    stored = [STORED["dream"][f"nll.{case['id']}.{part}"] for part in ("prefix", "target")]
    ours = get_log_likelihood(MODELS["dream"], *stored, case["mc_num"], case["batch_size"])
    assert ours == pytest.approx(-case["nll"], rel=1e-5)


def test_llada_masks_are_the_reference_draws():
    for i, batch in ((0, 16), (2, 1)):
        noisy, ratio = STORED["llada"][f"ll.{i}.first_noisy"], STORED["llada"][f"ll.{i}.first_pmask"]
        length = len(STORED["llada"][f"ll.{i}.answer"])
        torch.manual_seed(i)
        masks, weights = llada_masks(length, batch)
        assert torch.equal(masks, noisy[:, -length:] == 250)
        torch.testing.assert_close(weights, 1 / ratio[:, 0])


@torch.no_grad()
def exact_log_likelihood(model, prompt, answer, cfg_scale=0.0):
    """−E over all masks: k masked tokens with probability 1/L, each set of k equally likely, weight L/k."""
    L, total = len(answer), 0.0
    ids = torch.cat((prompt, answer))[None]
    known = (torch.arange(ids.shape[1]) < len(prompt))[None]
    for subset in product((False, True), repeat=L):
        k = sum(subset)
        if k:
            where = torch.cat((torch.zeros(len(prompt), dtype=torch.bool), torch.tensor(subset)))[None]
            logits = guided_logits(model, ids.masked_fill(where, 250), known, cfg_scale)
            ce = F.cross_entropy(logits[where].double(), ids[where], reduction="sum")
            total -= float(ce) * (L / k) / (L * math.comb(L, k))
    return total


def test_llada_estimate_is_the_exact_expectation_within_its_error():
    case = PARITY["llada"]["loglik"][0]
    prompt, answer = (STORED["llada"][f"ll.0.{part}"] for part in ("prompt", "answer"))
    exact = exact_log_likelihood(MODELS["llada"], prompt, answer)
    assert exact == pytest.approx(case["exact_expectation"], rel=1e-5)
    for cfg_scale in (0.0, 0.5):
        exact = exact_log_likelihood(MODELS["llada"], prompt, answer, cfg_scale)
        run = partial(log_likelihoods, MODELS["llada"], [(prompt, answer)], 512, 8, cfg_scale=cfg_scale)
        runs = torch.tensor([run(seed=s)[0] for s in range(10)])
        assert abs(float(runs.mean()) - exact) < 4 * float(runs.std()) / 10**0.5
        assert float(runs.std()) < 0.05 * abs(exact)


def test_one_token_is_exact():
    """L = 1: every mask is the whole answer, so any number of samples gives log p(token), and runs once."""
    for cfg_scale in (0.0, 1.5):
        prompt, answer = STORED["llada"]["ll.2.prompt"], STORED["llada"]["ll.2.answer"]
        exact = exact_log_likelihood(MODELS["llada"], prompt, answer, cfg_scale)
        for mc_num, mc_batch in ((1, 1), (128, 16)):
            ours = log_likelihoods(MODELS["llada"], [(prompt, answer)], mc_num, mc_batch, cfg_scale=cfg_scale)
            assert ours[0] == pytest.approx(exact, rel=1e-5)


def requests(n=7):
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (n, 2), generator=g).tolist()
    return [(torch.randint(0, 240, (p,), generator=g), torch.randint(0, 240, (a,), generator=g)) for p, a in lengths]


@pytest.mark.parametrize(("family", "cfg_scale"), [("llada", 0.0), ("llada", 0.5), ("dream", 0.0)])
def test_batched_equals_one_by_one(family, cfg_scale):
    """Padding, chunking, order and company change nothing: each request has its own generator."""
    model, many = MODELS[family], requests()
    alone = [get_log_likelihood(model, p, a, 32, 8, cfg_scale, request_generator(p, a, 5)) for p, a in many]
    for batch_size in (1, 13, 500):
        together = log_likelihoods(model, many, 32, 8, batch_size, cfg_scale, seed=5)
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
    backwards = log_likelihoods(model, many[::-1], 32, 8, 13, cfg_scale, seed=5)[::-1]
    assert backwards == pytest.approx(alone, rel=1e-5, abs=1e-5)
    other = log_likelihoods(model, many, 32, 8, 13, cfg_scale, seed=6)
    assert any(abs(a - b) > 1e-3 for a, b in zip(alone, other, strict=True))
    assert log_likelihoods(model, []) == []


def test_batches_hold_at_most_batch_size_sequences():
    seen = []

    class Counting:
        config, mask_id, device = MODELS["llada"].config, 250, torch.device("cpu")

        def __call__(self, ids, mask, where):
            seen.append(len(ids))
            return MODELS["llada"](ids, mask, where)

    log_likelihoods(Counting(), requests(), 32, 8, 13)
    assert max(seen) == 13
    assert all(n == 13 for n in seen[:-1])
    seen.clear()
    log_likelihoods(Counting(), [(PROMPT[0], torch.tensor([5]))], 128, 16)
    assert seen == [1]
    seen.clear()
    choices = [(PROMPT[0], torch.tensor([t])) for t in (5, 6, 7, 8)]
    together = log_likelihoods(Counting(), choices, 8, 8)
    assert seen == [1]  # four answers, one masked row
    assert together == pytest.approx([log_likelihoods(MODELS["llada"], [c], 8, 8)[0] for c in choices], rel=1e-5)
    assert len(set(together)) == 4


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 16), st.integers(0, 10**6))
def test_masks_and_weights(length, samples, seed):
    g = torch.Generator().manual_seed(seed)
    masks, weights = llada_masks(length, samples, g)
    torch.testing.assert_close(weights * masks.sum(-1), torch.full((samples,), float(length)))
    masks, weights = dream_masks(3, length, samples, 1e-3, g)
    assert masks.shape == (samples, length)
    assert not bool(masks[:, -1].any())  # the last token is EOS
    whole = dream_masks(0, 9, 64, 1e-3, g)[0].any(0).tolist()
    assert whole == [False, *[True] * 7, False]
    assert bool((weights >= 1).all())
    assert bool((weights <= 1001).all())
    ratios = (1 / weights).sort().values  # one in each of `samples` equal parts of the circle
    assert samples == 1 or float((ratios[1:] - ratios[:-1]).max()) <= 1.01 / samples


def test_greedy_suffix_parity():
    prefix, continuation = STORED["llada"]["greedy.prefix"], STORED["llada"]["greedy.continuation"]
    assert suffix_greedy_prediction(MODELS["llada"], prefix, continuation)
    for i in range(len(continuation)):
        wrong = continuation.clone()
        wrong[i] += 1
        assert not suffix_greedy_prediction(MODELS["llada"], prefix, wrong)


def test_likelihood_refusals():
    with pytest.raises(ValueError, match="at least one token"):
        log_likelihoods(MODELS["llada"], [(PROMPT[0], PROMPT[0, :0])])
    with pytest.raises(ValueError, match="mc_num 12 is not a multiple of the 8"):
        get_log_likelihood(MODELS["llada"], PROMPT[0], PROMPT[0], 12, 8)
