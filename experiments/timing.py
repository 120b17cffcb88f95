"""Times of functions on one machine, in turns, and the limits of that machine.

All functions are called in turns, so that clocks and neighbours hit them alike. They are warmed up and synchronized,
and every time is a median with its quartiles. What fails (memory that runs out, a peer that does not compile) is a
result and not a crash. A roofline is the least time that the bytes and the operations of a piece of work can take, at
the bandwidth and the rate of products that `ceilings` measured and `reach` raised to the best that was reached.
"""

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import kernels
from runtime.processes import Refused, synchronize

WARM_UPS = 2  # calls of every function before those that count
REPLAYS = 4  # of a CUDA graph per measurement


def attempt(function, device) -> str | None:
    """Run function() to its end. What went wrong, or None."""
    try:
        function()
        synchronize(device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # what is measured (a peer's compiler, say) may fail in any way; it is said in the table
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None


def measure(functions: dict, repeats: int, device) -> dict:
    """Seconds of each function, called in turns: {name: {"median", "low", "high"} | {"failed": why}}; quartiles."""
    times, out = {name: [] for name in functions}, {}
    for _ in range(WARM_UPS + repeats):
        for name in [name for name in functions if name not in out]:
            synchronize(device)
            start = time.perf_counter()
            if why := attempt(functions[name], device):
                out[name] = {"failed": why}
            times[name].append(time.perf_counter() - start)
    for name in [name for name in functions if name not in out]:
        low, median, high = np.quantile(times[name][WARM_UPS:], (0.25, 0.5, 0.75)).tolist()
        out[name] = {"median": median, "low": low, "high": high}
    return out


def measure_each(functions: dict, repeats: int, device) -> dict:
    """`measure` for short work: name -> list of calls, replayed as one CUDA graph on a GPU; seconds of one call."""
    ready, times = {}, {name: len(calls) for name, calls in functions.items()}
    for name, calls in functions.items():
        run = partial(in_turn, calls)
        # the first run compiles, and lets cuBLAS choose; where it fails, `measure` will say why
        if device.type == "cuda" and attempt(run, device) is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()

            def record(graph=graph, run=run):
                with torch.cuda.graph(graph):
                    run()

            if attempt(record, device) is None:
                # several replays, so that what the host takes to start and end does not count
                run, times[name] = partial(in_turn, [graph.replay] * REPLAYS), REPLAYS * times[name]
            torch.cuda.set_stream(stream)  # a recording that failed may have left its own
        ready[name] = run
    seconds = measure(ready, repeats, device)
    return {name: {k: v if k == "failed" else v / times[name] for k, v in s.items()} for name, s in seconds.items()}


def in_turn(calls):
    """Call every function, in order."""
    for call in calls:
        call()


def ceilings(device, dtype, repeats: int) -> dict:
    """Measured here and now: bytes/s of a copy, operations/s of a 16-bit (or fp32) and of an integer product."""
    n, size = (8192, 2**32) if device.type == "cuda" else (2048, 2**26)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device).to(dtype)
    codes = torch.randint(-8, 8, (n, n), dtype=torch.int8, device=device)
    plain = kernels.backend(device.type) == "int_mm"  # the product alone, without the copy that pads it
    products = {"float": lambda: a @ a,
                "integer": lambda: torch._int_mm(codes, codes.t()) if plain else kernels.int_matmul(codes, codes, 64)}
    seconds = measure({"copy": lambda: target.copy_(source), **products}, 3 * repeats, device)
    for name, s in seconds.items():
        if "failed" in s:
            raise Refused(f"the machine's limits cannot be measured: {name}: {s['failed']}.")
    # PyTorch has no product of 4 bits, which takes the tensor cores of sm_80 to sm_89 half the time
    nibbles = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 8
    # a ceiling is what was reached, so the fast quartile
    return {"bytes_per_s": 2 * size / seconds["copy"]["low"],
            **{f"{k}_ops_per_s": 2 * n**3 / seconds[k]["low"] * (1 + (nibbles and k == "integer")) for k in products}}


def reach(top: dict, seconds: dict, size: float, ops: float, kind: str):
    """Raise the limits `top` to what this work reached by its fast quartile: no roofline of it is above that."""
    if "low" in seconds:
        for limit, amount in (("bytes_per_s", size), (f"{kind}_ops_per_s", ops)):
            top[limit] = max(top[limit], amount / seconds["low"])


def roofline(top: dict, size: float, ops: float, kind: str) -> float:
    """Least seconds for `size` bytes and `ops` operations of this kind ("float" or "integer")."""
    return max(size / top["bytes_per_s"], ops / top[f"{kind}_ops_per_s"])


STAT = Path("/proc/stat")  # ticks of all processors: user, nice, system, idle, iowait, irq, softirq, steal


def clocks() -> tuple[float, float]:
    """Seconds until now: that all processors had, and that they worked for others than this process and the children
    that it waited for. The second is not a number where the system does not tell."""
    try:
        ticks = [int(n) for n in STAT.read_text().split()[1:9]]
        others = (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
    except (OSError, ValueError):
        ticks = []
    if not any(ticks):
        others = float("nan")
    return os.cpu_count() * time.perf_counter(), others


def busy(since: tuple, until: tuple) -> float | None:
    """The share of this machine's processors that other work took between two `clocks`; None where that is unknown."""
    share = (until[1] - since[1]) / (until[0] - since[0])
    return max(share, 0.0) if share == share else None
