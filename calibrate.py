"""Quantize a masked-diffusion language model: python calibrate.py [--model tiny] [--method starquant] [--out DIR]

The algorithm, one block at a time (Sections 3.2-3.3, Appendices B and C):

    embed masked copies of the calibration segments
    for each block:   read it                                                      disk -> one block in memory
                      collect its inputs: 16-bit stream X_fp, quantized-prefix stream X_q
                      for each input group (qkv, out, gate_up, down):
                          fit SGAT on (X_q, Y = X_fp Wᵀ), fold P into the weight, quantize
                          after qkv: estimate TAC from softmax·V of both streams
                      write it, move both streams through it, free it

so a model never has to fit in memory. The default run quantizes the embedded model, judges it against 16 bit and RTN,
and ends with one line of JSON on standard output; progress goes to standard error.
"""

import copy
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, fields
from math import prod
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import baselines
import data
import distributed
import metrics
import preflight
from checkpoint import Checkpoint, CheckpointError, hub_id, resolve
from cli import Parser
from families import ConfigError
from hadamard import exists, rotation
from layers import TAC, QuantLinear
from methods import COMPENSATED, METHODS, SETTINGS_OF, QuantConfig
from model import FUSED, DiffusionLM, check_tensors, load_block, load_model, load_outer, pick_device, quantize_outer
from output import Output, run_key, survey
from softmax_value import QuantAttention, ia_aq, softmax_scores
from starquant import fold_weight, linear, tac_fit, tac_ridge
from states import rollout
from stress import write_stressed

# ---- one block -------------------------------------------------------------------------------------------------------


def activations(shape, like, spill: Path | None):
    """Room for activations of like's dtype: on its device, or in a file of the folder `spill`.

    The file has no name once it is mapped, so that it goes with its tensor, however the program ends; it is allocated
    whole, so that a full disk is an OSError here and not a crash later.
    """
    if spill is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.NamedTemporaryFile(dir=spill) as file:
        size = prod(shape) * like.element_size()
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(file.name, shared=True, size=prod(shape), dtype=like.dtype).view(shape)


@torch.no_grad()
def run_block(block, x, state, table, rows: int = 64, watch: tuple[str, ...] = (), spill: Path | None = None):
    """Output of a block and the inputs of its submodules named in `watch`, in chunks of `rows` segments."""
    seen = {}

    def keep(name, part):
        if name not in seen:
            seen[name] = activations((len(x), *part.shape[1:]), part, spill)
        seen[name][now] = part

    hooks = [getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
             for name in watch]
    try:
        for now in metrics.batches(len(x), rows):
            keep("output", block(x[now].to(state.device), state[now], table))
    finally:
        for hook in hooks:
            hook.remove()
    return seen.pop("output"), seen


class Unquantized(nn.Module):
    """A fitted linear with its quantizers off and its transform on (App. C's full-precision pass)."""

    def __init__(self, fitted: QuantLinear, weight, bias):
        super().__init__()
        self.fitted, self.bias = fitted, bias
        self.folded = fold_weight(weight.float(), fitted.P)

    def forward(self, x, state):
        y = linear(self.fitted.transformed(x, state), self.folded)
        return self.fitted.shifted(y if self.bias is None else y + self.bias, state).to(x.dtype)


def with_linears(block, **linears):
    """The block with some submodules replaced; everything else is shared, nothing is copied."""
    out = copy.copy(block)
    out._modules = {**block._modules, **linears}
    return out


def estimate_tac(block, quantized, x_fp, x_q, state, table, config: QuantConfig) -> TAC:
    """TAC of one block from at most `tac_samples` segments: Z^FP through the transform alone, Ẑ quantized."""
    n = min(config.tac_samples, len(x_fp))
    exact = with_linears(block, qkv=Unquantized(quantized.qkv, block.qkv.weight, block.qkv.bias))
    _, z_fp = run_block(exact, x_fp[:n], state[:n], table, watch=("tac",))
    _, z_q = run_block(quantized, x_q[:n], state[:n], table, watch=("tac",))
    z_fp, z_q = z_fp["tac"].flatten(0, 1), z_q["tac"].flatten(0, 1)
    if config.tac == "ridge":
        return TAC(*tac_ridge(z_fp, z_q, config.tac_block, config.damping))
    return TAC(*tac_fit(z_fp, z_q, config.tac_block, config.damping, config.smoothing, config.shrinkage))


