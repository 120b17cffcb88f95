"""What only a GPU can answer, a step a call: python tests/tools/gpu_steps.py probe|micro|calib|epochs|tf32|fp8|sanitize

`gpu_first.sh` runs every step in a process of its own. A step prints and saves each of its results in the folder
$RESULTS as soon as it has it. Without a GPU the same lines run on tiny shapes and no kernel is started, which shows
that every name and every signature still exists; the numbers mean nothing then.
"""

import json
import os
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import calibrate
import kernels
import methods.gptq
import methods.plus
import methods.sgat
import model
from checkpoint.families import read_config
from checkpoint.folder import read_json, write_json
from checkpoint.published import published
from experiments.timing import ceilings, measure_each
from experiments.twins import plus_twin, quantized_twin, random_model
from methods import QuantConfig
from runtime import checks, cuda, fusion, products
from runtime.processes import synchronize
from starquant import Across, Blocks, Kronecker, apply_basis, fake_quantize

GPU, BF16 = torch.cuda.is_available(), torch.bfloat16
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
SEGMENTS, LENGTH = (128, 256) if GPU else (8, 16)  # of a calibration
SHAPES = {"qkv": (4096, 12288), "out": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096)} if GPU else {
    "qkv": (256, 512)}  # K, N of LLaDA-8B's linears
# functions whose time is told apart in a calibration, by the module that calls them
STAGES = {calibrate: ("run_block", "input_of", "exact_output", "check_finite", "estimate_tac"),
          methods.sgat: ("fit_sgat",),
          methods.gptq: ("hessian", "gptq", "upper_factor", "shrunk_scale", "apply_basis", "fold_weight"),
          methods.plus: ("hessian", "balanced_basis", "in_order", "gptq", "shrunk_scale", "feedback_matrix",
                         "best_clip", "unit_gain", "apply_basis", "fold_weight", "aligned", "exponent")}


def keep(name: str, value) -> None:
    """Write what a step has so far, whole or not at all."""
    write_json(Path(os.environ["RESULTS"]) / f"{name}.json", value, indent=1)


def attempt(function):
    """function(), or what went wrong as a sentence."""
    try:
        return function()
    except Exception as error:  # what has never run on a GPU may fail in any way, and the next row shall still run
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:300]}"


@contextmanager
def stand_ins():
    """Where no GPU is, launches do nothing, and every kernel counts as ready."""
    with (mock.patch.multiple(cuda, _launch=lambda *args, **kwargs: None, _multiprocessors=lambda device: 132,
                              shared_memory=lambda device: 226 << 10),
          mock.patch.object(checks, "ready", return_value=True),
          mock.patch.object(products, "slice_width", return_value=256)):
        yield


def checked(name: str, out: dict) -> None:
    """Judge every part into out["parts"], and keep it."""
    rotations = {f"rotation {sizes}": cuda.Rotation(*sizes) for sizes in (
        (64, 64, 1), (96, 128, 1), (64, 64, 0), (192, 64, 0), (64, 64, 1, 1), (96, 128, 1, 2))}
    for label, part in ({part: part for part in cuda.PARTS} | cuda.TILES | rotations).items():
        for dtype in (BF16,) if label in rotations or part in checks.ONLY_BF16 else (torch.float32, BF16):
            start = time.time()
            try:
                said = checks.self_check(DEVICE, dtype, part) or "ok"
                synchronize(DEVICE)
            except Exception:
                said = traceback.format_exc(limit=-3)
            out.setdefault("parts", {})[f"{label} {dtype}"] = {"said": said, "seconds": round(time.time() - start, 2)}
            print(label, dtype, said, flush=True)
            keep(name, out)

# ---- does it run, and are the integers right? -----------------------------------------------------------------------


