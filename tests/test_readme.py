"""README and docs/ cannot rot: tables, commands, code, numbers and links are held against the code and `results/`."""

import argparse
import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import calibrate
import starquant
from checkpoint import published
from checkpoint.families import read_config
from methods.storage import memory_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{f.name}": f.read_text() for f in sorted((ROOT / "docs").glob("*.md"))}
RESULTS = {f.name: f.read_text() for f in sorted((ROOT / "results").glob("*.md"))}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.S)]


def rows(text):
    """Cells of every Markdown table row, without the rules below the headings."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in cells if set("".join(row)) - set("-")]


def measured(name):
    """{setting: {column: cell}} of a table in results/."""
    heading, *rest = rows(RESULTS[name])
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rest}


KL, RECOVERED = "KL from 16 bit, 10⁻³ nats/token", "recovered %"
TASKS, AGAINST = "mean of the tasks, points from 16 bit", "against the row above (or the one named)"


# ---- README is a door

def test_readme_is_short_and_shows_a_picture_first():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1800
    assert README.index("![") < README.index("```")


# ---- Equations

def docstring_table():
    """(equation, function, where it runs, test) of each row in starquant.py's module docstring."""
    found = re.findall(r"^(\d+) +\|.*?\| (\w+) +\| ([\w. ]+?) +\| (\w+)$", starquant.__doc__, flags=re.M)
    assert [int(row[0]) for row in found] == [*range(1, 19), 27, 28, 29, 30]
    return found


def definitions(folders):
    """{name} of the functions and classes in these files, methods as Class.method."""
    trees = [ast.parse(file.read_text()) for file in folders]
    top = [n for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {n.name for n in top} | {f"{c.name}.{n.name}" for c in top for n in c.body if isinstance(n, ast.FunctionDef)}


def test_every_equation_has_a_function_a_test_and_a_place_where_it_runs():
    tests = definitions((ROOT / "tests").glob("test_equations*.py"))
    places = definitions([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])
    for number, function, place, test in docstring_table():
        assert inspect.isfunction(getattr(starquant, function))
        assert re.search(rf"(Eqs?\. |/|, | and ){number}\b", getattr(starquant, function).__doc__), function
        assert any(name.startswith(f"{test}.test") for name in tests), test
        assert place == "tests only" or place in places, place


def test_readme_has_the_same_equation_table():
    found = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*?) \| `(\w+)` \|$", README, flags=re.M)
    assert [(a, b, c.strip("`"), d) for a, b, c, d in found] == docstring_table()


# ---- Commands and code

COMMANDS = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
COMMANDS += [text.replace("\n", " ") for page in (*PAGES.values(), *RESULTS.values())
             for text in re.findall(r"`((?:python|torchrun) [^`]*)`", page)]


class Parsed(BaseException):
    """Raised in place of what a command would do with its flags."""