@torch.no_grad()
def fit_attention(quantized, x_q, state, table, config: QuantConfig, generator) -> QuantAttention:
    """Quantizers of K, V and the softmax output; V's scale by IA-AQ for DLLMQuant, per token otherwise."""
    bits, h = (config.kv_bits, config.softmax_bits), quantized.config.head_dim
    rotated = config.method in baselines.ROTATED and exists(h)
    attention = QuantAttention(bits, rotation(h, generator).dense().float().to(state.device) if rotated else None)
    if config.method not in baselines.DLLMQUANT or config.kv_bits == 16:
        return attention
    n = min(config.tac_samples, len(x_q))
    qkv = torch.cat([quantized.qkv(quantized.attn_norm(x_q[r].to(state.device)), state[r])
                     for r in metrics.batches(n)])
    q, k, v = attention.rotated(*quantized.heads(qkv, table))
    return QuantAttention(bits, attention.rotation, *ia_aq(softmax_scores(q, k), v, config.kv_bits))


def quantize_block(block, x_fp, x_q, state, table, config: QuantConfig, index: int, progress=lambda loss: None,
                   confidence=None, spill: Path | None = None):
    """Block `index` quantized, and a record of what was fitted. x_fp, x_q (S, L, D) are its inputs in both streams.

    spill: folder for the inputs of its linears, which stay in memory without it.
    """
    start = time.time()
    targets = run_block(block, x_fp, state, table, watch=FUSED, spill=spill)[1]
    quantized, record = block, {"block": index, "linears": {}}
    gains = {"qkv": block.attn_norm.weight.detach(), "gate_up": block.ffn_norm.weight.detach()}
    for group, name in enumerate(FUSED):
        original = getattr(block, name)
        x = run_block(quantized, x_q, state, table, watch=(name,), spill=spill)[1][name].to(state.device).float()
        weight = original.weight.detach().float()
        check_finite(x, f"block {index}: the input of {name}")
        y = linear(targets.pop(name).to(state.device).float(), weight)
        y = y if original.bias is None else y + original.bias.float()
        check_finite(y, f"block {index}: the 16-bit output of {name}")
        generator = torch.Generator().manual_seed((config.seed * 1009 + index) * 16 + group)
        inputs = baselines.Inputs(x, y, state, confidence, gains.get(name))
        try:
            fitted, losses = METHODS[config.method](weight, original.bias, inputs, config, generator, progress)
        except torch.linalg.LinAlgError:
            raise CheckpointError(f"block {index}: {config.method} has no finite solution for {name}: inputs reach "
                                  f"{float(x.abs().max()):.3g}, weights {float(weight.abs().max()):.3g}.") from None
        quantized = with_linears(quantized, **{name: fitted})
        y_hat = fitted(x[:16], state[:16])
        check_finite(y_hat, f"block {index}: the quantized output of {name}")
        error = (y_hat - y[:16]).double().square().sum() / y[:16].double().square().sum().clamp_min(1e-300)
        record["linears"][name] = {"error": float(error), **losses}
        if name == "qkv" and min(config.kv_bits, config.softmax_bits) < 16:
            attention = fit_attention(quantized, x_q, state, table, config, generator)
            quantized = with_linears(quantized, softmax_value=attention)
        if name == "qkv" and config.compensated:
            quantized = with_linears(quantized, tac=estimate_tac(block, quantized, x_fp, x_q, state, table, config))
    record["seconds"] = round(time.time() - start, 2)
    return quantized, record


def report_divergence(record: dict) -> None:
    """One line on standard error for each linear whose training ended above its start; its best iterate is kept."""
    for name, fit in record["linears"].items():
        if fit.get("diverged"):
            how = "became infinite or NaN" if fit["last"] is None else f"ended at {fit['last']:.4g}"
            tqdm.write(f"calibrate.py: block {record['block']}, {name}: the held-out loss began at {fit['start']:.4g} "
                       f"and {how}; the best iterate, {fit['best']:.4g}, is kept.", file=sys.stderr)


def check_finite(x, what: str) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise CheckpointError(f"{what} holds {bad} NaN or Inf of {x.numel()} values.")


# ---- the whole model -------------------------------------------------------------------------------------------------


@torch.no_grad()
def prediction_confidence(outer: DiffusionLM, blocks, noisy, spill: Path | None = None):
    """Largest probability of the 16-bit model's prediction at each position, (S, L): one pass, block by block."""
    x, state, table, _ = outer.prepare(noisy)
    for block in blocks:
        x, _ = run_block(block, x, state, table, spill=spill)
    best = torch.cat([torch.softmax(outer.logits(outer.norm(x[r].to(state.device))).float(), -1).amax(-1)
                      for r in metrics.batches(len(x), 8)])
    return torch.cat((best[:, :1], best[:, :-1]), 1) if outer.config.logit_shift else best


