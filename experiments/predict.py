"""What a denoising step of a published model costs on a GPU, counted without one: predicted, not measured.

A whole step of `generate` runs at true shapes on PyTorch's meta device, whose tensors have shapes but no numbers. It
takes the code paths of a GPU, and what it would start there is counted:

    launches   one for each operation that is no view and no allocation, and for each kernel of `runtime/cuda.py`
    bytes      of every tensor that an operation reads or writes, once; a look-up counts the rows that it takes
    FLOP       of products, two for each multiplication
    waits      where the host needs a number or a shape from the GPU
    peak       bytes of weights and of the tensors that are alive at a time

The floor of an operation is the largest of bytes / bandwidth, FLOP / rate and the time of the smallest kernel in a CUDA
graph, by the datasheet and without an L2 cache. A step takes at least the sum of its floors.
"""

import json
import weakref
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint.families import read_config
from checkpoint.published import published
from experiments.twins import eager, plus_twin, quantized_twin
from methods.storage import memory_table
from model import DiffusionLM, denoise
from runtime import checks, cuda, products
from runtime.measures import markdown_table

SMALLEST_S = 4e-6  # as measured on an H200 (results/gpu-h200.md)
STEPS = 4  # of a generation, of which the first is counted
MEASURED = Path(__file__).parents[1] / "results" / "gpu-h200" / "bench.json"
# dense rates, with fp32 sums of bf16 and fp8 products
Gpu = namedtuple("Gpu", "name capability multiprocessors L2_MiB bytes_per_s rates")
HOPPER = {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12, "fp32": 67e12}
GPUS = {"h100": Gpu("H100 SXM", (9, 0), 132, 50, 3.35e12, HOPPER), "h200": Gpu("H200", (9, 0), 132, 60, 4.8e12, HOPPER),
        "a40": Gpu("A40", (8, 6), 84, 6, 0.696e12, {"bf16": 149.7e12, "int8": 299.3e12, "fp32": 37.4e12}),
        "4090": Gpu("RTX 4090", (8, 9), 128, 72, 1.008e12,
                    {"bf16": 165.2e12, "int8": 660.6e12, "fp8": 330.3e12, "fp32": 82.6e12})}
PRODUCTS, LOOK_UPS = ("mm", "addmm", "bmm", "_int_mm"), ("embedding", "index", "gather")
KINDS = {torch.int8: "int8", torch.bfloat16: "bf16"}
FLOP = {"tiled_product": lambda codes, packed, *_: ("int8", 2 * codes.numel() * len(packed)),
        "grouped_product": lambda codes, packed, *_: ("int8", 2 * codes.numel() * len(packed)),
        "rotated_codes": lambda x, P1, P2, *_: ("bf16", 2 * x.numel() * (len(P1) + len(P2) * (P2 is not P1))),
        "centred_blocks": lambda x, *_: ("bf16", 2 * x.numel() * 64), "tac": lambda z, *_: ("bf16", 4 * z.numel() * 16),
        "feedback": lambda x, *_: ("fp32", x.numel() * 64)}


def touched(*tensors) -> int:
    """Bytes of tensors; a dimension that is only repeated counts once."""
    return sum(t.element_size() * torch.Size(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride).numel()
               for t in tensors if isinstance(t, torch.Tensor))


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
        self.add(touched(*args), *FLOP.get(name, lambda *_: ())(*args))

    def fp8_product(self, codes, weight, scale, w_scale, y):  # of `products.fp8_product`
        self.add(touched(codes, weight, scale, w_scale, y), "fp8", 2 * y.numel() * codes.shape[1])

    def attention(self, q, k, v, attn_mask=None, enable_gqa=False):  # of `scaled_dot_product_attention`
        z = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # (B, H, L, h)
        self.add(touched(q, k, v, z), "bf16", 4 * q.numel() * k.shape[2])
        return z

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, (first, *_) = function._schema.name.removeprefix("aten::"), (*function._schema.returns, None)
        inputs = [t for t in tree_leaves(args[name == "copy_":]) if isinstance(t, torch.Tensor)]
        asks = name == "index" and inputs[1].dtype == torch.bool  # how many rows there are
        self.sums["waits"] += asks or name == "_local_scalar_dense"
        if name == "_local_scalar_dense":
            return 0
        out = function(*args, **(kwargs or {})) if not asks else (
            inputs[0].new_empty(self.open_positions, *inputs[0].shape[inputs[1].ndim:]))
        if (first and first.alias_info and not first.alias_info.is_write) or name in ("detach", "_unsafe_view"):
            return out  # a view
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for t in outputs:
            self.hold(t.untyped_storage())
        if name in PRODUCTS:
            (*_, K), kind = inputs[-2].shape, KINDS.get(inputs[-2].dtype, "fp32")
            self.add(touched(*inputs, *outputs), kind, 2 * outputs[0].numel() * K)
        elif "empty" not in name:
            self.add(touched(*outputs, *(outputs + inputs[1:] if name in LOOK_UPS else inputs)))
        return out


