"""Before anything is written: can this run finish? And `--dry-run`, which also rehearses one optimization step.

`check` runs at the start of every calibration and refuses in one sentence what cannot end well. It compares the exact
bytes of the output with the free disk, tries the permission to write, compares a lower bound of the memory with what is
free, and reads every weight once to find NaN and Inf. (Opening the model has checked the headers of its files before.)
`rehearse` fits the first linear of the first block for one step and estimates the time of the whole run from it.
"""

import copy
import shutil
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from calibration.output import OURS
from calibration.streams import exact_output
from checkpoint.families import FUSED, NAMES, ModelConfig, linear_shapes
from checkpoint.folder import TOKENIZER_FILES, Checkpoint
from checkpoint.storage import Tensor
from methods import METHODS
from methods.rtn import Inputs, check_tied
from methods.settings import Settings
from methods.storage import output_bytes
from runtime.measures import markdown_table
from runtime.processes import Refused, free_memory, rank, synchronize, watched, writable

HEADER = 2**16  # bytes allowed for the text at the head of a shard (names, shapes, losses)
# passes through a block that calibration takes: two whole ones of the streams, and parts for the inputs of the four
# linears and for TAC's two representations, which add up to less than three
FORWARDS = 5


def memory_bytes(c: ModelConfig, tokens: int, itemsize: int, spilled: bool = False, gptq: bool = False) -> dict:
    """Bytes of memory that calibrating on `tokens` tokens takes, by part, and `total`, a lower bound of the peak.

    gptq: the method rounds weights by GPTQ, in float64. Then the second moment, its factor, the weight and its codes
    count. spilled: activations are in files and do not count, except for the 16-bit stream when the embedding makes it.
    The embedding is gone when the blocks come. Scratch of the optimizer, of attention and of the integer products
    depends on the device and is not counted.
    """
    shapes = list(linear_shapes(c).values())  # in the order they are fitted
    # while one is fitted: the 16-bit inputs of those after it; its own input, output and weight in fp32
    stages = [(0 if spilled else tokens * sum(d for _, d in shapes[i + 1 :]) * itemsize,
               4 * (tokens * (C + d) + C * d), gptq * (16 * d * d + 9 * C * d))
              for i, (C, d) in enumerate(shapes)]
    later, fit, second_order = max(stages, key=sum)
    parts = {
        "embedding": c.vocab_size * c.d_model * itemsize,
        "one block": sum(map(prod, shapes)) * itemsize,
        "both streams and the next": 0 if spilled else 3 * tokens * c.d_model * itemsize,
        "fitting a linear": fit,
        "inputs of later linears": later,
        **({"GPTQ": second_order} if gptq else {}),
    }
    outer, stream = parts["embedding"], tokens * c.d_model * itemsize
    return parts | {"total": max(outer + stream, sum(parts.values()) - outer)}


def gb(size: int) -> str:
    return f"{size / 1e9:.4g} GB"


def spilled_bytes(c: ModelConfig, tokens: int, itemsize: int) -> int:
    """Most bytes of activations that --spill keeps on disk at once.

    They are the two streams, the 16-bit block's output, the 16-bit inputs of all linears and the widest quantized one.
    """
    widths = [d for _, d in linear_shapes(c).values()]
    return tokens * (3 * c.d_model + sum(widths) + max(widths)) * itemsize


def check(source: Checkpoint, out: Path, config: Settings, tokens: int, device, dtype, spill: Path | None = None,
          stressed: bool = False) -> dict:
    """What the run will take, in bytes, or Refused in one sentence; nothing is written. Few tokens bring a warning.

    stressed: the run writes the source to the disk first, in fp32.
    """
    c = source.config
    if stressed:
        source = copy.copy(source)
        source.dtypes = dict.fromkeys(source.dtypes, "F32")
    check_tied(c.tied, config.head_bits, config.embed_bits)
    model_bytes = sum(Tensor(shape, source.dtypes[name]).nbytes for name, shape in source.shapes.items())
    *blocks, outer = output_bytes(source, config)
    home = writable(out, "--out")
    files = sum((source.folder / n).stat().st_size for n in TOKENIZER_FILES if (source.folder / n).is_file())
    disk = sum(blocks) + outer + files + HEADER * (c.n_layers + 2) + (model_bytes + files + HEADER) * stressed
    kept = sum(p.stat().st_size for p in out.iterdir() if OURS.fullmatch(p.name)) if out.is_dir() else 0
    free = shutil.disk_usage(home).free + kept
    if disk > free:
        raise Refused(f"the output takes {gb(disk)}, but {home} has {gb(free)} left; free some or choose another "
                      f"--out.")
    if spill is not None:
        if writable(spill, "--spill") != spill:
            raise Refused(f"--spill {spill} is no folder; make it first.")
        room, free_there = spilled_bytes(c, tokens, dtype.itemsize), shutil.disk_usage(spill).free
        if room > free_there:
            raise Refused(f"--spill takes {gb(room)}, but {spill} has {gb(free_there)} left; lower --segments or "
                          f"--length or choose another folder.")
    memory = memory_bytes(c, tokens, dtype.itemsize, spill is not None, config.second_order)
    available = free_memory(device)
    if available is not None and memory["total"] > available:
        other = ", or add --spill FOLDER" if spill is None else ""
        raise Refused(f"calibrating takes at least {gb(memory['total'])} of memory on {device}, but {gb(available)} "
                      f"are free; lower --segments or --length{other}.")
    for name in watched(source.shapes, "checking tensors"):
        source.get(name)  # names NaN and Inf
    warn_of_few_tokens(c, tokens, config)
    return {"blocks": blocks, "outer": outer, "disk": disk, "disk_free": free, "memory": memory,
            "memory_free": available, "model_bytes": model_bytes}


