"""Samplers: token for token the reference outputs, the official rules written out, and what they are built on."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from official import EOS, MODELS, PARITY, PROMPT, STORED, biased

from model import denoise, generate
from runtime.sampling import (
    block_schedule,
    draw_positions,
    dream_prediction,
    filtered_probs,
    guided_logits,
    gumbel_max,
    pad_left,
    time_schedule,
)

LLADA, TWO = MODELS["llada"], torch.arange(1, 6).repeat(2, 1)


def arguments(family, case):
    c = PARITY[family]["generate"][case]
    if c["seed"] is not None:
        torch.manual_seed(c["seed"])
    if family == "llada":
        own = {"gen_length": c["gen_length"], "block_length": c["block_length"], "cfg_scale": c.get("cfg_scale", 0.0),
               "algorithm": c.get("remasking", "low_confidence")}
    else:
        own = {"gen_length": c["max_new_tokens"], "algorithm": c["alg"], "top_p": c["top_p"], "top_k": c["top_k"]}
    return {"prompt_ids": STORED[family][f"gen.{case}.prompt"], "steps": c["steps"], **own,
            "attention_mask": STORED[family].get(f"gen.{case}.attention_mask")}


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "case"), [(f, case) for f in PARITY for case in PARITY[f]["generate"]])
def test_generation_parity(family, case):
    out = generate(MODELS[family], **arguments(family, case))
    assert torch.equal(out, STORED[family][f"gen.{case}.out"])


@pytest.mark.parametrize(("family", "case"), [(f, case) for f in PARITY for case in PARITY[f]["generate"]])
def test_steps_tell_what_happened(family, case):
    """Each step's `committed` are the tokens it changed from [MASK]; their number is the reference's."""
    args = arguments(family, case)
    before = F.pad(args["prompt_ids"], (0, args["gen_length"]), value=250)
    counts = []
    for i, step in enumerate(denoise(MODELS[family], **args)):
        assert step.index == i
        assert torch.equal(step.ids != before, step.committed)
        assert bool((before[step.committed] == 250).all())
        before = step.ids
        counts.append(int(step.committed.sum()) // len(before))
    assert i + 1 == args["steps"]
    assert not bool((before == 250).any())
    assert counts == PARITY[family]["generate"][case].get("tokens_per_step", counts)


@pytest.mark.parametrize(("steps", "length", "block", "counts"), [
    (5, 12, None, [3, 3, 2, 2, 2]), (12, 12, 12, [1] * 12), (1, 7, 7, [7]), (9, 12, 4, [2, 1, 1] * 3),
    (4, 8, 4, [2, 2, 2, 2]), (8, 4, 4, [1, 1, 1, 1, 0, 0, 0, 0])])
@pytest.mark.parametrize("algorithm", ["low_confidence", "random"])
def test_commits_so_many_tokens_block_by_block(steps, length, block, counts, algorithm):
    before = F.pad(TWO, (0, length), value=250)
    seen, g = list(denoise(LLADA, TWO, steps, length, block, algorithm=algorithm,
                           generator=torch.Generator().manual_seed(0))), block or length
    assert [s.index for s in seen] == list(range(steps))
    for i, step in enumerate(seen):
        assert step.committed.sum(1).tolist() == [counts[i]] * 2
        # only masks are committed, only what is committed changes, and it is no mask afterwards
        assert torch.equal(step.ids[~step.committed], before[~step.committed])
        assert bool((before[step.committed] == 250).all())
        assert bool((step.ids[step.committed] != 250).all())
        # only inside the current block; every block before it is finished
        start = 5 + i // (steps * g // length) * g
        columns = step.committed.any(0).nonzero()[:, 0]
        assert bool(((columns >= start) & (columns < start + g)).all())
        assert not bool((before[:, :start] == 250).any())
        before = step.ids
    assert not bool((before == 250).any())
    assert torch.equal(before[:, :5], TWO)


def test_a_predicted_mask_commits_nothing():
    for step in denoise(biased(LLADA, 250, 100.0), TWO, 4, 4):
        assert torch.equal(step.ids, F.pad(TWO, (0, 4), value=250))
        assert not step.committed.any()


def test_default_algorithm_is_the_familys():
    args = {"steps": 8, "gen_length": 8}
    for family, default in (("llada", "low_confidence"), ("dream", "entropy")):
        model = MODELS[family]
        assert torch.equal(generate(model, PROMPT, **args), generate(model, PROMPT, algorithm=default, **args))
    assert list(inspect.signature(generate).parameters)[:13] == [
        "model", "prompt_ids", "steps", "gen_length", "block_length", "temperature", "cfg_scale", "attention_mask",
        "algorithm", "eps", "top_p", "top_k", "alg_temp"]


def test_left_padding_does_not_change_dreams_tokens():
    """A left-padded row generates what the row generates alone."""
    model = biased(MODELS["dream"], 250, -100.0)  # a random model predicts [MASK] now and then; the share counts those
    for algorithm in ("maskgit_plus", "topk_margin", "entropy"):
        args = {"steps": 6, "gen_length": 12, "algorithm": algorithm}
        prompts, mask = pad_left([PROMPT[0].tolist(), PROMPT[0, 4:].tolist()], EOS)
        assert prompts[1, :4].tolist() == 4 * [EOS]
        both = generate(model, prompts, attention_mask=mask, **args)
        assert torch.equal(both[:1], generate(model, PROMPT, **args))
        assert torch.equal(both[1:, 4:], generate(model, PROMPT[:, 4:], **args))


# ---- the parts of the samplers -------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(0, 5))
def test_block_schedule_commits_each_block_once(blocks, steps_per_block, block_length, start):
    plan = list(block_schedule(start, steps_per_block * blocks, block_length * blocks, block_length))
    assert len(plan) == steps_per_block * blocks
    for b in range(blocks):
        counts = [n for end, n in plan if end == start + (b + 1) * block_length]
        assert sum(counts) == block_length
        assert sorted(counts, reverse=True) == counts
        assert max(counts) - min(counts) <= 1


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 40), st.floats(0, 0.5))
def test_time_schedule(steps, eps):
    """Committing these shares one after the other leaves (eps, or nothing) of the tokens: Π(1 − share) telescopes."""
    shares = [float(s) for s in time_schedule(steps, eps)]
    assert len(shares) == steps
    assert shares[-1] == 1
    left = math.prod(1 - s for s in shares[:-1])
    assert left == pytest.approx(1 - (1 - eps) * (steps - 1) / steps, rel=1e-4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.none() | st.floats(0.05, 1.0), st.none() | st.integers(1, 12),
       st.sampled_from((0.0, 0.5, 2.0)))
def test_filtered_probs(seed, top_p, top_k, temperature):
    """The nucleus is the smallest set of best tokens with at least top_p; top_k then keeps its k best."""
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
    ours = filtered_probs(logits, temperature, top_p, top_k)
    for row, got in zip(logits.double() / (temperature or 1), ours, strict=True):
        order = sorted(range(10), key=lambda i: -row[i])
        p = row.softmax(-1)
        keep, mass = [], 0.0
        for i in order:
            if top_p is not None and top_p < 1 and mass > top_p:
                break
            keep.append(i)
            mass += float(p[i])
        keep = keep[:top_k]
        expected = torch.zeros(10, dtype=torch.float64)
        expected[keep] = p[keep] / p[keep].sum()
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_top_k_and_top_p_change_the_order_but_not_the_best_tokens():
    """At temperature 0 a cut changes confidences only; top_k = 1 makes every prediction certain."""
    model, args = MODELS["dream"], {"steps": 1, "gen_length": 12, "algorithm": "maskgit_plus"}
    once = generate(model, PROMPT, **args)
    assert torch.equal(once, generate(model, PROMPT, top_p=0.9, **args))
    assert torch.equal(once, generate(model, PROMPT, top_k=1, temperature=1.0, **args))
    args["steps"] = 12
    assert not torch.equal(generate(model, PROMPT, **args), generate(model, PROMPT, top_k=1, **args))


def test_seeds_decide_and_the_global_generator_is_one_of_them():
    for family, options in (("llada", {"algorithm": "low_confidence"}), ("llada", {"algorithm": "random"}),
                            ("dream", {"algorithm": "origin"}), ("dream", {"algorithm": "entropy", "alg_temp": 0.5})):
        args = {"steps": 6, "gen_length": 12, "temperature": 1.0, **options}
        def run(seed, args=args, family=family):
            return generate(MODELS[family], PROMPT, generator=torch.Generator().manual_seed(seed), **args)
        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))
        torch.manual_seed(0)
        assert torch.equal(generate(MODELS[family], PROMPT, **args), run(0))
        assert not bool((run(0) == 250).any())


def test_alg_temp_draws_positions_by_confidence():
    """Tending to 0 it takes the most confident."""
    model, args = biased(MODELS["dream"], 250, -100.0), {"steps": 6, "gen_length": 12, "algorithm": "maskgit_plus"}
    greedy = [s.committed for s in denoise(model, PROMPT, **args)]
    torch.manual_seed(0)
    tiny = next(denoise(model, PROMPT, alg_temp=1e-6, **args)).committed
    assert int(tiny.sum()) == 1
    assert torch.equal(greedy[0], tiny)  # the first step commits one position, the surest
    hot = [s.committed for s in denoise(model, PROMPT, alg_temp=1e6, **args)]
    assert not all(torch.equal(a, b) for a, b in zip(greedy, hot, strict=True))


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_p": 0.2}, {"alg_temp": 0.5}, {"temperature": 0.7},
                                     {"temperature": 0.7, "top_k": 1, "alg_temp": 0.1}])
def test_uneven_rows_and_ties_are_the_official_rule(algorithm, options):
    """The step written out as the official code has it: the number from the mean row, positions by `topk` or drawn,
    [MASK] written where a row has no masked position left; ties (one token in the nucleus) as `topk` breaks them."""
    model = MODELS["dream"]
    prompts, T, alg_temp = torch.cat((PROMPT, PROMPT)), options.get("temperature", 0.0), options.get("alg_temp")
    if not alg_temp:  # drawing from a row without masks is an error in the official code
        prompts[1, 2:6] = 250  # the second row has four masks more
    ids = F.pad(prompts, (0, 6), value=250)
    torch.manual_seed(5)
    for share in time_schedule(5, 1e-3):
        masked = ids == 250
        p = filtered_probs(model(ids)[masked], T, options.get("top_p"), options.get("top_k"))
        if T > 0:
            x0 = torch.distributions.Categorical(probs=p).sample()
            confidence = p.gather(-1, x0[:, None])[:, 0]
        else:
            confidence, x0 = p.max(-1)
        if algorithm == "topk_margin":
            best = p.sort(-1, descending=True).values
            confidence = best[:, 0] - best[:, 1]
        if algorithm == "entropy":
            confidence = (p * torch.log(p + 1e-10)).sum(-1)
        count = int(masked.sum() / 2 * share)
        full = torch.full(ids.shape, -torch.inf)
        full[masked] = confidence
        predicted = torch.full_like(ids, 250)
        predicted[masked] = x0
        if count:
            where = torch.multinomial((full / alg_temp).softmax(-1), count) if alg_temp else full.topk(count).indices
            rows = torch.arange(2)[:, None]
            ids[rows, where] = predicted[rows, where]
    torch.manual_seed(5)
    got = generate(model, prompts, steps=5, gen_length=6, algorithm=algorithm, **options)
    assert torch.equal(got, ids)


def test_probabilities_that_do_not_sum_to_one_are_the_official_rule():
    """In bf16 `Categorical` refuses some sums; the official code then takes the best tokens and draws nothing."""
    kinds = set()
    for seed in range(40):
        logits = (3 * torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))).bfloat16()
        p = filtered_probs(logits, 1.0, None, None)
        torch.manual_seed(seed)
        try:
            want, kind = torch.distributions.Categorical(probs=p).sample(), "drawn"
        except ValueError:
            want, kind = p.argmax(-1), "best"
        after = torch.rand(1)
        torch.manual_seed(seed)
        got, confidence = dream_prediction(logits, None, "maskgit_plus", 1.0, None, None, None)
        assert torch.equal(got, want)
        assert torch.equal(confidence, p.gather(-1, want[:, None])[:, 0])
        assert torch.equal(torch.rand(1), after)
        kinds.add(kind)
    assert kinds == {"drawn", "best"}


def test_a_finished_row_stays_as_it_is_when_positions_are_drawn():
    """Where the official code stops with an error: a row of the batch has no [MASK] left."""
    confidence = torch.full((2, 9), -torch.inf)
    confidence[1, 2:5] = torch.tensor([-0.5, -1.0, -2.0])
    chosen = draw_positions(confidence, 3, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(chosen, confidence > -torch.inf)


def test_temperature_samples_the_models_distribution():
    """One token, many rows: frequencies of the sampled token are the model's probabilities (both samplers)."""
    n = 2000
    for family, algorithm in (("llada", "low_confidence"), ("dream", "maskgit_plus"), ("dream", "origin")):
        model = MODELS[family]
        p = model(F.pad(PROMPT, (0, 1), value=250))[0, -1].detach().double().softmax(-1)
        ids = generate(model, PROMPT.repeat(n, 1), 1, 1, temperature=1.0, algorithm=algorithm,
                       generator=torch.Generator().manual_seed(0))
        counts = ids[:, -1].bincount(minlength=256).double()
        likely = p * n > 5
        chi2 = ((counts - p * n) ** 2 / (p * n))[likely].sum() + (
            (counts - p * n)[~likely].sum() ** 2 / (p * n)[~likely].sum())
        assert float(chi2) < int(likely.sum()) + 5 * (2 * int(likely.sum())) ** 0.5  # five standard deviations