def parse_and_stop(self, args=None, namespace=None, parse_args=argparse.ArgumentParser.parse_args):
    parse_args(self, args, namespace)
    raise Parsed


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_parse(line, monkeypatch, tmp_path):
    """Every command of README, docs/ and results/ names a program that is there, with flags that it has."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "results"):  # where results of commands go
        Path(folder).mkdir()
    for command in line.split(" && "):
        words = shlex.split(command, comments=True)
        if words[0] == "torchrun":
            words = words[words.index("--nproc-per-node") + 1:]
        program, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        if program in ("pip", "pytest", "coverage"):
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
        elif program in ("calibrate.py", "evaluate.py", "bench.py", "tiny.train", "experiments.gates"):
            module = importlib.import_module(program.removesuffix(".py"))
            if hasattr(module, "parse"):
                module.parse(rest)
            else:
                monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
                with pytest.raises(Parsed):
                    module.main(rest)
        else:
            assert program in ("experiments.harness", "tests/tools/against_official.py", "tests/tools/mutate.py")


@pytest.mark.parametrize("body", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_code_runs(body, capsys):
    exec(compile(body, "README.md", "exec"), {})
    assert "####" in capsys.readouterr().out  # the example prints a solved word problem


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        file, _, heading = target.partition("#")
        if not file.startswith("https://"):
            text = PAGES[page] if not file else ((ROOT / page).parent / file).read_bytes().decode("utf-8", "replace")
            headings = [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
                        for h in re.findall(r"^#+ (.*)$", text, flags=re.M)]
            assert not heading or heading in headings, target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:\w+/)[\w./-]+\.(?:py|md|jsonl?|cu|sh))`", PAGES[page]):
        assert (ROOT / name).exists(), name


# ---- Numbers

def test_every_interval_is_a_measured_one():
    """In prose, too."""
    interval = r"\d[\d.]* ± [\d.]*\d"
    known = {i for text in RESULTS.values() for i in re.findall(interval, text)}
    assert len(known) > 100
    assert {i for text in PAGES.values() for i in re.findall(interval, text)} <= known


def test_readme_shows_rows_of_table_1():
    settings = ("RTN", "STaR-Quant", "STaR-Quant, P dense", "starquant+ (ours)")
    shown = rows(re.search(r"<!-- table-1 -->(.*?)<!-- end", README, flags=re.S).group(1))[1:]
    for (_, kl, share), row in zip(shown, (measured("table-1.md")[s] for s in settings), strict=True):
        assert kl == row[KL]
        assert share == ("–" if row["setting"] == "RTN" else f"{float(row[RECOVERED]):.0f} %")


CLAIMS = {  # claim of README: (table, settings) of the numbers in its last cell, from left to right
    "RTN, AWQ": [("table-1.md", ["RTN", "AWQ", "DLLMQuant+", "QuaRot", "DLLMQuant++"])],
    "STaR-Quant beats": [("table-1.md", ["STaR-Quant", "STaR-Quant, P dense", "FlatQuant"])],
    "SGAT helps": [("table-2-nelbo.md", ["neither (RTN)", "SGAT only"])],
    "The gates help": [("table-2-nelbo.md", ["SGAT only", "SGAT only, its gates switched off"])],
    "TAC helps": [("table-2-nelbo.md", ["neither (RTN)", "TAC only", "SGAT only", "SGAT + TAC (STaR-Quant)"])],
    "4-bit K, V": [("table-2-nelbo.md", ["QuaRot", "QuaRot, K and V in 4 bits"])],
    "Blocks of 16": [("table-3-nelbo.md", ["TAC block 8", "TAC block 32"])],
    "W8A8 is nearly": [("table-5-nelbo.md", ["RTN", "STaR-Quant"])]}


@pytest.mark.parametrize("claim", CLAIMS)
def test_numbers_behind_claims_are_those_of_their_rows(claim):
    (row,) = [row for row in rows(README) if row[0].startswith(claim)]
    values = [measured(table)[setting][KL].split()[0] for table, settings in CLAIMS[claim] for setting in settings]
    assert re.findall(r"\d+\.\d+", row[-1]) == values


def test_tables_of_results_are_those_of_the_named_files():
    """Under <!-- plain stressed -->: a row a setting, a column of either file a cell."""
    tables = re.findall(r"<!-- (table\S+) (table\S+) -->\n(.*?)<!-- end", PAGES["docs/results.md"], flags=re.S)
    assert len(tables) == 2
    columns = {"KL": KL, "recovered %": RECOVERED, "tasks, points": TASKS, AGAINST: AGAINST, "KL, outliers": KL,
               "recovered %, outliers": RECOVERED, "tasks, outliers": TASKS, "against it, outliers": AGAINST}
    for plain, stressed, text in tables:
        heading, *shown = rows(text)
        assert [row[0] for row in shown] == [s for s in measured(plain) if s != "16-bit"]
        for row in shown:
            for column, cell in zip(heading[1:], row[1:], strict=True):
                source = measured(stressed if "outliers" in column else plain)
                assert cell == source[row[0]][columns[column]], (row[0], column)


def test_numbers_of_the_gpu_are_those_of_the_run():
    """The table of steps is that of the run, whose speed-ups follow from its times."""
    shown = rows(re.search(r"<!-- gpu -->(.*?)<!-- end", PAGES["docs/performance.md"], flags=re.S).group(1))[1:]
    assert len(shown) == 4
    for row in shown:
        assert row in rows(RESULTS["gpu-h200.md"])
        eager, fused = map(float, row[1:3])
        for cell in row[3:]:
            ms, over_eager, over_fused = map(float, re.findall(r"[\d.]+", cell))
            assert abs(eager / ms - over_eager) < 0.01
            assert abs(fused / ms - over_fused) < 0.01


def test_memory_table_is_the_exact_count():
    found = re.findall(r"^\| (LLaDA-8B|Dream-7B), `(.*?)` \|(.*)\|$", PAGES["docs/performance.md"], flags=re.M)
    assert len(found) == 4
    for model, method, cells in found:
        for cell, (head, embed) in zip(cells.split("|")[1:], ((16, 16), (8, 8), (8, 4)), strict=True):
            sizes = memory_table(read_config(published.SHAPES[model.lower()]), head, embed, method)
            saving = sizes["sixteen_bit"] / sizes["total"]
            assert cell.strip() == f"{sizes['total'] / 1e9:.2f} GB, {saving:.2f}x"


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        calibrate.parse(["--help"])
    text = capsys.readouterr().out
    assert all(method in text for method in calibrate.METHODS)
