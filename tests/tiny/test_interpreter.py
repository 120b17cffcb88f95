"""The whitelist interpreter: Python's values for plain programs, a quick refusal for everything else."""

import contextlib
import time
import tracemalloc
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiny import interpreter
from tiny.interpreter import Failed, run_function

XS = [3, 1, 4, 1, 5, 9, 2, 6]

TRUSTED = [  # (parameters, body, arguments): written here, so Python itself may run them
    ("xs", "return sum(x * x for x in xs if x % 2 == 0)", (XS,)),
    ("xs", "return [x + 1 for x in xs if x > 2 if x < 6]", (XS,)),
    ("xs", "return sorted(x - 3 for x in xs)", (XS,)),
    ("xs", "return len([x for x in xs if not x % 3 == 0])", (XS,)),
    ("xs", "return max(xs) - min(xs) + xs[0] * xs[-1]", (XS,)),
    ("xs", "return xs[1:4] + xs[::-2] + xs[:0]", (XS,)),
    ("xs", "y = xs[2]\n z = y ** 2 // 3\n y = z % 5\n return -y", (XS,)),
    ("xs", "return list(reversed(sorted(xs)))", (XS,)),
    ("xs", "return 4 in xs and 7 not in xs", (XS,)),
    ("xs", "return xs and 0 or 5", (XS,)),
    ("xs", "return xs[0] > 5 and xs[99]", (XS,)),
    ("xs", "return [xs[0] or xs[99], 1 and 7 and 2, 0 or 0 or 4, 3 and 0 and 5]", (XS,)),
    ("xs", "return xs[99] if len(xs) > 99 else len(xs)", (XS,)),
    ("xs", "return 1 < xs[0] <= 3 < 2", (XS,)),
    ("xs", "return xs.count(1)", (XS,)),
    ("xs", "x = 100\n ys = [x for x in xs]\n return x + len(ys)", (XS,)),
    ("xs", "return [1, 2] * 3 == [1, 2, 1, 2, 1, 2]", (XS,)),
    ("x, y", "return x * 3 + y - 7", (-4, 11)),
    ("x, y", "return x // y, ", (-7, 2)),
    ("x, y", "return ()", (1, 2)),
    ("x, y", "return (x, y, x)[1:] + (x,) * 2", (1, 2)),
    ("x, y", "return (x, y, x).count(x) if y in (x, y) else 0", (1, 2)),
    ("x, y", "return [(x, y) == [x, y], (x, y) < (x, y, 1), max((x, y)), sum((x, y))]", (1, 2)),
    ("x, y", "return sorted((y, x))", (1, 2)),
    ("x, y", "return x % y + (x // y) * y", (-7, 2)),
    ("x, y", "return abs(x) if x < 0 else y", (-4, 11)),
    ("x, y", "return not x == y", (1, 1)),
    ("x, y", "return max(x, y, 3)", (1, 2)),
    ("n", "return sum(range(1, n + 1)) == n * (n + 1) // 2", (50,)),
    ("n", "return list(range(n, 0, -3))", (20,)),
    ("s", "return s.upper() + s.lower() + s[::-1] + s[0] * 3", ("aBc",)),
    ("s", "return s.count('b') * 10 + len(s)", ("abcb",)),
    ("s", "return [c for c in s if c in 'aeiou']", ("education",)),
    ("", '"""Documented."""\n return True', ()),
]


@pytest.mark.parametrize(("parameters", "body", "arguments"), TRUSTED)
def test_trusted_programs_have_pythons_values(parameters, body, arguments):
    source = f"def f({parameters}):\n {body}\n"
    scope = {}
    exec(source, scope)
    want, got = scope["f"](*arguments), run_function(source, arguments)
    assert got == want
    assert type(got) is type(want)


def function(body, parameters="xs"):
    return f"def f({parameters}):\n {body}\n"


def lines(*body):
    return function("\n ".join(body))


def doubling(n, name):
    return [f"{name} = [1]", *[f"{name} = [{name}, {name}]"] * n]


