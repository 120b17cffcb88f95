"""What a published model costs on a GPU, counted without one: a denoising step, and the calibration of a block.

How it is counted
    It is predicted, not measured. A whole step of `generate`, or `calibrate.quantize_block`, runs at true shapes on
    PyTorch's meta device, whose tensors have shapes but no numbers. It takes the code paths of a GPU. A number that is
    asked for is 0. What runs on the CPU, as the singular values of small blocks do, is not counted.

What is counted
    launches   one for each operation that is no view and no allocation, and for each kernel of `runtime/cuda.py`; also
               one for a decomposition, which starts several
    bytes      of every tensor that an operation reads or writes, once; a look-up counts the rows that it takes
    FLOP       of products, two for each multiplication, and of decompositions
    waits      where the host needs a number or a shape from the GPU, or copies a tensor to or from it
    peak       bytes of weights and of the tensors that are alive at a time
    floor      the largest of bytes / bandwidth, FLOP / rate and the time of the smallest kernel in a CUDA graph, by the
               datasheet and without an L2 cache, for each operation; the least time of all is their sum
"""

import sys
import weakref
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibrate import quantize_block
from checkpoint.families import read_config
from checkpoint.folder import read_json
from checkpoint.published import published
from experiments.twins import eager, plus_twin, quantized_twin
from methods import QuantConfig
from methods.storage import memory_table
from model import DiffusionLM, denoise
from runtime import checks, cuda, products
from runtime.measures import markdown_table

SMALLEST_S = 4e-6  # as measured on an H200 (results/gpu-h200.md)
STEPS = 4  # of a generation, of which the second is counted
SEGMENTS, LENGTH = 128, 256  # of a calibration (Section 4.1)
RESULTS = Path(__file__).parents[1] / "results"
# dense rates, with fp32 sums of bf16, tf32 and fp8 products
Gpu = namedtuple("Gpu", "name capability multiprocessors L2_MiB bytes_per_s rates")
HOPPER = {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12, "tf32": 494.7e12, "fp32": 67e12, "fp64": 67e12}
GPUS = {"h100": Gpu("H100 SXM", (9, 0), 132, 50, 3.35e12, HOPPER), "h200": Gpu("H200", (9, 0), 132, 60, 4.8e12, HOPPER),
        "a40": Gpu("A40", (8, 6), 84, 6, 0.696e12,
                   {"bf16": 149.7e12, "int8": 299.3e12, "int4": 598.7e12, "tf32": 74.8e12, "fp32": 37.4e12,
                    "fp64": 0.58e12}),
        "4090": Gpu("RTX 4090", (8, 9), 128, 72, 1.008e12,
                    {"bf16": 165.2e12, "int8": 660.6e12, "int4": 1321.2e12, "fp8": 330.3e12, "tf32": 82.6e12,
                     "fp32": 82.6e12, "fp64": 1.29e12})}
PRODUCTS, LOOK_UPS = ("mm", "addmm", "addmm_", "bmm", "_int_mm"), ("embedding", "index", "gather", "index_select")
KINDS = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float64: "fp64"}
# FLOP / n³ of n x n matrices, with n right-hand sides (Golub and Van Loan, Matrix Computations)
DECOMPOSITIONS = {"linalg_cholesky_ex": 1 / 3, "linalg_solve_triangular": 1, "linalg_inv_ex": 2,
                  "_linalg_solve_ex": 8 / 3, "_linalg_eigh": 9, "_linalg_svd": 21}
FLOP = {"tiled_product": lambda codes, packed, *_: ("int8", 2 * codes.numel() * len(packed)),
        "grouped_product": lambda codes, packed, *_: ("int8", 2 * codes.numel() * len(packed)),
        # x may have twice as many channels, of which SiLU makes one half
        "rotated_codes": lambda x, P1, P2, *_: ("bf16", 2 * len(x) * len(P1) * (
            64 * len(P1) if P2 is P1 else len(P2) * (len(P1) + len(P2)))),
        "centred_blocks": lambda x, state, mean, B, out, *_: ("bf16", 2 * out.numel() * 64),
        "tac": lambda z, *_: ("bf16", 4 * z.numel() * 16),
        "feedback": lambda x, *_: ("fp32", x.numel() * 64),
        "gptq_columns": lambda columns, *_: ("fp64", columns.numel() * (len(columns) - 1)),
        "rounding_losses": lambda w, scales, *_: ("fp32", 11 * w.numel() * scales.shape[1])}
MADE = {}  # results of another call with tensors of such forms: the meta device takes up to 3 ms to find one