def warn_of_few_tokens(c: ModelConfig, tokens: int, config: Settings) -> None:
    """Warn on standard error below two tokens a channel of the widest linear; `docs/results.md` says what that costs.

    RTN takes nothing from the tokens.
    """
    channels = max(d for _, d in linear_shapes(c).values())
    if tokens < 2 * channels and config.method != "rtn" and rank() == 0:
        print(f"calibrate.py: {tokens} tokens are fewer than two for each of the {channels} channels of the widest "
              f"linear, so the result suffers; give more --segments.", file=sys.stderr)


def timed(function, device):
    """(result, seconds) of function(); the seconds end when the device has done what it was told."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def fit_once(outer, block, noisy, config: Settings):
    """(record, seconds) of fitting the first block's qkv to segments noisy (S, L), straight from the embedding."""
    x, state, _, _ = outer.prepare(noisy)
    x, layer = block.attn_norm(x).detach().float(), block.qkv  # (S, L, D)
    y = exact_output(layer, x)
    inputs = Inputs(x, y, state, torch.full(state.shape, 0.5, device=x.device), block.attn_norm.weight.detach())
    generator, fit = torch.Generator().manual_seed(config.seed), METHODS[config.method].fit
    (fitted, record), seconds = timed(lambda: fit(layer.weight.detach().float(), layer.bias, inputs, config, generator,
                                                  lambda loss: None), x.device)
    error = float((fitted(x, state) - y).square().sum() / y.square().sum().clamp_min(1e-30))
    return {**record, "error": error}, seconds


def rehearse(outer, block, noisy, config: Settings) -> dict:
    """One real optimization step on the first block's qkv, and the time of the whole run that follows from it.

    noisy (S, L): the calibration segments. A method that does not train is fitted whole. Other linears are taken to
    cost in proportion to their weights.
    """
    c, few = outer.config, noisy[: config.batch + 1] if config.trained else noisy[:4]
    still = replace(config, epochs=0) if config.trained else config
    fit_once(outer, block, few, still)  # the first call of everything is slow
    steps, step = 0, 0.0
    if config.trained:
        few_seconds = fit_once(outer, block, few, still)[1]
        # of few segments one is held out, and the others make one batch
        record, seconds = fit_once(outer, block, few, replace(config, epochs=min(config.epochs, 1)))
        steps = config.epochs * -(-(len(noisy) - max(len(noisy) // 8, 1)) // config.batch)
        step = max(seconds - few_seconds, 0.0)
        linear_seconds = few_seconds * len(noisy) / len(few) + steps * step
    else:
        record, linear_seconds = fit_once(outer, block, noisy, config)
    sizes = {name: prod(shape) for name, shape in linear_shapes(c).items()}
    with torch.no_grad():
        x, state, rope, _ = outer.prepare(few)
        _, seconds = timed(lambda: block(x, state, rope), x.device)
    forwards = FORWARDS * seconds * len(noisy) / len(few)
    total = c.n_layers * (forwards + linear_seconds * sum(sizes.values()) / sizes["qkv"])
    return {"linear": "block 0: qkv", "loss_before": record.get("start"), "loss_after": record.get("last"),
            "error": record["error"], "steps_per_linear": steps, "step_seconds": step,
            "estimated_seconds": float(f"{total:.3g}")}


def describe(plan: dict, step: dict, c: ModelConfig, config) -> str:
    """The plan as Markdown: what happens to which tensors, the bytes of every stage, the rehearsed step."""
    names, blocks = NAMES[c.family], plan["blocks"]
    kept = ["norms"] + ([names.embed, names.head][: 1 if c.tied else 2] if config.head_bits == 16 else [])
    head = "" if config.head_bits == 16 else (f"; {names.embed} in {config.embed_bits or config.head_bits} bit, "
                                              f"{names.head} in {config.head_bits} bit")
    memory, free = plan["memory"], plan["memory_free"]
    rows = [("read: the 16-bit model", plan["model_bytes"]),
            *((f"memory: {part}", size) for part, size in memory.items() if part != "total"),
            ("memory, the most at one time" + ("" if free is None else f" ({gb(free)} free)"), memory["total"]),
            (f"write: tensors of each of {len(blocks)} blocks", max(blocks)),
            ("write: embedding, head, final norm", plan["outer"]),
            (f"disk, at most ({gb(plan['disk_free'])} free)", plan["disk"])]
    loss = "" if step["loss_before"] is None else (f" loss {step['loss_before']:.4g} before and "
                                                   f"{step['loss_after']:.4g} after the step,")
    return "\n".join([
        f"Quantized to W{config.wbits}A{config.abits} by {config.method}: {', '.join(FUSED)} of {c.n_layers} blocks, "
        f"{4 * c.n_layers} linears{head}.", f"Stays in 16 bit: {', '.join(kept)}.", "",
        markdown_table(("stage", "bytes"), rows), "",
        f"Rehearsed {step['linear']}:{loss} relative output error {step['error']:.4g}; the whole run takes about "
        f"{step['estimated_seconds']:g} s. Nothing was written."])
