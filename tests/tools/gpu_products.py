"""Times every product of `runtime/cuda.py` at LLaDA-8B's shapes on a GPU, and counts the outputs that differ from the
readable integers.

    PYTHONPATH=. python tests/tools/gpu_products.py [--out FILE] [--seconds 60] [--names REGEX] [--tokens 32 64 ...]

Each product runs from a CUDA graph over as many weights as exceed the L2 cache several times, so that the weights come
from memory. Without a GPU the same lines run on tiny shapes and no kernel is started, which shows that they are sound.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import kernels
from checkpoint.folder import write_json
from runtime import cuda
from runtime.cuda import Tile

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA starts only after the processes that compile
GPU = torch.cuda.is_available()
DEVICE, BF16 = torch.device("cuda:0" if GPU else "cpu"), torch.bfloat16
SHAPES = {"gate_up": (4096, 24576), "out": (4096, 4096), "qkv": (4096, 12288), "down": (12288, 4096)}  # K, N
TOKENS = (32, 128, 512, 64, 256, 1024, 4096)
FEW = {"32x128": Tile(32, 128), "32x128 k256": Tile(32, 128, 256), "32x256": Tile(32, 256, WN=64),
       "32x64 k256": Tile(32, 64, 256, RESIDENT=3, STAGES=3), "32x128 6 stages": Tile(32, 128, STAGES=6)}
SOME = {"64x128": Tile(64, 128, WN=64), "64x128 tall": Tile(64, 128, WM=64), "64x256": Tile(64, 256, WM=64, WN=64)}
MANY = {"128x128": Tile(128, 128, WM=64, WN=64), "128x128 8 warps": Tile(128, 128, WM=32, WN=64, RESIDENT=1),
        "128x128 tall": Tile(128, 128, WM=64, WN=32, RESIDENT=1), "256x128": Tile(256, 128, WM=64, WN=64, RESIDENT=1),
        "128x128 3 stages": Tile(128, 128, STAGES=3, WM=64, WN=64),
        "128x128 of 4 bits": Tile(128, 128, WM=64, WN=64, NIBBLES=1),
        "128x256": Tile(128, 256, WM=64, WN=64, RESIDENT=1)}
GROUPED = {name: tile._replace(GROUPS=2) for name, tile in {
    "128x128": Tile(128, 128), "128x256": Tile(128, 256, RESIDENT=1), "256x128": Tile(256, 128, RESIDENT=1),
    "128x128 1 block": Tile(128, 128, STAGES=6, RESIDENT=1), "128x256 6 stages": Tile(128, 256, STAGES=6, RESIDENT=1),
    "256x128 5 stages": Tile(256, 128, STAGES=5, RESIDENT=1)}.items()}
if not GPU:
    SHAPES, TOKENS = {"qkv": (256, 512), "down": (512, 256)}, (32, 64)
    cuda._launch, cuda._multiprocessors = (lambda *arguments, **options: None), (lambda device: 132)


def tiles(M: int) -> dict:
    found = (FEW if M <= 64 else {}) | (SOME if 64 <= M <= 512 else {}) | (MANY if M >= 128 else {})
    return {"tiled " + name: tile for name, tile in found.items()} | (
        {"grouped " + name: tile for name, tile in GROUPED.items()} if M >= 64 else {})


def ways(M: int, K: int, layers: list, a) -> dict:
    """Every product as a list of calls, one for each layer, that return y (M, N)."""
    def own(tile, layer):
        y = torch.empty(M, len(layer.packed), dtype=BF16, device=DEVICE)
        cuda.tiled_product(tile, a.paired, layer.packed, cuda.Ends(a.scale, a.zero, None, layer.scale, layer.sum), y)
        return y

    def unpacked(layer):
        return cuda.unpack(layer.packed, a.fp8.new_empty(len(layer.packed), K), BF16)

    def fp8(weight, layer):
        return torch._scaled_mm(a.fp8, weight.t(), scale_a=a.scale[:, None], scale_b=layer.scale[None], out_dtype=BF16,
                                use_fast_accum=False)

    every = {"bf16": [lambda w=layer.half: F.linear(a.half, w) for layer in layers if layer.half is not None],
             "fp8, resident": [lambda b=layer: fp8(b.fp8, b) for layer in layers if layer.fp8 is not None],
             "fp8, unpacked": [lambda b=layer: fp8(unpacked(b), b) for layer in layers],
             "unpack_e4m3": [lambda b=layer: unpacked(b) for layer in layers]}
    return every | {name: [partial(own, tile, layer) for layer in layers] for name, tile in tiles(M).items()
                    if K % tile.TK == 0}


def microseconds(calls: list, repeats: int = 5) -> float:
    """Median microseconds of one call, from a graph of all of them."""
    for call in calls:
        call()
    if not GPU:
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return sorted(times)[repeats // 2]


def compiled(tile):
    """A tile, and its kernel's machine code or what the compiler says."""
    try:
        return tile, cuda._machine_code(BF16, tile, CAPABILITY)
    except RuntimeError as error:
        return tile, str(error)