def measured(gpu: str, what: str) -> dict:
    """What was measured on this GPU, as `tests/tools/gpu_first.sh` brings it back: {} if nothing was."""
    return read_json(RESULTS / f"gpu-{gpu}" / f"{what}.json", {})


def succeeded(entry: dict | None) -> dict | None:
    """What was measured, unless it failed."""
    return None if entry is None or "failed" in entry else entry


def touched(*tensors) -> int:
    """Bytes of tensors; a dimension that is only repeated counts once."""
    return sum(t.element_size() * torch.Size(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride).numel()
               for t in tensors if isinstance(t, torch.Tensor))


def tensors(values) -> list:
    """The tensors among values and in lists of them."""
    return [t for value in values for t in (value if isinstance(value, list | tuple) else (value,))
            if isinstance(t, torch.Tensor)]


@cache
def about(function) -> tuple[str, bool, bool]:
    """The name of an operation, whether it makes a view, and whether it makes one tensor, maybe in place."""
    name = function.overloadpacket.__name__
    return (name, function.is_view or name == "_unsafe_view",
            [str(value.type) for value in function._schema.returns] == ["Tensor"] and function._overloadname != "out")


def form(value):
    """What the form of a result depends on: shape, strides and type of a tensor, the items of a list."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(form, value)) if isinstance(value, list | tuple) else (type(value), value)


def run(function, args, kwargs):
    """function(*args, **kwargs), a tensor on the meta device."""
    key = function, form(args), form([*kwargs.items()])
    if key not in MADE:
        out = function(*args, **kwargs)
        MADE[key] = None if out is args[0] else torch.empty_like(out)  # None: in place
    return args[0] if MADE[key] is None else torch.empty_like(MADE[key])


class Count(TorchDispatchMode):
    """Counts what runs inside. The head runs at `open_positions` positions, where a token is still masked."""

    def __init__(self, gpu: Gpu, open_positions: int = 0):
        super().__init__()
        self.gpu, self.open_positions, self.sums, self.alive = gpu, open_positions, Counter(), {}

    def add(self, size: int, kind: str = "fp32", flop: int = 0):
        floor = max(size / self.gpu.bytes_per_s, flop / self.gpu.rates[kind], SMALLEST_S)
        self.sums.update({"launches": 1, "bytes": size, f"{kind}_flop": flop, "floor_s": floor})

    def hold(self, storage):
        """Count a tensor's memory as alive until nothing uses it."""
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata)
            self.sums["peak_bytes"] = max(self.sums["peak_bytes"], sum(self.alive.values()))

    def launch(self, name, dtype, grid, args, threads=None, sizes=None):  # in the place of `cuda._launch`
        kind, flop = FLOP.get(name, lambda *_: ("fp32", 0))(*args)
        self.add(touched(*args), "int4" if getattr(sizes, "NIBBLES", 0) else kind, flop)

    def fp8_product(self, codes, weight, scale, w_scale, y):  # of `products.fp8_product`
        self.add(touched(codes, weight, scale, w_scale, y), "fp8", 2 * y.numel() * codes.shape[1])

    def attention(self, q, k, v, attn_mask=None, enable_gqa=False):  # of `scaled_dot_product_attention`
        z = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # (B, H, L, h)
        self.add(touched(q, k, v, z), "bf16", 4 * q.numel() * k.shape[2])
        return z

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        (name, view, single), kwargs = about(function), kwargs or {}
        inputs = tensors(args[name == "copy_":])
        here = any(t.is_meta for t in inputs)  # or on the CPU
        asks = name == "index" and here and inputs[1].dtype == torch.bool  # how many rows there are
        moves = name == "_to_copy" and here != (torch.device(kwargs.get("device") or inputs[0].device).type == "meta")
        self.sums["waits"] += asks or moves or (here and name in ("_local_scalar_dense", "_linalg_check_errors"))
        if here and name == "_local_scalar_dense":
            return 0
        if here and moves:
            return torch.zeros(inputs[0].shape, dtype=inputs[0].dtype)
        if asks:
            out = inputs[0].new_empty(self.open_positions, *inputs[0].shape[inputs[1].ndim:])
        elif name == "_fused_adamw_":  # the meta device lacks it
            out = None
        else:
            out = run(function, args, kwargs) if here and single and not view else function(*args, **kwargs)
        if view:
            return out
        outputs = [t for t in tensors([out]) if t.is_meta]
        for t in outputs:
            self.hold(t.untyped_storage())
        if name in PRODUCTS or name in DECOMPOSITIONS:
            x = inputs[-2 if name in PRODUCTS else 0]
            flop = 2 * outputs[0].numel() if name in PRODUCTS else DECOMPOSITIONS[name] * x.numel()
            tf32 = name in PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32"
            self.add(touched(*inputs, *outputs), KINDS.get(x.dtype, "tf32" if tf32 else "fp32"),
                     round(flop * x.shape[-1]))
        elif "empty" not in name and (here or outputs):
            self.add(touched(*outputs, *(outputs + inputs[1:] if name in LOOK_UPS else inputs)))
        return out


