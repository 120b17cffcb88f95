"""Quantize a masked-diffusion language model: python calibrate.py [--model tiny] [--method starquant] [--out FOLDER]

The command around `blocks.py`, which is the algorithm: it reads the model block by block, checks everything before it
writes anything (`preflight.py`), writes each block whole (`output.py`), and goes on where an earlier run stopped. The
default run quantizes the embedded model by `starquant+`, judges it against 16 bit and RTN, and ends with one line of
JSON on standard output; progress goes to standard error.
"""

import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
import data
import distributed
import metrics
import preflight
from blocks import calibrate_blocks, masked_copies, progress_steps, quantize_model, token_states
from checkpoint import Checkpoint, CheckpointError, hub_id, resolve
from cli import Parser
from families import ConfigError
from methods import METHODS, QuantConfig
from model import check_tensors, load_block, load_model, load_outer, pick_device
from output import Output, run_key, survey
from stress import write_stressed


def parse(argv):
    parser = Parser("calibrate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, llada-8b, llada-1.5, dream-7b, a hub id or a folder")
    parser.add_argument("--method", default="starquant+", help="starquant (the paper), starquant+ (ours, the default), "
                        + ", ".join(m for m in METHODS if "starquant" not in m))
    parser.add_argument("--wbits", type=int, default=4, help="weight bits (4)")
    parser.add_argument("--abits", type=int, default=4, help="activation bits (4)")
    parser.add_argument("--out", type=Path, help="output folder (out/MODEL-METHOD-wWaA)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    parser.add_argument("--dry-run", action="store_true", help="check everything, rehearse one step, print the plan, "
                        "write nothing (a model of the hub is downloaded)")
    parser.add_argument("--stress", type=float, default=1.0, metavar="C",
                        help="scale the most state-disparate channels by C first, same 16-bit function (1: off)")
    parser.add_argument("--data", help="calibration text: winogrande (downloaded, as the paper), or a .txt, .jsonl or "
                        ".parquet file (the embedded model has its own)")
    parser.add_argument("--segments", type=int, default=128, help="calibration segments (128, Section 4.1)")
    parser.add_argument("--length", type=int, default=64, help="tokens per segment (64)")
    parser.add_argument("--inputs", choices=QuantConfig.CHOICES["inputs"],
                        help="inputs of the next block (quantized); fp lets torchrun share the blocks")
    parser.add_argument("--states", choices=QuantConfig.CHOICES["states"],
                        help="token states: masked copies of the segments (masked), or rollout, of the own trajectory")
    parser.add_argument("--spill", type=Path, metavar="FOLDER", help="keep the calibration set's activations in files "
                        "there, not in memory (same result; for many or long segments)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on a GPU, fp32 on a CPU unless given")
    parser.add_argument("--problems", type=int, default=24, help="problems per task in the closing table (0: no table)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="any other field of QuantConfig: " + ", ".join(f"{f.name}={f.default}" for f in
                                                                           fields(QuantConfig)[3:-1]))
    args = parser.parse_args(argv)
    stressed = f"-stress{args.stress:g}" if args.stress != 1 else ""
    args.out = args.out or Path("out") / f"{Path(args.model).name}{stressed}-{args.method}-w{args.wbits}a{args.abits}"
    return args


