"""Quantize a masked-diffusion language model: python calibrate.py [--model tiny] [--method starquant] [--out FOLDER]

The algorithm (Sections 3.2-3.3, Appendices B and C)
    It takes one block at a time. A model never has to fit in memory. Every method goes through this loop; `methods/`
    holds the fits.

    embed masked copies of the calibration segments
    for each block:   read it                                                      disk -> one block in memory
                      collect its inputs: 16-bit stream X_fp, quantized-prefix stream X_q
                      for each input group (qkv, out, gate_up, down):
                          fit SGAT on (X_q, Y = X_fp Wᵀ), fold P into the weight, quantize
                          after qkv: estimate TAC from softmax·V of both streams
                      write it, move both streams through it, free it

The command (second half of this file)
    It checks everything before it writes anything (`calibration/preflight.py`). It writes each block whole
    (`calibration/output.py`), so that `--resume` goes on where an earlier run stopped. Standard output ends with one
    line of JSON; progress goes to standard error.
"""

import argparse
import copy
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from calibration import closing, preflight
from calibration.output import Output, default_folder, gate_sizes, left_by, quantization_config, run_key, survey
from calibration.segments import calibration_texts, calibration_tokens, masked_copies, token_states
from calibration.streams import activations, exact_output, input_of, run_block
from checkpoint.families import ALIASES, FUSED
from checkpoint.folder import Checkpoint, hub_id, resolve
from checkpoint.loading import check_tensors
from methods import METHODS, QuantConfig, config_from, settings_help
from methods.dllmquant import ia_aq
from methods.hadamard import exists, rotation
from methods.rtn import Inputs, quantize_outer
from methods.settings import Settings
from methods.tac import tac_ridge
from model import DiffusionLM, load_block, load_model, load_outer
from runtime import processes
from runtime.attention import QuantAttention, softmax_scores
from runtime.layers import TAC, QuantLinear, rebuilt
from runtime.processes import Parser, Refused, at_least, batches, pick_device, pick_dtype
from starquant import fold_weight, linear, tac_fit
from tiny.stress import write_stressed
from tiny.tasks import knows_our_tasks

# ---- the loop over blocks --------------------------------------------------------------------------------------------


def quantize_model(model: DiffusionLM, tokens, config: Settings = QuantConfig(), region=None,  # noqa: B008 (frozen)
                   progress=None) -> DiffusionLM:
    """The quantized counterpart of a 16-bit model in memory; the command gives the same result.

    tokens (S, L): clean calibration segments. region (S, L) bool: where [MASK] may stand, everywhere by default.
    progress(block, blocks, error): called after each block with its number from 1, the number of blocks and the largest
    relative output error of its linears. What stays in 16 bit lies in the memory of `model`, until one of them moves.
    Raises Refused for arguments of another type, and if activations become NaN or Inf.
    """
    for name, value, kind, source in (("model", model, DiffusionLM, "load_model"),
                                      ("config", config, Settings, "QuantConfig")):
        if not isinstance(value, kind):
            raise Refused(f"{name} is of type {type(value).__name__}; give what {source}(...) returns.")
    if model.config.raw.get("quantization_config"):
        raise Refused("the model is quantized already; give the 16-bit model.")
    if not torch.is_tensor(tokens) or tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise Refused("tokens must be an integer tensor of token ids, one row a segment: (segments, length).")
    if not tokens.numel() or not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise Refused(f"tokens must be at least one id, each between 0 and {model.config.vocab_size - 1}.")
    if region is not None and not (torch.is_tensor(region) and region.shape == tokens.shape
                                   and region.dtype == torch.bool):
        raise Refused(f"region must be a bool tensor of the shape of tokens, {tuple(tokens.shape)}.")
    noisy = token_states(lambda: model, tokens, region, model.mask_id, config).to(model.device)
    # parameters of its own in the same memory: `.to` puts others in their place and leaves those of `model` alone
    own = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    quantized, blocks = copy.deepcopy(model, own | {id(model.tokenizer): model.tokenizer}), []
    if config.head_bits < 16:
        quantize_outer(quantized, config.head_bits, config.embed_bits or None)
    with processes.threads_for(model.config.d_model):
        for i, block, record in calibrate_blocks(model, lambda: quantized.blocks, noisy, config):
            blocks.append(block)
            if progress:
                progress(i + 1, len(model.blocks), max(found["error"] for found in record["linears"].values()))
    about = quantization_config(asdict(config), model.config, gate_sizes(blocks[0]))
    quantized.config = replace(model.config, raw=model.config.raw | {"quantization_config": about})
    quantized.blocks = nn.ModuleList(blocks)
    return quantized.eval()


