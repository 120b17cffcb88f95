"""Runs a CUDA kernel on a CPU, instruction by instruction, from the PTX that NVIDIA's compiler makes of it.

How it works
------------
The threads of some CUDA blocks are the lanes of numpy arrays, and every step executes the stretch of instructions with
the lowest address among the threads that can run. The machine knows the instructions that this project's kernels
compile to (`ptx_instructions.py`) and refuses all others. It takes the block sizes of a GPU, barriers, tensor-core
fragments (`mma.sync`, `wgmma`) and copies in the background (`cp.async`), whose bytes arrive only when the kernel waits
for them.

What it checks, as compute-sanitizer does on a GPU
--------------------------------------------------
Every access lies inside the tensor it belongs to and is aligned. Shared memory is written before it is read. No two
threads touch one byte of shared memory between two barriers unless both read, and neither `cp.async` nor a thread
writes what a running `wgmma` reads. All threads that still run meet at the same barrier, and all lanes of a warp at an
`mma`. No address is written by two blocks, unless by atomic operations.

What it does not cover: the step from PTX to machine code, timing, and the order in which a GPU runs blocks.
"""

import ctypes
import math
import re
import shutil
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from ptx_instructions import DTYPE, ENDED, WAITING, Fault, Instructions, Unknown, count
from ptx_reader import Kernel, compiled, nvrtc

from runtime import checks, cuda, products

np.seterr(all="ignore")
LANES, SHARED = 1 << 13, 1 << 21  # at most so many threads and bytes of shared memory at a time, if a block fits

# ---- running -------------------------------------------------------------------------------------------------------


@cache
def kind_of(register):
    return {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "f": np.uint32, "rd": np.uint64, "fd": np.uint64}[
        re.match(r"%([a-z]+)\d", register)[1]]


