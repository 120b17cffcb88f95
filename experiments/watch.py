"""Models write one answer side by side: python evaluate.py --prompt TEXT [--against M]

On a terminal the answers are rewritten in place after every pass. What was just committed is green, and red is where
the models have committed different tokens. In a pipe every pass is one plain line a model, without colours.

    ░   a token that is still masked
    ▒   bytes that are no whole character, because a token beside them is still masked or because the model erred
    ⏎   the end of a line; any other control character is written as its escape, such as \\x1b
"""

import os
import re
import shutil
import sys
import unicodedata
from itertools import groupby, zip_longest
from pathlib import Path

import torch

from checkpoint.folder import resolve
from checkpoint.tokenizer import has_template, question
from experiments.protocol import source_name
from runtime.sampling import denoise

MASK, PART = "░", "▒"
DIM, NEW, OTHER = "2", "1;32", "31"  # codes of a terminal: faint, bold green, red
LEGEND = [(f"{MASK} still masked  ", DIM), ("just committed  ", NEW), ("the models differ", OTHER)]

# ---- the prompt ----------------------------------------------------------------------------------------------------


def encode_prompt(model, text: str, chat: bool) -> torch.Tensor:
    """Token ids (1, P) of a line of text, or of a question in the chat template of the model's family."""
    if not chat:
        return torch.tensor([model.tokenizer.encode(text + "\n").ids])
    conversation = question(model.tokenizer, model.config.family, text)
    return torch.tensor([model.tokenizer.encode(conversation, add_special_tokens=False).ids])


def is_chat_model(model, name: str) -> bool:
    """Whether the name of the 16-bit model says that it was trained to chat. Base models have the template, too."""
    source = source_name(name, resolve(name))
    return (has_template(model.tokenizer, model.config.family)
            and bool(re.search(r"instruct|chat|LLaDA-1\.5", source, re.I)))

# ---- what a terminal shows -----------------------------------------------------------------------------------------


def visible(text: str) -> list[str]:
    """The characters of a text, each as something that takes room and moves no cursor."""
    text = re.sub("\ufffd+", PART, text)
    return ["⏎" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]


def cells(tokenizer, ids: list[int], mask_id: int, marks: list[str]) -> list[tuple[str, str]]:
    """(character, mark) for token ids and the mark of each token.

    Tokens that make up one character are decoded together. All are decoded behind a letter, since some tokenizers drop
    the space in front of a text.
    """
    letter, out, start = tokenizer.encode("a", add_special_tokens=False).ids, [], 0
    skip = len(tokenizer.decode(letter))
    for i, token in enumerate(ids):
        text = MASK
        if token != mask_id:
            text = tokenizer.decode(letter + ids[start : i + 1])[skip:]
            if text.endswith("\ufffd") and i + 1 < len(ids) and ids[i + 1] != mask_id:
                continue  # the next token may complete the character
        mark = max(marks[start : i + 1], key=bool)
        out += [(c, mark) for c in visible(text)]
        start = i + 1
    return out


def width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text)


def wrapped(line: list[tuple[str, str]], columns: int) -> list[list[tuple[str, str]]]:
    """The characters of a line, cut into rows of so many columns."""
    rows, used = [[]], 0
    for cell in line:
        if used + width(cell[0]) > columns:
            rows, used = [*rows, []], 0
        rows[-1].append(cell)
        used += width(cell[0])
    return rows


def painted(row: list[tuple[str, str]]) -> str:
    groups = ((mark, "".join(c for c, _ in group)) for mark, group in groupby(row, key=lambda cell: cell[1]))
    return "".join(f"\033[{mark}m{text}\033[0m" if mark else text for mark, text in groups)


