"""Text, problems and token states for the embedded model: everything is made from a seed, and nothing is downloaded.

There are three domains, each with splits `train`, `calib` and `eval` that never overlap:
- english: Moby-Dick and State of the Union addresses 1934-2019 (`tiny/english`, public domain), split by document;
- math:    word problems answered with a chain of thought, the counterpart of GSM8K, split by a hash of the problem;
- code:    docstring to small function, the counterpart of HumanEval, split by a hash of the specification.

`cloze` problems (the true continuation of an english passage among four) are the counterpart of HellaSwag.
"""

import hashlib
import lzma
import random
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import pad

from runtime.processes import Refused
from tiny.interpreter import Failed, run_function

HERE = Path(__file__).parent
GEN_LENGTH = 24  # tokens reserved for the answer of a generation task (the longest answer takes 22)


def knows_our_tasks(folder: Path) -> bool:
    """Whether the model of a folder was trained on these tasks (`tiny/train.py`), or was quantized from one."""
    record = folder / "training.json"
    return record.is_file() and '"phases"' in record.read_text(encoding="utf-8", errors="replace")


def split_of(key: str) -> str:
    """The split that owns `key`: 1/10 eval, 1/10 calib, 8/10 train, by a hash that no seed changes."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: "eval", 1: "calib"}.get(bucket, "train")

# ---- english -------------------------------------------------------------------------------------------------------


def english_documents(split: str) -> tuple[str, ...]:
    """Documents (chapters, addresses) of one split."""
    out = []
    for source in ("moby-dick", "sotu"):
        text = lzma.decompress((HERE / "english" / f"{source}.txt.xz").read_bytes()).decode()
        out += [d for i, d in enumerate(text.split("\f")) if split_of(f"{source}/{i}") == split]
    return tuple(out)


@lru_cache(maxsize=8)
def _english_tokens(tokenizer_json: str, split: str) -> torch.Tensor:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    eos = tokenizer.token_to_id("<|endoftext|>")
    return torch.tensor([t for e in tokenizer.encode_batch(list(english_documents(split))) for t in [*e.ids, eos]])


def english_tokens(tokenizer, split: str) -> torch.Tensor:
    """All english tokens of a split, documents joined by end-of-text, (N,)."""
    return _english_tokens(tokenizer.to_str(), split)

# ---- problems ------------------------------------------------------------------------------------------------------

PEOPLE = ("Ann", "Ben", "Carl", "Dora", "Emma", "Fred", "Gina", "Hugo", "Ivy", "Jack", "Kate", "Liam", "Mia", "Noah",
         "Olga", "Paul", "Rosa", "Sam", "Tina", "Will")
ITEMS = ("apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps", "stones", "nuts")
GAIN = ("buys {b} more", "finds {b} more", "gets {b} from {n2}")
LOSS = ("gives {b} to {n2}", "loses {b}", "sells {b}")
# words and code of a function's parts
REDUCE = (("the sum of ", "sum({})"), ("the largest of ", "max({})"), ("the smallest of ", "min({})"),
          ("the count of ", "len([{}])"), ("", "[{}]"), ("in order ", "sorted({})"))
FILTERS = (("", ""), (" that are even", " if x % 2 == 0"), (" that are odd", " if x % 2 == 1"),
           (" that are greater than {k}", " if x > {k}"), (" that are less than {k}", " if x < {k}"),
           (" that are divisible by {k}", " if x % {k} == 0"))
MAPS = (("", "x"), (", each squared", "x * x"), (", each plus {k}", "x + {k}"), (", each minus {k}", "x - {k}"),
        (", each times {k}", "x * {k}"))


@dataclass(frozen=True)
class Problem:
    """A prompt, its reference answer, and what decides whether another answer is right."""

    prompt: str
    answer: str
    inputs: tuple = ()  # code: argument tuples; the first is one on which the reference answer has a value

    def correct(self, text: str) -> bool:
        """math: the number after '####' is the reference's; code: every input gives the reference's value."""
        if not self.inputs:
            return _final_number(text) == _final_number(self.answer)
        return all(self._value(text, args) == self._value(self.answer, args) for args in self.inputs)

    def _value(self, text: str, args: tuple):
        try:
            return run_function(self.prompt + text, args)
        except Failed:  # also what the reference does on some inputs, e.g. the largest of nothing
            return Failed


def _final_number(text: str) -> list[str]:
    """The word behind the last '####', as a list: an answer may have none."""
    return text.split("####")[-1].split()[:1] if "####" in text else []


def _math(rng: random.Random, steps: int = 2) -> tuple[list[str], Problem]:
    name, other = rng.sample(PEOPLE, 2)
    item = rng.choice(ITEMS)
    if rng.random() < 0.3:  # boxes of things
        boxes, each = rng.randint(2, 5), rng.randint(2, 9)
        total, lines = boxes * each, [f"{boxes}*{each}={boxes * each}"]
        story = f"{name} has {boxes} boxes of {each} {item}."
    else:
        total, lines = rng.randint(3, 30), []
        story = f"{name} has {total} {item}"
    while len(lines) < steps:
        b = rng.randint(2, 9)
        up = rng.random() < 0.5 or b > total
        what = rng.choice(GAIN if up else LOSS).format(b=b, n2=rng.choice(PEOPLE) if lines else other)
        story += f" Then {name} {what}." if lines else f" and {what}."
        result = total + b if up else total - b
        lines.append(f"{total}{'+' if up else '-'}{b}={result}")
        total = result
    # the keys leave out names and wording: the same two lines never appear in two splits
    keys = [f"math/{first} {second}" for first, second in pairwise(lines)]
    return keys, Problem(f"{story} How many {item}?\n", "\n".join([*lines, f"#### {total}"]))


def _code(rng: random.Random) -> tuple[list[str], Problem]:
    if rng.random() < 0.25:  # arithmetic on two numbers
        a, b = rng.randint(2, 9), rng.randint(2, 20)
        op, word = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
        op2, word2 = rng.choice((("+", "plus"), ("-", "minus")))
        doc, expr = f"x {word} {a} times y, {word2} {b}", f"x {op} {a} * y {op2} {b}"
        params, inputs = "x, y", [(7, 3), *((rng.randint(-9, 20), rng.randint(-9, 20)) for _ in range(4))]
    else:
        (of, call), (which, test) = rng.choice(REDUCE), rng.choice(FILTERS)
        how, value = MAPS[0] if of == "the count of " else rng.choice(MAPS)
        k1, k2 = rng.randint(2, 20), rng.randint(2, 20)
        doc = f"{of}the numbers in xs{which.format(k=k1)}{how.format(k=k2)}"
        expr = call.format(f"{value.format(k=k2)} for x in xs{test.format(k=k1)}")
        params = "xs"  # the first list holds all of 0..40, so that no filter leaves it empty
        inputs = [(rng.sample(range(41), 41),), *(([rng.randint(0, 40) for _ in range(8)],) for _ in range(4))]
    return [f"code/{doc}"], Problem(f'def f({params}):\n """Return {doc}."""\n', f" return {expr}", tuple(inputs))


def problems(task: str, split: str, n: int, seed: int) -> list[Problem]:
    """`math`, `code` or `chain` (three-step math) problems whose contents all hash into the split."""
    make = {"math": _math, "code": _code, "chain": partial(_math, steps=3)}[task]
    rng, out = random.Random(f"{task}/{split}/{seed}"), []
    while len(out) < n:
        keys, problem = make(rng)
        if all(split_of(key) == split for key in keys):
            out.append(problem)
    return out


@dataclass(frozen=True)
class Cloze:
    context: torch.Tensor  # (C,)
    options: torch.Tensor  # (4, N), option `answer` is the true continuation
    answer: int


def cloze_problems(tokenizer, split: str, n: int, seed: int, context=40, length=16) -> list[Cloze]:
    """Passages of `context` tokens with the true continuation of `length` tokens and three from elsewhere."""
    tokens, rng = english_tokens(tokenizer, split), random.Random(f"cloze/{split}/{seed}")
    out = []
    for _ in range(n):
        at = rng.randrange(len(tokens) - context - length)
        starts = [at + context] + [rng.randrange(len(tokens) - length) for _ in range(3)]
        order = rng.sample(range(4), 4)
        options = torch.stack([tokens[starts[o] : starts[o] + length] for o in order])
        out.append(Cloze(tokens[at : at + context], options, order.index(0)))
    return out

# ---- token sequences -----------------------------------------------------------------------------------------------


def problem_tokens(tokenizer, task: str, split: str, n: int, seed: int, gen_length=GEN_LENGTH):
    """Problems as sequences of one length: prompt, answer, end-of-text up to the end.

    Returns ids (n, L) and region (n, L) bool, True from the answer to the end. The region has at least `gen_length`
    tokens, and more after a short prompt. So no row needs padding or an attention mask.
    """
    eos = tokenizer.token_to_id("<|endoftext|>")
    batch = problems(task, split, n, seed)
    prompts = [e.ids for e in tokenizer.encode_batch([p.prompt for p in batch])]
    answers = [e.ids for e in tokenizer.encode_batch([p.answer for p in batch])]
    length = max(map(len, prompts)) + max(gen_length, *map(len, answers))  # another tokenizer may need more
    rows = [p + a + [eos] * (length - len(p) - len(a)) for p, a in zip(prompts, answers, strict=True)]
    return torch.tensor(rows), torch.arange(length) >= torch.tensor([[len(p)] for p in prompts])


def chain_tokens(tokenizer, n: int, seed: int, mask_id: int, ahead: int = 4):
    """A drill for training: `math` of two or three steps as left-to-right decoding meets it.

    Each problem is cut at a random place, in half of them right behind an '='. All that follows the cut is masked.
    Returns clean ids, masked ids, and (n, L) bool for the `ahead` tokens behind the cut, which the model must predict.
    With independent masks a result can mostly be copied from a later line, so a model hardly learns to calculate. And
    there are so few two-step problems that it would learn them by heart.
    """
    ids, region = problem_tokens(tokenizer, ("math", "chain")[seed % 2], "train", n, seed, gen_length=34)
    g, equals = torch.Generator().manual_seed(seed), ids == tokenizer.token_to_id("=")
    pick = torch.rand(ids.shape, generator=g)
    text = region & (ids != tokenizer.token_to_id("<|endoftext|>"))
    chosen = torch.where(torch.rand(n, 1, generator=g) < 0.5, pick * equals, pick * text).argmax(1, keepdim=True)
    distance = torch.arange(ids.shape[1]) - chosen
    return ids, ids.masked_fill(distance > 0, mask_id), (distance > 0) & (distance <= ahead)


def sum_tokens(tokenizer, n: int, length: int, seed: int):
    """A drill for training: lines of sums like those in `math`, in which only results are masked.

    Word problems alone teach a small model to copy numbers long before it adds them.
    """
    rng, rows, regions = random.Random(f"sums/{seed}"), [], []
    for _ in range(n):
        text, hidden = "", []  # hidden: of every character, whether it may be masked
        while len(text) < length:
            kind, a, b = rng.choice("++--*"), rng.randint(2, 54), rng.randint(2, 9)
            if kind == "*":
                a, b = rng.randint(2, 5), rng.randint(2, 9)
            if kind == "-" and b > a:
                kind = "+"
            asked, result = f"{a}{kind}{b}=", str({"+": a + b, "-": a - b, "*": a * b}[kind])
            text += f"{asked}{result}\n"
            hidden += [False] * len(asked) + [True] * len(result) + [False]
        encoded = tokenizer.encode(text)
        rows.append(encoded.ids[:length])
        regions.append([hidden[at] for at, _ in encoded.offsets[:length]])
    return torch.tensor(rows), torch.tensor(regions)


def english_segments(tokenizer, split: str, n: int, length: int, seed: int):
    """Random windows of the split's english tokens: ids (n, length) and an all-True region."""
    tokens, g = english_tokens(tokenizer, split), torch.Generator().manual_seed(seed)
    if len(tokens) <= length:
        raise Refused(f"the {split} split holds {len(tokens)} tokens of English, too few for segments of {length}.")
    starts = torch.randint(len(tokens) - length, (n, 1), generator=g)
    ids = tokens[starts + torch.arange(length)]
    return ids, torch.ones_like(ids, dtype=torch.bool)


def calibration_set(tokenizer, n: int, length: int, seed: int, split: str = "calib"):
    """n clean segments of one length from the three domains in turn: ids (n, length) and the maskable region.

    Longer problems are cut; shorter ones are continued with end-of-text.
    """
    parts, eos = [], tokenizer.token_to_id("<|endoftext|>")
    for i, domain in enumerate(("english", "math", "code")[:n]):
        count = len(range(i, n, 3))
        ids, region = (english_segments(tokenizer, split, count, length, seed) if domain == "english" else
                       problem_tokens(tokenizer, domain, split, count, seed))
        more = length - ids.shape[1]  # below 0, `pad` cuts
        parts.append((pad(ids, (0, more), value=eos), pad(region, (0, more), value=True)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return tuple(torch.cat(tensors)[order] for tensors in zip(*parts, strict=True))