class Machine(Instructions):
    """Runs a kernel in blocks of so many threads. Lanes are a slice, or an array of their numbers."""

    def __init__(self, kernel: Kernel, threads: int):
        if threads % 32:
            raise Unknown("blocks of warps that are not whole")
        self.k, self.T = kernel, threads
        self.granules = {space: self._granule(space) for space in ("global", "shared")}
        self._compile()

    def run(self, grid, arguments, memory, dynamic: int = 0):
        """One launch. memory: list of (address, bytes, name)."""
        kernel, threads = self.k, self.T
        self.grid, self.arguments, self.conflicts = (*grid, 1, 1)[:3], arguments, 0
        self.shared_bytes = kernel.dynamic + dynamic
        self.stride = -(-max(self.shared_bytes, 1) // 16) * 16  # from one block's shared memory to the next one's
        memory = sorted(memory)
        self.starts = np.array([m[0] for m in memory], dtype=np.int64)
        self.ends = np.array([m[0] + m[1] for m in memory], dtype=np.int64)
        self.names, self.views = [m[2] for m in memory], {}
        self.owner = [None] * len(memory)  # block that wrote each granule, allocated at the first store
        at_once, numbers = max(1, min(LANES // threads, SHARED // self.stride)), np.arange(math.prod(self.grid))
        for first in range(0, len(numbers), at_once):
            self._blocks(numbers[first : first + at_once])

    def _granule(self, space: str) -> int:
        """Bytes of the smallest access: all others are aligned multiples of it."""
        sizes = [np.dtype(DTYPE[op.split(".")[-1]]).itemsize for op in re.findall(rf"\b(?:ld|st)\.{space}\S*",
                                                                                    "\n".join(self.k.code))]
        return min([*sizes, 16])

    def _blocks(self, numbers):
        """Some blocks until their threads have ended."""
        T, (gx, gy, gz) = self.T, self.grid
        self.lanes = np.arange(len(numbers) * T)
        self.block, self.number = self.lanes // T, np.repeat(numbers, T)
        self.base = self.block * self.stride
        sizes = dict(zip(("%ntid.x", "%nctaid.x", "%nctaid.y", "%nctaid.z"), (T, gx, gy, gz), strict=True))
        where = {"%tid.x": self.lanes % T, "%ctaid.x": self.number % gx, "%ctaid.y": self.number // gx % gy,
                 "%ctaid.z": self.number // gx // gy}
        self.regs = {name: value.astype(np.uint32) for name, value in where.items()} | {
            name: np.full(len(self.lanes), size, np.uint32) for name, size in sizes.items()}
        self.copies, self.products = [], []  # cp.async and wgmma that run
        self.committed = np.zeros(len(numbers), np.int64)
        self.shared = np.zeros(len(numbers) * self.stride, np.uint8)
        # who used each granule of shared memory last: (number of the barrier, lane) in one integer
        granules = len(self.shared) // self.granules["shared"]
        self.writer, self.reader = np.full(granules, -1, np.int64), np.full(granules, -1, np.int64)
        self.busy = np.zeros(granules, np.int32)  # wgmma that read it
        self.several, self.epoch = len(self.lanes), 0
        self.pc = np.zeros(len(self.lanes), np.int64)
        self.resume = self.pc.copy()
        while (now := int(self.pc.min())) != ENDED:
            lanes = np.flatnonzero(self.pc == now)
            if now == WAITING:
                self._release(lanes)
                continue
            if lanes[-1] - lanes[0] + 1 == len(lanes):
                lanes = slice(int(lanes[0]), int(lanes[-1]) + 1)
            stretch, end = self.program[now]
            self.pc[lanes] = end
            for do in stretch:
                do(lanes)

    def _release(self, lanes):
        """All threads wait that still run: each block's at one barrier."""
        first = np.full(len(self.committed), -1)
        first[self.block[lanes]] = self.resume[lanes]
        if (first[self.block[lanes]] != self.resume[lanes]).any():
            raise Fault(f"{self.k.name}: threads wait at different barriers")
        self.pc[lanes] = self.resume[lanes]
        self.epoch += self.several + 1

    def _warps(self, lanes, what: str, size: int = 32):
        """(warps, 32) numbers of the lanes, all of each warp."""
        numbers = self.lanes[lanes]
        if (np.bincount(numbers // size) % size).any():
            raise Fault(f"{self.k.name}: {what} that not all lanes of a warp reach together")
        return numbers.reshape(-1, size)

    # ---- registers

    def _reader(self, name, dtype):
        """What reads an operand as `dtype` for the lanes; its result may be the register itself."""
        dtype = np.dtype(dtype)
        if name.startswith("%"):
            def register(lanes):
                if name not in self.regs:
                    raise Fault(f"{self.k.name}: {name} is read before it is written")
                return self.regs[name][lanes]

            kind = np.dtype(np.uint32 if name.endswith((".x", ".y", ".z")) else kind_of(name))
            if kind == np.bool_ or dtype == np.bool_:
                return register
            if kind.itemsize == dtype.itemsize:
                return lambda lanes: register(lanes).view(dtype)
            return lambda lanes: register(lanes).astype(f"u{dtype.itemsize}").view(dtype)
        if name in self.k.shared:
            value = self.k.shared[name]
        elif name.startswith("0d"):
            value = np.uint64(int(name[2:], 16)).view(np.float64)
        elif name.startswith("0f"):
            value = np.uint32(int(name[2:], 16)).view(np.float32)
        else:
            value = int(name, 0)
            if dtype.kind in "iu":
                value = np.array([value & (2 ** (8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)[0]
        return lambda lanes: np.full(count(lanes), value, dtype)

    def _readers(self, names, dtype):
        return [self._reader(name, dtype) for name in names]

    def _writer(self, name):
        kind = np.dtype(kind_of(name))

        def write(lanes, value):
            if name not in self.regs:
                self.regs[name] = np.zeros(len(self.lanes), kind)
            if kind != np.bool_ and value.dtype != kind:
                value = (value.astype(f"i{kind.itemsize}").view(kind) if value.dtype.kind == "i"
                         else value.view(f"u{value.itemsize}").astype(kind))
            self.regs[name][lanes] = value
        return write

    # ---- memory

    def _buffers(self, lanes, address, size, what):
        """(buffer, rows of `address` in it), after the checks of an access to global memory."""
        low, high = int(address.min()), int(address.max())
        first = int(np.searchsorted(self.starts, low, "right")) - 1
        if (address % size).any():
            raise Fault(f"{self.k.name}: {what} of {size} bytes is misaligned")
        if first >= 0 and high + size <= self.ends[first]:
            return [(first, slice(None))]
        at = np.searchsorted(self.starts, address, "right") - 1
        bad = (at < 0) | (address + size > self.ends[np.maximum(at, 0)])
        if bad.any():
            a, near, block = int(address[bad][0]), int(max(at[bad][0], 0)), int(self.number[lanes][bad][0])
            raise Fault(f"{self.k.name}, block {block}: {what} of {size} bytes at {a - int(self.starts[near])} of "
                        f"{self.names[near]} ({int(self.ends[near] - self.starts[near])} bytes): out of bounds")
        return [(int(b), at == b) for b in np.unique(at)]

    def _view(self, buffer, dtype):
        """(array of a buffer's whole numbers, address of the first one)."""
        key, size = (buffer, np.dtype(dtype)), np.dtype(dtype).itemsize
        if key not in self.views:
            start = -(-int(self.starts[buffer]) // size) * size
            room = (ctypes.c_uint8 * ((int(self.ends[buffer]) - start) // size * size)).from_address(start)
            self.views[key] = np.ctypeslib.as_array(room).view(dtype), start
        return self.views[key]

    def load_global(self, lanes, address, dtype, n):
        """(lanes,) addresses -> (lanes, n) values."""
        size, out = np.dtype(dtype).itemsize, np.empty((len(address), n), dtype)
        for b, rows in self._buffers(lanes, address, size * n, "load"):
            values, start = self._view(b, dtype)
            out[rows] = values[((address[rows] - start) // size)[:, None] + np.arange(n)]
        return out

    def store_global(self, lanes, address, values):
        n, size, granule = values.shape[1], values.itemsize, self.granules["global"]
        me = self.number[lanes]
        for b, rows in self._buffers(lanes, address, size * n, "store"):
            begin = int(self.starts[b]) // granule
            if self.owner[b] is None:
                self.owner[b] = np.full((2, -(-int(self.ends[b]) // granule) - begin), -1, np.int32)
            owner, last = self.owner[b]
            at = (address[rows] // granule - begin)[:, None] + np.arange(max(size * n // granule, 1))
            mine = me[rows][:, None]
            if ((owner[at] >= 0) & (owner[at] != mine)).any():
                raise Fault(f"{self.k.name}: two blocks store to one address of {self.names[b]}")
            owner[at], order = mine, np.arange(len(at))[:, None]
            last[at] = order
            if (last[at] != order).any():
                raise Fault(f"{self.k.name}: two threads store to one address of {self.names[b]}")
            kept, start = self._view(b, values.dtype)
            kept[((address[rows] - start) // size)[:, None] + np.arange(n)] = values[rows]

    def _granules(self, lanes, address, size, what):
        """(lanes, granules) indices of shared memory, and (lanes, 1) numbers of its users."""
        if ((address < 0) | (address + size > self.shared_bytes)).any() or (address % size).any():
            raise Fault(f"{self.k.name}: a {what} is out of bounds or misaligned")
        granule = self.granules["shared"]
        at = ((address + self.base[lanes]) // granule)[:, None] + np.arange(size // granule)
        return at, self.epoch + self.lanes[lanes][:, None]

    def load_shared(self, lanes, address, dtype, n):
        size = np.dtype(dtype).itemsize
        at, me = self._granules(lanes, address, size * n, "load from shared memory")
        writer, reader = self.writer[at], self.reader[at]
        if (writer < 0).any():
            raise Fault(f"{self.k.name}: shared memory is read before it is written")
        if ((writer >= self.epoch) & (writer != me)).any():
            raise Fault(f"{self.k.name}: race in shared memory, a read of what another thread writes before a barrier")
        several = self.epoch + self.several
        self.reader[at] = np.where((reader >= self.epoch) & (reader != me), several, me)
        more = self.reader[at] != me  # read before by another lane, or now
        self.reader[at[more]] = several
        return self.shared.view(dtype)[((address + self.base[lanes]) // size)[:, None] + np.arange(n)]

    def store_shared(self, lanes, address, values):
        size, n = values.itemsize, values.shape[1]
        at, me = self._granules(lanes, address, size * n, "store to shared memory")
        if self._used(at, self.writer, me) or self._used(at, self.reader, me):
            raise Fault(f"{self.k.name}: race in shared memory, a write to what another thread uses before a barrier")
        if self.busy[at].any():
            raise Fault(f"{self.k.name}: what a wgmma reads changes before it has ended")
        self.writer[at] = me
        if (self.writer[at] != me).any():
            raise Fault(f"{self.k.name}: race in shared memory, two threads write one address")
        self.shared.view(values.dtype)[((address + self.base[lanes]) // size)[:, None] + np.arange(n)] = values

    def _used(self, at, users, me) -> bool:
        """By another thread since the last barrier."""
        return ((users[at] >= self.epoch) & (users[at] != me)).any()


# ---- launching -----------------------------------------------------------------------------------------------------


machine_of = cache(Machine)


def launcher(architecture="compute_90a"):
    """A stand-in for `runtime.cuda._launch` whose tensors lie on the CPU; `conflicts` of a kernel counts the rows of
    `ldmatrix` that meet in a bank of shared memory."""
    def launch(name, dtype, grid, args, threads=None, sizes=None):
        part = sizes or next(part for part, names in cuda.PARTS.items() if name in names)
        module = compiled(cuda.source(dtype, part), architecture)
        arguments, memory = [], {}
        for j, x in enumerate(args):
            if x is None:
                arguments.append(0)
            elif isinstance(x, torch.Tensor):
                start = x.data_ptr()
                arguments.append(start)
                extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
                size = extent * x.element_size()
                if start not in memory or memory[start][1] < size:
                    memory[start] = (start, size, f"argument {j}")
            else:
                arguments.append(x)
        machine = machine_of(module[name], sizes.threads if sizes else threads or cuda.THREADS)
        machine.run(grid, arguments, list(memory.values()), sizes.shared if sizes else 0)
        launch.conflicts[name] = launch.conflicts.get(name, 0) + machine.conflicts

    launch.conflicts = {}
    return launch


@contextmanager
def interpreted(multiprocessors: int = 1):
    """Inside, the CPU is a GPU to `runtime`: its launches go to the interpreter. Skips where no compiler is."""
    if not shutil.which("nvcc") and not nvrtc():
        pytest.skip("needs nvcc or NVRTC (pip install nvidia-cuda-nvrtc)")
    launch = launcher()
    cuda._counters.cache_clear()
    with (mock.patch.multiple(cuda, _launch=launch, _multiprocessors=lambda _: multiprocessors,
                              shared_memory=lambda _: 226 << 10),
          mock.patch.multiple(products, slice_width=lambda *_: 256),
          mock.patch.multiple(checks, ready=lambda _, to, part: part not in checks.ONLY_BF16 or to == torch.bfloat16)):
        yield launch