def screen_rows(head: str, line: list[tuple[str, str]], columns: int, room: int | None = None) -> list[str]:
    """The rows of one model. If they are more than `room`, those from the first masked token on stay; … marks a cut."""
    rows = wrapped(line, max(columns - width(head) - 1, 4))
    room = room or len(rows)
    first = next((i for i, row in enumerate(rows) if any(c == MASK for c, _ in row)), len(rows))
    first = max(0, min(first, len(rows) - room))
    cut = {0: first > 0, room - 1: first + room < len(rows)}
    return [(head if i == 0 else " " * width(head)) + ("…" if cut.get(i) else " ") + painted(row)
            for i, row in enumerate(rows[first : first + room])]


def short(names, columns: int) -> list[str]:
    """Names of one width: the last part of a path if that tells them apart, and at most a third of the columns."""
    parts = [Path(name).name or name for name in names]
    names = ["".join(visible(n)) for n in (parts if len(set(parts)) == len(parts) else names)]
    for i, name in enumerate(names):
        while width(names[i]) > max(columns // 3, 4):
            name = name[1:]
            names[i] = "…" + name
    return [" " * (max(map(width, names)) - width(name)) + name for name in names]

# ---- watch ---------------------------------------------------------------------------------------------------------


def marks_of(answers: list[list[int]], steps, mask_ids, start: int) -> list[list[str]]:
    """The mark of every token of every answer."""
    differ = [len(set(tokens)) > 1 and not set(tokens) & mask_ids for tokens in zip(*answers, strict=True)]
    new = [step.committed[0, start:].tolist() if step else [False] * len(differ) for step in steps]

    def mark(token, is_new, differs):
        if token in mask_ids:
            return DIM
        if differs:
            return f"1;{OTHER}" if is_new else OTHER
        return NEW if is_new else ""

    return [list(map(mark, tokens, fresh, differ)) for tokens, fresh in zip(answers, new, strict=True)]


def show_denoising(models: dict, ids: torch.Tensor, out=None, seed: int = 0, **options) -> dict:
    """Write to `out`, standard output by default, how each model answers the prompt ids (1, P), pass by pass.

    options: of `denoise`. Returns what each model wrote, and in how many passes.
    """
    out = out or sys.stdout
    live = out.isatty() and os.environ.get("TERM") != "dumb"
    coloured = live and not os.environ.get("NO_COLOR")
    start, mask_ids, steps = ids.shape[1], {m.mask_id for m in models.values()}, options.get("steps")
    latest, shown, digits = [None] * len(models), 0, len(str(steps or options["gen_length"]))

    def write(batch, whole: bool = False):
        nonlocal shown
        columns, lines = shutil.get_terminal_size() if live else (10**9, 10**9)
        columns, room = columns - 1, None if whole else max((lines - 1) // len(models), 1)
        answers, rows = [step.ids[0, start:].tolist() for step in latest], []
        for name, model, step, answer, marks in zip(short(models, columns), models.values(), latest, answers,
                                                    marks_of(answers, batch, mask_ids, start), strict=True):
            head = f"{name} {step.index + 1:>{digits}}" + (f"/{steps}" if steps else "")
            line = cells(model.tokenizer, answer, model.mask_id, marks if coloured else [""] * len(answer))
            rows += screen_rows(head, line, columns, room)
        out.write((f"\033[{shown}A\033[J" if shown else "") + "\n".join(rows) + "\n")
        out.flush()
        shown = len(rows) if live else 0

    runs = [denoise(m, ids.to(m.device), generator=torch.Generator(m.device).manual_seed(seed), **options)
            for m in models.values()]
    for batch in zip_longest(*runs):
        if coloured and not shown:
            out.write(painted(LEGEND) + "\n")
        latest = [new or old for new, old in zip(batch, latest, strict=True)]  # a model may need fewer passes
        write(batch)
    if live:
        write([None] * len(models), whole=True)
    return {"text": {name: model.tokenizer.decode(step.ids[0, start:].tolist())
                     for (name, model), step in zip(models.items(), latest, strict=True)},
            "passes": {name: step.index + 1 for name, step in zip(models, latest, strict=True)}}
