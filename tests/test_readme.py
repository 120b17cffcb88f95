"""README cannot rot: its equation table, commands, code and numbers are checked against the code and `results/`."""

import ast
import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import mutate
import pytest

import calibrate
import evaluate
import methods
import starquant
from checkpoint import published
from checkpoint.families import read_config
from methods.storage import memory_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)


def docstring_table():
    """(equation, function, test) of each row in starquant.py's module docstring."""
    rows = re.findall(r"^(\d+) +\|.*?\| (\w+) +\| (\w+)$", starquant.__doc__, flags=re.M)
    assert [int(r[0]) for r in rows] == [*range(1, 19), 27, 28, 29, 30]
    return rows


def test_classes_exist_for_every_equation():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").glob("test_equations*.py")]
    classes = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    for number, function, test in docstring_table():
        assert inspect.isfunction(getattr(starquant, function))
        assert re.search(rf"(Eqs?\. |/|, | and ){number}\b", getattr(starquant, function).__doc__), function
        assert any(n.name.startswith("test") for n in classes[test].body if isinstance(n, ast.FunctionDef))


def test_readme_has_the_same_equation_table():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `(\w+)` \|$", README, flags=re.M)
    assert rows == docstring_table()


COMMANDS = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if line.startswith("python ")]
RECORDED = [text.replace("\n", " ") for path in sorted((ROOT / "results").glob("*.md"))
            for text in re.findall(r"`(python [^`]*)`", path.read_text())]


@pytest.mark.parametrize("line", COMMANDS + RECORDED)
def test_commands_parse(line):
    """Every command of README and of results/ names a program that is there, with flags that it has."""
    for command in line.split(" && "):
        words = shlex.split(command)[1:]
        if words[0] == "-m":
            assert words[1] in ("pip", "pytest", "coverage")
            continue
        assert (ROOT / words[0]).is_file()
        module = {"calibrate.py": calibrate, "evaluate.py": evaluate}.get(words[0])
        if module is calibrate:
            methods.config_from(calibrate.parse(words[1:]))
        elif module is not None:
            module.parse(words[1:])


@pytest.mark.parametrize("body", [body for kind, body in BLOCKS if kind == "python"])
def test_code_runs(body, capsys):
    exec(compile(body, "README.md", "exec"), {})
    assert "####" in capsys.readouterr().out  # the example prints a solved word problem


def test_every_file_is_named():
    table = README.split("## Files")[1].split("\n\n")[1]
    named = re.findall(r"`(\w+\.py|kernels\.cu)`", table)
    assert sorted(named) == sorted(p.name for p in (*ROOT.glob("*.py"), *ROOT.glob("*.cu")))


def test_an_installation_has_every_module():
    listed = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), flags=re.S).group(1)
    assert sorted(re.findall(r"\w+", listed)) == sorted(p.stem for p in ROOT.glob("*.py"))


def test_every_number_of_the_result_tables_is_a_measured_one():
    measured = "\n".join(f.read_text() for f in (ROOT / "results").glob("*.md"))
    tables = re.findall(r"^\|.*±.*\|$", README, flags=re.M)
    assert len(tables) >= 3
    assert [t for t in tables if t not in measured] == []


def test_every_interval_is_a_measured_one():
    """In prose, too."""
    interval = r"\d[\d.]* ± [\d.]*\d"
    measured = {i for f in (ROOT / "results").glob("*.md") for i in re.findall(interval, f.read_text())}
    assert len(measured) > 100
    assert set(re.findall(interval, README)) <= measured


def test_memory_table_is_the_exact_count():
    rows = re.findall(r"^\| (LLaDA-8B|Dream-7B), `(.*?)` \|(.*)\|$", README, flags=re.M)
    assert len(rows) == 4
    for model, method, cells in rows:
        for cell, (head, embed) in zip(cells.split("|")[1:], ((16, 16), (8, 8), (8, 4)), strict=True):
            sizes = memory_table(read_config(published.SHAPES[model.lower()]), 4, head, embed, method)
            saving = sizes["sixteen_bit"] / sizes["total"]
            assert cell.strip() == f"{sizes['total'] / 1e9:.2f} GB, {saving:.2f}x"


def test_every_quantconfig_field_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        calibrate.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(calibrate.QuantConfig):
        assert field.name in text


def test_every_mutation_still_applies():
    """`python tests/mutate.py` takes half an hour; that its targets exist is checked here."""
    mutate.check()
