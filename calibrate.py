"""Quantize a masked-diffusion language model: python calibrate.py [--model tiny] [--method starquant] [--out FOLDER]

The command around `blocks.py`, which is the algorithm: it reads the model block by block, checks everything before it
writes anything (`preflight.py`), writes each block whole (`output.py`), and goes on where an earlier run stopped. The
default run quantizes the embedded model by `starquant+`, judges it against 16 bit and RTN, and ends with one line of
JSON on standard output; progress goes to standard error.
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

import methods
from calibration import preflight
from calibration.output import Output, run_key, survey
from calibration.segments import calibration_texts, calibration_tokens, rollout
from checkpoint.families import FUSED
from checkpoint.folder import Checkpoint, hub_id, resolve
from checkpoint.loading import check_tensors
from methods import METHODS, SETTINGS_OF, QuantConfig, config_from, dllmquant, rtn
from methods.dllmquant import ia_aq
from methods.hadamard import exists, rotation
from methods.rtn import quantize_outer
from model import DiffusionLM, load_block, load_model, load_outer
from runtime import processes, sampling
from runtime.attention import QuantAttention, softmax_scores
from runtime.layers import TAC, QuantLinear
from runtime.processes import Parser, Refused, pick_device
from starquant import fold_weight, linear, tac_fit, tac_ridge
from tiny import metrics
from tiny.stress import write_stressed


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


def report_divergence(record: dict) -> None:
    """One line on standard error for each linear whose training ended above its start; its best iterate is kept."""
    for name, fit in record["linears"].items():
        if fit.get("diverged"):
            how = "became infinite or NaN" if fit["last"] is None else f"ended at {fit['last']:.4g}"
            tqdm.write(f"calibrate.py: block {record['block']}, {name}: the held-out loss began at {fit['start']:.4g} "
                       f"and {how}; the best iterate, {fit['best']:.4g}, is kept.", file=sys.stderr)


def run(args) -> dict:
    config = config_from(args)
    device = processes.start(pick_device(args.device))
    if processes.world() > 1 and config.inputs != "fp":
        raise Refused("several processes share the blocks only if these do not wait for one another: add --inputs "
                          "fp.")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: torch.bfloat16 if device.type == "cuda"
             else torch.float32}[args.dtype]
    for name, low in (("segments", 1), ("length", 2), ("problems", 0)):
        if getattr(args, name) < low:
            raise Refused(f"--{name} {getattr(args, name)} is below {low}.")
    early = args.data or hub_id(args.model)
    texts = calibration_texts(args) if early else None  # before gigabytes are downloaded
    judged = (resolve(args.model) / "training.json").exists()  # a model of this project's tasks
    source = Checkpoint(resolve(args.model))
    if source.quantization:
        raise Refused(f"{args.model} is quantized already; give the 16-bit model.")
    check_tensors(source)
    if not early and not judged:
        calibration_texts(args)  # says what is missing
    plan = preflight.check(source, args.out, config, config.compensated, args.segments * args.length, device, dtype,
                           args.spill)
    if args.stress != 1 and not args.dry_run:  # the plan of the plain model is that of the stressed one
        stressed = args.out.parent / f"{Path(args.model).name}-stress{args.stress:g}"
        processes.first(lambda: write_stressed(args.model, args.stress, stressed))
        args.model, source = str(stressed), Checkpoint(stressed)
    outer = load_outer(source, device, dtype, head=config.method in methods.DLLMQUANT)
    tokens, region = calibration_tokens(args, outer.tokenizer, texts)
    key = run_key(args.model, source, tokens, config)
    if args.dry_run:
        survey(args.out, key, args.resume, args.overwrite)
        noisy = masked_copies(tokens, region, outer.mask_id, config).to(device)
        step = preflight.rehearse(METHODS[config.method], outer, load_block(source, 0, device, dtype), noisy, config)
        print(preflight.describe(plan, step, source.config, config))
        return {"dry_run": True, "plan": plan, "step": step, **asdict(config)}
    processes.first(lambda: Output(args.out, source, key, args.resume, args.overwrite).folder)
    out = Output(args.out, source, key, resume=True, overwrite=False)  # on every process, once the first made it
    noisy = token_states(lambda: load_model(args.model, device, dtype), tokens, region, outer.mask_id, config)
    noisy = noisy.to(device)
    n, start = source.config.n_layers, time.time()

    def blocks():
        return (load_block(source, i, device, dtype) for i in range(n))

    with tqdm(total=n * progress_steps(config), unit="step", file=sys.stderr, disable=processes.rank() > 0) as bar:
        def progress(error):
            bar.set_postfix_str(f"error {error:.4f}", refresh=False)
            bar.update()

        stream = calibrate_blocks(outer, blocks, noisy, config, lambda i: out.finished(i, device, dtype), progress,
                                  (processes.rank(), processes.world()), args.spill)
        del outer
        write_blocks(stream, out, bar, n)
    if processes.rank():
        return {}
    result = {"out": str(args.out), "seconds": round(time.time() - start, 1),
              "peak_bytes": processes.peak_bytes(device), **asdict(config)}
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
    for records in processes.gather(out.records):
        out.records |= records
    if processes.rank() == 0:
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
    except (Refused, processes.Refused) as error:
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
    if processes.rank() == 0:
        print(json.dumps(result))
    return 0

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
        for now in processes.batches(len(x), rows):
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
    rotated = config.method in methods.ROTATED and exists(h)
    attention = QuantAttention(bits, rotation(h, generator).dense().float().to(state.device) if rotated else None)
    if config.method not in methods.DLLMQUANT or config.kv_bits == 16:
        return attention
    n = min(config.tac_samples, len(x_q))
    qkv = torch.cat([quantized.qkv(quantized.attn_norm(x_q[r].to(state.device)), state[r])
                     for r in processes.batches(n, 64)])
    q, k, v = attention.rotated(*quantized.heads(qkv, table))
    return QuantAttention(bits, attention.rotation, *ia_aq(softmax_scores(q, k), v, config.kv_bits))


def quantize_block(block, x_fp, x_q, state, table, config: QuantConfig, index: int, progress=lambda loss: None,
                   confidence=None, spill: Path | None = None):
    """Block `index` quantized, and a record of what was fitted. x_fp, x_q (S, L, D) are its inputs in both streams.

    progress is called with the loss after every epoch of a training, and with its relative error after every linear.
    spill: folder for the inputs of the linears, which stay in memory without it.
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
        inputs = rtn.Inputs(x, y, state, confidence, gains.get(name))
        try:
            fitted, losses = METHODS[config.method](weight, original.bias, inputs, config, generator, progress)
        except torch.linalg.LinAlgError:
            raise Refused(f"block {index}: {config.method} has no finite solution for {name}: inputs reach "
                                  f"{float(x.abs().max()):.3g}, weights {float(weight.abs().max()):.3g}.") from None
        quantized = with_linears(quantized, **{name: fitted})
        y_hat = fitted(x[:16], state[:16])
        check_finite(y_hat, f"block {index}: the quantized output of {name}")
        error = (y_hat - y[:16]).double().square().sum() / y[:16].double().square().sum().clamp_min(1e-300)
        record["linears"][name] = {"error": float(error), **losses}
        progress(float(error))
        if name == "qkv" and min(config.kv_bits, config.softmax_bits) < 16:
            attention = fit_attention(quantized, x_q, state, table, config, generator)
            quantized = with_linears(quantized, softmax_value=attention)
        if name == "qkv" and config.compensated:
            quantized = with_linears(quantized, tac=estimate_tac(block, quantized, x_fp, x_q, state, table, config))
    record["seconds"] = round(time.time() - start, 2)
    return quantized, record


