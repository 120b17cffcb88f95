"""Judge a 16-bit or quantized model, compare two, or watch one write: python evaluate.py [--model tiny] [--against M]

    python evaluate.py --model out/tiny-starquant+-w4a4 --against tiny     NELBO, tasks, paired differences, fidelity
    python evaluate.py --table 2 --quick                                   one of the paper's tables, see tables.py
    python evaluate.py --prompt "Ann has 4 boxes of 6 eggs." [--against M] the denoising, step by step
    python evaluate.py --model llada-8b --tasks arc_challenge,gsm8k        the paper's benchmarks through lm-eval

Without --prompt: NELBO per token, accuracy on `math`, `code` (free-running generation) and `cloze` (Monte-Carlo
likelihood) with 95 % bootstrap intervals; with --against also the KL divergence from the second model, the paired
differences to it and how far the two denoising trajectories agree. Tables go to standard output, its last line is JSON;
progress to standard error.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.folder import write_json
from experiments import protocol, tables
from model import load_model
from runtime import processes
from runtime.processes import Parser, Refused, pick_device
from runtime.sampling import denoise
from tiny import metrics, tasks

MEASURES = {"nelbo": "NELBO, nats/token", "kl": "KL from it, nats/token", "math": "math, accuracy",
            "code": "code, accuracy", "cloze": "cloze, accuracy", "tokens": "same final token",
            "positions": "committed at the same step", "divergence": "first difference, share of the steps"}


def report(values: dict[str, torch.Tensor], reference: dict[str, torch.Tensor] | None = None) -> tuple[str, dict]:
    """A Markdown table of means with 95 % intervals (and paired differences), and the same as numbers."""
    lines, numbers = ["| measure | value | 95 % interval |", "|---|---|---|"], {}
    if reference:
        lines = [lines[0] + " against it | 95 % interval |", lines[1] + "---|---|"]
    for key, per_example in values.items():
        numbers[key] = metrics.bootstrap(per_example)
        mean, low, high = numbers[key]
        lines.append(f"| {MEASURES[key]} | {mean:.4f} | {low:.4f} to {high:.4f} |")
        if reference and key in reference:
            numbers[f"{key}_difference"] = metrics.bootstrap(per_example - reference[key])
            mean, low, high = numbers[f"{key}_difference"]
            lines[-1] += f" {mean:+.4f} | {low:+.4f} to {high:+.4f} |"
        elif reference:
            lines[-1] += " | |"
    return "\n".join(lines), numbers


def show_denoising(models: dict, prompt: str, steps: int, gen_length: int, out=None) -> dict[str, str]:
    """Write every denoising step of each model to `out`, standard output by default; on a terminal in place."""
    tokenizer, out = next(iter(models.values())).tokenizer, sys.stdout if out is None else out
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    if ids.shape[1] == 0:
        raise Refused("--prompt holds no text.")

    def text(model, row):
        tokens = [("░" if t == model.mask_id else tokenizer.decode([t], skip_special_tokens=True)) for t in row]
        return "".join(tokens).replace("\n", "⏎")

    runs = [denoise(m, ids.to(m.device), steps, gen_length) for m in models.values()]
    wide, live = max(map(len, models)), out.isatty()
    for number, batch in enumerate(zip(*runs, strict=True)):
        if live and number:
            out.write(f"\033[{len(models)}A")
        for (name, model), step in zip(models.items(), batch, strict=True):
            line = f"{name:>{wide}} {step.index + 1:>3}/{steps} {text(model, step.ids[0, ids.shape[1]:].tolist())}"
            out.write(("\033[2K" if live else "") + line + "\n")
        out.flush()
    return {name: tokenizer.decode(step.ids[0, ids.shape[1]:].tolist())
            for name, step in zip(models, batch, strict=True)}


def parse(argv):
    parser = Parser("evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="alias, hub id or folder, 16-bit or quantized (tiny)")
    parser.add_argument("--against", help="a second model to compare with")
    parser.add_argument("--table", choices=tables.TABLES, help="measure a table of the paper on the embedded model")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds of a table (3)")
    parser.add_argument("--stress", type=float, default=1.0, metavar="C", help="a table of the model with outlier "
                        "channels of scale C (1: off)")
    parser.add_argument("--nelbo", action="store_true", help="a table by its likelihoods (NELBO and KL) alone")
    parser.add_argument("--quick", action="store_true", help="a table in minutes: one seed, one epoch, few examples, a "
                        "sixth of the calibration segments")
    parser.add_argument("--fresh", action="store_true", help="measure every cell of a table again, also finished ones")
    parser.add_argument("--problems", type=int, default=200, help="problems per task (200)")
    parser.add_argument("--sequences", type=int, help="sequences of each kind for a table's likelihoods (--problems)")
    parser.add_argument("--prompt", help="write the denoising of an answer to this text instead")
    parser.add_argument("--steps", type=int, help="denoising steps with --prompt or --tasks (--gen-length)")
    parser.add_argument("--gen-length", type=int, help="tokens to write with --prompt (24) or --tasks (protocol)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on a GPU, fp32 on a CPU unless given")
    parser.add_argument("--weights", choices=("packed", "int8"), default="packed", help="4-bit weights in memory two a "
                        "byte (smallest) or one (fastest)")
    parser.add_argument("--tasks", help="benchmarks by lm-evaluation-harness instead: " + ",".join(protocol.TASKS))
    parser.add_argument("--protocol", choices=protocol.PROTOCOLS, help="settings of --tasks, by the model unless given")
    parser.add_argument("--mc-num", type=int, help="masks per likelihood with --tasks, at most (protocol, mostly 128)")
    parser.add_argument("--limit", type=int, help="documents per task of --tasks (all)")
    parser.add_argument("--cache", type=Path, help="folder for finished answers of --tasks: run again to continue")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at once with --tasks (32)")
    parser.add_argument("--include", type=Path, help="folder of further task YAMLs for --tasks")
    parser.add_argument("--confirm-run-unsafe-code", action="store_true", help="let --tasks execute generated code")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args(argv)


def run(args) -> dict:
    given = {"problems": args.problems, "gen-length": args.gen_length, "steps": args.steps, "limit": args.limit,
             "batch-size": args.batch_size, "mc-num": args.mc_num, "sequences": args.sequences}
    for name in (name for name, value in given.items() if value is not None and value < 1):
        raise Refused(f"--{name} must be at least 1.")
    if args.out and (args.out.is_dir() or not next(p for p in args.out.absolute().parents if p.exists()).is_dir()):
        raise Refused(f"--out {args.out} cannot be a file there.")
    if args.table:
        device = processes.start(pick_device(args.device))
        run, seeds = tables.Run(args.model, args.stress, args.problems, args.nelbo, str(device),
                                sequences=args.sequences), args.seeds
        if args.quick:
            run, seeds = replace(run, problems=16, nelbo=True, segments=20, sequences=None), 1
        return tables.make(args.table, run, seeds, args.quick, args.fresh)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
    if args.tasks:
        try:
            from experiments.harness import benchmarks
        except ImportError as error:
            raise Refused(f"--tasks needs lm-evaluation-harness ({error.name} is missing): pip install lm-eval.") \
                from None
        return benchmarks(args, dtype)
    names = [args.model] + ([args.against] if args.against else [])
    models = {name: load_model(name, args.device, dtype, args.weights) for name in names}
    for name, model in models.items():
        if model.tokenizer is None:
            raise Refused(f"{name} has no tokenizer.json, which text needs.")
    if args.prompt is not None:
        length = args.gen_length or tasks.GEN_LENGTH
        written = show_denoising(models, args.prompt + "\n", args.steps or length, length)
        return {"prompt": args.prompt, "text": written}
    other = models.get(args.against)
    if other and other.config.vocab_size != models[args.model].config.vocab_size:
        raise Refused(f"{args.model} and {args.against} have different vocabularies and cannot be compared.")
    results = {name: metrics.scores(model, args.problems, args.seed, label=name,
                                    reference=None if model is other else other) for name, model in models.items()}
    record = {"problems": args.problems, "seed": args.seed, "torch": torch.__version__}
    for name in reversed(names):
        values, reference = dict(results[name][0]), None
        if name == args.model and args.against:
            reference, paths = results[args.against]
            values |= metrics.agreement(results[name][1], paths)
        text, record[name] = report(values, reference)
        print(f"\n**{name}**" + (f" against {args.against}" if reference is not None else "") + f"\n\n{text}")
    return record


def main(argv=None) -> int:
    args = parse(argv)
    try:
        record = run(args)
    except ValueError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: interrupted.", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("evaluate.py: out of GPU memory; lower --batch-size (or --problems).", file=sys.stderr)
        return 2
    if processes.rank():
        return 0
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, record)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
