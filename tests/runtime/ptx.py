"""Runs a CUDA kernel on a CPU, instruction by instruction, from the PTX that NVIDIA's compiler makes of it.

How it works
------------
The threads of some CUDA blocks are the lanes of numpy arrays, and every step executes the stretch of instructions with
the lowest address among the threads that can run. The machine knows the instructions that this project's kernels
compile to and refuses all others. It takes the block sizes of a GPU, barriers, tensor-core fragments (`mma.sync`,
`wgmma`) and copies in the background (`cp.async`), whose bytes arrive only when the kernel waits for them.

What it checks, as compute-sanitizer does on a GPU
--------------------------------------------------
Every access lies inside the tensor it belongs to and is aligned. Shared memory is written before it is read. No two
threads touch one byte of shared memory between two barriers unless both read, and neither `cp.async` nor a thread
writes what a running `wgmma` reads. All threads that still run meet at the same barrier, and all lanes of a warp at an
`mma`. No address is written by two blocks, unless by atomic operations.

What it does not cover: the step from PTX to machine code, timing, and the order in which a GPU runs blocks.
"""

import ctypes
import itertools
import math
import re
import shutil
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from ptx_reader import Kernel, compiled, nvrtc, operands

from runtime import checks, cuda, products

np.seterr(all="ignore")
ENDED, WAITING = 1 << 62, (1 << 62) - 1  # in place of a thread's next instruction
LANES, SHARED = 1 << 13, 1 << 21  # at most so many threads and bytes of shared memory at a time, if a block fits


class Fault(Exception):  # noqa: N818 - a fault of the kernel that runs
    """What compute-sanitizer would have reported."""


# ---- running -------------------------------------------------------------------------------------------------------


@cache
def kind_of(register):
    return {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "f": np.uint32, "rd": np.uint64, "fd": np.uint64}[
        re.match(r"%([a-z]+)\d", register)[1]]


DTYPE = {"s8": np.int8, "u8": np.uint8, "b8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
         "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64, "u64": np.uint64,
         "b64": np.uint64, "f64": np.float64, "pred": np.bool_}


PAIRS = {"bf16x2": (torch.bfloat16, torch.int16, 16), "e4m3x2": (torch.float8_e4m3fn, torch.uint8, 8)}


def fma(a, b, c):
    """Correctly rounded: the product is exact in fp64, the sum rounded to odd there before it is rounded to fp32."""
    p, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + c64
    t = s - p
    error = (p - (s - t)) + (c64 - t)
    bits = s.view(np.int64)
    odd = (error != 0) & np.isfinite(s) & (bits & 1 == 0)
    away = (error > 0) == (s > 0)
    return np.where(odd, np.where(away, bits + 1, bits - 1), bits).view(np.float64).astype(np.float32)


def saturated(a, b, c):
    """Within 0 and 1."""
    return np.clip(fma(a, b, c), np.float32(0), np.float32(1))