@contextmanager
def pretended(count: Count):
    """Inside, tensors on the meta device take the code paths of a GPU, and are counted."""
    gpu = count.gpu
    machine = SimpleNamespace(L2_cache_size=gpu.L2_MiB << 20, multi_processor_count=gpu.multiprocessors)
    own = next(key for key, one in GPUS.items() if one == gpu)
    known = measured(own, "bench").get("products") or (
        measured("h200", "bench").get("products", {}) if gpu.capability == (9, 0) else {})

    def fastest(calls, key):
        """The product that was fastest on this GPU, of Hoppers else on an H200, or the first if that is unknown: it
        reads the weights once."""
        *_, M, N, K, packed = key
        name = known.get(f"{M} x {K} -> {N}, {'packed' if packed else 'a byte each'}")
        return name if name in calls else next(iter(calls))

    with (mock.patch.multiple(checks, ready=lambda *_: True, usable=lambda *_: True),
          mock.patch.multiple(cuda, _launch=count.launch, _multiprocessors=lambda _: gpu.multiprocessors,
                              shared_memory=lambda _: (226 if gpu.capability == (9, 0) else 98) << 10,
                              _counters=lambda device: torch.empty(0, device=device)),
          mock.patch.multiple(products, fastest=fastest, fp8_product=count.fp8_product,
                              fp8_is_exact=lambda _: "fp8" in gpu.rates),
          mock.patch.multiple(torch.cuda, get_device_capability=lambda _: gpu.capability,
                              get_device_properties=lambda _: machine),
          mock.patch.object(torch.Tensor, "is_cuda", True),
          mock.patch.object(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused"),
          mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", count.attention), count):
        yield


@cache
def models(name: str, blocks: int) -> dict:
    """{name: model of that many blocks, on the meta device} of all that are compared."""
    with torch.device("meta"):
        model = DiffusionLM(read_config(published(name, blocks))).to(torch.bfloat16).requires_grad_(False)
    packed = quantized_twin(model)
    return {"16-bit, eager glue": eager(model), "16-bit": model, "starquant": packed, "starquant+": plus_twin(packed)}


def step(model, gpu: Gpu, batch: int, length: int, tokens: int) -> Counter:
    """The counts of a model's second denoising step; the peak is that of what is alive besides weights."""
    prompt = torch.empty(batch, length - STEPS * tokens, dtype=torch.long, device="meta")
    steps = denoise(model, prompt, STEPS, STEPS * tokens, cuda_graph=False)
    for index in range(2):  # what is done once is done in the first
        with pretended(count := Count(gpu, batch * (STEPS - index) * tokens)):
            next(steps)
    return count.sums


@torch.no_grad()
def calibrated(model, gpu: Gpu, segments: int, length: int, **settings) -> Counter:
    """The counts of calibrating a model's first block, where both streams are one, on half masked segments."""
    x, state, rope, _ = model.prepare(torch.empty(segments, length, dtype=torch.long, device="meta"))
    with pretended(count := Count(gpu, segments * length // 2)):
        for tensor in (x, *model.blocks[0].parameters()):
            count.hold(tensor.untyped_storage())
        quantize_block(model.blocks[0], x, x, state, rope, QuantConfig(**settings), 0)
    return count.sums


def calibration(name: str, gpu: str) -> list[dict]:
    """Counts and floors of calibrating a block of the published model. All epochs of a training are alike, but that
    the first makes the optimizer's moments; each counts as the first."""
    one, known = models(name, 1)["16-bit"], measured(gpu, f"calib-{name}")
    plus, start, first = (calibrated(one, GPUS[gpu], SEGMENTS, LENGTH, **settings)
                          for settings in ({"method": "starquant+"}, {"epochs": 0}, {"epochs": 1}))
    rows = {"starquant+": plus} | {
        f"starquant, {n} epochs": {key: start[key] + n * (first[key] - start[key]) for key in first}
        | {"peak_bytes": first["peak_bytes"]} for n in (2, QuantConfig().epochs)}
    # of a method that ran twice, the second run: the first one compiles
    return [{"method": label, **counts, "measured": succeeded(known.get(f"{label} again", known.get(label)))}
            for label, counts in rows.items()]


def predict(name: str, gpu: str, points) -> dict:
    """Counts and floors of a step of the published model, for points of batch, length and tokens per step, and of the
    calibration of a block. All blocks are alike, so each counts as the difference between a model of two blocks and a
    model of one."""
    c, rows, results = read_config(published(name)), [], measured(gpu, "bench")
    like = {"model": name, "blocks": None, "head_bits": 8}
    known = results["denoising"] if results and like.items() <= results.items() else []
    with pretended(Count(GPUS[gpu])):
        one, two = models(name, 1), models(name, 2)
    tables = {kind: memory_table(c, head_bits=8, method=kind) for kind in ("starquant", "starquant+")}
    for batch, length, tokens in dict.fromkeys(points):
        point = {"batch": batch, "length": length, "tokens_per_step": tokens}
        at_point = next((p["models"] for p in known if point.items() <= p.items()), {})
        for kind in one:
            few, more = (step(m[kind], GPUS[gpu], batch, length, tokens) for m in (one, two))
            counts = {key: few[key] + (c.n_layers - 1) * (more[key] - few[key]) for key in more}
            counts["peak_bytes"] += tables[kind]["total"] if kind in tables else tables["starquant"]["sixteen_bit"]
            rows.append({**point, "model": kind, **counts,
                         "measured": succeeded(at_point.get(kind))})
    return {"predicted": True, "model": name, "gpu": GPUS[gpu].name, "steps": rows,
            "calibration": calibration(name, gpu)}


def ratios(steps: list[dict]) -> str:
    """How many times as fast one model of a point is as another, by their floors and as measured; Markdown."""
    def ratio(a, b):
        measured = [row["measured"]["step_s"]["median"] for row in (a, b) if row["measured"]]
        return f"{a['floor_s'] / b['floor_s']:.2f}" + (f" ({measured[0] / measured[1]:.2f})" if measured[1:] else "")

    points = {}
    for row in steps:
        points.setdefault((row["batch"], row["length"], row["tokens_per_step"]), []).append(row)
    return markdown_table(
        ("times as fast, by the floors (measured)", "starquant as eager", "starquant as 16-bit", "starquant+ as eager",
         "starquant+ as 16-bit", "starquant as starquant+"),
        [(f"{batch} x {length}", ratio(eager, packed), ratio(full, packed), ratio(eager, plus), ratio(full, plus),
          ratio(plus, packed)) for (batch, length, _), (eager, full, packed, plus) in points.items()])


def table(result: dict) -> str:
    """The result of `predict` as Markdown."""
    gpu = next(g for g in GPUS.values() if g.name == result["gpu"])

    def counts(rows, unit, *what):
        """A table of rows, which begin with the columns `what`."""
        cells = []
        for *first, row in rows:
            flop, measured = {kind: row.get(f"{kind}_flop", 0) for kind in gpu.rates}, row["measured"] or {}
            times = (row["bytes"] / gpu.bytes_per_s, sum(n / gpu.rates[kind] for kind, n in flop.items()),
                     row["launches"] * SMALLEST_S, row["floor_s"],
                     measured.get("seconds") or measured.get("step_s", {}).get("median"))
            peak = f"{row['peak_bytes'] / 1e9:.2f}" + (f" ({measured['peak_bytes'] / 1e9:.2f})" if measured else "")
            cells.append((*first, row["launches"], row["waits"], f"{row['bytes'] / 1e9:.2f}",
                          f"{sum(flop.values()) / 1e12:.2f}", peak,
                          *("" if s is None else f"{s * {'ms': 1e3, 's': 1}[unit]:.2f}" for s in times)))
        return markdown_table((*what, "launches", "waits", "GB moved", "TFLOP", "peak GB (measured)", *(
            f"{unit}: {part}" for part in ("bytes", "FLOP", "launches", "floor", "measured"))), cells)

    steps = [(f"{row['batch']} x {row['length']}", row["model"], row) for row in result["steps"]]
    blocks = [(row["method"], row) for row in result["calibration"]]
    return (f"PREDICTED, NOT MEASURED: a denoising step of {result['model']} on one {gpu.name}, counted without it. "
            f"What was measured is of an earlier run's code (results/gpu-*.md).\n\n"
            f"{counts(steps, 'ms', 'batch x length', 'model')}\n\n{ratios(result['steps'])}\n\n"
            f"PREDICTED, NOT MEASURED: one of its blocks, calibrated on {SEGMENTS} segments of {LENGTH} tokens. Every "
            f"epoch of a training counts as the first.\n\n{counts(blocks, 's', 'method')}")