def calibrate_blocks(outer: DiffusionLM, blocks, noisy, config: Settings, finished=lambda i: None, progress=None,
                     share=(0, 1), spill: Path | None = None):
    """Yield (index, quantized block, record) for each block; `finished(i)` gives a block of an earlier run, or None.

    noisy (S, L): the calibration segments with [MASK] in place. blocks(): iterates over the 16-bit blocks in order.
    share (rank, world): every world-th block is yielded; with inputs "fp" a block depends on the 16-bit stream alone.
    spill: a folder, in whose files both streams and the inputs of the linears are kept instead of in memory.
    """
    confidence = prediction_confidence(outer, blocks(), noisy, spill) if config.diffusion_aware else None
    with torch.no_grad():  # around this function it would keep `outer` alive
        x, state, rope, _ = outer.prepare(noisy)
        x_q = x_fp = activations(x.shape, x, spill).copy_(x)  # (S, L, D)
    del x
    del outer  # the embedding and head of an 8B model take as much as ten blocks
    for i, block in enumerate(blocks()):
        y_fp = None
        if i % share[1] == share[0]:
            quantized, record = finished(i) or (None, None)
            if quantized is None:
                quantized, record, y_fp = quantize_block(block, x_fp, x_q, state, rope, config, i,
                                                         progress or (lambda _: None), confidence, spill)
            yield i, quantized, record
        x_fp = run_block(block, x_fp, state, rope, spill=spill)[0] if y_fp is None else y_fp
        x_q = x_fp if config.inputs == "fp" else run_block(quantized, x_q, state, rope, spill=spill)[0]


@torch.no_grad()
def quantize_block(block, x_fp, x_q, state, rope, config: Settings, index: int, progress=lambda loss: None,
                   confidence=None, spill: Path | None = None):
    """Block `index` quantized, a record of what was fitted, and the 16-bit block's output (S, L, D).

    x_fp, x_q (S, L, D): the block's inputs in the 16-bit and in the quantized stream. progress: called with the loss
    after every epoch of a training and with its relative error after every linear.
    """
    start = time.time()
    y_fp, inputs_fp = run_block(block, x_fp, state, rope, watch=FUSED, spill=spill)
    quantized, record = block, {"block": index, "linears": {}}
    gains = {"qkv": block.attn_norm.weight.detach(), "gate_up": block.ffn_norm.weight.detach()}
    for group, name in enumerate(FUSED):
        x = input_of(name, quantized, x_q, state, rope, spill).to(state.device).float()  # (S, L, d)
        y = exact_output(getattr(block, name), inputs_fp.pop(name).to(state.device).float())  # (S, L, C)
        generator = torch.Generator().manual_seed((config.seed * 1009 + index) * 16 + group)
        fitted, found = fit_linear(getattr(block, name), Inputs(x, y, state, confidence, gains.get(name)), config,
                                   generator, progress, f"block {index}", name)
        quantized, record["linears"][name] = rebuilt(quantized, **{name: fitted}), found
        progress(found["error"])
        if name == "qkv" and min(config.kv_bits, config.softmax_bits) < 16:
            attention = fit_attention(quantized, x_q, state, rope, config, generator)
            quantized = rebuilt(quantized, softmax_value=attention)
        if name == "qkv" and config.compensated:
            quantized = rebuilt(quantized, tac=estimate_tac(block, quantized, x_fp, x_q, state, rope, config))
    record["seconds"] = round(time.time() - start, 2)
    return quantized, record, y_fp


