"""Speed and memory of the quantized model against the 16-bit one, on one machine, in one run (Table 4).

    python bench.py                                                      # the embedded model, CPU, under a minute
    python bench.py --model llada-8b --random-weights                    # true shapes, no download, minutes of a GPU
    python bench.py --model llada-8b --random-weights --write FOLDER     # only writes a checkpoint of that shape
    python bench.py --model llada-8b --predict --gpu h200                # only counts, without a GPU

All models are in memory together and are called in turns (`experiments/timing.py`). Every time is a median. Beside it
stands its roofline: the least time that the bytes and the operations of that work can take, at the bandwidth and the
rate of products measured in this same run, which are the best that a copy, a square product or any linear reached.
`--out` is written after every point. Progress goes to standard error; the last line of standard output is JSON.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

import kernels
from checkpoint.families import FUSED, linear_shapes
from checkpoint.folder import write_json
from checkpoint.loading import is_quantized
from checkpoint.published import SHAPES, write_checkpoint
from experiments import peers, predict
from experiments.timing import busy, ceilings, clocks, measure, measure_each, reach, roofline
from experiments.twins import eager, plus_twin, quantized_twin, random_model, residents, unpacked
from methods.storage import memory_table
from model import generate, load_model, swiglu
from runtime import checks, cuda, fusion, processes, products
from runtime.graphs import GraphedModel
from runtime.layers import TAC, QuantLinear
from runtime.measures import markdown_table
from runtime.processes import Parser, Refused, at_least, pick_device, pick_dtype, positive, writable_file
from runtime.sampling import check_length

# Table 4 (A40): tokens/s of the 16-bit and of the quantized model, and their GB
TABLE_4 = {"llada-8b": (34.59, 57.07, 15.89, 5.20), "llada-1.5": (35.55, 58.30, 15.88, 5.20),
           "dream-7b": (23.27, 39.33, 13.95, 4.44)}
# what is compared with the 16-bit model: the method, and how its 4-bit weights lie in memory
QUANTIZED = {"starquant": ("starquant", "packed"), "starquant, int8": ("starquant", "int8"),
             "starquant+": ("starquant+", "packed"), "starquant+, int8": ("starquant+", "int8")}
TOKENS = (32, 128, 512, 1024, 4096)  # of the table of linears
STEPS = 4  # denoising steps per measurement
REPEATS = {"cuda": 7, "cpu": 5}
POINTS = {"cuda": [(1, 32, 1), (1, 128, 1), (1, 512, 4), (4, 1024, 4)],
          "cpu": [(1, 64, 1), (1, 128, 4), (4, 128, 4)],  # (batch, length, tokens per step and sequence)
          "cpu, published shapes": [(1, 64, 4), (1, 128, 4), (1, 512, 4)]}


def log(*text):
    print(*text, file=sys.stderr, flush=True)

# ---- what is measured ----------------------------------------------------------------------------------------------


def denoising(models: dict, point, repeats: int) -> dict:
    """Tokens/s of `generate` for one (batch, length, tokens per step); with peak bytes on a GPU."""
    batch, length, tokens = point
    device, mask_id = models["16-bit"].device, models["16-bit"].mask_id
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, mask_id, (batch, length - STEPS * tokens), generator=generator).to(device)
    runs = {name: partial(generate, GraphedModel(m), prompt, steps=STEPS, gen_length=STEPS * tokens, cuda_graph=False)
            for name, m in models.items()}
    out = measure(runs, repeats, device)
    for name, s in out.items():
        if "failed" in s:
            continue
        # tokens/s = batch · tokens per step · steps / seconds
        out[name] = {"step_s": {k: v / STEPS for k, v in s.items()},
                     "tokens_per_s": batch * tokens * STEPS / s["median"]}
        if device.type == "cuda":
            out[name]["peak_bytes"] = peak_bytes(models[name], prompt, tokens)
    return out


def blocks_alone(models: dict, engines: dict, point, repeats: int) -> dict:
    """Seconds of one pass through the blocks alone. In a model of few blocks the head and sampling would hide them."""
    ids = torch.zeros(point, dtype=torch.long)
    calls = {name: partial(through, model.blocks, *model.prepare(ids)) for name, model in models.items()}
    x, _, rope, _ = models["16-bit"].prepare(ids)
    arrays = [t.float().numpy() for t in (x, *rope)]
    return measure(calls | {name: partial(run, *arrays) for name, run in engines.items()}, repeats, ids.device)


def through(blocks, x, *rest):
    for block in blocks:
        x = block(x, *rest)


def peak_bytes(model, prompt, tokens: int) -> int:
    """Peak of this model's own weights and of everything a step allocates; other models in memory do not count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generate(model, prompt, steps=1, gen_length=STEPS * tokens, cuda_graph=False)
    return torch.cuda.max_memory_allocated() - before + residents(model)


