"""Can the tests fail? Small wrong changes to a module, each of which the module's own tests must notice.

    python tests/tools/mutate.py --module starquant --n 20 [--seed 0]

A comparison is flipped, a number changed, an operator swapped, a condition negated, an argument dropped or a statement
removed; --seed chooses n of all that are possible. The tests run in a copy of the repository. A change that no test
notices has survived and is printed; read it, since some are no errors. The last line of standard output is JSON.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = {f"methods/{m}": "baselines" for m in ("awq", "dllmquant", "flat", "gptq", "quarot")} | {
    "starquant": "equations equations_sgat equations_tac quantizer", "kernels": "backend", "model": "write cuda",
    "calibrate": "baselines bad_arguments", "runtime/attention": "baselines", "runtime/layers": "calibrate",
    "runtime/cuda": "checks products", "runtime/cpu": "cpu_compiling",
    "runtime/sampling": "threshold sampling_options", "tiny/metrics": "cells",
    "checkpoint/folder": "bad_input loading tokenizer output", "checkpoint/loading": "folder model bad_input storage",
    "checkpoint/families": "loading", "checkpoint/published": "twins", "methods/__init__": "calibrate bad_arguments",
    "methods/settings": "calibrate", "methods/rtn": "memory calibrate", "methods/tac": "equations_tac calibrate",
    "methods/storage": "memory preflight calibrate", "methods/plus": "feedback storage", "experiments/rows": "tables",
    "experiments/tables": "evaluate", "calibration/segments": "calibrate bad_arguments", "experiments/cells": "tables",
    "calibration/streams": "calibrate gates", "experiments/animation": "figures", "experiments/peers": "bench"}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
             ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
             ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And}


def nodes(node):
    """Every node whose change can change a result: no annotations, decorators, or text that is put together."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    yield from nodes(child)


def changes(tree):
    """(line, what, change) of every mutation; change() makes it in this tree."""
    for node in nodes(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield line, "comparison flipped", lambda n=node: n.ops.__setitem__(0, COMPARISONS[type(n.ops[0])]())
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
            yield line, "operator swapped", lambda n=node: setattr(n, "op", OPERATORS[type(n.op)]())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            other = not node.value if isinstance(node.value, bool) else node.value + 1
            yield line, f"{node.value} is {other}", lambda n=node, v=other: setattr(n, "value", v)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield line, "condition negated", lambda n=node: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
        elif isinstance(node, ast.Call) and (node.keywords or len(node.args) > 1):
            yield line, "last argument dropped", lambda n=node: (n.keywords or n.args).pop()
        body = [] if isinstance(node, ast.Module) else getattr(node, "body", [])
        for i, child in enumerate(body if isinstance(body, list) else []):  # an expression's body is no list
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.Expr | ast.AugAssign | ast.Raise) and not text:
                yield child.lineno, "statement removed", lambda b=body, i=i: b.__setitem__(i, ast.Pass())


def mutate(source: str, index: int) -> tuple[int, str, str]:
    """(line, what, changed source) of the mutation with this number."""
    tree = ast.parse(source)
    line, what, change = list(changes(tree))[index]
    change()
    return line, what, ast.unparse(ast.fix_missing_locations(tree))


def tests_of(module: str) -> list[str]:
    names = [Path(module).name, *TESTS.get(module, "").split()]  # of tests/**/test_NAME.py
    return [str(f.relative_to(ROOT)) for name in names for f in sorted((ROOT / "tests").rglob(f"test_{name}.py"))]


def passes(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests pass in this folder; out of time is a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, timeout=seconds,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("mutate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--module", required=True, help="starquant, kernels, runtime/layers, ...")
    parser.add_argument("--tests", nargs="+", help="test files (those named after the module)")
    parser.add_argument("--n", type=int, default=20, help="mutations (20)")
    parser.add_argument("--seed", type=int, default=0, help="which of all possible ones (0)")
    parser.add_argument("--seconds", type=float, default=600, help="limit for one run of the tests (600)")
    args = parser.parse_args(argv)
    tests, source = args.tests or tests_of(args.module), (ROOT / f"{args.module}.py").read_text()
    possible, survivors = len(list(changes(ast.parse(source)))), []
    chosen = sorted(random.Random(args.seed).sample(range(possible), min(args.n, possible)))
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(copy) / "repository"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        if not passes(folder, tests, args.seconds):
            parser.error(f"{' '.join(tests) or 'no test'}: must pass before anything is changed.")
        for index in chosen:
            line, what, changed = mutate(source, index)
            (folder / f"{args.module}.py").write_text(changed)
            survivors += [[line, what]] * (survived := passes(folder, tests, args.seconds))
            print(f"{args.module}.py:{line} {what}: {('killed', 'SURVIVED')[survived]}", file=sys.stderr, flush=True)
    print(json.dumps({"module": args.module, "possible": possible, "tried": len(chosen), "survived": survivors}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
