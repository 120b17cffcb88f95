"""Activations of the calibration set on their way through one block: its output, and what reaches its linears.

Segments pass a block in chunks. All activations of one kind are one tensor (S, L, d), in memory or, with `--spill`, in
a file.
"""

import os
import tempfile
from contextlib import ExitStack, suppress
from functools import partial
from math import prod
from pathlib import Path

import torch

from checkpoint.families import FUSED
from runtime.processes import batches
from starquant import linear

SEGMENTS = 64  # that pass through a block at once


def activations(shape, like, spill: Path | None):
    """Room for activations of like's dtype: on its device, or in a file of the folder `spill`.

    The file has no name once it is mapped, so it goes with its tensor, however the program ends. It is allocated
    whole, so that a full disk is an OSError here and not a crash later.
    """
    if spill is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.NamedTemporaryFile(dir=spill) as file:
        size = prod(shape) * like.element_size()
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(file.name, shared=True, size=prod(shape), dtype=like.dtype).view(shape)


class Room:
    """One kind of activations of all segments, (S, ...), which is filled chunk by chunk."""

    def __init__(self, segments: int, spill: Path | None):
        self.segments, self.spill, self.filled, self.tensor = segments, spill, 0, None

    def add(self, part):
        if self.tensor is None:  # the first part shows the width
            self.tensor = activations((self.segments, *part.shape[1:]), part, self.spill)
        self.tensor[self.filled : self.filled + len(part)] = part
        self.filled += len(part)


class Reached(Exception):  # noqa: N818 (not an error)
    """The submodule whose input is wanted is reached, so the rest of the block need not run."""


@torch.no_grad()
def run_block(block, x, state, rope, at_once: int = SEGMENTS, watch: tuple[str, ...] = (), spill: Path | None = None,
              stop: bool = False):
    """x (S, L, D) -> the output of a block (S, L, D) and the input of each submodule in `watch`, {name: (S, L, d)}.

    stop: the block runs up to the first of these submodules, and the output is None.
    """
    output, inputs = Room(len(x), spill), {name: Room(len(x), spill) for name in watch}

    def keep(name, _, args):
        inputs[name].add(args[0])
        if stop:
            raise Reached

    with ExitStack() as hooks:
        for name in watch:
            hooks.enter_context(getattr(block, name).register_forward_pre_hook(partial(keep, name)))
        for now in batches(len(x), at_once):
            with suppress(Reached):
                output.add(block(x[now].to(state.device), state[now], rope))
    return output.tensor, {name: room.tensor for name, room in inputs.items()}


@torch.no_grad()
def inputs_of(model, ids, names=FUSED):
    """(place, linear, its input (N, d), states (N,)) of the linears `names` for token ids (n, L), a block at a time."""
    x, state, rope, _ = model.prepare(ids.to(model.device))
    for i, block in enumerate(model.blocks):
        x, seen = run_block(block, x, state, rope, watch=names)
        for name, inputs in seen.items():
            yield {"block": i, "linear": name}, getattr(block, name), inputs.flatten(0, 1).float(), state.flatten()


def input_of(name: str, block, x, state, rope, spill: Path | None = None):
    """Input (S, L, d) of the submodule `name` of a block, which runs up to it and no further."""
    return run_block(block, x, state, rope, watch=(name,), spill=spill, stop=True)[1][name]


def exact_output(original, x):
    """Y = X Wᵀ + b of a 16-bit linear, in fp32: x (S, L, d) -> (S, L, C)."""
    y = linear(x, original.weight.detach().float())
    return y if original.bias is None else y + original.bias.float()