def head_rows(point) -> int:
    """Positions at which the head runs, those that are still masked: the mean over the steps of `denoising`."""
    batch, _, tokens = point
    return batch * tokens * (STEPS + 1) // 2


def linear_work(linear, tokens: int, element: int) -> tuple[int, int, str]:
    """Bytes, operations and their kind of a linear on tokens (tokens, d), whose numbers take `element` bytes, as those
    of the output."""
    kind, weight = ("integer", linear.weight_packed) if isinstance(linear, QuantLinear) else ("float", linear.weight)
    C, d = len(weight), linear.in_features
    return weight.nbytes + tokens * (C + d) * element, 2 * tokens * C * d, kind


def step_roofline(model, top, point, element: int) -> float:
    """Least seconds of one denoising step: linears, attention and head, each at its own roofline."""
    (batch, length, _), c = point, model.config
    tokens, heads = batch * length, c.n_heads * c.head_dim
    block = sum(roofline(top, *linear_work(getattr(model.blocks[0], fused), tokens, element)) for fused in FUSED)
    # Q Kᵀ and A V
    block += roofline(top, 4 * tokens * heads * element, 4 * tokens * length * heads, "float")
    return c.n_layers * block + roofline(top, *linear_work(model.head, head_rows(point), element))


def linears(models: dict, top, repeats: int) -> list[dict]:
    """Seconds of each fused linear by tokens. All blocks are called in turn, so that weights come from memory. The
    limits `top` are raised to what any of them reached."""
    device, dtype, out, work = models["16-bit"].device, models["16-bit"].norm.weight.dtype, [], []
    for fused, (C, d) in linear_shapes(models["16-bit"].config).items():
        for tokens in (n for n in TOKENS if device.type == "cuda" or n <= 512):
            state = torch.arange(tokens, device=device) % 2 == 0
            x = torch.randn(tokens, d, device=device).to(dtype)
            calls = {name: [partial(getattr(block, fused), x, state) for block in m.blocks]
                     for name, m in models.items()}
            out.append({"linear": fused, "M": tokens, "N": C, "K": d, **measure_each(calls, repeats, device)})
            work += [(out[-1][name], linear_work(getattr(m.blocks[0], fused), tokens, dtype.itemsize))
                     for name, m in models.items()]
    for seconds, amounts in work:
        reach(top, seconds, *amounts)
    for seconds, amounts in work:
        seconds["roofline"] = roofline(top, *amounts)
    return out


def first_half(linear: QuantLinear, x, state, before=None):
    """What a linear does to x (B, L, d) on a GPU before its product; without our kernels that leaves out the codes."""
    if products.serves(linear, x):
        return products.codes(linear, x.reshape(-1, x.shape[-1]), state.flatten(), before=before)
    return linear.phi(x, state)


@torch.no_grad()
def shares(model, point, repeats: int) -> dict:
    """Where a denoising step goes: seconds per step of each part, measured alone, over several blocks in turn."""
    (batch, length, _), c = point, model.config
    device, dtype = model.device, model.norm.weight.dtype
    blocks, shapes = list(model.blocks[:4]), linear_shapes(c)
    ids = torch.full((batch, length), c.mask_id, device=device)
    ids[:, ::2] = 0
    x, state, rope, mask = model.prepare(ids)
    inputs = {f: torch.randn(batch, length, d, device=device).to(dtype) for f, (_, d) in shapes.items()}
    qkv = torch.randn(batch, length, shapes["qkv"][0], device=device).to(dtype)
    gate_up = torch.randn(batch, length, 2 * c.d_ffn, device=device).to(dtype)
    open_rows = model.norm(x).flatten(0, 1)[:head_rows(point)]
    calls = {"linears": [lambda b=b: [getattr(b, f)(inputs[f], state) for f in FUSED] for b in blocks],
             "attention": [partial(b.attention, qkv, rope, mask) for b in blocks],
             "norms, activation": [lambda b=b: (b.attn_norm(x), b.ffn_norm(x), swiglu(gate_up)) for b in blocks],
             "head": [partial(model.logits, open_rows)]}
    first = {}
    if fusion.serves(blocks[0], x):  # then linears do these and the sums, too
        del calls["norms, activation"]
        first, inputs["down"], added = fusion.first(blocks[0]), gate_up, {"out": x, "down": x}
        calls["linears"] = [lambda b=b: [products.linear(getattr(b, f), inputs[f], state, first.get(f), added.get(f))
                                         for f in FUSED] for b in blocks]
    before = "transforms, gates, codes"  # before the product; on a CPU one call does both
    if isinstance(blocks[0].qkv, QuantLinear) and device.type == "cuda":
        calls[before] = [lambda b=b: [first_half(getattr(b, f), inputs[f], state, first.get(f)) for f in FUSED]
                         for b in blocks]
    if isinstance(blocks[0].tac, TAC):
        calls["TAC"] = [partial(b.tac, inputs["out"]) for b in blocks]
    seconds = {name: s.get("median", float("nan")) * (1 if name == "head" else c.n_layers)
               for name, s in measure_each(calls, repeats, device).items()}
    if before in seconds:
        seconds["linears"] -= seconds[before]  # a QuantLinear contains them
    return seconds

