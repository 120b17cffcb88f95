"""Runs a CUDA kernel on a CPU, instruction by instruction, from the PTX that NVIDIA's compiler makes of it.

How it works
------------
One CUDA block runs at a time. Its threads are the lanes of numpy arrays, and every step executes the instruction with
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
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from runtime import cuda

np.seterr(all="ignore")
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
MAX = 1 << 62


def nvrtc() -> list:
    """The NVRTC libraries that PyTorch's CUDA builds bring."""
    found = (path for folder in map(Path, sys.path) for path in folder.glob("nvidia/*/lib/libnvrtc.so.*"))
    return [path for path in found if "alt" not in path.name]


def compile_ptx(source: str, architecture="compute_90a") -> str:
    """PTX by NVRTC, or by nvcc."""
    found = nvrtc()
    if not found:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernels.cu"
            file.write_text(source)
            subprocess.run(["nvcc", f"-arch={architecture}", "-ptx", "-o", f"{folder}/out.ptx", str(file)], check=True)
            return Path(f"{folder}/out.ptx").read_text()
    lib, program = ctypes.CDLL(str(found[0])), ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    status, size = lib.nvrtcCompileProgram(program, 1, options), ctypes.c_size_t()
    if status:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    lib.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetPTX(program, text)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return text.value.decode()


class Fault(Exception):  # noqa: N818 - a fault of the kernel that runs
    """What compute-sanitizer would have reported."""


# ---- parsing -------------------------------------------------------------------------------------------------------