@contextmanager
def pretended(count: Count):
    """Inside, tensors on the meta device take the code paths of a GPU, and are counted."""
    gpu = count.gpu
    machine = SimpleNamespace(L2_cache_size=gpu.L2_MiB << 20, multi_processor_count=gpu.multiprocessors)
    known = json.loads(MEASURED.read_text())["products"] if gpu.capability == (9, 0) else {}

    def fastest(calls, key):
        """The product that was fastest on an H200, or the first if that is unknown: it reads the weights once."""
        *_, M, N, K, packed = key
        name = known.get(f"{M} x {K} -> {N}, {'packed' if packed else 'a byte each'}")
        return name if name in calls else next(iter(calls))

    def serves(*_):
        return True

    with (mock.patch.multiple(checks, ready=serves, usable=serves),
          mock.patch.multiple(cuda, _launch=count.launch, _multiprocessors=lambda _: gpu.multiprocessors,
                              _counters=lambda device: torch.empty(0, device=device)),
          mock.patch.multiple(products, fastest=fastest, fp8_product=count.fp8_product,
                              fp8_is_exact=lambda _: "fp8" in gpu.rates),
          mock.patch.multiple(torch.cuda, get_device_capability=lambda _: gpu.capability,
                              get_device_properties=lambda _: machine),
          mock.patch.object(torch.Tensor, "is_cuda", True),
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
    """The counts of a model's first denoising step; the peak is that of what is alive besides weights."""
    prompt = torch.empty(batch, length - STEPS * tokens, dtype=torch.long, device="meta")
    for _ in range(2):  # transforms are converted at first use
        with pretended(count := Count(gpu, batch * STEPS * tokens)):
            next(denoise(model, prompt, STEPS, STEPS * tokens, cuda_graph=False))
    return count.sums


def predict(name: str, gpu: str, points) -> dict:
    """Counts and floors of a step of the published model, for points of batch, length and tokens per step. All blocks
    are alike, so each counts as the difference between a model of two blocks and a model of one."""
    c, rows, results = read_config(published(name)), [], json.loads(MEASURED.read_text())
    known = results["denoising"] if (name, gpu) == (results["model"], "h200") else []
    with pretended(Count(GPUS[gpu])):
        one, two = models(name, 1), models(name, 2)
    tables = {kind: memory_table(c, head_bits=8, method=kind) for kind in ("starquant", "starquant+")}
    for batch, length, tokens in points:
        measured = next((p["models"] for p in known if (p["batch"], p["length"]) == (batch, length)), {})
        for kind in one:
            few, more = (step(m[kind], GPUS[gpu], batch, length, tokens) for m in (one, two))
            counts = {key: few[key] + (c.n_layers - 1) * (more[key] - few[key]) for key in more}
            counts["peak_bytes"] += tables[kind]["total"] if kind in tables else tables["starquant"]["sixteen_bit"]
            rows.append({"batch": batch, "length": length, "model": kind, **counts, "measured": measured.get(kind)})
    return {"predicted": True, "model": name, "gpu": GPUS[gpu].name, "steps": rows}


def table(result: dict) -> str:
    """The result of `predict` as Markdown."""
    gpu = next(g for g in GPUS.values() if g.name == result["gpu"])
    header = ("batch x length", "model", "launches", "waits", "GB moved", "TFLOP", "peak GB (measured)", "ms: bytes",
              "ms: FLOP", "ms: launches", "ms: floor", "ms: measured")
    rows = []
    for row in result["steps"]:
        flop, measured = {kind: row.get(f"{kind}_flop", 0) for kind in gpu.rates}, row["measured"]
        ms = (row["bytes"] / gpu.bytes_per_s, sum(n / gpu.rates[kind] for kind, n in flop.items()),
              row["launches"] * SMALLEST_S, row["floor_s"], measured and measured["step_s"]["median"])
        peak = f"{row['peak_bytes'] / 1e9:.2f}" + (f" ({measured['peak_bytes'] / 1e9:.2f})" if measured else "")
        rows.append((f"{row['batch']} x {row['length']}", row["model"], row["launches"], row["waits"],
                     f"{row['bytes'] / 1e9:.2f}", f"{sum(flop.values()) / 1e12:.2f}", peak,
                     *("" if s is None else f"{1e3 * s:.2f}" for s in ms)))
    return (f"PREDICTED, NOT MEASURED: a denoising step of {result['model']} on one {gpu.name}, counted without it.\n\n"
            + markdown_table(header, rows))