def progress_steps(config: QuantConfig) -> int:
    """How often `quantize_block` calls progress for one block; less often where a training diverges."""
    trained = config.method in SETTINGS_OF["epochs"] and (config.method, config.transform) != ("starquant", "none")
    return len(FUSED) * (1 + config.epochs * trained)


def check_finite(x, what: str) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise Refused(f"{what} holds {bad} NaN or Inf of {x.numel()} values.")

# ---- the whole model -------------------------------------------------------------------------------------------------


@torch.no_grad()
def prediction_confidence(outer: DiffusionLM, blocks, noisy, spill: Path | None = None):
    """Largest probability of the 16-bit model's prediction at each position, (S, L): one pass, block by block."""
    x, state, table, _ = outer.prepare(noisy)
    for block in blocks:
        x, _ = run_block(block, x, state, table, spill=spill)
    best = torch.cat([torch.softmax(outer.logits(outer.norm(x[r].to(state.device))).float(), -1).amax(-1)
                      for r in processes.batches(len(x), 8)])
    return torch.cat((best[:, :1], best[:, :-1]), 1) if outer.config.logit_shift else best


def calibrate_blocks(outer: DiffusionLM, blocks, noisy, config: QuantConfig, finished=lambda i: None, progress=None,
                     share=(0, 1), spill: Path | None = None):
    """Yield (index, quantized block, record) for each block; `finished(i)` gives a block of an earlier run, or None.

    noisy (S, L) are the calibration segments with [MASK] in place; blocks() iterates over the 16-bit blocks in order.
    With inputs "fp" a block depends on the 16-bit stream alone; share (rank, world) yields every world-th block.
    spill: a folder; both streams and the inputs of the linears are kept in files there instead of in memory.
    """
    confidence = prediction_confidence(outer, blocks(), noisy, spill) if config.method in methods.DLLMQUANT else None
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
    return (dllmquant.tmas_ratios if config.method in methods.DLLMQUANT else sampling.stratified_ratios)(n, generator)


def masked_copies(tokens, region, mask_id: int, config: QuantConfig):
    """Calibration segments with a share t of `region` masked: the forward process."""
    g = torch.Generator().manual_seed(config.seed)
    region = torch.ones_like(tokens, dtype=torch.bool) if region is None else region
    return sampling.mask_tokens(tokens, region, masking_ratios(len(tokens), config, g), mask_id, g)


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


if __name__ == "__main__":
    sys.exit(main())
