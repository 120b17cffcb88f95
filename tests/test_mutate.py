"""The mutations of tests/tools/mutate.py change a module, each in one place, and the same seed gives the same ones."""

import ast

import mutate

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
        pairs = enumerate(zip(SOURCE.splitlines(), changed.splitlines(), strict=True), 1)
        assert [number for number, (before, after) in pairs if before != after] == [line]


def test_every_module_has_tests():
    rooms = ("runtime", "checkpoint", "methods", "tiny", "calibration", "experiments")
    files = [*mutate.ROOT.glob("*.py"), *(f for room in rooms for f in (mutate.ROOT / room).glob("*.py"))]
    modules = [str(f.relative_to(mutate.ROOT).with_suffix("")) for f in files if kinds(f.read_text())]
    assert [module for module in modules if not mutate.tests_of(module)] == []
    assert not mutate.TESTS.keys() - set(modules)