@pytest.mark.parametrize(("family", "algorithm"), [("llada", "low_confidence"), ("llada", "random"),
                                                   ("dream", "entropy"), ("dream", "origin")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_head_runs_only_where_a_token_may_be_committed(family, algorithm, temperature):
    model, asked = MODELS[family], []

    class Watched:
        config, mask_id, device, tokenizer = model.config, model.mask_id, model.device, None

        def __call__(self, ids, attention_mask=None, where=None):
            asked.append((ids == 250, where))
            return model(ids, attention_mask, where)

    blocks = {"block_length": 4} if family == "llada" else {}
    generate(Watched(), PROMPT, 9, 12, algorithm=algorithm, temperature=temperature, **blocks)
    for i, (masked, where) in enumerate(asked):
        if family == "llada":
            masked[:, PROMPT.shape[1] + 4 * (i // 3 + 1):] = False
        assert bool((where <= masked).all())
        assert algorithm == "origin" or torch.equal(where, masked)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_samples_the_softmax_at_a_temperature(temperature):
    logits, n = torch.tensor([1.0, 0.0, -1.0, 2.0]), 40_000
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(n, 4, dtype=torch.float64, generator=g)
    picks = gumbel_max(logits.expand(n, 4), temperature, noise).argmax(-1)
    frequency = np.bincount(picks.numpy(), minlength=4) / n
    p = np.exp(logits.double().numpy() / temperature)
    p /= p.sum()
    assert np.abs(frequency - p).max() < 4 * (0.25 / n) ** 0.5


class TestGuidance:
    def test_formula(self):
        ids = F.pad(TWO, (0, 4), value=250)
        empty = ids.clone()
        empty[:, :5] = 250
        with torch.no_grad():
            conditional, unconditional = LLADA(ids).double(), LLADA(empty).double()
            for scale in (0.5, 2.0):
                got = guided_logits(LLADA, ids, ids != 250, scale)
                want = unconditional + (scale + 1) * (conditional - unconditional)
                torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)
            assert torch.equal(guided_logits(LLADA, ids, ids != 250, 0.0), LLADA(ids))

    def test_padding_stays_hidden_in_both_halves(self):
        ids = F.pad(TWO, (0, 4), value=250)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, :2] = 0
        other = ids.clone()
        other[1, :2] = 77
        with torch.no_grad():
            outputs = [guided_logits(LLADA, i, ids != 250, 1.0, mask)[1, 2:] for i in (ids, other)]
        torch.testing.assert_close(*outputs)

    def test_the_model_runs_once_per_step_on_twice_the_batch(self):
        sizes = []
        handle = LLADA.embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        generate(LLADA, TWO, 4, 4)
        generate(LLADA, TWO, 4, 4, cfg_scale=1.0)
        handle.remove()
        assert sizes == [2] * 4 + [4] * 4