# ---- the report ----------------------------------------------------------------------------------------------------


def cell(entry: dict, scale: float, digits: int) -> str:
    """A time, the least possible one in parentheses where it is known, or what went wrong."""
    if "failed" in entry:
        return entry["failed"].replace("|", "/")
    value = f"{entry.get('step_s', entry)['median'] * scale:.{digits}f}"
    return f"{value} ({entry['roofline'] * scale:.{digits}f})" if "roofline" in entry else value


def table_4(result: dict) -> str:
    """Speed and memory of every quantized model at every point, below the paper's own row."""
    memory, rows = result["memory"], []
    if result["model"] in TABLE_4 and not result["blocks"]:
        full, quantized, full_gb, quantized_gb = TABLE_4[result["model"]]
        rows.append(("paper, A40", full, quantized, f"{quantized / full:.2f}", full_gb, quantized_gb,
                     f"{full_gb / quantized_gb:.2f}"))
    for p in result["denoising"]:
        full = p["models"]["16-bit"]
        for name in QUANTIZED:
            quantized = p["models"][name]
            rates = [cell(m, 1, 2) if "failed" in m else f"{m['tokens_per_s']:.2f}" for m in (full, quantized)]
            failed = "failed" in full or "failed" in quantized
            speed = "" if failed else f"{quantized['tokens_per_s'] / full['tokens_per_s']:.2f}"
            full_bytes = full.get("peak_bytes", memory[name]["sixteen_bit"])
            quantized_bytes = quantized.get("peak_bytes", memory[name]["total"])
            rows.append((f"{name}, batch {p['batch']}, length {p['length']}, {p['tokens_per_step']} per step",
                         *rates, speed, f"{full_bytes / 1e9:.4g}", f"{quantized_bytes / 1e9:.4g}",
                         f"{full_bytes / quantized_bytes:.2f}"))
    return markdown_table(("", "tokens/s 16-bit", "quantized", "speed-up", "GB 16-bit", "quantized", "saving"), rows)


def other_work(result: dict) -> str:
    """A sentence about other work during the run, "" where the system does not say; an older run has its own."""
    share = result["busy"]
    if share is None or isinstance(share, str):
        return share or ""
    points = [p["busy"] for p in result["denoising"] if p["busy"] is not None]
    run, worst = (f"{100 * n:.0f} %" for n in (share, max(points, default=share)))
    return f"Other work took {run} of the machine's processors during the run, {worst} at the worst point."


def tables(result: dict) -> str:
    """Table 4, then times beside their rooflines, then where a step goes; Markdown."""
    points, linear_names, shares = result["denoising"], result["linear_models"], result["shares"]
    memory = "GB: peak of a step, measured." if result["device"] != "cpu" else (
        f"GB: weights, computed, 16-bit ones as bf16; no activations. The 16-bit model ran in {result['dtype']}.")
    out = [table_4(result), f"{memory} {other_work(result)}".rstrip()]
    for key, title in (("models", "ms per step (least possible)"), ("blocks", "ms in the blocks alone")):
        if names := list(points[0].get(key, ())):
            out.append(markdown_table((title, *names), [
                (f"{p['batch']} x {p['length']}", *(cell(p[key][name], 1e3, 2) for name in names)) for p in points]))
    if result.get("products"):
        out.append("Products that were the fastest, by M x K -> N and residency of the weights: "
                   + "; ".join(f"{shape}: {name}" for shape, name in result["products"].items()) + ".")
    out.append(markdown_table(("linear, M: µs (least possible)", *linear_names), [
        (f"{r['linear']} {r['K']} -> {r['N']}, {r['M']}", *(cell(r[name], 1e6, 0) for name in linear_names))
        for r in result["linears"]]))
    parts = dict.fromkeys(part for s in shares.values() for part in s if part != "step")
    out.append(markdown_table(("part of a step", *shares), [
        (part, *(f"{100 * s[part] / s['step']:.0f} %" if part in s else "" for s in shares.values()))
        for part in parts]))
    if any("norms, activation" not in s for s in shares.values()):
        out.append("Where norms and activation have no share, they are part of transforms, gates, codes.")
    return "\n\n".join(out)


