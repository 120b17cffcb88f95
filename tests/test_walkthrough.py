"""docs/walkthrough.md is typed into a Python prompt, line by line, and prints the numbers that stand on the page."""

import code
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text()
STEPS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", PAGE, flags=re.S)
ABOUT = r"≈ ([\d.]+)"  # a number that may differ by a tenth


def test_every_step_has_code_that_says_what_it_prints_and_an_exercise_with_an_answer():
    assert len(STEPS) == PAGE.count("```python")
    for number, step in enumerate(re.split(r"^## (?=\d\.)", PAGE, flags=re.M)[1:], 1):
        assert step.startswith(f"{number}.")
        assert all(step.count(word) == 1 for word in ("**The idea.**", "**Exercise.**", "<summary>Answer</summary>"))
    assert number == 6


@pytest.fixture
def as_many_threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_many_threads_as_before")
def test_the_page_prints_its_numbers(capsys):
    prompt = code.InteractiveConsole()
    for body, expected in STEPS:
        for line in body.splitlines():
            unfinished = prompt.push(line)
        assert not unfinished, f"the prompt waits for more after: {line}"
        printed, complaint = capsys.readouterr()
        assert complaint == "", body
        assert re.sub(ABOUT, "≈", printed) == re.sub(ABOUT, "≈", expected)
        for got, want in zip(re.findall(ABOUT, printed), re.findall(ABOUT, expected), strict=True):
            assert float(got) == pytest.approx(float(want), rel=0.1), f"{got}, not {want}, by: {body}"


def test_numbers_of_the_paper_s_settings_are_those_of_table_2():
    rows = (ROOT / "results" / "table-2-nelbo.md").read_text()
    settings = ("SGAT + TAC (STaR-Quant)", "no gates, no TAC, random P, untrained", "SGAT + TAC, no gates",
                "the same, P dense")
    measured = [re.search(rf"^\| {re.escape(name)} \| ([\d.]+)", rows, flags=re.M).group(1) for name in settings]
    assert re.findall(r"\d+\.\d", PAGE[PAGE.index("STaR-Quant reaches"):PAGE.index("## The method on")]) == measured
