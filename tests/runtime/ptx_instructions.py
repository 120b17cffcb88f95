"""What the instructions of PTX do: for each line of a kernel's code a function of the lanes that run it.

The machine in `ptx.py` keeps registers, memory and the order of threads. This file knows arithmetic, conversions, loads
and stores, products of tensor cores and copies in the background. An instruction to which no kernel of this project
compiles is `Unknown`.
"""

import itertools
import re

import numpy as np
import torch
from ptx_reader import operands

ENDED, WAITING = 1 << 62, (1 << 62) - 1  # in place of a thread's next instruction


class Fault(Exception):  # noqa: N818 - a fault of the kernel that runs
    """What compute-sanitizer would have reported."""


class Unknown(Exception):  # noqa: N818 - no fault of the kernel
    """An instruction, or a form of one, that no kernel of this project compiles to."""


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


class Instructions:
    """The part of a `ptx.Machine` that turns lines of PTX into functions. Lanes are a slice, or an array of numbers."""

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
            raise Unknown(line)
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
                raise Unknown("ordered ne")
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
        if name in ("ex2", "lg2", "rsqrt") and "approx" in parts:  # rounded here; a GPU may be one or two units off
            f = {"ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda x: 1 / np.sqrt(x)}[name]
            return [T], lambda x: f(x.astype(np.float64)).astype(T)
        one = {"not": np.invert, "neg": np.negative, "abs": np.abs, "rcp": lambda x: np.float32(1) / x}.get(name)
        if one and "approx" not in parts:
            return [T], one
        two = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "and": np.bitwise_and,
               "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.fmin if kind == "f" else np.minimum,
               "max": np.fmax if kind == "f" else np.maximum}.get(name)
        if two is None or (name == "div" and "rn" not in parts) or "ftz" in parts or "approx" in parts:
            raise Unknown(".".join(parts))
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
        """mma.sync.aligned.row.col, m16n8k32.s32.s8.s8.s32, m16n8k64.s32.s4.s4.s32 or m16n8k16.f32.bf16.bf16.f32:
        fragments by the PTX manual (9.7.14.5). A register has 4 bytes of neighbours: columns of A or rows of B, as many
        numbers as they are, the first one lowest."""
        D, A, B, C = ([r.strip() for r in v[1:-1].split(",")] for v in a)
        T, K, n = {"s8": (np.int32, 32, 4), "s4": (np.int32, 64, 8), "bf16": (np.float32, 16, 2)}[parts[-2]]
        A, B, C = self._readers(A, np.uint32), self._readers(B, np.uint32), self._readers(C, T)
        write = [self._writer(r) for r in D]
        group, four, next_to = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4, np.arange(n)
        sums_at = [(group[:, 0] + 8 * (i // 2), 2 * four[:, 0] + i % 2) for i in range(4)]

        def numbers(bits):  # (warps * 32,) -> (warps, 32, n); products of integers are exact in fp32
            if n == 8:
                return ((bits[:, None] >> 4 * next_to & 15 ^ 8).astype(np.int32) - 8).reshape(-1, 32, 8)
            if n == 4:
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
                    raise Unknown("cp.async groups of some threads only")
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
            raise Unknown(".".join(parts))
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
            raise Unknown(".".join(parts))

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
                raise Unknown("wgmma.wait_group of some groups only")

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
            raise Unknown(".".join(parts))
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
                    raise Unknown(f"wgmma with the descriptor {d:x}")
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