def fit_linear(original, inputs: Inputs, config: Settings, generator, progress, where: str, name: str):
    """One linear fitted by the method of `config`: (QuantLinear, record with its relative output error)."""
    x, y, state = inputs[:3]
    check_finite(x, f"{where}: the input of {name}")
    check_finite(y, f"{where}: the 16-bit output of {name}")
    weight = original.weight.detach().float()
    try:
        fitted, record = METHODS[config.method].fit(weight, original.bias, inputs, config, generator, progress)
    except torch.linalg.LinAlgError:
        raise Refused(f"{where}: {config.method} has no finite solution for {name}: inputs reach "
                      f"{float(x.abs().max()):.3g}, weights {float(weight.abs().max()):.3g}.") from None
    y, y_hat = y[:16], fitted(x[:16], state[:16])
    check_finite(y_hat, f"{where}: the quantized output of {name}")
    # ‖Ŷ − Y‖² / ‖Y‖²
    error = (y_hat - y).double().square().sum() / y.double().square().sum().clamp_min(1e-300)
    return fitted, {"error": float(error), **record}


def check_finite(x, what: str) -> None:
    """Refused if x (S, ...) holds NaN or Inf."""
    # in pieces: over all of x at once, the two masks would take half as much memory again
    bad = sum(int((~torch.isfinite(part)).sum()) for part in x.split(8))
    if bad:
        raise Refused(f"{what} holds {bad} NaN or Inf of {x.numel()} values.")


@torch.no_grad()
def prediction_confidence(outer: DiffusionLM, blocks, noisy, spill: Path | None = None):
    """Largest probability of the 16-bit model's prediction at each position, (S, L): one pass, block by block."""
    x, state, rope, _ = outer.prepare(noisy)
    for block in blocks:
        x, _ = run_block(block, x, state, rope, spill=spill)
    best = torch.cat([torch.softmax(outer.logits(outer.norm(x[r].to(state.device))).float(), -1).amax(-1)
                      for r in batches(len(x), 8)])
    return outer.predicting(best)

# ---- inside attention ------------------------------------------------------------------------------------------------


class Unquantized(nn.Module):
    """A fitted linear with its quantizers off and its transform on (App. C's full-precision pass)."""

    def __init__(self, fitted: QuantLinear, weight):
        super().__init__()
        self.fitted = fitted
        self.folded = fold_weight(weight.float(), fitted.P)

    def forward(self, x, state):
        return self.fitted.finish(linear(self.fitted.phi(x, state), self.folded), state).to(x.dtype)


def estimate_tac(block, quantized, x_fp, x_q, state, rope, config: Settings) -> TAC:
    """TAC of one block from at most `tac_samples` segments: Z^FP through the transform alone, Ẑ quantized."""
    n = min(config.tac_samples, len(x_fp))
    exact = rebuilt(block, qkv=Unquantized(quantized.qkv, block.qkv.weight))
    z_fp = input_of("tac", exact, x_fp[:n], state[:n], rope).flatten(0, 1)  # (n L, d)
    z_q = input_of("tac", quantized, x_q[:n], state[:n], rope).flatten(0, 1)
    if config.tac == "ridge":
        return TAC(*tac_ridge(z_fp, z_q, config.tac_block, config.damping))
    return TAC(*tac_fit(z_fp, z_q, config.tac_block, config.damping, config.smoothing, config.shrinkage))


@torch.no_grad()
def fit_attention(quantized, x_q, state, rope, config: Settings, generator) -> QuantAttention:
    """Quantizers of K, V and the softmax output; V's scale by IA-AQ for DLLMQuant, per token otherwise."""
    bits, h = (config.kv_bits, config.softmax_bits), quantized.config.head_dim
    rotated = config.rotated and exists(h)
    attention = QuantAttention(bits, rotation(h, generator).dense().float().to(state.device) if rotated else None)
    if not config.diffusion_aware or config.kv_bits == 16:
        return attention
    n = min(config.tac_samples, len(x_q))
    qkv = torch.cat([quantized.qkv(quantized.attn_norm(x_q[r].to(state.device)), state[r]) for r in batches(n, 64)])
    q, k, v = attention.rotated(*quantized.heads(qkv, rope))
    return QuantAttention(bits, attention.rotation, *ia_aq(softmax_scores(q, k), v, config.kv_bits))

# ---- the command -----------------------------------------------------------------------------------------------------