def downwards(a, b, c):
    """Rounded towards minus infinity."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def count(lanes) -> int:
    return lanes.stop - lanes.start if isinstance(lanes, slice) else len(lanes)


class Machine:
    """Runs a kernel in blocks of so many threads. Lanes are a slice, or an array of their numbers."""

    def __init__(self, kernel: Kernel, threads: int):
        if threads % 32:
            raise NotImplementedError("blocks of warps that are not whole")
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

    # ---- instructions

    def _compile(self):
        """program: beginning -> (instructions that lanes run through together, where they end)."""
        self.program, code = {}, self.k.code
        done = [self._guarded(line) for line in code]
        jumps = [re.match(r"(@\S+\s+)?(bra|ret|exit|bar)\b", line) is not None for line in code]
        begins = sorted({0, *self.k.labels.values(), *(i + 1 for i, jump in enumerate(jumps) if jump)})
        for begin, end in itertools.pairwise([*begins, len(code)] if begins[-1] < len(code) else begins):
            self.program[begin] = done[begin:end], end
        self.program[len(code)] = [lambda lanes: self.pc.__setitem__(lanes, ENDED)], len(code)

    def _guarded(self, line):
        guard = None
        if line.startswith("@"):
            guard, line = line.split(None, 1)
        op, _, rest = line.partition(" ")
        op, args = op.rstrip(), operands(rest.strip())
        if op == "bar.sync" and guard:
            raise NotImplementedError(line)
        do = self._instruction(op.split("."), args)
        if guard is None:
            return do
        negate, predicate = guard[1] == "!", self._reader(guard.lstrip("@!"), np.bool_)

        def guarded(lanes):
            p = predicate(lanes) != negate
            if p.all():
                do(lanes)
            elif p.any():
                do(self.lanes[lanes][p])
        return guarded

    def _address(self, text):
        """What reads [register + offset]."""
        base, _, offset = text[1:-1].partition("+")
        if base in self.k.shared:
            address = self.k.shared[base] + int(offset or 0)
            return lambda lanes: np.full(count(lanes), address, np.int64)
        register, offset = self._reader(base, np.uint64 if base.startswith("%rd") else np.uint32), int(offset or 0)
        return lambda lanes: register(lanes).astype(np.int64) + offset

    def _instruction(self, parts, a):
        name = parts[0]
        special = {"mma": self._mma, "cp": self._copy, "shfl": self._shuffle, "ldmatrix": self._ldmatrix,
                   "wgmma": self._wgmma, "atom": self._atom, "ld": self._load, "st": self._store, "cvt": self._convert}
        if name in special:
            return special[name](parts, a)
        if name == "bar":
            def wait(lanes):
                self.resume[lanes], self.pc[lanes] = self.pc[lanes], WAITING
            return wait
        if name == "bra":
            target = self.k.labels[a[0]]
            return lambda lanes: self.pc.__setitem__(lanes, target)
        if name in ("ret", "exit"):
            return lambda lanes: self.pc.__setitem__(lanes, ENDED)
        if name in ("membar", "fence"):
            return lambda lanes: None  # a step ends before the next one begins
        write = self._writer(a[0])
        if name in ("mov", "cvta") and a[1].startswith("<"):  # two halves into one, the first one below
            T = np.dtype(DTYPE[parts[-1]])
            halves = self._readers([r.strip() for r in a[1][1:-1].split(",")], f"u{T.itemsize // 2}")
            return lambda lanes: write(lanes, np.stack([half(lanes) for half in halves], 1).view(T)[:, 0])
        if name == "selp":
            chosen, yes, no = self._reader(a[3], np.bool_), *self._readers(a[1:3], DTYPE[parts[-1]])
            return lambda lanes: write(lanes, np.where(chosen(lanes), yes(lanes), no(lanes)))
        of, f = self._function(name, parts, a)
        read = [self._reader(r, T) for r, T in zip(a[1:], of, strict=False)]
        if len(read) == 1:
            return lambda lanes: write(lanes, f(read[0](lanes)))
        if len(read) == 2:
            return lambda lanes: write(lanes, f(read[0](lanes), read[1](lanes)))
        return lambda lanes: write(lanes, f(*(r(lanes) for r in read)))

    def _function(self, name, parts, a):
        """(types of the operands, the function of them) of an instruction that acts on each lane by itself."""
        if name in ("prmt", "lop3", "bfe", "bfi"):
            return [np.uint32] * 4, self._bits(name, parts, a)
        T = DTYPE.get(parts[-1], np.uint64)
        kind, bits, wide = np.dtype(T).kind, 8 * np.dtype(T).itemsize, np.int64 if np.int32 == T else np.uint64
        if name in ("mov", "cvta"):
            return [T], lambda x: x
        if name == "setp":
            if parts[1] == "ne" and np.float32 == T:
                raise NotImplementedError("ordered ne")
            return [T, T], {
                "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
                "ne": np.not_equal, "nan": lambda x, y: np.isnan(x) | np.isnan(y), "neu": np.not_equal,
                "ltu": lambda x, y: ~(x >= y), "gtu": lambda x, y: ~(x <= y), "leu": lambda x, y: ~(x > y),
                "geu": lambda x, y: ~(x < y), "equ": lambda x, y: ~(x < y) & ~(x > y)}[parts[1]]
        if name in ("mul", "mad") and parts[1] == "wide":
            return [T, T, wide], lambda x, y, z=0: x.astype(wide) * y.astype(wide) + wide(0) + z
        if name == "mul" and parts[1] == "hi":
            return [T, T], lambda x, y: (x.astype(wide) * y.astype(wide) >> wide(32)).astype(T)
        if name in ("div", "rem") and kind in "iu":
            whole = (lambda x, y: np.trunc(x / y)) if name == "div" else np.fmod
            return [T, T], lambda x, y: whole(x.astype(np.float64), y).astype(T)
        if name in ("fma", "mad"):
            if "sat" in parts or "rm" in parts:  # of expf, which scales its argument so
                return [T, T, T], saturated if "sat" in parts else downwards
            return [T, T, T], fma if np.float32 == T else lambda x, y, z: x * y + z
        if name in ("shl", "shr"):
            most = bits - 1 if name == "shr" and kind == "i" else bits

            def shift(x, n):
                n = np.minimum(n, most).astype(T)
                inside = np.minimum(n, T(bits - 1))
                return np.where(n >= bits, T(0), x << inside if name == "shl" else x >> inside)
            return [T, np.uint32], shift
        if name in ("ex2", "rsqrt") and "approx" in parts:  # rounded here; a GPU may be one or two units off
            f = np.exp2 if name == "ex2" else lambda x: 1 / np.sqrt(x)
            return [T], lambda x: f(x.astype(np.float64)).astype(T)
        one = {"not": np.invert, "neg": np.negative, "abs": np.abs, "rcp": lambda x: np.float32(1) / x}.get(name)
        if one and "approx" not in parts:
            return [T], one
        two = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "and": np.bitwise_and,
               "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.fmin if kind == "f" else np.minimum,
               "max": np.fmax if kind == "f" else np.maximum}.get(name)
        if two is None or (name == "div" and "rn" not in parts) or "ftz" in parts or "approx" in parts:
            raise NotImplementedError(".".join(parts))
        return [T, T], two

    def _bits(self, name, parts, a):
        if name == "prmt":
            def prmt(x, y, s, _=None):
                x, y, s = (v.astype(np.uint64) for v in (x, y, s))
                pool, out = x | y << np.uint64(32), np.zeros(len(x), np.uint64)
                for j in range(4):
                    sel = s >> np.uint64(4 * j) & np.uint64(15)
                    byte = pool >> np.uint64(8) * (sel & np.uint64(7)) & np.uint64(255)
                    sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
                    byte = np.where(sel & np.uint64(8), sign, byte)
                    out |= byte << np.uint64(8 * j)
                return out.astype(np.uint32)
            return prmt
        if name == "lop3":
            table = int(a[4], 0)

            def lop3(x, y, z, _):
                out = np.zeros(len(x), np.uint32)
                for j in range(8):
                    if table >> j & 1:
                        out |= (x if j & 4 else ~x) & (y if j & 2 else ~y) & (z if j & 1 else ~z)
                return out
            return lop3
        if name == "bfe":
            def bfe(x, at, n):
                x, at, n = (v.astype(np.uint64) for v in (x, at, n))
                mask = (np.uint64(1) << n) - np.uint64(1)
                out = x >> at & mask
                if parts[-1] == "s32":
                    out = np.where(out >> (n - np.uint64(1)) & np.uint64(1), out | ~mask, out)
                return out.astype(np.uint32)
            return bfe

        def bfi(x, y, at, n):
            x, y, at, n = (v.astype(np.uint64) for v in (x, y, at, n))
            mask = ((np.uint64(1) << n) - np.uint64(1)) << at
            return (y & ~mask | x << at & mask).astype(np.uint32)
        return bfi

    def _load(self, parts, a):
        T, space = DTYPE[parts[-1]], parts[1]
        registers = [r.strip() for r in a[0][1:-1].split(",")] if a[0].startswith("<") else [a[0]]
        write = [self._writer(r) for r in registers]
        if space == "param":
            i = self.k.params.index(a[1][1:-1].partition("+")[0])
            return lambda lanes: write[0](lanes, np.array(self.arguments[i], T))
        address, get = self._address(a[1]), self.load_global if space == "global" else self.load_shared

        def load(lanes):
            values = get(lanes, address(lanes), T, len(registers))
            for j, one in enumerate(write):
                one(lanes, values[:, j])
        return load

    def _store(self, parts, a):
        address, put = self._address(a[0]), self.store_global if parts[1] == "global" else self.store_shared
        read = self._readers([r.strip() for r in a[1].strip("<>").split(",")], DTYPE[parts[-1]])
        return lambda lanes: put(lanes, address(lanes), np.stack([r(lanes) for r in read], 1))

    def _convert(self, parts, a):
        write = self._writer(a[0])
        if parts[-2] in PAIRS:
            # two numbers into one register, the first one above; to nearest, as PyTorch rounds
            (kind, whole, shift), read = PAIRS[parts[-2]], self._readers(a[1:3], np.float32)

            def pair(lanes):
                high, low = (torch.from_numpy(r(lanes)).to(kind).view(whole).numpy().astype(np.int64) for r in read)
                write(lanes, ((high << shift) | (low & (1 << shift) - 1)).astype(f"u{shift // 4}"))
            return pair
        to, of = np.dtype(DTYPE[parts[-2]]), np.dtype(DTYPE[parts[-1]])
        read = self._reader(a[1], of)

        def convert(lanes):
            x = read(lanes)
            if of.kind == to.kind == "f":
                y = np.rint(x) if "rni" in parts else x
                y = (np.clip(y, 0, 1) if "sat" in parts else y).astype(to)
            elif of.kind == "f":
                y = np.trunc(x) if "rzi" in parts else np.rint(x)
                info = np.iinfo(to)
                y = np.where(np.isnan(x), 0, np.clip(y.astype(np.float64), info.min, info.max)).astype(to)
            else:
                y = x.astype(to)
            write(lanes, y)
        return convert

    def _mma(self, parts, a):
        """mma.sync.aligned.row.col, m16n8k32.s32.s8.s8.s32 or m16n8k16.f32.bf16.bf16.f32: fragments by the PTX manual
        (9.7.14.5). A register has 4 bytes of neighbouring columns of A or rows of B, as many numbers as they are."""
        D, A, B, C = ([r.strip() for r in v[1:-1].split(",")] for v in a)
        small = parts[-2] == "s8"
        T, K, n = (np.int32, 32, 4) if small else (np.float32, 16, 2)
        A, B, C = self._readers(A, np.uint32), self._readers(B, np.uint32), self._readers(C, T)
        write = [self._writer(r) for r in D]
        group, four, next_to = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4, np.arange(n)
        sums_at = [(group[:, 0] + 8 * (i // 2), 2 * four[:, 0] + i % 2) for i in range(4)]

        def numbers(bits):  # (warps * 32,) -> (warps, 32, n); products of integers are exact in fp32
            if small:
                return bits.copy().view(np.int8).reshape(-1, 32, 4)
            return (bits.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, 32, 2)

        def mma(lanes):
            W = len(self._warps(lanes, "an mma"))
            left, right, sums = (np.zeros((W, *shape), np.float32) for shape in ((16, K), (K, 8), (16, 8)))
            for i, register in enumerate(A):
                left[:, group + 8 * (i % 2), n * four + next_to + K // 2 * (i // 2)] = numbers(register(lanes))
            for i, register in enumerate(B):
                right[:, n * four + next_to + K // 2 * i, group] = numbers(register(lanes))
            sums = sums.astype(T)
            for (row, column), register in zip(sums_at, C, strict=True):
                sums[:, row, column] = register(lanes).reshape(W, 32)
            sums += (left @ right).astype(T)
            for (row, column), one in zip(sums_at, write, strict=True):
                one(lanes, sums[:, row, column].ravel())
        return mma

    def _copy(self, parts, a):
        """cp.async of 16 bytes, or of none and 16 zeros: read now, written when the kernel has waited for its group."""
        if parts[2] in ("commit_group", "wait_group"):
            def group(lanes):
                threads = np.bincount(self.block[lanes], minlength=len(self.committed))
                if (threads % self.T).any():
                    raise NotImplementedError("cp.async groups of some threads only")
                if parts[2] == "commit_group":
                    self.committed += threads > 0
                    return
                later = []
                for group, by, *copy in self.copies:
                    ended = (threads[self.block[by]] > 0) & (group < self.committed[self.block[by]] - int(a[0]))
                    if ended.any():
                        self.store_shared(by[ended], *(values[ended] for values in copy))
                    if not ended.all():
                        later.append(tuple(values[~ended] for values in (group, by, *copy)))
                self.copies = later
            return group
        to, of, size = *map(self._address, a[:2]), self._reader(a[3], np.uint32)

        def copy(lanes):
            numbers, target, there = self.lanes[lanes], to(lanes), size(lanes) == 16
            values = np.zeros((len(numbers), 4), np.uint32)
            if there.any():
                values[there] = self.load_global(numbers[there], of(lanes)[there], np.uint32, 4)
            at, me = self._granules(lanes, target, 16, "cp.async to shared memory")
            if self.busy[at].any() or self._used(at, self.reader, me):
                raise Fault(f"{self.k.name}: race in shared memory, a cp.async to what is still read")
            self.copies.append((self.committed[self.block[lanes]], numbers, target, values))
        return copy

    def _shuffle(self, parts, a):
        """shfl.sync.bfly.b32 by whole warps: a lane receives the value of the one whose number differs by a mask."""
        if parts[2] != "bfly":
            raise NotImplementedError(".".join(parts))
        write, (value, mask) = self._writer(a[0].split("|")[0]), self._readers(a[1:3], np.uint32)

        def shuffle(lanes):
            numbers = self._warps(lanes, "a shuffle").ravel()
            every = np.zeros(len(self.lanes), np.uint32)
            every[lanes] = value(lanes)
            write(lanes, every[numbers ^ mask(lanes)])
        return shuffle

    def _ldmatrix(self, parts, a):
        """ldmatrix.x4: lane 8 i + r names row r of matrix i; lane 4 g + t receives word t of row g of each, or with
        trans the halves of rows 2 t and 2 t + 1 in column g."""
        write, address = [self._writer(r.strip()) for r in a[0][1:-1].split(",")], self._address(a[1])

        def ldmatrix(lanes):
            W, at = len(self._warps(lanes, "an ldmatrix")), address(lanes)
            matrices = self.load_shared(lanes, at, np.uint32, 4).reshape(W, 4, 8, 4)
            banks = np.sort(at.reshape(-1, 8) // 16 % 8, axis=1)
            self.conflicts += int((np.diff(banks, axis=1) == 0).sum())
            if "trans" in parts:
                halves = matrices.view(np.uint16).reshape(W, 4, 8, 8).swapaxes(2, 3)
                matrices = np.ascontiguousarray(halves).view(np.uint32)
            for i, one in enumerate(write):
                one(lanes, matrices[:, i].ravel())
        return ldmatrix

    def _atom(self, parts, a):
        """atom.global.add.u32, lane by lane."""
        write, address, value = self._writer(a[0]), self._address(a[1]), self._reader(a[2], np.uint32)
        if parts[1:] not in (["global", "add", "u32"], ["global", "gpu", "add", "u32"]):
            raise NotImplementedError(".".join(parts))

        def atom(lanes):
            for lane in self.lanes[lanes][:, None]:
                where = address(lane)
                ((buffer, _),) = self._buffers(lane, where, 4, "atom")
                kept, start = self._view(buffer, np.uint32)
                at = (where - start) // 4
                old = kept[at]
                kept[at] += value(lane)
                write(lane, old)
        return atom

    def _wgmma(self, parts, a):
        """wgmma.mma_async.m64nNk32.s32.s8.s8 with A in registers and B in shared memory, 128-byte swizzle, K-major.

        It reads at once and delivers at wgmma.wait_group 0, until when nothing that it reads may change.
        """
        if parts[1] in ("fence", "commit_group"):
            return lambda lanes: None
        if parts[1] == "wait_group":
            if a[0] != "0":
                raise NotImplementedError("wgmma.wait_group of some groups only")

            def wait(lanes):
                there, running = set(self.lanes[lanes].tolist()), []
                for product in self.products:
                    own, _, now, then, write, sums, at = product
                    if own.start not in there:
                        running.append(product)
                        continue
                    if any((register(own) != value).any() for register, value in zip(now, then, strict=True)):
                        raise Fault(f"{self.k.name}: what a wgmma reads changes before it has ended")
                    for one, value in zip(write, sums, strict=True):
                        one(own, value)
                    self.busy[at] -= 1
                self.products = running
            return wait
        D, A = ([r.strip() for r in v[1:-1].split(",")] for v in a[:2])
        n = int(re.search(r"m64n(\d+)k32", ".".join(parts))[1])
        if len(D) != n // 2 or a[3] != "1" or parts[-3:] != ["s32", "s8", "s8"]:
            raise NotImplementedError(".".join(parts))
        write, before, registers = [self._writer(r) for r in D], self._readers(D, np.int32), self._readers(A, np.uint32)
        descriptor, granule, lane = self._reader(a[2], np.uint64), self.granules["shared"], np.arange(128)
        warp, g, t = lane // 32, lane % 32 // 4, lane % 4
        of_A, i = np.arange(4)[:, None, None], np.arange(len(D))[:, None]  # (register, lane, byte)
        rows = 16 * warp[:, None] + g[:, None] + 8 * (of_A % 2), 4 * t[:, None] + np.arange(4) + 16 * (of_A // 2)
        sums_at = 16 * warp + g + 8 * (i // 2 % 2), i // 4 * 8 + 2 * t + i % 2

        def mma(lanes):
            for numbers in self._warps(lanes, "a wgmma", 128):
                own, left = slice(int(numbers[0]), int(numbers[0]) + 128), np.zeros((64, 32), np.float32)
                values = [register(own).copy() for register in registers]
                left[rows] = np.stack(values)[:, :, None].view(np.int8)
                every = descriptor(own)
                d = int(every[0])
                if (every != every[0]).any() or d >> 62 != 1 or d >> 49 & 7 or d >> 32 & 0x3FFF != 64:
                    raise NotImplementedError(f"wgmma with the descriptor {d:x}")
                row, k = np.arange(n)[:, None], np.arange(32)
                at = ((d & 0x3FFF) << 4) + row // 8 * 1024 + row % 8 * 128 + k
                at = (at ^ (at >> 7 & 7) << 4) + int(self.base[own.start])  # the swizzle
                there = at[:, ::granule] // granule
                if (self.writer[there] < 0).any() or (self.writer[there] >= self.epoch).any():
                    raise Fault(f"{self.k.name}: a wgmma reads what was not written before the last barrier")
                product = (left @ self.shared[at].view(np.int8).astype(np.float32).T).astype(np.int32)  # exact in fp32
                # of products that follow each other into the same registers each goes on from the one before
                last = next((p[5] for p in reversed(self.products) if p[:2] == (own, D)), None)
                last = np.stack([register(own) for register in before]) if last is None else last
                self.products.append((own, D, registers, values, write, last + product[sums_at], there))
                self.busy[there] += 1
        return mma


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
    with (mock.patch.multiple(cuda, _launch=launch, _multiprocessors=lambda _: multiprocessors),
          mock.patch.multiple(products, slice_width=lambda *_: 256),
          mock.patch.multiple(checks, ready=lambda _, to, part: part not in checks.ONLY_BF16 or to == torch.bfloat16)):
        yield launch
