"""Several processes, one per GPU (or CPU process), started by torchrun; without torchrun, one process.

Work is divided by index (`i % world() == rank()`), and Python objects travel: every process ends with all results.
"""

import argparse
import atexit
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

ROWS = 16  # sequences per forward pass: on a CPU their activations stay in the caches; changes no mask or draw


class Refused(ValueError):  # noqa: N818 (a verdict on the input, not a fault of the program)
    """What a user can mend: the message is one sentence that names the thing and what to do about it."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started (gloo on a CPU, nccl on GPUs); the device of this one."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # a process may wait very long for the others, whose share takes longer
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return device


def gather(value) -> list:
    """Every process's value, in the order of ranks, on every process."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def watched(items, what: str):
    """The items, with a progress bar on the first process once they take more than two seconds."""
    return tqdm(items, desc=what, delay=2, leave=False, disable=rank() > 0)


def first(function):
    """function() on the first process, whose value all get; if it fails, it fails on all."""
    value = None
    if rank() == 0:
        try:
            value = function()
        except Exception as error:  # the others must not wait for what will not come
            value = error
    value = gather(value)[0]
    if isinstance(value, Exception):
        raise value
    return value


def batches(n: int, rows: int = ROWS):
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*limits, *cgroup_free()], default=None)


def cgroup_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under each memory limit that a container or batch system (cgroup, either version) sets for us."""
    try:
        groups = [line.split(":", 2)[2].lstrip("/") for line in own.read_text().splitlines()
                  if line.startswith("0::") or ":memory:" in line]
    except (OSError, IndexError):
        return []
    out = []
    for folder, limit, used, cache in ((root, "memory.max", "memory.current", "inactive_file"),
                                       (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                        "total_inactive_file")):
        for here in {folder, *(folder / g for g in groups)}:
            try:
                # pages of files that were read count as used, but go when memory is asked for
                kept = dict(line.split() for line in (here / "memory.stat").read_text().splitlines()).get(cache, 0)
                out.append(int((here / limit).read_text()) - int((here / used).read_text()) + int(kept))
            except (OSError, ValueError):  # no such group, or "max": no limit
                continue
    return [max(free, 0) for free in out]


def pick_device(device: str) -> torch.device:
    """auto -> cuda if there is one; a device that is not there is named."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # a device such as "meta" exists but holds no number
    except (RuntimeError, AssertionError, ValueError):
        raise Refused(f"device {device!r} is not available here; use --device cpu.") from None
    return torch.device(device)


def synchronize(device) -> None:
    """Wait for what a GPU was told to do: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device) -> int:
    """Most memory this process ever held: of the GPU if it calibrates there, of the machine otherwise (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of its errors."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists what there is.\n")