def probe():
    """Does the CUDA path run at all, and is every integer right?"""
    out = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    if GPU:
        p = torch.cuda.get_device_properties(0)
        out |= {"gpu": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
                "memory": p.total_memory, "l2": p.L2_cache_size}
    print(out, flush=True)

    def exact(M, K, N):
        g = torch.Generator().manual_seed(0)
        a, w = (torch.randint(-128, 128, s, generator=g, dtype=torch.int8) for s in ((M, K), (N, K)))
        return torch.equal(kernels.int_mm(a.to(DEVICE), w.to(DEVICE)).cpu(), kernels.float_mm(a, w))

    # the self-check that switches everything else on; each shape by itself, so that one refusal is seen as such
    shapes = (33, 24, 40), (64, 512, 512), (257, 24, 40), (1, 64, 48), (32, 4096, 256), (1000, 4096, 4096)
    out["int_mm"] = {f"{M}x{K}->{N}": attempt(partial(exact, M, K, N)) for M, K, N in shapes[: 6 if GPU else 5]}
    out["backend"] = attempt(lambda: kernels.backend(DEVICE.type))
    print("int_mm", out["int_mm"], out["backend"], flush=True)
    checked("probe", out)
    # what the host needs for a launch, and the same inside a graph
    x, state = torch.randn(64, 4096, device=DEVICE).to(BF16), torch.zeros(64, dtype=torch.bool, device=DEVICE)
    call = partial(cuda.quantize_rows, x, state, 128, 128, 4)

    def launches(n=200):
        synchronize(DEVICE)
        start = time.perf_counter()
        for _ in range(n):
            call()
        host = time.perf_counter() - start
        synchronize(DEVICE)
        return {"host_us": 1e6 * host / n, "with_gpu_us": 1e6 * (time.perf_counter() - start) / n}

    def graph():
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            codes, *_ = call()
        recorded.replay()
        synchronize(DEVICE)
        return torch.equal(codes, call()[0])

    out |= {"launch": attempt(launches), "graph": attempt(graph) if GPU else None}
    print("launch", out["launch"], "graph", out["graph"], flush=True)
    keep("probe", out)


def fp8():
    """Is an fp8 product of 4-bit codes exact? Counts what differs of 16.8 million outputs a width. With scales of one
    it must equal the integers, rounded to bf16 once. Real scales decide some roundings by their order."""
    out, n = {}, 4096 if GPU else 64
    for K in (4096, 12288, 18944) if GPU else (64,):
        g = torch.Generator(DEVICE).manual_seed(0)
        a, w = (torch.randint(low, high, (n, K), generator=g, device=DEVICE).float() for low, high in ((-15, 16),
                                                                                                       (-8, 8)))
        s, t = torch.rand(2, n, generator=g, device=DEVICE) + 0.5
        want = a @ w.t()  # integers below 2^24: exact in fp32
        assert torch.equal(want[:64].double(), a[:64].double() @ w.double().t())
        y, codes, weight = want.to(BF16), a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        one = torch.ones_like(s)
        products.fp8_product(codes, weight, one, one, y)
        out[K] = {"unit scales": int((y != want.to(BF16)).sum())}
        products.fp8_product(codes, weight, s, t, y)
        out[K] |= {"real scales": int((y != (want * s[:, None] * t).to(BF16)).sum()),
                   "real scales, multiplied first": int((y != (want * (s[:, None] * t)).to(BF16)).sum())}
        print(K, out[K], flush=True)
        keep("fp8", out)


def sanitize():
    """Every kernel once, under compute-sanitizer."""
    checked("sanitize", {})

# ---- how long does a kernel take? -----------------------------------------------------------------------------------


def micro():
    """The machine's limits, every pass over activations at LLaDA-8B's widths, and what stands around a product."""
    repeats = 5 if GPU else 1
    out = {"device": torch.cuda.get_device_name() if GPU else "cpu", "passes": [],
           "ceilings": attempt(lambda: ceilings(DEVICE, BF16, repeats)),
           "fp8_is_exact": attempt(lambda: products.fp8_is_exact(0)) if GPU else None}
    print(out, flush=True)

    def row(about: dict, functions):
        """Microseconds of each of functions()."""
        def timed():
            found = measure_each({name: [call] for name, call in functions().items()}, repeats, DEVICE)
            return {name: s.get("failed") or round(1e6 * s["median"], 2) for name, s in found.items()}

        found = attempt(timed)
        out["passes"].append(about | (found if isinstance(found, dict) else {"failed": found}))
        print(out["passes"][-1], flush=True)
        keep("micro", out)

    for K in (4096, 12288) if GPU else (4096,):
        for M in (32, 512, 4096) if GPU else (8,):
            row({"K": K, "M": M}, partial(passes, K, M))
    for linear, (K, N) in SHAPES.items():
        row({"linear": linear, "K": K, "N": N}, partial(of_a_weight, K, N))
        for M in (512, 4096) if GPU else (8,):
            row({"linear": linear, "K": K, "N": N, "M": M}, partial(around_a_product, M, K, N))
    for B, L in ((1, 512), (4, 1024)) if GPU else ((1, 16),):
        row({"B": B, "L": L}, partial(glue, B, L))
    for B, L in ((1, 32), (1, 512), (4, 1024)) if GPU else ((1, 16),):
        row({"blocks": 1, "B": B, "L": L}, partial(whole_blocks, B, L))


