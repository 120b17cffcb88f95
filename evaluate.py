"""Judge a 16-bit or quantized model, compare two, watch one write, or make the paper's tables and figures.

    python evaluate.py --model out/tiny-starquant-w4a4 --against tiny    NELBO, KL, tasks, passes, paired differences
    python evaluate.py --model Q --against F --data FILE                 the same of any two models on your own text
    python evaluate.py --prompt TEXT [--against M]                       the denoising, pass by pass
    python evaluate.py --table 2 --quick                                 a table of the paper (experiments/tables.py)
    python evaluate.py --figure 3                                        a figure (experiments/figures.py)
    python evaluate.py --model llada-8b --tasks arc_challenge,gsm8k      the paper's benchmarks through lm-eval

Judging (`experiments/judge.py`)
    It is what happens without --prompt, --table, --figure and --tasks. A model gets its NELBO per token and the passes
    that an answer takes when it is decoded in parallel. With --against it also gets the KL divergence from the second
    model, the paired differences to it, and how far the two denoising trajectories agree. With --data FILE that works
    for every model. Without it the model must know the embedded tasks. Then it also gets its accuracy on `math`, `code`
    (free-running generation) and `cloze` (Monte-Carlo likelihood). Intervals are 95 % bootstrap intervals.
"""

import argparse
import json
import sys
from pathlib import Path

from checkpoint.families import ALIASES
from checkpoint.folder import write_json
from experiments import protocol, tables, watch
from experiments.cells import Run
from experiments.judge import checkpoints, judge
from experiments.rows import TABLES
from model import load_model
from runtime import processes
from runtime.processes import Parser, Refused, at_least, pick_device, positive, writable, writable_file
from tiny import tasks

# the flags of each use of this command, and their defaults
LOADED = {"model": "tiny", "device": "auto", "dtype": None, "weights": "packed", "out": None}
USES = {
    "judge": LOADED | {"against": None, "problems": 200, "threshold": 0.9, "seed": 0, "data": None},
    "data": LOADED | {"against": None, "segments": 64, "length": None, "gen_length": None, "threshold": 0.9, "seed": 0},
    "prompt": LOADED | {"against": None, "gen_length": tasks.GEN_LENGTH, "steps": None, "threshold": None,
                        "block_length": None, "temperature": 0.0, "chat": None, "seed": 0},
    "tasks": LOADED | {"protocol": None, "mc_num": None, "gen_length": None, "steps": None, "limit": None,
                       "cache": None, "batch_size": 32, "include": None, "confirm_run_unsafe_code": False},
    "table": {"model": "tiny", "device": "auto", "out": tables.OUT, "seeds": None, "problems": None, "sequences": None,
              "stress": 1.0, "nelbo": False, "quick": False, "fresh": False},
    "figure": {"model": "tiny", "device": "auto", "out": Path("out/figures"), "stress": 1.0},
    "figure from tables": {"out": Path("out/figures")}}
FIGURES, FROM_TABLES = ("1", "3", "4", "5", "6", "hero", "passes", "denoising"), ("6", "hero", "passes")

# ---- watch ---------------------------------------------------------------------------------------------------------


def prompt(args) -> dict:
    if not args.prompt.strip():
        raise Refused("--prompt holds no text; write the question or the beginning of a text behind it.")
    if args.steps and args.threshold is not None:
        raise Refused("--threshold decides itself how many passes there are; leave --steps out.")
    if args.steps and args.steps > args.gen_length:
        raise Refused(f"--steps {args.steps} is more than the {args.gen_length} tokens of --gen-length.")
    steps = args.steps or (args.gen_length if args.threshold is None else None)
    models = {name: load_model(name, args.device, args.dtype, args.weights) for name in reversed(checkpoints(args))}
    model = models[args.model]
    chat = watch.is_chat_model(model, args.model) if args.chat is None else args.chat
    with processes.threads_for(max(m.config.d_model for m in models.values())):
        return {"prompt": args.prompt, "chat": chat} | watch.show_denoising(
            models, watch.encode_prompt(model, args.prompt, chat), seed=args.seed, steps=steps,
            threshold=args.threshold, gen_length=args.gen_length, block_length=args.block_length,
            temperature=args.temperature)

# ---- the paper -----------------------------------------------------------------------------------------------------


def table(args) -> dict:
    """Sizes are those of the published tables unless given; a table of likelihoods alone has sequences, no problems."""
    nelbo = args.nelbo or args.quick
    seeds, problems, sequences = (1, 16, 16) if args.quick else (tables.SEEDS, tables.PROBLEMS, tables.SEQUENCES)
    sequences = args.sequences or args.problems or sequences
    problems = sequences if nelbo else args.problems or problems
    device = processes.start(pick_device(args.device))
    run = Run(args.model, args.stress, problems, nelbo, str(device), 20 if args.quick else 128, sequences)
    return tables.make(args.table, run, args.seeds or seeds, args.quick, args.fresh, args.out)


def figure(args) -> dict:
    try:
        from experiments import figures
    except ModuleNotFoundError as error:
        raise Refused(f"--figure needs matplotlib ({error.name} is missing): pip install matplotlib.") from None
    return figures.make(args.figure, args.out, *([] if args.figure in FROM_TABLES else
                                                 [args.model, args.stress, args.device]))


def benchmarks(args) -> dict:
    try:
        from experiments import harness
    except ModuleNotFoundError as error:
        raise Refused(f"--tasks needs lm-evaluation-harness ({error.name} is missing): pip install lm-eval.") from None
    return harness.benchmarks(args)

# ---- command -------------------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("names nothing; give names with commas between them")
    return found


