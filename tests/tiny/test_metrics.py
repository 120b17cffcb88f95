"""Parallel decoding of the tasks: answers, and the passes that each took."""

import pytest

from model import load_model
from tiny import metrics, tasks


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


def test_passes_are_counted_per_answer(tiny):
    values = metrics.parallel(tiny, 3, 5, 0.9)
    assert values.keys() == {"math", "math_passes", "code", "code_passes"}
    for task in metrics.GENERATION:
        asked = tasks.problems(task, "eval", 3, 5)
        alone = [metrics.trajectory(tiny, [problem], None, threshold=0.9) for problem in asked]
        for i, path in enumerate(alone):  # every pass commits something, also the last
            assert set(path.when[0].tolist()) == set(range(int(values[f"{task}_passes"][i])))
        texts = [metrics.answers(tiny.tokenizer, path.tokens)[0] for path in alone]
        assert values[task].tolist() == [p.correct(text) for p, text in zip(asked, texts, strict=True)]


def test_above_every_probability_a_pass_commits_one_token(tiny):
    asked = tasks.problems("math", "eval", 2, 5)
    path = metrics.trajectory(tiny, asked, None, 8, threshold=1.1)
    assert path.when.sort(-1).values.tolist() == [list(range(8))] * 2
    assert path.tokens.equal(metrics.trajectory(tiny, asked, 8, 8).tokens)