def usual_points(device_type: str, args) -> list[tuple]:
    """The points asked for, or those of the device. On a CPU, published shapes get longer sequences."""
    shapes = ", published shapes" if args.random_weights and device_type == "cpu" else ""
    return args.points or POINTS[device_type + shapes]


def measure_all(args):
    """Measure everything; yields the result, which the JSON line holds, whenever there is more of it."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype or ("bf16" if args.random_weights else None), device)
    repeats, asked = args.repeats or REPEATS[device.type], usual_points(device.type, args)
    torch.manual_seed(args.seed)
    if args.random_weights:
        model = random_model(args.model, device, dtype, args.seed, args.blocks)
    else:
        try:
            model = load_model(args.model, device, dtype)
        except Refused as error:
            other = ", or add --random-weights." if args.model in SHAPES else "."
            raise Refused(str(error).removesuffix(".") + other) from None
    if is_quantized(model):
        raise Refused(f"{args.model} is quantized already; bench.py takes a 16-bit model and quantizes it.")
    c = model.config
    for _, length, _ in asked:
        check_length(c, length)
    result = {"command": args.command, "model": args.model, "random_weights": args.random_weights,
              "blocks": args.blocks, "seed": args.seed, "dtype": str(dtype)[6:],
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
              "threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.version.cuda,
              "head_bits": args.head_bits, "embed_bits": args.embed_bits or args.head_bits,
              "integer_product": kernels.backend(device.type),
              "cuda_kernels": [part for part in cuda.PARTS if device.type == "cuda"
                               and checks.ready(torch.cuda.current_device(), dtype, part)],
              "ceilings": (top := ceilings(device, dtype, repeats))}
    log(f"{args.model}: {c.n_layers} blocks on {device}, {dtype}; the machine reaches "
        f"{top['bytes_per_s'] / 1e9:.3g} GB/s, {top['float_ops_per_s'] / 1e12:.3g} TFLOP/s and "
        f"{top['integer_ops_per_s'] / 1e12:.3g} T/s of integers")
    yield result
    packed = quantized_twin(model, args.seed, args.head_bits, args.embed_bits)
    plus = plus_twin(packed, args.seed)
    models = {"16-bit": model, **dict(zip(QUANTIZED, (packed, unpacked(packed), plus, unpacked(plus)), strict=True))}
    sizes = {name: memory_table(c, head_bits=args.head_bits, embed_bits=args.embed_bits, method=method, weights=weights)
             for name, (method, weights) in QUANTIZED.items()}
    result["memory"] = {name: s | {"ratio": s["sixteen_bit"] / s["total"]} for name, s in sizes.items()}
    result["resident"] = {name: residents(m) for name, m in models.items()}
    all_models = models | ({"16-bit, eager glue": eager(model)} if device.type == "cuda" else {})
    all_models |= peers.models(model, log) if args.peers else {}
    engines = peers.engines(model, log) if args.peers and device.type == "cpu" else {}
    points = result["denoising"] = []
    for point in asked:
        (batch, length, tokens), since = point, clocks()
        entry = {"batch": batch, "length": length, "tokens_per_step": tokens,
                 "models": denoising(all_models, point, repeats)}
        if device.type == "cpu":
            entry["blocks"] = blocks_alone(models, engines, (batch, length), repeats)
        points.append(entry | {"busy": busy(since, clocks())})
        log(f"{batch} x {length}, ms per step: "
            + "; ".join(f"{name} {cell(measured, 1e3, 2)}" for name, measured in entry["models"].items()))
        yield result
    result |= {"linear_models": list(models), "linears": linears(models, top, repeats)}
    for point, entry in zip(asked, points, strict=True):
        for name, m in models.items():
            entry["models"][name]["roofline"] = step_roofline(m, top, point, dtype.itemsize)
    yield result
    where = result["shares"] = {}
    for name, m in models.items():
        if "failed" not in points[-1]["models"][name]:
            where[name] = shares(m, asked[-1], repeats)
            step = points[-1]["models"][name]["step_s"]["median"]
            where[name] |= {"sampling and rest": step - sum(where[name].values()), "step": step}
    result["products"] = products.chosen()
    yield result


def point(text: str) -> tuple[int, int, int]:
    """"BATCHxLENGTHxTOKENS", tokens per step and sequence."""
    try:
        batch, length, tokens = (int(n) for n in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxLENGTHxTOKENS, as in 1x512x4") from None
    if min(batch, length, tokens) < 1 or length < STEPS * tokens:
        raise argparse.ArgumentTypeError(f"{text}: each number is at least 1, the length at least {STEPS} x tokens")
    return batch, length, tokens


def parse(argv=None):
    parser = Parser("bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="alias, hub id or folder of a 16-bit model (default: tiny)")
    parser.add_argument("--random-weights", action="store_true", help="published shapes without a download")
    parser.add_argument("--blocks", type=int, help="blocks of --random-weights (as many as the published model has)")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the --random-weights as a checkpoint with "
                        "outlier channels, to rehearse on, and measure nothing")
    parser.add_argument("--gain", type=positive, help="size of the outlier channels of --write (30)")
    parser.add_argument("--points", type=point, nargs="+", help="BATCHxLENGTHxTOKENS_PER_STEP, as in 1x512x4")
    parser.add_argument("--head-bits", type=int, choices=(8, 16), default=8, help="of embedding and head (default: 8)")
    parser.add_argument("--embed-bits", type=int, choices=(4, 8), help="of the embedding (default: --head-bits)")
    parser.add_argument("--repeats", type=at_least(1),
                        help="measurements of each time (default: 7 on a GPU, 5 on a CPU)")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=False,
                        help="also torch.compile and torchao, where they install; takes minutes more")
    parser.add_argument("--predict", action="store_true", help="count launches, bytes and operations of a step and of "
                        "calibrating a block without a GPU, and measure nothing")
    parser.add_argument("--gpu", choices=predict.GPUS, help="the GPU whose datasheet --predict takes (h200)")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the 16-bit model: bf16 on a GPU and for "
                        "--random-weights, else fp32, unless given")
    parser.add_argument("--seed", type=at_least(0, 2**63), default=0, help="of random weights and inputs (0)")
    args = parser.parse_args(argv)
    args.random_weights |= args.write is not None
    wrong = {
        "--predict knows --model, --gpu, --points and --out alone": args.predict and any(
            value != parser.get_default(name) for name, value in vars(args).items()
            if name not in ("predict", "model", "gpu", "points", "out")),
        "--blocks needs --random-weights": args.blocks is not None and not args.random_weights,
        "--gain needs --write": args.gain is not None and not args.write,
        "--write measures nothing": args.write and (args.points or args.repeats or args.peers or args.out),
        "--gpu needs --predict": args.gpu and not args.predict,
        "--embed-bits needs --head-bits 8": args.embed_bits and args.head_bits == 16,
        f"the folder of --out {args.out} does not exist": args.out and not args.out.parent.is_dir()}
    for sentence in (sentence for sentence, holds in wrong.items() if holds):
        parser.error(sentence)
    args.kept = ""  # what an interrupted run leaves
    args.command = "python bench.py " + " ".join(sys.argv[1:] if argv is None else argv)
    return args


def run(args) -> dict:
    start, since = time.perf_counter(), clocks()
    if args.out:
        writable_file(args.out, "--out")
    if args.write:
        size = write_checkpoint(args.model, args.write, args.blocks, args.gain or 30.0, args.seed)
        return {"model": args.model, "blocks": args.blocks, "bytes": size, "out": str(args.write)}
    if args.predict:
        results, table = [predict.predict(args.model, args.gpu or "h200", args.points or POINTS["cuda"])], predict.table
    else:
        results, table = measure_all(args), tables
    with torch.no_grad():
        for result in results:
            result |= {"seconds": time.perf_counter() - start, "busy": busy(since, clocks())}
            if args.out:
                write_json(args.out, result)
                args.kept = f"{args.out} holds what was measured."
    print(table(result))
    return result


def main(argv=None) -> int:
    args = parse(argv)
    return processes.run("bench.py", run, args, smaller="--blocks or --points", kept=lambda: args.kept)


if __name__ == "__main__":
    sys.exit(main())