def parse(argv=None):
    """The arguments; a flag that has no part in what is asked for is refused."""
    parser = Parser("evaluate.py", description=__doc__, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--data", help="judge on this text: a .txt, .jsonl or .parquet file, best one that was not "
                     "calibrated on")
    use.add_argument("--prompt", help="write the denoising of an answer to this text")
    use.add_argument("--table", choices=TABLES, help="measure a table, the paper's or ours, on the embedded model")
    use.add_argument("--figure", choices=FIGURES, help="draw a figure from the embedded model, or from the tables")
    use.add_argument("--tasks", type=names,
                     help="benchmarks by lm-evaluation-harness: " + ",".join(protocol.BENCHMARKS))
    parser.add_argument("--model", help=f"tiny (the default), {', '.join(ALIASES)}, a hub id or a folder, 16-bit or "
                        "quantized")
    parser.add_argument("--device", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on a GPU, fp32 on a CPU unless given")
    parser.add_argument("--weights", choices=("packed", "int8"), help="4-bit weights in memory: two in a byte "
                        "(smallest) or one (fastest)")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file; of a table or figure: its folder "
                        "(out/tables, out/figures)")
    parser.add_argument("--against", help="a second model to compare with, or to watch beside the first")
    parser.add_argument("--seed", type=at_least(0, 2**63), help="of examples and masks (0)")
    parser.add_argument("--problems", type=at_least(1), help="problems per task (200; of a table 250)")
    parser.add_argument("--gen-length", type=at_least(1), help="tokens to write with --prompt (24), --data (32, at "
                        "most half a segment) or --tasks (protocol)")
    parser.add_argument("--steps", type=at_least(1), help="denoising steps with --prompt or --tasks (--gen-length)")
    parser.add_argument("--threshold", type=positive, help="decode in parallel: a pass commits every token of this "
                        "probability or more (0.9; with --prompt one token a pass unless given, as above 1)")
    group = parser.add_argument_group("with --data")
    group.add_argument("--segments", type=at_least(2), help="segments of the text (64)")
    group.add_argument("--length", type=at_least(2), help="tokens of a segment (256; 64 for the embedded model)")
    group = parser.add_argument_group("with --prompt")
    group.add_argument("--block-length", type=at_least(1), help="finish blocks of so many tokens left to right (one)")
    group.add_argument("--temperature", type=float, help="0 takes the most probable token, above 0 draws (0)")
    group.add_argument("--chat", action=argparse.BooleanOptionalAction, help="ask in the model's chat template (if the "
                       "model's name says instruct or chat)")
    group = parser.add_argument_group("with --table and --figure")
    group.add_argument("--stress", type=positive, metavar="C",
                       help="give the model outlier channels of scale C (1: off)")
    group = parser.add_argument_group("with --table")
    group.add_argument("--seeds", type=at_least(1), help="calibration seeds (3)")
    group.add_argument("--sequences", type=at_least(1), help="sequences of each kind for likelihoods (--problems, 100)")
    group.add_argument("--nelbo", action="store_true", help="the likelihoods (NELBO and KL) alone")
    group.add_argument("--quick", action="store_true", help="in minutes: one seed, one epoch, few examples, a sixth of "
                       "the calibration segments, likelihoods alone")
    group.add_argument("--fresh", action="store_true", help="measure every cell again, also finished ones")
    group = parser.add_argument_group("with --tasks")
    group.add_argument("--protocol", choices=protocol.PROTOCOLS, help="whose settings (the model's)")
    group.add_argument("--mc-num", type=at_least(1), help="masks per likelihood, at most (protocol, mostly 128)")
    group.add_argument("--limit", type=at_least(1), help="documents per task (all)")
    group.add_argument("--cache", type=Path, help="folder for finished answers: run again to continue")
    group.add_argument("--batch-size", type=at_least(1), help="sequences at once (32)")
    group.add_argument("--include", type=Path, help="folder of further task YAMLs")
    group.add_argument("--confirm-run-unsafe-code", action="store_true", help="let tasks execute generated code")
    given = vars(parser.parse_args(argv))
    asked = next((name for name in ("data", "prompt", "table", "figure", "tasks") if name in given), "judge")
    use = "figure from tables" if given.get("figure") in FROM_TABLES else asked
    for name in sorted(given.keys() - USES[use].keys() - {asked}):
        where = "judging a model" if asked == "judge" else f"--{asked}" + f" {given[asked]}" * (asked == "figure")
        parser.error(f"--{name.replace('_', '-')} has no part in {where}")
    return argparse.Namespace(use=asked, **USES[use] | given)


def run(args) -> dict:
    if args.use in ("judge", "data", "prompt", "figure") and processes.launched() > 1:
        raise Refused("torchrun shares --table and --tasks among processes; start everything else without it.")
    file = args.out if args.use in ("judge", "data", "prompt", "tasks") else None
    if file:
        writable_file(file, "--out")
    for flag, folder in (("--out", None if file else args.out), ("--cache", getattr(args, "cache", None))):
        if folder:
            writable(folder, flag)
    record = {"judge": judge, "data": judge, "prompt": prompt, "table": table, "figure": figure,
              "tasks": benchmarks}[args.use](args)
    if file and processes.rank() == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)
        except OSError:  # the disk may be full by now
            print(json.dumps(record))
            raise
    return record


def main(argv=None) -> int:
    args = parse(argv)
    smaller = {"tasks": "--batch-size", "data": "--length", "prompt": "--gen-length"}.get(args.use, "--problems")
    where = {"table": args.out, "tasks": getattr(args, "cache", None)}.get(args.use)
    return processes.run("evaluate.py", run, args, smaller, lambda: (
        f"What was finished is in {where}; the same command continues." if where and where.exists() else ""))


if __name__ == "__main__":
    sys.exit(main())
