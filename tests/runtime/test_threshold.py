"""Decoding in parallel by threshold or factor: cases worked out by hand, batches against single rows, where it ends."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from official import EOS, MODELS, PROMPT, biased

from model import denoise, generate
from runtime.sampling import sure_enough


class Scripted:
    """A model of six tokens, of which 5 is [MASK], whose probabilities a table gives by position and tokens before."""

    def __init__(self, probabilities, family="llada"):
        self.config = SimpleNamespace(family=family, eos_id=None, positions=None, vocab_size=6)
        self.mask_id, self.tokenizer, self.probabilities, self.asked = 5, None, probabilities, []

    def __call__(self, ids, attention_mask=None, where=None):
        self.asked.append(where.clone())
        rows = [self.probabilities(b, i, ids[b].tolist()) for b, i in where.nonzero().tolist()]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 6).log()


def sure(token, p):
    """Probability p of one token; [MASK] has a share of the rest, which is smaller than p."""
    rest = torch.full((6,), (1 - p) / 5).tolist()
    return [*rest[:token], p, *rest[token + 1:]]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_threshold_on_a_case_worked_out_by_hand(family):
    """Blocks of two behind a prompt of one: (.95, .9) both reach .9; (.6, .5) none does, so the surest goes alone and
    the other, now .8, follows as the surest of the next pass. In the last block .7 and then .91 need two passes."""
    def probabilities(_, i, ids):
        p = {1: .95, 2: .9, 3: .6, 4: .5 if ids[3] == 5 else .8, 5: .7, 6: .69 if ids[5] == 5 else .91}[i]
        return sure(i % 4, p)

    model = Scripted(probabilities, family)
    steps = list(denoise(model, torch.tensor([[0]]), None, 6, 2, threshold=0.9 - 1e-9))
    assert [s.committed[0].nonzero()[:, 0].tolist() for s in steps] == [[1, 2], [3], [4], [5], [6]]
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert steps[-1].ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    # the head is asked for the masked positions of the current block alone
    assert [w[0].nonzero()[:, 0].tolist() for w in model.asked] == [[1, 2], [3, 4], [4], [5, 6], [6]]


def test_what_reaches_the_threshold_is_committed():
    confidence = torch.tensor([[0.5, 0.25, 0.75], [0.25, -torch.inf, 0.125]])
    assert sure_enough(confidence, 0.5, None).tolist() == [[True, False, True], [True, False, False]]


def exactly(token, p):
    """Probability p of one token and 1 − p of token 4, none of [MASK]."""
    row = torch.tensor([0, 0, 0, 0, 1 - p, 0], dtype=torch.float64)
    row[token] = p
    return row.tolist()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_factor_on_a_case_worked_out_by_hand(family):
    """f = .35. Of (.8, .95, .6, .9) the two surest go: 2 · .05 = .1 and 3 · .1 = .3 are below f, 4 · .2 = .8 is not. Of
    the rest, .8 and .6, the surer goes, since one must, and 3 · .4 is above f (the authors' code commits both). Of (.9,
    .85, .9, .85) both of .9 go, 3 · .1 = .3, and one of .85 in each of two passes, since 3 · .15 = .45 is above f."""
    p = {1: .8, 2: .95, 3: .6, 4: .9, 5: .9, 6: .85, 7: .9, 8: .85}
    model = Scripted(lambda _, i, ids: exactly(i % 4, p[i]), family)
    steps = list(denoise(model, torch.tensor([[0]]), None, 8, 4, factor=0.35))
    assert [s.committed[0].nonzero()[:, 0].tolist() for s in steps] == [[2, 4], [1], [3], [5, 7], [6], [8]]
    assert steps[-1].ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0]]


def test_factor_counts_tokens_that_tie():
    """2 · .1 is below .25 and 3 · .1 is not: one of two equals goes, whichever it is."""
    model = Scripted(lambda _, i, ids: exactly(0, 0.9))
    assert [int(s.committed.sum()) for s in denoise(model, torch.tensor([[0]]), None, 2, factor=0.25)] == [1, 1]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_threshold_above_one_is_one_token_a_pass(family):
    """The surest token of the current block, pass by pass, written out; for LLaDA also its own one-token schedule."""
    model, ids, start = biased(MODELS[family], 250, -100.0), F.pad(PROMPT, (0, 12), value=250), PROMPT.shape[1]
    steps = list(denoise(model, PROMPT, None, 12, 4, threshold=1.01))
    assert len(steps) == 12
    for i, step in enumerate(steps):
        p, x0 = model(ids).softmax(-1).max(-1)
        end = start + 4 * (i // 4 + 1)
        best = int(p[0, :end].masked_fill(ids[0, :end] != 250, 0).argmax())
        ids[0, best] = x0[0, best]
        assert torch.equal(step.ids, ids)
    if family == "llada":
        assert torch.equal(ids, generate(model, PROMPT, 12, 12, 4))


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"factor": 2.5}], ids=["threshold", "factor"])
def test_a_batch_equals_single_rows(family, block_length, rule):
    """Tokens and passes: a row that needs fewer passes waits, and padding changes nothing."""
    model = MODELS[family]
    prompts = torch.randint(0, 240, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    prompts[3, :2], mask[3, :2] = EOS, 0
    steps = list(denoise(model, prompts, None, 12, block_length, attention_mask=mask, **rule))
    passes = torch.stack([s.committed.any(-1) for s in steps]).sum(0).tolist()
    assert len(steps) == max(passes) > min(passes)
    for row, skip, n in zip(range(4), (0, 0, 0, 2), passes, strict=True):
        alone = list(denoise(model, prompts[row : row + 1, skip:], None, 12, block_length, **rule))
        assert len(alone) == n
        assert torch.equal(alone[-1].ids[0], steps[-1].ids[row, skip:])


def test_threshold_gives_the_model_only_rows_that_are_not_finished():
    model = Scripted(lambda _, i, ids: sure(0, 0.95 if ids[0] == 1 else 0.5))
    assert [step.committed.any(-1).tolist() for step in denoise(model, torch.tensor([[1], [0]]), None, 3, threshold=0.9)
            ] == [[True, True], [False, True], [False, True]]
    assert [len(where) for where in model.asked] == [2, 1, 1]


def test_threshold_ends_where_the_model_predicts_a_mask():
    model = biased(MODELS["llada"], 250, 100.0)
    assert not bool((generate(model, PROMPT, None, 8, threshold=0.5) == 250).any())