EXAMPLES = """Quantize a masked-diffusion language model and judge the result.

  python calibrate.py                                            the embedded model, by the paper's method
  python calibrate.py --method starquant+                        ours: closer to 16 bit, no training
  python calibrate.py --model llada-8b                           LLaDA-8B on one GPU, calibrated on WinoGrande
  python calibrate.py --model FOLDER --data text.txt --abits 8   your own model and text
  torchrun --nproc-per-node 4 calibrate.py --inputs fp           blocks shared by four processes"""


def parse(argv):
    parser = Parser("calibrate.py", description=EXAMPLES, epilog=settings_help(),
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    what, where = parser.add_argument_group("what is quantized, and how"), parser.add_argument_group("output")
    what.add_argument("--model", default="tiny", help="tiny, " + ", ".join(ALIASES) + ", a hub id or a folder (tiny)")
    what.add_argument("--method", default="starquant", help="starquant (the paper, the default), starquant+ (ours), "
                      + ", ".join(m for m in METHODS if "starquant" not in m))
    what.add_argument("--wbits", type=int, default=4, help="weight bits (4)")
    what.add_argument("--abits", type=int, default=4, help="activation bits (4)")
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting, see below")
    what.add_argument("--stress", type=float, default=1.0, metavar="C",
                      help="scale the most state-disparate channels by C first, same 16-bit function (1: off)")
    text = parser.add_argument_group("calibration text")
    text.add_argument("--data", help="a .txt, .jsonl or .parquet file (winogrande, as in the paper, downloaded; "
                      "the embedded model has its own text)")
    text.add_argument("--segments", type=at_least(1), default=128, help="calibration segments, drawn "
                      "at random, so that they may overlap (128, Section 4.1)")
    text.add_argument("--length", type=at_least(2), help="tokens per segment (256; 64 for the embedded model)")
    text.add_argument("--states", default="masked", help="token states: masked copies of the segments, or rollout, "
                      "states of the model's own denoising (masked)")
    text.add_argument("--seed", type=int, default=0, help="seed of segments, masks and all else that is drawn (0)")
    where.add_argument("--out", type=Path, help="output folder (out/MODEL-METHOD-wWaA; + is written -plus)")
    again = where.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    where.add_argument("--dry-run", action="store_true", help="check everything, rehearse one step, print the plan, "
                       "write nothing (a model of the hub is downloaded)")
    where.add_argument("--problems", type=at_least(0), help="size of the closing table: problems per embedded task "
                       "(16); for another model or with --data, segments of the text that it was not calibrated on "
                       "(16); 0: no table")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda")
    machine.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on a GPU, fp32 on a CPU unless given")
    machine.add_argument("--inputs", default="quantized", help="inputs of the next block: quantized, or fp, which lets "
                         "torchrun share the blocks (quantized)")
    machine.add_argument("--spill", type=Path, metavar="FOLDER", help="keep the calibration set's activations in files "
                         "there, not in memory (same result; for many or long segments)")
    args = parser.parse_args(argv)
    args.out, args.opened = args.out or default_folder(args), False  # opened: this run has begun to write there
    return args


def calibrate(args) -> dict:
    """The command: check everything, write block by block, judge what was written; returns what the JSON line says."""
    config = config_from(args)
    device = processes.start(pick_device(args.device))
    dtype = pick_dtype(args.dtype, device)
    if processes.world() > 1 and config.inputs != "fp":
        raise Refused("several processes can share the blocks only if no block waits for another; add --inputs fp.")
    source, texts = open_source(args)
    with processes.threads_for(source.config.d_model):
        return calibrate_checkpoint(args, config, source, texts, device, dtype)


def calibrate_checkpoint(args, config: Settings, source: Checkpoint, texts, device, dtype) -> dict:
    """`calibrate` for a checkpoint that is open: rehearse, or write and judge."""
    stressed, size = args.stress != 1, args.segments * args.length
    plan = preflight.check(source, args.out, config, size, device, dtype, args.spill, stressed)
    if stressed and not args.dry_run:
        folder = args.out.parent / f"{Path(args.model).name}-stress{args.stress:g}"
        processes.first(lambda: write_stressed(args.model, args.stress, folder))
        source = Checkpoint(folder)
    outer = load_outer(source, device, dtype, head=config.diffusion_aware)
    tokens, region = calibration_tokens(args, outer.tokenizer, texts)
    key = run_key(args, source, tokens, config, dtype)
    before = processes.first(lambda: survey(args.out, key, args.resume, args.overwrite))
    if before.get("complete"):
        print(f"calibrate.py: {args.out} is complete; there is nothing to resume.", file=sys.stderr)
        return {"out": str(args.out), "complete": True}
    if args.dry_run:
        noisy = masked_copies(tokens, region, outer.mask_id, config).to(device)
        step = preflight.rehearse(outer, load_block(source, 0, device, dtype), noisy, config)
        print(preflight.describe(plan, step, source.config, config))
        return {"dry_run": True, "plan": plan, "step": step, **asdict(config)}
    out, start, n = Output(args.out, source, key, before), time.time(), source.config.n_layers
    args.opened = True
    noisy = token_states(lambda: load_model(source.folder, device, dtype), tokens, region, outer.mask_id, config)
    noisy = noisy.to(device)
    steps = n * progress_steps(config)
    with processes.Bar(total=steps, unit="step") as bar:
        stream = calibrate_blocks(outer, lambda: (load_block(source, i, device, dtype) for i in range(n)), noisy,
                                  config, lambda i: out.finished(i, device, dtype), partial(advance, bar),
                                  (processes.rank(), processes.world()), args.spill)
        del outer  # the loop alone holds it now, and lets go of it once the segments are embedded
        write_blocks(stream, out, bar, n)
    seconds = round(time.time() - start, 1)
    return {} if processes.rank() else report(args, source, config, texts, device, dtype, out, seconds)


def open_source(args):
    """The 16-bit checkpoint, checked, and the documents to calibrate with (None: the embedded model's own)."""
    early = args.data or hub_id(args.model)
    texts = calibration_texts(args.data) if early else None  # before gigabytes are downloaded
    source = Checkpoint(resolve(args.model))
    if source.quantization:
        raise Refused(f"{args.model} is quantized already; give the 16-bit model.")
    check_tensors(source)
    ours = knows_our_tasks(source.folder)
    args.length, most = args.length or (64 if ours else 256), source.config.positions
    if most and args.length > most:
        raise Refused(f"--length {args.length}: {args.model} knows sequences of at most {most} tokens.")
    return source, calibration_texts(args.data) if texts is None and not ours else texts


def progress_steps(config: Settings) -> int:
    """How often `quantize_block` calls progress for one block; less often where a training diverges."""
    return len(FUSED) * (1 + config.epochs if config.trained else 1)


def advance(bar, error: float) -> None:
    bar.set_postfix_str(f"error {error:.4f}", refresh=False)
    bar.update()


def write_blocks(stream, out: Output, bar, n: int) -> None:
    """Write every block as it comes, and at the end what the folder needs besides (on the first process)."""
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


def report(args, source, config: Settings, texts, device, dtype, out: Output, seconds: float) -> dict:
    """Judge what was written, print the closing table and what to do next; returns what the JSON line says."""
    table = {}
    if args.problems != 0:
        table["table"] = (closing.table_of_tasks(args, source, config, device, dtype) if texts is None else
                          closing.table_of_text(args, source, config, texts, device, dtype))
        out.write_card(table["table"])
        print(closing.described(args, table["table"]))
    print(closing.farewell(args, source, config, texts is None))
    # peak_bytes is of the whole command
    return {"out": str(args.out), "seconds": seconds, "peak_bytes": processes.peak_bytes(device), **asdict(config),
            **table}


def report_divergence(record: dict) -> None:
    """One line on standard error for each linear whose training ended above its start; its best iterate is kept."""
    for name, fit in record["linears"].items():
        if fit.get("diverged"):
            how = "became infinite or NaN" if fit["last"] is None else f"ended at {fit['last']:.4g}"
            tqdm.write(f"calibrate.py: block {record['block']}, {name}: the held-out loss began at {fit['start']:.4g} "
                       f"and {how}; the best iterate, {fit['best']:.4g}, is kept.", file=sys.stderr)


def main(argv=None) -> int:
    args = parse(argv)
    return processes.run("calibrate.py", calibrate, args, "--segments, --length or --set batch=N, and add --overwrite",
                         partial(left_by, args))


if __name__ == "__main__":
    sys.exit(main())