def calibrate_blocks(outer: DiffusionLM, blocks, noisy, config: QuantConfig, finished=lambda i: None, progress=None,
                     share=(0, 1), spill: Path | None = None):
    """Yield (index, quantized block, record) for each block; `finished(i)` gives a block of an earlier run, or None.

    noisy (S, L) are the calibration segments with [MASK] in place; blocks() iterates over the 16-bit blocks in order.
    With inputs "fp" a block depends on the 16-bit stream alone; share (rank, world) yields every world-th block.
    spill: a folder; both streams and the inputs of the linears are kept in files there instead of in memory.
    """
    confidence = prediction_confidence(outer, blocks(), noisy, spill) if config.method in baselines.DLLMQUANT else None
    x, state, table, _ = outer.prepare(noisy)
    x_q = x_fp = activations(x.shape, x, spill).copy_(x.detach())
    del x
    del outer  # an 8B model's embedding and head take as much as ten blocks
    for i, block in enumerate(blocks()):
        if i % share[1] == share[0]:
            old = finished(i)
            if old is None:
                quantized, record = quantize_block(block, x_fp, x_q, state, table, config, i,
                                                   progress or (lambda _: None), confidence, spill)
            else:
                quantized, record = old
            yield i, quantized, record
        x_fp, _ = run_block(block, x_fp, state, table, spill=spill)
        x_q = x_fp if config.inputs == "fp" else run_block(quantized, x_q, state, table, spill=spill)[0]


def masking_ratios(n: int, config: QuantConfig, generator):
    """t of each segment, stratified over (0, 1] so that the whole trajectory is there; or TMAS."""
    return (baselines.tmas_ratios if config.method in baselines.DLLMQUANT else data.stratified_ratios)(n, generator)


def masked_copies(tokens, region, mask_id: int, config: QuantConfig):
    """Calibration segments with a share t of `region` masked: the forward process."""
    g = torch.Generator().manual_seed(config.seed)
    region = torch.ones_like(tokens, dtype=torch.bool) if region is None else region
    return data.mask_tokens(tokens, region, masking_ratios(len(tokens), config, g), mask_id, g)


def token_states(model, tokens, region, mask_id: int, config: QuantConfig):
    """Masked copies, or states of the model's own trajectory, for which model() gives the 16-bit model."""
    if config.states == "masked":
        return masked_copies(tokens, region, mask_id, config)
    return rollout(model(), tokens, masking_ratios(len(tokens), config, torch.Generator().manual_seed(config.seed)))


def quantize_model(model: DiffusionLM, tokens, config: QuantConfig, region=None) -> DiffusionLM:
    """The quantized counterpart of a 16-bit model in memory: the same result as the command.

    tokens (S, L) clean calibration segments; region (S, L) bool says where [MASK] may stand, everywhere by default.
    """
    noisy = token_states(lambda: model, tokens, region, model.mask_id, config).to(model.device)
    quantized = copy.copy(model)
    quantized._modules = dict(model._modules)
    if config.head_bits < 16:
        quantize_outer(quantized, config.head_bits, config.embed_bits or None)
    quantized.blocks = nn.ModuleList(b for _, b, _ in calibrate_blocks(model, lambda: model.blocks, noisy, config))
    return quantized.eval()


# ---- command line ----------------------------------------------------------------------------------------------------


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
    for name in (item.partition("=")[0] for item in args.set):
        if config.method not in SETTINGS_OF.get(name, METHODS):
            *some, last = SETTINGS_OF[name]
            raise ConfigError(f"--set {name} is for {', '.join(some) + ' and ' * bool(some)}{last}, not for "
                              f"{config.method}.")
        if name == "tac" and config.tac != "none" and not config.compensated:
            raise ConfigError(f"--set tac={config.tac} is not for {config.method}, which takes "
                              f"{' or '.join((*COMPENSATED[config.method], 'none'))}.")
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

    stream = calibrate_blocks(outer, blocks, noisy, config, lambda i: out.finished(i, device, dtype),
                              lambda loss: progress(loss), (distributed.rank(), distributed.world()), args.spill)
    del outer

    with tqdm(total=n * len(FUSED) * max(config.epochs, 1), desc=f"block 1/{n}", unit="epoch", file=sys.stderr,
              disable=distributed.rank() > 0) as bar:
        def progress(loss):
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()

        for i, block, record in stream:
            if i not in out.records:
                out.write_block(i, block, record)
                report_divergence(record)
            bar.n = (i + 1) * len(FUSED) * max(config.epochs, 1)
            bar.set_description(f"block {min(i + 2, n)}/{n}")
    for records in distributed.gather(out.records):
        out.records |= records
    if distributed.rank():
        return {}
    out.finish(block)
    result = {"out": str(args.out), "seconds": round(time.time() - start, 1), "peak_bytes": peak_bytes(device),
              **asdict(config)}
    if args.problems and judged:
        full = load_model(args.model, device, dtype)
        models = {"16-bit": full}
        if config.method != "rtn":
            models[f"RTN W{config.wbits}A{config.abits}"] = quantize_model(
                full, tokens, QuantConfig(method="rtn", wbits=config.wbits, abits=config.abits), region)
        models[f"{config.method} W{config.wbits}A{config.abits}"] = load_model(args.out, device, dtype)
        result["table"] = metrics.judge(models, args.problems, seed=1)
        print(metrics.table(result["table"]))
    return result


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