class Kernel:
    """One kernel: its parameters, its code by line, its labels, and where its shared variables lie.

    `extern __shared__` memory begins behind the others and is as large as the launch asks for.
    """

    def __init__(self, name, params, body):
        self.name, self.params, self.shared, self.shared_bytes = name, params, {}, 0
        self.code, self.labels = [], {}
        for line in body:
            line = line.split("//")[0].strip()
            if not line or line in "{}":
                continue
            if m := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\S+?)\[(\d+)\];", line):
                align = int(m[1])
                self.shared_bytes = -(-self.shared_bytes // align) * align
                self.shared[m[2]] = self.shared_bytes
                self.shared_bytes += int(m[3])
            elif m := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.[bus](\d+)\s+(\w+);", line):
                align = int(m[1])
                self.shared_bytes = -(-self.shared_bytes // align) * align
                self.shared[m[3]] = self.shared_bytes
                self.shared_bytes += int(m[2]) // 8
            elif line.startswith("."):
                continue
            elif line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            else:
                self.code.append(line.rstrip(";"))
        self.dynamic = self.shared["tiles"] = -(-self.shared_bytes // 128) * 128


def parse(ptx: str) -> dict:
    """Kernels of a module by name."""
    kernels = {}
    ptx = re.sub(r"\{([^{}\n]*)\}", lambda m: "<" + m[1] + ">", ptx)  # vectors are not blocks
    for m in re.finditer(r"\.entry\s+(\w+)\(\s*(.*?)\)\s*(?:\.\w+[^{\n]*\n)*\s*\{\n(.*?)\n\}\n", ptx, re.S):
        params = [p.split()[-1] for p in m[2].split(",") if p.strip()]
        body = re.sub(r"\n\s*(mma[^;]*);", lambda x: "\n" + " ".join(x[1].split()) + ";", m[3])
        kernels[m[1]] = Kernel(m[1], params, body.split("\n"))
    return kernels


# ---- running -------------------------------------------------------------------------------------------------------


def operands(text):
    out, depth, now = [], 0, ""
    for ch in text:
        depth += ch in "<[" or 0
        depth -= ch in ">]" or 0
        if ch == "," and not depth:
            out.append(now.strip())
            now = ""
        else:
            now += ch
    return [*out, now.strip()] if now.strip() else out


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


class Machine:
    """One launch. memory: list of (address, bytes as a numpy uint8 view, name)."""

    def __init__(self, kernel: Kernel, grid, threads, arguments, memory, dynamic: int = 0):
        self.k, self.grid, self.T, self.arguments = kernel, (*grid, 1, 1)[:3], threads, arguments
        self.shared_bytes = kernel.dynamic + dynamic
        memory = sorted(memory, key=lambda m: m[0])
        self.starts = np.array([m[0] for m in memory], dtype=np.int64)
        self.ends = np.array([m[0] + len(m[1]) for m in memory], dtype=np.int64)
        self.buffers, self.names = [m[1] for m in memory], [m[2] for m in memory]
        self.owner = [None] * len(memory)  # block that wrote each byte, allocated at the first store
        self.program = [self._compile(i, line) for i, line in enumerate(kernel.code)]
        self.steps = self.conflicts = 0

    def run(self):
        gx, gy, gz = self.grid
        for z, y, x in itertools.product(range(gz), range(gy), range(gx)):
            self._block(x, y, z)

    def _block(self, x, y, z):
        T, k = self.T, self.k
        self.block, self.tid = (x, y, z), np.arange(T, dtype=np.uint32)
        self.copies, self.products = [[]], []  # groups of cp.async, wgmma that run
        self.regs = {}
        self.shared = np.zeros(max(self.shared_bytes, 1), np.uint8)
        n = len(self.shared)
        self.written = np.zeros(n, bool)
        self.w_epoch, self.w_lane = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        self.r_epoch, self.r_lane = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        self.epoch, self.pc = 0, np.zeros(T, np.int64)
        waiting = np.zeros(T, bool)
        self.here = None
        end = len(self.program)
        while True:
            pc = np.where(waiting, MAX, self.pc)
            now = int(pc.min())
            if now >= end:
                if not waiting.any():
                    return
                at = np.unique(self.pc[waiting])
                if len(at) > 1:
                    raise Fault(f"{k.name}, block {self.block}: threads wait at different barriers")
                waiting[:] = False
                self.epoch += 1
                continue
            lanes = np.flatnonzero(pc == now)
            self.steps += 1
            do = self.program[now]
            if do == "bar":
                waiting[lanes] = True
                self.pc[lanes] += 1
                continue
            self.pc[lanes] += 1
            do(lanes)

    # ---- registers

    def get(self, name, lanes, dtype):
        """An operand as `dtype` for the lanes."""
        if name.startswith("%"):
            special = {"%tid.x": self.tid, "%ntid.x": self.T} | {
                f"%{what}.{axis}": size for what, sizes in (("ctaid", self.block), ("nctaid", self.grid))
                for axis, size in zip("xyz", sizes, strict=True)}
            special = special.get(name)
            if special is not None:
                return (special[lanes] if isinstance(special, np.ndarray)
                        else np.full(len(lanes), special, np.uint32)).astype(dtype)
            if name not in self.regs:
                raise Fault(f"{self.k.name}: {name} is read before it is written")
            raw = self.regs[name][lanes]
            if raw.dtype == np.bool_ or dtype == np.bool_:
                return raw
            size = np.dtype(dtype).itemsize
            return raw.view(dtype) if raw.itemsize == size else raw.astype(f"u{size}").view(dtype)
        if name in self.k.shared:
            value = self.k.shared[name]
        elif name.startswith("0d"):
            value = np.uint64(int(name[2:], 16)).view(np.float64)
        elif name.startswith("0f"):
            value = np.uint32(int(name[2:], 16)).view(np.float32)
        else:
            value = int(name, 0)
            if np.dtype(dtype).kind in "iu":
                bits = 8 * np.dtype(dtype).itemsize
                value = np.array([value & (2**bits - 1)], f"u{bits // 8}").view(dtype)[0]
        return np.full(len(lanes), value, dtype)

    def put(self, name, lanes, value):
        kind = kind_of(name)
        if name not in self.regs:
            self.regs[name] = np.zeros(self.T, kind)
        if kind != np.bool_:
            size = np.dtype(kind).itemsize
            value = np.ascontiguousarray(value)
            value = (value.view(f"u{value.itemsize}").astype(kind) if value.itemsize <= size and value.dtype.kind != "i"
                     else value.astype(f"i{size}").view(kind) if value.dtype.kind == "i"
                     else value.view(f"u{value.itemsize}").astype(kind))
        self.regs[name][lanes] = value

    # ---- memory

    def _check_global(self, address, size, what):
        at = np.searchsorted(self.starts, address, "right") - 1
        bad = (at < 0) | (address + size > self.ends[np.maximum(at, 0)])
        if bad.any():
            a = int(address[bad][0])
            near = int(max(at[bad][0], 0))
            raise Fault(f"{self.k.name}, block {self.block}: {what} of {size} bytes at {a - int(self.starts[near])} of "
                        f"{self.names[near]} ({int(self.ends[near] - self.starts[near])} bytes): out of bounds")
        if (address % size).any():
            raise Fault(f"{self.k.name}, block {self.block}: {what} of {size} bytes is misaligned")
        return at

    def load_global(self, address, dtype, n):
        """(lanes,) addresses -> (lanes, n) values."""
        size = np.dtype(dtype).itemsize * n
        at = self._check_global(address, size, "load")
        out = np.empty((len(address), n), dtype)
        for b in np.unique(at):
            rows = at == b
            offset = (address[rows] - self.starts[b])[:, None] + np.arange(size)
            out[rows] = self.buffers[b][offset].view(dtype)
        return out

    def store_global(self, address, values):
        size = values.itemsize * values.shape[1]
        at = self._check_global(address, size, "store")
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(address), size)
        (x, y, z), (gx, gy, _) = self.block, self.grid
        me = (z * gy + y) * gx + x
        for b in np.unique(at):
            rows = at == b
            offset = (address[rows] - self.starts[b])[:, None] + np.arange(size)
            if self.owner[b] is None:
                self.owner[b] = np.full(len(self.buffers[b]), -1, np.int32)
            if len(np.unique(offset)) != offset.size:
                raise Fault(f"{self.k.name}, block {self.block}: two threads store to one address of {self.names[b]}")
            other = self.owner[b][offset]
            if ((other >= 0) & (other != me)).any():
                raise Fault(f"{self.k.name}: two blocks store to one address of {self.names[b]}")
            self.owner[b][offset] = me
            self.buffers[b][offset] = raw[rows]

    def load_shared(self, lanes, address, dtype, n):
        size = np.dtype(dtype).itemsize * n
        if ((address < 0) | (address + size > len(self.shared))).any() or (address % size).any():
            raise Fault(f"{self.k.name}: a load from shared memory is out of bounds or misaligned")
        at = address[:, None] + np.arange(size)
        if not self.written[at].all():
            raise Fault(f"{self.k.name}: shared memory is read before it is written")
        if ((self.w_epoch[at] == self.epoch) & (self.w_lane[at] != lanes[:, None])).any():
            raise Fault(f"{self.k.name}: race in shared memory, a read of what another thread writes before a barrier")
        mixed = (self.r_epoch[at] == self.epoch) & (self.r_lane[at] != lanes[:, None])
        self.r_epoch[at] = self.epoch
        self.r_lane[at] = np.where(mixed, -2, lanes[:, None])
        flat = np.unique(at)  # several lanes at one byte
        if len(flat) != at.size:
            counts = np.bincount(np.searchsorted(flat, at.ravel()), minlength=len(flat))
            self.r_lane[flat[counts > 1]] = -2
        return self.shared[at].view(dtype)

    def store_shared(self, lanes, address, values):
        size = values.itemsize * values.shape[1]
        if ((address < 0) | (address + size > len(self.shared))).any() or (address % size).any():
            raise Fault(f"{self.k.name}: a store to shared memory is out of bounds or misaligned")
        at = address[:, None] + np.arange(size)
        if len(np.unique(at)) != at.size:
            raise Fault(f"{self.k.name}: race in shared memory, two threads write one address")
        if ((self.w_epoch[at] == self.epoch) & (self.w_lane[at] != lanes[:, None])).any() or (
                (self.r_epoch[at] == self.epoch) & (self.r_lane[at] != lanes[:, None])).any():
            raise Fault(f"{self.k.name}: race in shared memory, a write to what another thread uses before a barrier")
        self.w_epoch[at], self.w_lane[at], self.written[at] = self.epoch, lanes[:, None], True
        self.shared[at] = np.ascontiguousarray(values).view(np.uint8).reshape(len(address), size)

    # ---- instructions

    def _compile(self, i, line):
        guard = None
        if line.startswith("@"):
            guard, line = line.split(None, 1)
        op, _, rest = line.partition(" ")
        op, args = op.rstrip(), operands(rest.strip())
        parts = op.split(".")
        if op == "bar.sync":
            if guard:
                raise NotImplementedError(line)
            return "bar"
        do = self._instruction(parts, args)
        if guard is None:
            return do
        negate, name = guard[1] == "!", guard.lstrip("@!")

        def guarded(lanes):
            p = self.get(name, lanes, np.bool_)
            lanes = lanes[p != negate]
            if len(lanes):
                do(lanes)
        return guarded

    def _address(self, text):
        base, _, offset = text[1:-1].partition("+")
        return base, int(offset or 0)

    def _instruction(self, parts, a):
        name, get, put = parts[0], self.get, self.put
        if name == "bra":
            target = self.k.labels[a[0]]
            return lambda lanes: self.pc.__setitem__(lanes, target)
        if name in ("ret", "exit"):
            return lambda lanes: self.pc.__setitem__(lanes, MAX)
        if name == "ld" and parts[1] == "param":
            base, _ = self._address(a[1])
            value, T = self.arguments[self.k.params.index(base)], DTYPE[parts[-1]]
            return lambda lanes: put(a[0], lanes, np.full(len(lanes), value, T))
        if name in ("ld", "st"):
            T, space = DTYPE[parts[-1]], parts[1]
            memory, vector = (a[1], a[0]) if name == "ld" else (a[0], a[1])
            base, offset = self._address(memory)
            regs = [r.strip() for r in vector[1:-1].split(",")] if vector.startswith("<") else [vector]

            def address(lanes):
                if base in self.k.shared:
                    return np.full(len(lanes), self.k.shared[base] + offset, np.int64)
                kind = np.uint64 if base.startswith("%rd") else np.uint32
                return get(base, lanes, kind).astype(np.int64) + offset

            if name == "ld":
                def load(lanes):
                    values = (self.load_global(address(lanes), T, len(regs)) if space == "global"
                              else self.load_shared(lanes, address(lanes), T, len(regs)))
                    for j, r in enumerate(regs):
                        put(r, lanes, values[:, j])
                return load

            def store(lanes):
                values = np.stack([get(r, lanes, T) if np.dtype(T).itemsize > 1 or not r.startswith("%")
                                   else self.regs[r][lanes].astype(np.uint8) for r in regs], 1)
                if space == "global":
                    self.store_global(address(lanes), values)
                else:
                    self.store_shared(lanes, address(lanes), values)
            return store
        if name == "mma":
            return self._mma(parts, a)
        if name == "cp":
            return self._copy(parts, a)
        if name == "shfl":
            return self._shuffle(parts, a)
        if name == "ldmatrix":
            return self._ldmatrix(parts, a)
        if name == "wgmma":
            return self._wgmma(parts, a)
        if name == "atom":
            return self._atom(a)
        if name in ("membar", "fence"):
            return lambda lanes: None  # blocks run one after another
        if name in ("mov", "cvta"):
            T = DTYPE.get(parts[-1], np.uint64)
            if a[1].startswith("<"):  # two halves into one, the first one below

                def join(lanes):
                    low, high = (get(r.strip(), lanes, f"u{np.dtype(T).itemsize // 2}") for r in a[1][1:-1].split(","))
                    put(a[0], lanes, np.stack([low, high], 1).view(T)[:, 0])
                return join
            return lambda lanes: put(a[0], lanes, get(a[1], lanes, T))
        if name == "setp":
            T = DTYPE[parts[-1]]
            test = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
                    "ne": np.not_equal, "nan": lambda x, y: np.isnan(x) | np.isnan(y), "neu": np.not_equal,
                    "ltu": lambda x, y: ~(x >= y), "gtu": lambda x, y: ~(x <= y), "leu": lambda x, y: ~(x > y),
                    "geu": lambda x, y: ~(x < y), "equ": lambda x, y: ~(x < y) & ~(x > y)}[parts[1]]
            if parts[1] == "ne" and np.float32 == T:
                raise NotImplementedError("ordered ne")
            return lambda lanes: put(a[0], lanes, test(get(a[1], lanes, T), get(a[2], lanes, T)))
        if name == "selp":
            T = DTYPE[parts[-1]]
            return lambda lanes: put(a[0], lanes, np.where(get(a[3], lanes, np.bool_), get(a[1], lanes, T),
                                                           get(a[2], lanes, T)))
        if name == "cvt":
            return self._convert(parts, a)
        if name == "prmt":
            def prmt(lanes):
                x, y, s = (get(r, lanes, np.uint32).astype(np.uint64) for r in a[1:4])
                pool, out = x | y << np.uint64(32), np.zeros(len(lanes), np.uint64)
                for j in range(4):
                    sel = s >> np.uint64(4 * j) & np.uint64(15)
                    byte = pool >> np.uint64(8) * (sel & np.uint64(7)) & np.uint64(255)
                    sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
                    byte = np.where(sel & np.uint64(8), sign, byte)
                    out |= byte << np.uint64(8 * j)
                put(a[0], lanes, out.astype(np.uint32))
            return prmt
        if name in ("bfe", "bfi", "lop3"):
            return self._bits(name, parts, a)
        T = DTYPE[parts[-1]]
        bits = 8 * np.dtype(T).itemsize
        if name == "mul" and parts[1] == "wide":
            wide = np.int64 if np.int32 == T else np.uint64
            return lambda lanes: put(a[0], lanes, get(a[1], lanes, T).astype(wide) * get(a[2], lanes, T).astype(wide))
        if name == "mad" and parts[1] == "wide":
            wide = np.int64 if np.int32 == T else np.uint64
            return lambda lanes: put(a[0], lanes, get(a[1], lanes, T).astype(wide) * get(a[2], lanes, T).astype(wide)
                                     + get(a[3], lanes, wide))
        if name == "mul" and parts[1] == "hi":
            wide = np.int64 if np.int32 == T else np.uint64
            return lambda lanes: put(a[0], lanes, (get(a[1], lanes, T).astype(wide) * get(a[2], lanes, T).astype(wide)
                                                   >> wide(32)).astype(T))
        if name in ("div", "rem") and np.dtype(T).kind in "iu":
            whole = (lambda x, y: np.trunc(x / y)) if name == "div" else np.fmod
            return lambda lanes: put(a[0], lanes, whole(get(a[1], lanes, T).astype(np.float64),
                                                        get(a[2], lanes, T)).astype(T))
        if name in ("fma", "mad"):
            f = fma if np.float32 == T else lambda x, y, z: x * y + z
            if "sat" in parts or "rm" in parts:  # of expf, which scales its argument so
                f = saturated if "sat" in parts else downwards
            return lambda lanes: put(a[0], lanes, f(*(get(r, lanes, T) for r in a[1:4])))
        if name in ("shl", "shr"):
            def shift(lanes):
                x, n = get(a[1], lanes, T), get(a[2], lanes, np.uint32)
                n = np.minimum(n, bits - 1 if name == "shr" and np.dtype(T).kind == "i" else bits).astype(T)
                done = x << np.minimum(n, bits - 1) if name == "shl" else x >> np.minimum(n, bits - 1)
                put(a[0], lanes, np.where(n >= bits, 0, done).astype(T))
            return shift
        if name in ("ex2", "rsqrt") and "approx" in parts:  # rounded here; a GPU may be one or two units off
            f = np.exp2 if name == "ex2" else lambda x: 1 / np.sqrt(x)
            return lambda lanes: put(a[0], lanes, f(get(a[1], lanes, T).astype(np.float64)).astype(T))
        f1 = {"not": lambda x: ~x, "neg": lambda x: -x, "abs": np.abs, "rcp": lambda x: np.float32(1) / x}.get(name)
        if f1 and "approx" not in parts:
            return lambda lanes: put(a[0], lanes, f1(get(a[1], lanes, T)))
        f2 = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor,
              "min": np.fmin if np.dtype(T).kind == "f" else np.minimum,
              "max": np.fmax if np.dtype(T).kind == "f" else np.maximum}.get(name)
        if f2 is None or (name == "div" and "rn" not in parts) or "ftz" in parts or "approx" in parts:
            raise NotImplementedError(".".join(parts))
        return lambda lanes: put(a[0], lanes, f2(get(a[1], lanes, T), get(a[2], lanes, T)).astype(T))

    def _bits(self, name, parts, a):
        get, put = self.get, self.put
        if name == "lop3":
            table = int(a[4], 0)

            def lop3(lanes):
                x, y, z = (get(r, lanes, np.uint32) for r in a[1:4])
                out = np.zeros(len(lanes), np.uint32)
                for j in range(8):
                    if table >> j & 1:
                        out |= (x if j & 4 else ~x) & (y if j & 2 else ~y) & (z if j & 1 else ~z)
                put(a[0], lanes, out)
            return lop3
        if name == "bfe":
            T = DTYPE[parts[-1]]

            def bfe(lanes):
                x, at, n = (get(r, lanes, np.uint32).astype(np.uint64) for r in a[1:4])
                mask = (np.uint64(1) << n) - np.uint64(1)
                out = x >> at & mask
                if np.int32 == T:
                    out = np.where(out >> (n - np.uint64(1)) & np.uint64(1), out | ~mask, out)
                put(a[0], lanes, out.astype(np.uint32))
            return bfe
        if name == "bfi":
            def bfi(lanes):
                x, y, at, n = (get(r, lanes, np.uint32).astype(np.uint64) for r in a[1:5])
                mask = ((np.uint64(1) << n) - np.uint64(1)) << at
                put(a[0], lanes, (y & ~mask | x << at & mask).astype(np.uint32))
            return bfi
        raise NotImplementedError(name)

    def _convert(self, parts, a):
        if parts[-2] in PAIRS:
            # two numbers into one register, the first one above; to nearest, as PyTorch rounds
            kind, whole, shift = PAIRS[parts[-2]]

            def pair(lanes):
                high, low = (torch.from_numpy(self.get(r, lanes, np.float32)).to(kind) for r in a[1:3])
                high, low = (x.view(whole).numpy().astype(np.int64) & (1 << shift) - 1 for x in (high, low))
                self.put(a[0], lanes, (high << shift | low).astype(f"u{shift // 4}"))
            return pair
        to, of = DTYPE[parts[-2]], DTYPE[parts[-1]]

        def convert(lanes):
            x = (self.get(a[1], lanes, of) if np.dtype(of).itemsize > 1
                 else self.regs[a[1]][lanes].astype(np.uint8).view(of))
            if np.dtype(of).kind == "f" and np.dtype(to).kind == "f":
                y = np.rint(x) if "rni" in parts else x
            elif np.dtype(of).kind == "f":
                y = np.trunc(x) if "rzi" in parts else np.rint(x)
                info = np.iinfo(to)
                y = np.where(np.isnan(x), 0, np.clip(y.astype(np.float64), info.min, info.max)).astype(to)
            else:
                y = x.astype(to)
            self.put(a[0], lanes, y)
        return convert

    def _mma(self, parts, a):
        """mma.sync.aligned.row.col, m16n8k32.s32.s8.s8.s32 or m16n8k16.f32.bf16.bf16.f32: fragments by the PTX manual
        (9.7.14.5). A register has 4 bytes of neighbouring columns of A or rows of B, as many numbers as they are."""
        D, A, B, C = ([r.strip() for r in v[1:-1].split(",")] for v in a)
        small = parts[-2] == "s8"
        sums_of, wide, K, n = (np.int32, np.int64, 32, 4) if small else (np.float32, np.float32, 16, 2)
        lane = np.arange(32)
        group, four = lane // 4, lane % 4

        def numbers(register, own):
            bits = self.get(register, own, np.uint32)
            if small:
                return bits[:, None].view(np.int8)
            return (bits[:, None].view(np.uint16).astype(np.uint32) << 16).view(np.float32)

        def mma(lanes):
            for w in np.unique(lanes // 32):
                own = lanes[lanes // 32 == w]
                if len(own) != 32:
                    raise Fault(f"{self.k.name}: an mma that not all lanes of a warp reach together")
                left, right, sums = (np.zeros(shape, wide) for shape in ((16, K), (K, 8), (16, 8)))
                for i, register in enumerate(A):
                    left[group[:, None] + 8 * (i % 2), n * four[:, None] + np.arange(n) + K // 2 * (i // 2)] = numbers(
                        register, own)
                for i, register in enumerate(B):
                    right[n * four[:, None] + np.arange(n) + K // 2 * i, group[:, None]] = numbers(register, own)
                where = [(np.where(i < 2, group, group + 8), four * 2 + (i & 1)) for i in range(4)]
                for i in range(4):
                    sums[where[i]] = self.get(C[i], own, sums_of)
                sums += left @ right
                for i in range(4):
                    self.put(D[i], own, sums[where[i]].astype(sums_of))
        return mma

    def _copy(self, parts, a):
        """cp.async of 16 bytes, or of none and 16 zeros: read now, written when the kernel has waited for its group."""
        if parts[2] in ("commit_group", "wait_group"):
            def group(lanes):
                if len(lanes) != self.T:
                    raise NotImplementedError("cp.async groups of some threads only")
                if parts[2] == "commit_group":
                    self.copies.append([])
                    return
                ended = max(len(self.copies) - 1 - int(a[0]), 0)
                for copy in (copy for copies in self.copies[:ended] for copy in copies):
                    self.store_shared(*copy)
                self.copies = self.copies[ended:]
            return group
        (to, to_offset), (of, offset) = map(self._address, a[:2])

        def copy(lanes):
            target = self.get(to, lanes, np.uint32).astype(np.int64) + to_offset
            source = self.get(of, lanes, np.uint64).astype(np.int64) + offset
            there, values = self.get(a[3], lanes, np.uint32) == 16, np.zeros((len(lanes), 16), np.uint8)
            if there.any():
                values[there] = self.load_global(source[there], np.uint8, 16)
            at = target[:, None] + np.arange(16)
            if any(np.isin(at, product["at"]).any() for product in self.products) or (
                    (self.r_epoch[at] == self.epoch) & (self.r_lane[at] != lanes[:, None])).any():
                raise Fault(f"{self.k.name}: race in shared memory, a cp.async to what is still read")
            self.copies[-1].append((lanes, target, values))
        return copy

    def _shuffle(self, parts, a):
        """shfl.sync.bfly.b32 by whole warps: a lane receives the value of the one whose number differs by a mask."""
        if parts[2] != "bfly":
            raise NotImplementedError(".".join(parts))
        to = a[0].split("|")[0]

        def shuffle(lanes):
            if (np.bincount(lanes // 32) % 32).any():
                raise Fault(f"{self.k.name}: a shuffle that not all lanes of a warp reach together")
            value, every = self.get(a[1], lanes, np.uint32), np.zeros(self.T, np.uint32)
            every[lanes] = value
            self.put(to, lanes, every[lanes ^ self.get(a[2], lanes, np.uint32)])
        return shuffle

    def _ldmatrix(self, parts, a):
        """ldmatrix.x4: lane 8 i + r names row r of matrix i; lane 4 g + t receives word t of row g of each, or with
        trans the halves of rows 2 t and 2 t + 1 in column g."""
        registers = [r.strip() for r in a[0][1:-1].split(",")]
        base, offset = self._address(a[1])

        def ldmatrix(lanes):
            address = self.get(base, lanes, np.uint32).astype(np.int64) + offset
            for warp in np.unique(lanes // 32):
                own = lanes // 32 == warp
                if own.sum() != 32:
                    raise Fault(f"{self.k.name}: an ldmatrix that not all lanes of a warp reach together")
                matrices = self.load_shared(lanes[own], address[own], np.uint8, 16).reshape(4, 8, 4, 4)
                groups = address[own].reshape(4, 8) // 16 % 8
                self.conflicts += sum(8 - len(set(rows)) for rows in groups.tolist())
                if "trans" in parts:
                    halves = np.ascontiguousarray(matrices).view(np.uint16).reshape(4, 8, 8).transpose(0, 2, 1)
                    matrices = np.ascontiguousarray(halves).view(np.uint32)
                for register, matrix in zip(registers, matrices, strict=True):
                    self.put(register, lanes[own], np.ascontiguousarray(matrix).view(np.uint32).ravel())
        return ldmatrix

    def _atom(self, a):
        """atom.global.add.u32, lane by lane."""
        base, offset = self._address(a[1])

        def atom(lanes):
            for lane in lanes[:, None]:
                address = self.get(base, lane, np.uint64).astype(np.int64) + offset
                old = self.load_global(address, np.uint32, 1)[:, 0]
                buffer = self._check_global(address, 4, "atom")[0]
                at = int(address[0] - self.starts[buffer])
                self.buffers[buffer][at : at + 4] = (old + self.get(a[2], lane, np.uint32)).view(np.uint8)
                self.put(a[0], lane, old)
        return atom

    def _wgmma(self, parts, a):
        """wgmma.mma_async.m64nNk32.s32.s8.s8 with A in registers and B in shared memory, 128-byte swizzle, K-major.

        It reads at once and delivers at wgmma.wait_group 0, where nothing that it reads may have changed.
        """
        if parts[1] in ("fence", "commit_group"):
            return lambda lanes: None
        if parts[1] == "wait_group":
            if a[0] != "0":
                raise NotImplementedError("wgmma.wait_group of some groups only")

            def wait(lanes):
                ended = {product["lanes"][0] for product in self.products} & set(lanes.tolist())
                for product in (product for product in self.products if product["lanes"][0] in ended):
                    registers = [self.get(r, product["lanes"], np.uint32) for r in product["A"]]
                    if (self.shared[product["at"]] != product["B"]).any() or any(
                            (now != then).any() for now, then in zip(registers, product["A"].values(), strict=True)):
                        raise Fault(f"{self.k.name}: what a wgmma reads changes before it has ended")
                    for register, value in zip(product["D"], product["sums"], strict=True):
                        self.put(register, product["lanes"], value)
                self.products = [product for product in self.products if product["lanes"][0] not in ended]
            return wait
        D, A = ([r.strip() for r in v[1:-1].split(",")] for v in a[:2])
        n = int(re.search(r"m64n(\d+)k32", ".".join(parts))[1])
        if len(D) != n // 2 or a[3] != "1" or parts[-3:] != ["s32", "s8", "s8"]:
            raise NotImplementedError(".".join(parts))
        lane = np.arange(128)
        warp, g, t = lane // 32, lane % 32 // 4, lane % 4

        def mma(lanes):
            for group in np.unique(lanes // 128):
                own = lanes[lanes // 128 == group]
                if len(own) != 128:
                    raise Fault(f"{self.k.name}: a wgmma that not all lanes of a warp group reach together")
                left, registers = np.zeros((64, 32), np.int64), {r: self.get(r, own, np.uint32).copy() for r in A}
                for i, value in enumerate(registers.values()):
                    for b in range(4):
                        byte = (value >> np.uint32(8 * b) & np.uint32(255)).astype(np.uint8).view(np.int8)
                        left[16 * warp + g + 8 * (i % 2), 4 * t + b + 16 * (i // 2)] = byte
                descriptor = self.get(a[2], own, np.uint64)
                d = int(descriptor[0])
                if (descriptor != descriptor[0]).any() or d >> 62 != 1 or d >> 49 & 7 or d >> 32 & 0x3FFF != 64:
                    raise NotImplementedError(f"wgmma with the descriptor {d:x}")
                row, k = np.arange(n)[:, None], np.arange(32)
                at = ((d & 0x3FFF) << 4) + row // 8 * 1024 + row % 8 * 128 + k
                at = at ^ (at >> 7 & 7) << 4  # the swizzle
                if not self.written[at].all() or (self.w_epoch[at] == self.epoch).any():
                    raise Fault(f"{self.k.name}: a wgmma reads what was not written before the last barrier")
                product = left @ self.shared[at].view(np.int8).astype(np.int64).T
                # of products that follow each other into the same registers each goes on from the one before
                before = next((p["sums"] for p in reversed(self.products) if p["D"] == D and p["lanes"][0] == own[0]),
                              None) or [self.get(r, own, np.int32) for r in D]
                product = product.astype(np.int32)
                sums = [before[i] + product[16 * warp + g + 8 * (i // 2 % 2), i // 4 * 8 + 2 * t + i % 2]
                        for i in range(len(D))]
                self.products.append({"lanes": own, "at": at, "B": self.shared[at].copy(), "A": registers, "D": D,
                                      "sums": sums})
        return mma


# ---- launching -----------------------------------------------------------------------------------------------------


@cache
def compiled(source: str, architecture: str) -> dict:
    """The kernels of a source by name; the compiler takes longer than most runs."""
    return parse(compile_ptx(source, architecture))


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
                if start not in memory or len(memory[start][1]) < size:
                    view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
                    memory[start] = (start, view, f"argument {j}")
            else:
                arguments.append(x)
        machine = Machine(module[name], grid, sizes.threads if sizes else threads or cuda.THREADS, arguments,
                          list(memory.values()), sizes.shared if sizes else 0)
        machine.run()
        launch.conflicts[name] = launch.conflicts.get(name, 0) + machine.conflicts

    launch.conflicts = {}
    return launch
