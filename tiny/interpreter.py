"""A whitelist interpreter for the small functions that the `code` task asks for.

Code that a model wrote is never given to `exec`. `run_function` parses it, walks the syntax tree, and evaluates only
the node types listed here: no imports, no loop statements, and no attributes but a few string methods. Every node costs
one unit of a fixed budget. Integers and sequences are bounded, and sequences do not nest. So hostile text (nested
comprehensions, huge powers or ranges) ends quickly with `Failed`.

    run_function("def f(xs):\\n return sum(x * x for x in xs)", ([1, 2, 3],))   ->   14
"""

import ast
import operator
import warnings

MAX_SOURCE, MAX_STEPS, MAX_INT, MAX_LEN = 2000, 20_000, 10**12, 2000


class Failed(Exception):  # noqa: N818 (a verdict, not an error of ours)
    """The program is outside the whitelist, over budget, or fails when run."""


def _power(a, b):
    if abs(a) > 1000 or abs(b) > 8:
        raise Failed("power too large")
    return a**b


def _times(a, b):
    for seq, n in ((a, b), (b, a)):  # sequence repetition: refuse before the memory is taken
        if isinstance(seq, (str, list, tuple)) and isinstance(n, int) and len(seq) * n > MAX_LEN:
            raise Failed("sequence too long")
    return a * b


def _range(*args):
    if len(numbers := range(*args)) > MAX_LEN:
        raise Failed("range too long")
    return list(numbers)


BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: _times, ast.FloorDiv: operator.floordiv,
          ast.Mod: operator.mod, ast.Pow: _power}
UNARY = {ast.USub: operator.neg, ast.Not: operator.not_}
COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
           ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
FUNCTIONS = {"sum": sum, "max": max, "min": min, "len": len, "sorted": sorted, "list": list, "abs": abs,
             "reversed": lambda xs: list(reversed(xs)), "range": _range}
STRING_METHODS = {"upper", "lower", "count"}


def _element(value):
    """The value; Failed for a sequence, which may not stand in another: doubled, it soon holds 2^40 elements."""
    if isinstance(value, (list, tuple)):
        raise Failed("nested sequence")
    return value


class _Machine:
    def __init__(self):
        self.steps = 0

    def eval(self, node, env):
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Failed("too many steps")
        value = self._eval(node, env)
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise Failed("number too large")
        if isinstance(value, (str, list, tuple)) and len(value) > MAX_LEN:
            raise Failed("sequence too long")
        return value

    def _eval(self, node, env):
        match node:
            case ast.Constant(value=int() | str() | bool() as value):
                return value
            case ast.Name(id=name) if name in env:
                return env[name]
            case ast.BinOp(left=a, op=op, right=b) if type(op) in BINARY:
                left, right = self.eval(a, env), self.eval(b, env)
                if isinstance(op, ast.Mod) and isinstance(left, str):
                    raise Failed("string formatting")  # '%1000000000d' would take memory
                return BINARY[type(op)](left, right)
            case ast.UnaryOp(op=op, operand=a) if type(op) in UNARY:
                return UNARY[type(op)](self.eval(a, env))
            case ast.BoolOp(op=op, values=values):
                stop = isinstance(op, ast.Or)
                for v in values:
                    result = self.eval(v, env)
                    if bool(result) == stop:
                        break
                return result
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(o) in COMPARE for o in ops):
                a = self.eval(left, env)
                for op, right in zip(ops, rights, strict=True):
                    b = self.eval(right, env)
                    if not COMPARE[type(op)](a, b):
                        return False
                    a = b
                return True
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.eval(body if self.eval(test, env) else orelse, env)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                kind = list if isinstance(node, ast.List) else tuple
                return kind(_element(self.eval(i, env)) for i in items)
            case ast.Subscript(value=value, slice=index):
                return self.eval(value, env)[self.eval(index, env)]
            case ast.Slice(lower=a, upper=b, step=c):
                return slice(*[None if n is None else self.eval(n, env) for n in (a, b, c)])
            case (ast.ListComp(elt, [ast.comprehension(ast.Name(name), items, tests, is_async=0)])
                  | ast.GeneratorExp(elt, [ast.comprehension(ast.Name(name), items, tests, is_async=0)])):
                inner = ({**env, name: item} for item in self.eval(items, env))
                return [_element(self.eval(elt, e)) for e in inner if all(self.eval(test, e) for test in tests)]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*[self.eval(a, env) for a in args])
            case ast.Call(func=ast.Attribute(value=obj, attr=name), args=args, keywords=[]) if name in STRING_METHODS:
                target = self.eval(obj, env)
                if not isinstance(target, (str, list, tuple)):
                    raise Failed(f"method {name} of {type(target).__name__}")
                return getattr(target, name)(*[self.eval(a, env) for a in args])
        raise Failed(f"not allowed: {type(node).__name__}")

    def block(self, body, env):
        for node in body:
            match node:
                case ast.Return(value=value) if value is not None:
                    return self.eval(value, env)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    env[name] = self.eval(value, env)
                case _:
                    raise Failed(f"not allowed: {type(node).__name__}")
        raise Failed("no return")


def run_function(source: str, args: tuple):
    """Value of the single function in `source` applied to `args`; raises Failed for anything else."""
    if len(source) > MAX_SOURCE:
        raise Failed("source too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the program's own faults, such as an escape '\\d'
            tree = ast.parse(source)
        match tree.body:
            case [ast.FunctionDef(args=ast.arguments(args=params, posonlyargs=[], kwonlyargs=[], defaults=[],
                                                     vararg=None, kwarg=None), decorator_list=[],
                                  body=[ast.Expr(ast.Constant()), *body] | body)]:  # without the docstring
                return _Machine().block(body, {p.arg: a for p, a in zip(params, args, strict=True)})
        raise Failed("not a single plain function")
    except Failed:
        raise
    except Exception as error:  # whatever the program does wrong is its own failure: syntax, types, index, recursion
        raise Failed(type(error).__name__) from None
