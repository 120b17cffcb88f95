"""Several processes, one per GPU (or CPU process), started by torchrun; without torchrun, one process.

Work is divided by index (`i % world() == rank()`), and Python objects travel: every process ends with all results.
"""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm


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