def plain(function, *args):
    with checks.eager_glue():
        return function(*args)


def apart(function, *args):
    with mock.patch.object(fusion, "serves", return_value=False):
        return function(*args)


def passes(K: int, M: int) -> dict:
    """Everything that walks over activations (M, K)."""
    x, state = torch.randn(M, K, device=DEVICE).to(BF16), torch.rand(M, device=DEVICE) < 0.5
    n1 = {4096: 64, 12288: 96}[K]
    kron = Kronecker(*(torch.randn(n, n, device=DEVICE).to(BF16) for n in (n1, K // n1)))
    blocks = Blocks(torch.randn(K // 64, 64, 64, device=DEVICE).to(BF16))
    across = Across(torch.randn(K // 64, K // 64, device=DEVICE).to(BF16))
    norm = model.RMSNorm(K, 1e-5).to(DEVICE, BF16).requires_grad_(False)
    mean, V = torch.randn(2, K, device=DEVICE), torch.randn(K // 64, 64, 64, device=DEVICE).mul(0.1).to(BF16)
    M_tac, bias = torch.randn(K // 16, 16, 16, device=DEVICE), torch.randn(K // 16, 16, device=DEVICE)
    codes, scale, zero = cuda.quantize_rows(x, state, 0, 0, 4)
    calls = {
        "RMSNorm": lambda: plain(norm, x), "rms_norm": lambda: norm(x),
        "F.rms_norm": lambda: norm.weight * F.rms_norm(x, (K,), None, 1e-5),
        "kronecker": lambda: apply_basis(x, kron), "blocks": lambda: apply_basis(x, blocks),
        "across blocks": lambda: apply_basis(x, across), "copy": lambda: x.clone(),
        "quantize_rows": lambda: cuda.quantize_rows(x, state, K // 32, K // 32, 4),
        "grid only": lambda: cuda.quantize_rows(x, state, 0, 0, 4, None, True),
        "feedback": lambda: cuda.feedback(x, V, scale, zero, codes, 4), "tac": lambda: cuda.tac(x, M_tac, bias),
        "centred_blocks": lambda: cuda.centred_blocks(x, mean, state, blocks.B)}
    gate_up, normed = torch.randn(M, 2 * K, device=DEVICE).to(BF16), cuda.Before(norm.weight, 1e-5)
    calls["SiLU, centred_blocks"] = lambda: cuda.centred_blocks(gate_up, mean, state, blocks.B, True)
    for name, rows, factor, to_y, before in (
            ("kronecker, codes", x, kron, False, None), ("norm, kronecker, codes", x, kron, False, normed),
            ("SiLU, kronecker, codes", gate_up, kron, False, cuda.Before()), ("across, grid", x, across, True, None)):
        if rotation := products.rotation_of(rows, [factor], before):
            calls[name] = partial(cuda.rotated_codes, rotation, rows, factor, state, K // 32, K // 32, 4, to_y=to_y,
                                  before=before)
    return calls


def of_a_weight(K: int, N: int) -> dict:
    """What is done to a weight (N, K): unpacking, the search for scales, rounding in training with its gradient, and
    GPTQ's loop over a block of columns."""
    packed, n = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE), cuda.GPTQ_BLOCK
    columns, errors = torch.randn(2, n, N, device=DEVICE, dtype=torch.float64)
    R, scale = columns[:, :n].triu(1).contiguous(), columns[0].abs() + 0.2
    weight, scales = torch.randn(N, K, device=DEVICE), torch.rand(N, len(methods.gptq.SHRINK), device=DEVICE) + 0.1
    ends = torch.tensor([[0.0, 4.0]], device=DEVICE).repeat(N, 1)  # of the range of |w|
    return {"unpack_int4": partial(cuda.unpack, packed, packed.new_empty(N, K, dtype=torch.int8), BF16),
            "unpack_e4m3": partial(cuda.unpack, packed, packed.new_empty(N, K, dtype=torch.float8_e4m3fn), BF16),
            "rounding_losses": partial(cuda.rounding_losses, weight, scales, 4, 2.4),
            "fake_quantize": partial(cuda.fake_quantize, weight, 4, True),
            "fake_quantize_gradient": partial(cuda.fake_quantize_gradient, weight, weight, ends, 4, True),
            "eager fake_quantize": partial(fake_quantize, weight, 4, True),
            "gptq_columns": partial(cuda.gptq_columns, columns, errors, R, scale, 4)}


def around_a_product(M: int, K: int, N: int) -> dict:
    """The readable product (M, K) x (N, K), and what stands behind a product."""
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE)
    codes = torch.randint(-8, 8, (kernels.multiple(M, 32), K), dtype=torch.int8, device=DEVICE)
    scale, zero = torch.rand(M, device=DEVICE), torch.randint(-8, 8, (M,), dtype=torch.int32, device=DEVICE)
    (w_scale, bias), shift = torch.randn(2, N, device=DEVICE), torch.randn(2, N, device=DEVICE)
    state, y = torch.rand(M, device=DEVICE) < 0.5, torch.zeros(M, N, dtype=BF16, device=DEVICE)
    ends = cuda.Ends(scale, zero, None, w_scale, kernels.row_sums(packed, K), None, bias, shift, state)
    acc = torch.zeros(len(codes), N, dtype=torch.int32, device=DEVICE)
    layer = SimpleNamespace(weight_packed=packed, packed=True, in_features=K, abits=4, wbits=4)
    return {"slices": partial(products._in_slices, layer, codes, ends, y),
            "epilogue": partial(cuda.epilogue, acc, ends, y), "add_ends": partial(cuda.add_ends, y, bias, shift, state)}


def glue(B: int, L: int) -> dict:
    """What a block does besides its linears, and sampling."""
    c = read_config(published("llada-8b", 1)) if GPU else model.load_model("tiny", "cpu").config
    with torch.device("meta"):
        block = model.Block(c)
    qkv, gate_up, logits = (torch.randn(B, L, n, device=DEVICE).to(BF16)
                            for n in (3 * c.d_model, 2 * c.d_ffn, c.vocab_size))
    rope = model.cos_sin(torch.arange(L, device=DEVICE), c, BF16)
    return {"eager rope": lambda: plain(block.heads, qkv, rope), "rope": lambda: block.heads(qkv, rope),
            "rope and attention": lambda: block.attention(qkv, rope, None),
            "eager SiLU": lambda: plain(model.swiglu, gate_up), "SiLU": lambda: model.swiglu(gate_up),
            "sampling": lambda: (logits.argmax(-1), torch.softmax(logits, -1))}


@cache
def twins() -> dict:
    """A model of one block, quantized by both methods."""
    packed = quantized_twin(random_model("llada-8b", DEVICE, BF16, 0, 1) if GPU else model.load_model("tiny", "cpu"))
    return {"starquant": packed, "starquant+": plus_twin(packed)}


def whole_blocks(B: int, L: int) -> dict:
    """A quantized block with norms, SiLU and sums inside the kernels of its linears ("fused"), and with them apart."""
    inputs, calls = twins()["starquant"].prepare(torch.zeros(B, L, dtype=torch.long, device=DEVICE)), {}
    for method, twin in twins().items():
        calls[f"{method}, fused"] = partial(twin.blocks[0], *inputs)
        calls[f"{method}, apart"] = partial(apart, twin.blocks[0], *inputs)
    return calls

# ---- how long does calibration take? --------------------------------------------------------------------------------


@contextmanager
def staged():
    """Inside, the seconds of every stage are summed; those of a stage that runs inside of another are its own."""
    seconds, running = Counter(), []

    def timed(name, function, *args, **kwargs):
        synchronize(DEVICE)
        start = time.perf_counter()
        running.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            synchronize(DEVICE)
            took = time.perf_counter() - start
            seconds[name] += took - running.pop()
            if running:
                running[-1] += took

    before = {(module, name): getattr(module, name) for module, names in STAGES.items() for name in names}
    for (module, name), function in before.items():
        setattr(module, name, partial(timed, name, function))
    try:
        yield seconds
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def block_of(name: str, segments: int = SEGMENTS):
    """One block of a published model's shape, with outlier channels, and its inputs: what `quantize_block` takes."""
    torch.manual_seed(0)
    if not GPU:
        m = model.load_model("tiny", "cpu", torch.float32)
    else:
        m = random_model(name, DEVICE, BF16, 0, 1)
        for norm in (m.blocks[0].attn_norm, m.blocks[0].ffn_norm):
            norm.weight[torch.randperm(m.config.d_model)[:16].to(DEVICE)] = 30.0
    ids = torch.randint(0, m.config.mask_id, (segments, LENGTH), device=DEVICE)
    masked = torch.rand(segments, LENGTH, device=DEVICE) < torch.linspace(0.05, 1, segments, device=DEVICE)[:, None]
    x, state, rope, _ = m.prepare(ids.masked_fill(masked, m.config.mask_id))
    x = x.detach().clone()
    return m.blocks[0], x, x, state, rope


def fit(block, setting: dict) -> dict:
    """Seconds, errors, stages and peak memory of a calibrated block."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with staged() as seconds:
        synchronize(DEVICE)
        start = time.perf_counter()
        _, record, _ = calibrate.quantize_block(*block, QuantConfig(**setting), 0)
        synchronize(DEVICE)
    return {"seconds": time.perf_counter() - start, "errors": {k: v["error"] for k, v in record["linears"].items()},
            "stages": {k: round(v, 3) for k, v in seconds.most_common()},
            "peak_bytes": torch.cuda.max_memory_allocated() if GPU else 0,
            "reserved_bytes": torch.cuda.max_memory_reserved() if GPU else 0}


def fits(name: str, settings: dict) -> None:
    """Calibrate a block of a model by several methods: where do time and memory go?"""
    block = block_of(name)
    for label, setting in settings.items():
        found = attempt(partial(fit, block, setting))
        found = found if isinstance(found, dict) else {"failed": found}
        print(name, label, json.dumps(found), flush=True)
        known = read_json(Path(os.environ["RESULTS"]) / f"calib-{name}.json", {})  # another step may have begun it
        keep(f"calib-{name}", known | {label: found})


def calib():
    """A block of LLaDA-8B, and one of Dream-7B; the first run of a method also compiles."""
    plus = {"starquant+": {"method": "starquant+"}, "starquant+ again": {"method": "starquant+"}}
    fits("llada-8b", plus | {"starquant, 1 epoch": {"epochs": 1}, "starquant, 2 epochs": {"epochs": 2},
                             "quarot": {"method": "quarot"}})
    fits("dream-7b", plus)


def epochs():
    """A block of LLaDA-8B as the paper trains it."""
    fits("llada-8b", {"starquant, 15 epochs": {"epochs": 15 if GPU else 1}})


def tf32():
    """Is training in TF32 as good as in fp32? Seconds and held-out losses of three seeds by both."""
    block, out = block_of("llada-8b", SEGMENTS // 4), {}
    attempt(lambda: calibrate.quantize_block(*block, QuantConfig(epochs=1), 0))  # compiles the kernels
    for seed in range(3):
        for kind in ("fp32", "tf32"):
            products_in = methods.sgat.products_in if kind == "tf32" else nullcontext
            with mock.patch.object(methods.sgat, "products_in", products_in):
                start = time.perf_counter()
                found = attempt(lambda seed=seed: calibrate.quantize_block(
                    *block, QuantConfig(epochs=4 if GPU else 1, seed=seed), 0)[1]["linears"])
                synchronize(DEVICE)
            losses = {k: {"loss": v["best"], "error": v["error"]} for k, v in found.items()} if isinstance(
                found, dict) else found
            out[f"{kind}, seed {seed}"] = {"seconds": time.perf_counter() - start, "linears": losses}
            print(kind, seed, out[f"{kind}, seed {seed}"], flush=True)
            keep("tf32", out)


def main(argv=None):
    names = sys.argv[1:] if argv is None else argv
    for name in names:
        with nullcontext() if GPU else stand_ins():
            {f.__name__: f for f in (probe, micro, calib, epochs, tf32, fp8, sanitize)}[name]()


if __name__ == "__main__":
    main()
