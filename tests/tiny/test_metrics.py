"""The embedded tasks' measures: answers, choices, trajectories, and the passes of parallel decoding."""

import pytest
import torch

from model import answer, generate, load_model
from tiny import metrics, tasks


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


def test_left_padding_in_a_batch_changes_no_answer(tiny):
    problems = tasks.problems("math", "eval", 3, 11) + tasks.problems("code", "eval", 3, 11)
    ids, mask = metrics.encode_prompts(tiny.tokenizer, problems)
    assert not mask.all()
    together = generate(tiny, ids, 12, 24, attention_mask=mask)[:, -24:]
    for problem, row in zip(problems, together, strict=True):
        alone = torch.tensor([tiny.tokenizer.encode(problem.prompt).ids])
        assert torch.equal(generate(tiny, alone, 12, 24)[0, -24:], row)


def test_grade_judges_the_text_that_generate_writes(tiny):
    problems = tasks.problems("code", "eval", 4, 12)
    ids, mask = metrics.encode_prompts(tiny.tokenizer, problems)
    written = generate(tiny, ids, 24, 24, attention_mask=mask)[:, -24:].tolist()
    texts = [answer(tiny, row) for row in written]
    want = [float(p.correct(t)) for p, t in zip(problems, texts, strict=True)]
    assert metrics.grade(tiny, problems, metrics.trajectory(tiny, problems).tokens).tolist() == want
    assert sum(want) > 0


def test_answers_stop_at_end_of_text(tiny):
    eos = tiny.tokenizer.token_to_id("<|endoftext|>")
    body = tiny.tokenizer.encode("1+1=2").ids
    assert answer(tiny, [*body, eos, *body]) == "1+1=2"


def test_cloze_is_far_above_chance_and_a_tie_is_no_hit(tiny):
    problems = tasks.cloze_problems(tiny.tokenizer, "eval", 8, 2)
    equal = [tasks.Cloze(p.context, p.options[:1].expand(4, -1), 3) for p in problems[:2]]
    assert metrics.cloze(tiny, problems).mean() > 0.4
    assert metrics.cloze(tiny, equal).sum() == 0  # argmax of a four-way tie is the first option


def test_trajectory_records_every_commit(tiny):
    problems = tasks.problems("math", "eval", 2, 1)
    ids, mask = metrics.encode_prompts(tiny.tokenizer, problems)
    tokens, when = metrics.trajectory(tiny, problems, 8, 24)
    assert torch.equal(tokens, generate(tiny, ids, 8, 24, attention_mask=mask)[:, -24:])
    assert torch.equal(torch.bincount(when.flatten(), minlength=8), torch.full((8,), 6))


def test_passes_are_counted_per_answer(tiny):
    values = metrics.parallel(tiny, 3, 5, 0.9)
    assert values.keys() == {"math", "math_passes", "code", "code_passes"}
    for task in metrics.GENERATION:
        asked = tasks.problems(task, "eval", 3, 5)
        alone = [metrics.trajectory(tiny, [problem], None, threshold=0.9) for problem in asked]
        for i, path in enumerate(alone):  # every pass commits something, also the last
            assert set(path.when[0].tolist()) == set(range(int(values[f"{task}_passes"][i])))
        texts = [answer(tiny, path.tokens[0].tolist()) for path in alone]
        assert values[task].tolist() == [p.correct(text) for p, text in zip(asked, texts, strict=True)]


def test_above_every_probability_a_pass_commits_one_token(tiny):
    asked = tasks.problems("math", "eval", 2, 5)
    path = metrics.trajectory(tiny, asked, None, 8, threshold=1.1)
    assert path.when.sort(-1).values.tolist() == [list(range(8))] * 2
    assert path.tokens.equal(metrics.trajectory(tiny, asked, 8, 8).tokens)