def config_from(args) -> QuantConfig:
    values = {"method": args.method, "wbits": args.wbits, "abits": args.abits, "seed": args.seed}
    values |= {name: getattr(args, name) for name in ("inputs", "states") if getattr(args, name)}
    kinds = {f.name: type(f.default) for f in fields(QuantConfig)}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals or name not in kinds:
            raise ConfigError(f"--set {item!r}: expected FIELD=VALUE with a field of {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise ConfigError(f"--set {item!r}: {value!r} is not a {kinds[name].__name__}.") from None
    config = QuantConfig(**values)
    config.check_given(item.partition("=")[0] for item in args.set)
    return config


def calibration_texts(args) -> list[str]:
    """The documents of --data, which every model but the embedded one needs."""
    if not args.data:
        raise data.DataError(f"{args.model} needs calibration text: give --data winogrande (as the paper, downloaded) "
                             f"or --data FILE, a .txt, .jsonl or .parquet.")
    return data.read_texts(data.find_texts(args.data))


def calibration_tokens(args, tokenizer, texts: list[str] | None):
    """Segments and their maskable region: from texts, or for the embedded model its own calibration split."""
    if tokenizer is None:
        raise CheckpointError(f"{args.model} has no tokenizer, which calibration text needs.")
    if texts is not None:
        return data.text_segments(tokenizer, texts, args.data, args.segments, args.length, args.seed)
    return data.calibration_set(tokenizer, args.segments, args.length, args.seed)


def report_divergence(record: dict) -> None:
    """One line on standard error for each linear whose training ended above its start; its best iterate is kept."""
    for name, fit in record["linears"].items():
        if fit.get("diverged"):
            how = "became infinite or NaN" if fit["last"] is None else f"ended at {fit['last']:.4g}"
            tqdm.write(f"calibrate.py: block {record['block']}, {name}: the held-out loss began at {fit['start']:.4g} "
                       f"and {how}; the best iterate, {fit['best']:.4g}, is kept.", file=sys.stderr)


def peak_bytes(device) -> int:
    """Most memory this process ever held: of the GPU if it calibrates there, of the machine otherwise (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(args) -> dict:
    config = config_from(args)
    device = distributed.start(pick_device(args.device))
    if distributed.world() > 1 and config.inputs != "fp":
        raise ConfigError("several processes share the blocks only if these do not wait for one another: add --inputs "
                          "fp.")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: torch.bfloat16 if device.type == "cuda"
             else torch.float32}[args.dtype]
    for name, low in (("segments", 1), ("length", 2), ("problems", 0)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} {getattr(args, name)} is below {low}.")
    early = args.data or hub_id(args.model)
    texts = calibration_texts(args) if early else None  # before gigabytes are downloaded
    judged = (resolve(args.model) / "training.json").exists()  # a model of this project's tasks
    source = Checkpoint(resolve(args.model))
    if source.quantization:
        raise CheckpointError(f"{args.model} is quantized already; give the 16-bit model.")
    check_tensors(source)
    if not early and not judged:
        calibration_texts(args)  # says what is missing
    plan = preflight.check(source, args.out, config, config.compensated, args.segments * args.length, device, dtype,
                           args.spill)
    if args.stress != 1 and not args.dry_run:  # the plan of the plain model is that of the stressed one
        stressed = args.out.parent / f"{Path(args.model).name}-stress{args.stress:g}"
        distributed.first(lambda: write_stressed(args.model, args.stress, stressed))
        args.model, source = str(stressed), Checkpoint(stressed)
    outer = load_outer(source, device, dtype, head=config.method in baselines.DLLMQUANT)
    tokens, region = calibration_tokens(args, outer.tokenizer, texts)
    key = run_key(args.model, source, tokens, config)
    if args.dry_run:
        survey(args.out, key, args.resume, args.overwrite)
        noisy = masked_copies(tokens, region, outer.mask_id, config).to(device)
        step = preflight.rehearse(METHODS[config.method], outer, load_block(source, 0, device, dtype), noisy, config)
        print(preflight.describe(plan, step, source.config, config))
        return {"dry_run": True, "plan": plan, "step": step, **asdict(config)}
    distributed.first(lambda: Output(args.out, source, key, args.resume, args.overwrite).folder)
    out = Output(args.out, source, key, resume=True, overwrite=False)  # on every process, once the first made it
    noisy = token_states(lambda: load_model(args.model, device, dtype), tokens, region, outer.mask_id, config)
    noisy = noisy.to(device)
    n, start = source.config.n_layers, time.time()

    def blocks():
        return (load_block(source, i, device, dtype) for i in range(n))

    with tqdm(total=n * progress_steps(config), unit="step", file=sys.stderr, disable=distributed.rank() > 0) as bar:
        def progress(error):
            bar.set_postfix_str(f"error {error:.4f}", refresh=False)
            bar.update()

        stream = calibrate_blocks(outer, blocks, noisy, config, lambda i: out.finished(i, device, dtype), progress,
                                  (distributed.rank(), distributed.world()), args.spill)
        del outer
        write_blocks(stream, out, bar, n)
    if distributed.rank():
        return {}
    result = {"out": str(args.out), "seconds": round(time.time() - start, 1), "peak_bytes": peak_bytes(device),
              **asdict(config)}
    if args.problems and judged:
        result["table"] = closing_table(args, config, tokens, region, device, dtype)
        print(metrics.table(result["table"]))
    return result


def write_blocks(stream, out: Output, bar, n: int) -> None:
    """Every block as it comes, then what the folder needs besides (on the first process)."""
    bar.set_description(f"block 1/{n}")
    for i, block, record in stream:
        if i not in out.records:
            out.write_block(i, block, record)
            report_divergence(record)
        bar.n = (i + 1) * bar.total // n
        bar.set_description(f"block {min(i + 2, n)}/{n}")
    for records in distributed.gather(out.records):
        out.records |= records
    if distributed.rank() == 0:
        out.finish(block)


def closing_table(args, config: QuantConfig, tokens, region, device, dtype) -> list[dict]:
    """What was written, judged beside 16 bit and RTN."""
    full, bits = load_model(args.model, device, dtype), f"W{config.wbits}A{config.abits}"
    models = {"16-bit": full}
    if config.method != "rtn":
        rtn = QuantConfig(method="rtn", wbits=config.wbits, abits=config.abits)
        models[f"RTN {bits}"] = quantize_model(full, tokens, rtn, region)
    models[f"{config.method} {bits}"] = load_model(args.out, device, dtype)
    return metrics.judge(models, args.problems, seed=1)


def main(argv=None) -> int:
    args = parse(argv)
    try:
        result = run(args)
    except (CheckpointError, ConfigError, data.DataError) as error:
        print(f"calibrate.py: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(f"calibrate.py: out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}); lower "
              f"--segments, --length or --set batch=N and start anew with --overwrite.", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"calibrate.py: {error.strerror or error}; finished blocks in {args.out} are safe, continue with the "
              f"same command and --resume.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ncalibrate.py: interrupted; finished blocks are in {args.out}, continue with the same command and "
              f"--resume.", file=sys.stderr)
        return 130
    if distributed.rank() == 0:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