def compile_all(tiles):
    """Compile the kernels of all tiles at once, a process each, and hand them out where they are asked for."""
    global CAPABILITY
    asked = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True,
                           text=True, check=True)
    CAPABILITY = tuple(map(int, asked.stdout.split()[0].split(".")))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        code = dict(pool.map(compiled, tiles, chunksize=1))
    for said in code.values():
        if isinstance(said, str):
            print("does not compile:", said[:300], flush=True)
    one = cuda._machine_code
    cuda._machine_code = lambda dtype, part, capability: (
        code[part] if isinstance(code.get(part), bytes) else one(dtype, part, capability))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="products.json")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--names", default="", help="only products whose name this pattern is found in")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args(argv)
    start, rows = time.time(), []
    every = {name: tile for M in args.tokens for name, tile in tiles(M).items() if re.search(args.names, name)}
    if GPU:
        compile_all(set(every.values()))
        torch.cuda.init()
    g = torch.Generator(DEVICE).manual_seed(0)
    print(f"compiled {len(every)} kernels after {time.time() - start:.1f} s", flush=True)
    for linear, (K, N) in SHAPES.items():
        layers, halves = [], 2 + 80_000_000 // (N * K)
        for i in range(max(2, min(24, -(-250_000_000 // (N * K // 2)))) if GPU else 2):
            packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE, generator=g)
            codes = kernels.unpack_int4(packed, K) if i < halves else None
            layers.append(SimpleNamespace(packed=packed, scale=torch.rand(N, device=DEVICE, generator=g) + 0.5,
                                          sum=kernels.row_sums(packed, K),
                                          half=None if codes is None else codes.to(BF16),
                                          fp8=None if codes is None else codes.to(torch.float8_e4m3fn)))
        w = kernels.unpack_int4(layers[0].packed, K)
        for M in args.tokens:
            if time.time() - start > args.seconds - 3:
                print(f"{linear}, {M} tokens: no time left", flush=True)
                continue
            a = SimpleNamespace(codes=torch.randint(-8, 8, (M, K), dtype=torch.int8, device=DEVICE, generator=g),
                                scale=torch.rand(M, device=DEVICE, generator=g) + 0.5,
                                zero=torch.randint(-8, 8, (M,), dtype=torch.int32, device=DEVICE, generator=g))
            a.half = a.codes.to(BF16)
            # in every 32 channels the even ones before the odd ones
            a.paired = a.codes.view(M, -1, 16, 2).transpose(2, 3).reshape(M, K).contiguous()
            a.fp8 = (a.codes - a.zero[:, None]).to(torch.float8_e4m3fn)
            # Y = s_x s_w (X_c W_c - z_c rowsum(W_c))
            acc = kernels.int_mm(a.codes, w) - a.zero[:, None] * layers[0].sum
            want = (acc.float() * a.scale[:, None] * layers[0].scale).to(BF16)
            row = {"linear": linear, "M": M, "K": K, "N": N, "us": {}, "differ": {}}
            for name, calls in ways(M, K, layers, a).items():
                if not re.search(args.names, name):
                    continue
                try:
                    if name not in ("bf16", "unpack_e4m3"):
                        row["differ"][name] = int((calls[0]() != want).sum())
                    row["us"][name] = round(microseconds(calls), 2)
                except Exception as error:  # a refused shape; what ends the CUDA context shows in all that follow
                    row["us"][name] = f"{type(error).__name__}: {str(error)[:200]}"
            rows.append(row)
            times = sorted((t, name) for name, t in row["us"].items() if isinstance(t, float))
            print(f"{linear} {M}: " + ", ".join(f"{name} {t:.1f}" for t, name in times[:6]), flush=True)
            failed = {name: t for name, t in row["us"].items() if not isinstance(t, float)}
            wrong = {name: n for name, n in row["differ"].items() if n}
            if failed or (wrong and GPU):
                print("   FAILED", failed, "DIFFER", wrong, f"of {M * N}", flush=True)
            write_json(args.out, {"device": torch.cuda.get_device_name() if GPU else "cpu", "rows": rows}, indent=1)
            del acc, want
        del layers, w
    kinds = {"bf16": "bf16", "fp8, resident": "fp8, resident", "fp8, unpacked": "fp8, unpacked",
             "tiled": "tiled .*", "grouped": "grouped .*"}
    print("\n| linear | tokens | " + " | ".join(kinds) + " |\n|" + "---|" * (2 + len(kinds)))
    for row in rows:
        cells = []
        for pattern in kinds.values():
            found = sorted((t, name) for name, t in row["us"].items()
                           if isinstance(t, float) and re.fullmatch(pattern, name))
            cells.append("" if not found else f"{found[0][0]:.1f}" + (
                f" ({found[0][1].partition(' ')[2]})" if pattern.endswith("*") else ""))
        print(f"| {row['linear']} | {row['M']} | " + " | ".join(cells) + " |")
    wrong = sum(n > 0 for row in rows for n in row["differ"].values()) if GPU else 0
    print(f"products with outputs that differ: {wrong}; {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
