"""The mutations of tests/tools/mutate.py change a module, each in one place, and the same seed gives the same ones."""

import ast

import mutate
import pytest

SOURCE = ast.unparse(ast.parse('''"""Text."""
def f(x: int = 1, *, scale=2.0) -> int:
    """More text, 3."""
    if x < 3 and scale:
        x += 4
    print(x, flush=True)
    return g(x, 5) @ x if not x else x * scale
'''))


def kinds(source):
    return [what for _, what, _ in mutate.changes(ast.parse(source))]


def test_every_kind_is_there():
    found = kinds(SOURCE)
    for what in ("comparison flipped", "operator swapped", "3 is 4", "True is False", "2.0 is 3.0", "condition negated",
                 "last argument dropped", "statement removed"):
        assert what in found, what
    assert not any("text" in what for what in found)


def test_each_changes_one_place():
    for index in range(len(kinds(SOURCE))):
        line, _, changed = mutate.mutate(SOURCE, index)
        different = [i for i, (a, b) in enumerate(zip(SOURCE.splitlines(), changed.splitlines(), strict=True), 1) if a != b]
        assert different == [line]


@pytest.mark.parametrize("module", ["starquant", "kernels", "model", "calibrate", "evaluate", "bench", *mutate.TESTS])
def test_every_module_has_tests(module):
    assert mutate.tests_of(module) != []
    assert len(kinds((mutate.ROOT / f"{module}.py").read_text())) > 2
