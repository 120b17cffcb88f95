"""The table that a calibration ends with: how good is what was written, beside 16 bit and RTN?

The embedded model, calibrated on its own text, is judged on its tasks. Any other model or text is judged by NELBO and
KL on segments that were not calibrated on. Then every model is read block by block, as calibration reads it, and the
table takes the memory of one block, of embedding and head, and of the activations of these segments.
"""

import shlex
from math import prod
from pathlib import Path

import torch
from torch import nn

from calibration.segments import held_out_segments
from checkpoint.families import FUSED
from checkpoint.folder import Checkpoint
from checkpoint.loading import stored_bytes
from methods import QuantConfig
from methods.rtn import fit_rtn
from methods.settings import Settings
from methods.storage import output_bytes
from model import load_block, load_model, load_outer
from runtime import measures
from runtime.layers import rebuilt
from tiny import metrics

PROBLEMS, SEQUENCES, SEGMENTS = 16, 24, 16  # unless --problems is given: per task, of each domain, of a text
SEED = 1  # of problems, segments and masks
# of the table: heading, and scale and digits of its numbers
COLUMNS = {"kl": ("KL from 16 bit, 10⁻³ nats/token", 1000, 1), "nelbo": ("NELBO, nats/token", 1, 4),
           **{task: (f"{task} %", 100, 1) for task in metrics.TASKS}}
QUESTION = "Ann has 4 boxes of 6 eggs. Then Ann sells 5. How many eggs?"


def named(config: Settings) -> str:
    return f"{'RTN' if config.method == 'rtn' else config.method} W{config.wbits}A{config.abits}"


def rtn_block(block, rtn: Settings):
    """A 16-bit block rounded to nearest, which needs no calibration."""
    linears = {name: getattr(block, name) for name in FUSED}
    return rebuilt(block, **{name: fit_rtn(linear.weight.detach().float(), linear.bias, None, rtn, None, None)[0]
                             for name, linear in linears.items()})


def table_of_tasks(args, source: Checkpoint, config: Settings, device, dtype) -> list[dict]:
    """NELBO, KL from 16 bit, the embedded tasks and size of 16 bit, RTN and what was written."""
    full, rtn = load_model(source.folder, device, dtype), QuantConfig("rtn", wbits=config.wbits, abits=config.abits)
    rounded = rebuilt(full, blocks=nn.ModuleList(rtn_block(block, rtn) for block in full.blocks))
    models = {"16-bit": full, named(rtn): rounded, named(config): load_model(args.out, device, dtype)}
    rows = []
    for name, model in models.items():
        values, _ = metrics.scores(model, args.problems or PROBLEMS, SEED, label=f"evaluate {name}",
                                   reference=None if model is full else full, sequences=args.problems or SEQUENCES)
        rows.append({"model": name, **with_intervals(values), "bytes": stored_bytes(model)})
    return rows


def table_of_text(args, source: Checkpoint, config: Settings, texts: list[str], device, dtype) -> list[dict]:
    """NELBO, KL from 16 bit and size of the same three on held-out segments; empty where the text has less than two."""
    outer, n = load_outer(source, device, dtype), source.config.n_layers
    segments = held_out_segments(outer.tokenizer, texts, args.problems or SEGMENTS, args.length, SEED,
                                 (args.segments, args.seed))
    if len(segments) < 2:
        return []
    copies = measures.judged_copies(segments, None, outer.mask_id, seed=SEED)
    written, rtn = Checkpoint(args.out), QuantConfig("rtn", wbits=config.wbits, abits=config.abits)

    def blocks(checkpoint):
        return (load_block(checkpoint, i, device, dtype) for i in range(n))

    # embedding, head and final norm are written as they were, unless they are quantized
    top = outer if config.head_bits == 16 else load_outer(written, device, dtype)
    models = {"16-bit": (outer, blocks(source), 2 * sum(map(prod, source.shapes.values()))),
              named(rtn): (outer, (rtn_block(block, rtn) for block in blocks(source)), sum(output_bytes(source, rtn))),
              named(config): (top, blocks(written), sum(output_bytes(source, config)))}
    rows, reference = [], None
    with measures.progress_bar(len(models) * n, "closing table") as bar:
        for name, (top, parts, stored) in models.items():
            predicted = measures.predictions(top, parts, copies.noisy, bar.update)
            values = measures.likelihoods(copies, predicted, reference)
            reference = reference or predicted
            rows.append({"model": name, "segments": len(segments), **with_intervals(values), "bytes": stored})
    return rows


def with_intervals(values: dict[str, torch.Tensor]) -> dict:
    return {name: measures.bootstrap(per_example) for name, per_example in values.items()}


def table(rows: list[dict]) -> str:
    """What was measured of every model as Markdown, with 95 % intervals, and its size."""
    shown = {k: column for k, column in COLUMNS.items() if any(k in row for row in rows)}
    return measures.markdown_table(("model", *(heading for heading, *_ in shown.values()), "MB"), [
        (row["model"], *(measures.interval(row[k], *form) if k in row else "" for k, (_, *form) in shown.items()),
         f"{row['bytes'] / 1e6:.2f}") for row in rows])


def evaluation() -> str:
    """How evaluate.py is started from the folder that one is in."""
    file = Path(__file__).resolve().parents[1] / "evaluate.py"
    return f"python {'evaluate.py' if Path.cwd() == file.parent else shlex.quote(str(file))}"


def judging(args) -> str:
    """How the written model is compared with the 16-bit one on a text."""
    return f"{evaluation()} --model {shlex.quote(str(args.out))} --against {shlex.quote(args.model)} --data FILE"


def described(args, rows: list[dict]) -> str:
    """The table as it is printed, or a sentence in its place."""
    if not rows:
        return (f"There is no closing table: the text has fewer than two segments of {args.length} tokens beside those "
                f"that it was calibrated on. Judge the model on another text: {judging(args)}")
    if "segments" not in rows[0]:
        return table(rows)
    return (f"On {rows[0]['segments']} segments of {args.length} tokens from the same text, not calibrated on "
            f"(± half a 95 % interval; more: {judging(args)}):\n\n{table(rows)}")


def farewell(args, source: Checkpoint, config: Settings, ours: bool) -> str:
    """What was written, its size beside 16 bit, and what to do next."""
    written = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    full = 2 * sum(map(prod, source.shapes.values()))
    unit, name = (1e9, "GB") if full > 1e9 else (1e6, "MB")
    out, model = shlex.quote(str(args.out)), shlex.quote(args.model)
    lines = [f"\nWrote {args.out}: {written / unit:.2f} {name}, {full / unit:.2f} {name} in 16 bit.",
             "Next: " + (f'{evaluation()} --model {model} --against {out} --prompt "{QUESTION}"' if ours else
                         judging(args))]
    if config.method != "starquant+":
        lines.append("Where quality counts, try --method starquant+: closer to 16 bit in our tables, without training.")
    return "\n".join(lines)