HOSTILE = {
    "import": lines("import os", "return 1"),
    "import from": lines("from os import path", "return 1"),
    "import before": "import os\n" + function("return 1"),
    "__import__": function("return __import__('os')"),
    "builtins": function("return __builtins__"),
    "open": function("return open('/etc/passwd')"),
    "eval": function("return eval('1')"),
    "print": function("return print(xs)"),
    "getattr": function("return getattr(xs, 'append')"),
    "type": function("return type(xs)"),
    "__class__": function("return xs.__class__"),
    "__class__ chain": function("return ().__class__.__bases__[0].__subclasses__()"),
    "method object": function("return xs.count"),
    "unlisted method": function("return xs.append(1)"),
    "method of a number": function("return xs[0].count(1)"),
    "str.format": function("return '{0.__class__}'.format(xs)"),
    "% formatting": function("return '%1000000000d' % 5"),
    "% formatting, hidden": lines("s = '%1000000000d'", "return s % 5"),
    "f-string": function("return f'{xs}'"),
    "f-string width": function("return f'{1:1000000000}'"),
    "lambda": function("return (lambda: 1)()"),
    "lambda bomb": function("return (lambda g: g(g))(lambda g: g(g))"),
    "recursion": function("return f(xs)"),
    "recursion by name": lines("g = f", "return g(xs)"),
    "nested function": lines("def g(x):", "    return x", "return g(1)"),
    "class": lines("class A: pass", "return A"),
    "while": lines("while True:", "    pass", "return 1"),
    "for": lines("for x in xs:", "    pass", "return 1"),
    "if": lines("if xs:", "    return 1"),
    "try": lines("try:", "    return 1", "except Exception:", "    return 2"),
    "with": lines("with xs:", "    return 1"),
    "walrus": function("return (y := 5) + y"),
    "augmented assignment": lines("xs += [1]", "return xs"),
    "item assignment": lines("xs[0] = 1", "return xs"),
    "unpacking": lines("a, b = 1, 2", "return a"),
    "two targets": lines("a = b = 1", "return a"),
    "delete": lines("del xs", "return 1"),
    "global": lines("global y", "return 1"),
    "assert": lines("assert xs", "return 1"),
    "raise": function("raise SystemExit"),
    "yield": function("yield 1"),
    "await": function("return await xs"),
    "async": "async " + function("return 1"),
    "starred": function("return max(*xs)"),
    "keyword argument": function("return sorted(xs, key=len)"),
    "dict": function("return {1: 2}"),
    "set": function("return {1, 2}"),
    "dict comprehension": function("return {x: x for x in xs}"),
    "float": function("return 1e308"),
    "complex": function("return 1j"),
    "bytes": function("return b'a' * 9"),
    "None": function("return None"),
    "ellipsis": function("return ..."),
    "shift": function("return 1 << 10"),
    "true division": function("return 1 / 2"),
    "bitwise": function("return ~5"),
    "is": function("return xs is xs"),
    "default argument": "def f(xs=[1]):\n return xs\n",
    "varargs": "def f(xs, *ys):\n return xs\n",
    "keyword only": "def f(xs, *, y=1):\n return xs\n",
    "decorator": "@print\n" + function("return 1"),
    "two functions": function("return 1") + function("return 2"),
    "no function": "1 + 1",
    "empty": "",
    "no return": function("y = 1"),
    "bare return": function("return"),
    "wrong number of parameters": function("return 1", "x, y"),
    "syntax": function("return ("),
    "indentation": "def f(xs):\nreturn 1",
    "null byte": "def f(xs):\n return 1\0",
    "surrogate": "def f(xs):\n return '\ud800' + \ud800",
    "long source": function("return 1  # " + "one " * 600),
    "undefined": function("return y"),
    "division by zero": function("return 1 // 0"),
    "index": function("return xs[99]"),
    "zero step": function("return xs[::0]"),
    "adding apples": function("return xs + 1"),
    "nothing's largest": function("return max([])"),
    "huge power": function("return 9 ** 9 ** 9"),
    "huge power by squaring": lines(*["x = 999999"] + ["x = x * x"] * 60, "return x"),
    "huge literal": function("return " + "9" * 1900),
    "big exponent": function("return 2 ** 1000000000"),
    "negative power of zero": function("return 0 ** -1"),
    "huge range": function("return range(10 ** 11)"),
    "large range": function("return len(range(9 * 10 ** 6))"),
    "large repetition": function("return len([0] * 10 ** 8)"),
    "large repetition of text": function("return len(10 ** 8 * 'a')"),
    "huge sum": function("return sum(range(10 ** 11))"),
    "huge range in a comprehension": function("return [x for x in range(10 ** 9)]"),
    "repetition": function("return [0] * 10 ** 10"),
    "repetition from the left": function("return 10 ** 10 * 'a'"),
    "repetition by doubling": lines("s = 'aaaaaaaaaa'", *["s = s + s"] * 60, "return s"),
    "comprehension bomb": function("return [0 for a in range(2000) for b in range(2000) for c in range(2000)]"),
    "nested comprehensions": function("return sum(sum(sum(1 for a in range(2000)) for b in range(2000)) for c in xs)"),
    "list of lists": function("return [range(2000) for x in range(2000)]"),
    "list of lists of lists": function("return [[range(2000) for x in range(2000)] for y in range(2000)]"),
    "tuples of tuples": function("return ((1, 2), 3)"),
    "a tuple plus a list": function("return (1, 2) + xs"),
    "summing lists": lines("ys = [range(2000) for x in range(2000)]", "return sum(ys, [])"),
    "comparing lists of lists": lines("ys = [range(2000) for x in range(2000)]",
                                      "return sum([len(max(ys)) for y in range(2000)])"),
    "doubling lists": lines(*doubling(40, "a"), *doubling(40, "b"), "return a == b"),
    "doubling tuples": lines("a = (1,)", *["a = (a, a)"] * 40, "b = (1,)", *["b = (b, b)"] * 40, "return a == b"),
    "doubling by comprehension": lines("a = [1]", *["a = [a for i in range(2)]"] * 40, "return max(a, a)"),
    "deep parentheses": function("return " + "(" * 900 + "1" + ")" * 900),
    "deep lists": function("return " + "[" * 150 + "]" * 150),
    "deep not": function("return " + "not " * 470 + "1 + 'a'"),
    "deep minus": function("return " + "-" * 1900 + "'a'"),
    "deep index": function("return xs" + "[0]" * 600),
    "deep conditional": function("return " + "1 if y else " * 150 + "1"),
    "deep sum": function("return " + "x+" * 900 + "x"),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_programs_are_refused_quickly_and_in_little_memory(source):
    assert len(source) < interpreter.MAX_SOURCE or source == HOSTILE["long source"]
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(Failed):
            run_function(source, (XS,))
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 5
    assert peak < 50e6


@pytest.mark.parametrize("body", [
    "ys = range(2000)\n return sum([max(sorted(ys)) for y in range(2000)])",
    "ys = range(2000)\n return sum([ys.count(7) for y in range(2000)])",
    "ys = range(2000)\n zs = range(2000)\n return sum([ys == zs for y in range(2000)])",
    "ys = ['a' * 1999 + 'b' for x in range(1500)]\n return sum([len(max(ys)) for y in range(1500)])",
    "s = 'ab' * 1000\n t = 'a' * 1000\n return sum([s.count(t) for y in range(2000)])",
])
def test_the_most_expensive_programs_within_the_budget_end_quickly(body):
    start = time.process_time()
    assert isinstance(run_function(function(body), (XS,)), int)
    assert time.process_time() - start < 5


def test_a_wrong_escape_in_the_program_is_silent():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert run_function("def f(xs):\n return '\\d'\n", (XS,)) == "\\d"
    assert not seen


def test_arguments_are_not_changed():
    xs = [3, 1, 2]
    assert run_function(function("return sorted(xs) + list(reversed(xs))"), (xs,)) == [1, 2, 3, 2, 1, 3]
    assert xs == [3, 1, 2]


def value_or_refused(source, arguments):
    start = time.process_time()
    with contextlib.suppress(Failed):
        run_function(source, arguments)
    assert time.process_time() - start < 5


@given(st.text(max_size=300))
@example("\x00")
@example("def f(xs):\n return '\\d'\n")
def test_any_text(text):
    value_or_refused(text, (XS,))
    value_or_refused(function("return " + text), (XS,))
    value_or_refused(function(text), (XS,))


WORDS = ["xs", "x", "f", "0", "1", "7", "999999", "'ab'", "(", ")", "[", "]", ",", ":", "+", "-", "*", "**", "//", "%",
         "==", "<", "in", "not", "and", "or", "if", "else", "for", "range", "sum", "max", "sorted", "list", "len",
         "return", "lambda", ".", "count", "__class__", "=", ":=", "\n ", "{", "}", "await", "yield", "import", "*xs"]


@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_any_words(words):
    value_or_refused(function("return " + " ".join(words)), (XS,))
    value_or_refused(function(" ".join(words)), (XS,))


def grow(inner):
    """Syntactically right expressions, mostly over the whitelist."""
    pair = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "**", "//", "%", "==", "<", "in", "and", "or"]), inner)
        .map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        pair.map(lambda t: f"[x for x in {t[0]} if {t[1]}]"), pair.map(lambda t: f"[{t[0]} for x in {t[1]}]"),
        pair.map(lambda t: f"[{t[0]}, {t[1]}]"), pair.map(lambda t: f"{t[0]}[{t[1]}]"),
        pair.map(lambda t: f"{t[0]}.count({t[1]})"), pair.map(lambda t: f"range({t[0]}, {t[1]})"),
        st.tuples(st.sampled_from(["sum", "max", "min", "sorted", "list", "len", "reversed", "range", "-", "not "]),
                  inner).map(lambda t: f"{t[0]}({t[1]})"))


leaves = st.sampled_from(["xs", "x", "0", "2", "9", "1999", "'ab'", "True", "y"])
expressions = st.recursive(leaves, grow, max_leaves=25)


@given(expression=expressions, other=expressions)
def test_any_expression(expression, other):
    value_or_refused(lines(f"x = {expression}", f"y = {other}", f"return {expression}"), (XS,))
