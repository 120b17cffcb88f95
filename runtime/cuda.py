"""The integer linear on a GPU: one-pass CUDA kernels around `torch._int_mm`, and a product of our own for few tokens.

PyTorch operations would walk over the activations about ten times (gate, minimum, maximum, divide, round, add, clamp,
cast, ... and again after the product), and on a GPU these walks cost more than the int8 product saves. So there is

    centre           x less the mean of its token's state (starquant+)               one read, one write
    quantize_rows    gate by token state, clip, scale and zero point of a token, codes one read of x, one write of codes
                     (only scale and zero point where feedback follows)
    feedback         the same codes rounded by feedback (starquant+)                 one read of x, one write of codes
    unpack_int4      two codes a byte -> int8, into a scratch                        one read, one write
    torch._int_mm    int8 tensor cores, int32 out                                    (cuBLAS)
    epilogue         zero point, both scales, bias, mean's output, int32 -> bf16     one read, one write
    packed_product   few tokens: unpack_int4, product and epilogue at once           a read of the packed weights, half
                     a byte each, for every 32 tokens
    tac              Eq. 17 for blocks of 16                                         one read, one write

Their source is `kernels.cu`, plain CUDA C++ without headers. It is compiled at first use, as
`torch.cuda._compile_kernel` does it, with the NVRTC library that PyTorch ships: neither nvcc nor Triton is needed.
Every kernel has its eager twin (`kernels.py`, `starquant.tac_apply`); the integer ones agree with it bit for bit,
because they use the same IEEE operations in the same order (`__fdiv_rn`, `rintf`: no fused multiply-add, no fast
division). `ready` compares both once per device.

The weight is walked in slices along N, so that what one slice writes and the next kernel reads (int32 accumulators,
unpacked codes) is still in the L2 cache. Scratch memory comes from PyTorch's caching allocator, which hands out the
same block again; inside a CUDA graph nothing is allocated at all, and the launch cost (some 10 us from Python) is gone.

With a few tens of tokens a linear takes as long as its weights take to be read, and reading four bits, writing eight
and reading them again is more than the sixteen that a bf16 product reads. `packed_product` unpacks in registers and
ends in the epilogue, so that neither int8 weights nor int32 sums ever leave the chip. It is written for the bytes that
come from memory, not for the operations: each 32 tokens read the weights again, and each 32 columns the activations,
both from the L2. Up to `FEW` tokens `fastest` times both products at the first use of a shape and keeps the faster one;
their integers are the same.

What a production library does beyond this: such a product for many tokens as well, its tiles staged in shared memory
and multiplied by a whole warp group (Hopper's wgmma).
"""

import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import kernels

THREADS = 256
TAC_BLOCK = 16
FEEDBACK_BLOCK = 64  # the only size that the kernel serves: a token's block lies in the registers of one thread
WARPS = 8  # of a CUDA block of packed_product, each with its part of K
FEW = 256  # tokens up to which packed_product is tried
L2_BYTES = 16 * 2**20  # of int32 accumulators, and of unpacked weights, in flight at a time
WAVE = 132 * 128 * 128  # of the product's elements that an H100 or H200 works on at once, a tile each multiprocessor
SOURCES = [Path(__file__).parent / name for name in ("kernels.cu", "products.cu")]
# parts by themselves: the unrolled loops of feedback take seconds to compile, which only those should wait for who use
# it, and packed_product needs tensor cores as sm_80 has them
PARTS = {"linear": ("centre", "quantize_rows", "unpack_int4", "epilogue", "tac"), "feedback": ("feedback",),
         "packed": ("packed_product",), "orders": ("arrange_codes", "unpack_e4m3", "add_ends"),
         "tiled": ("tiled_product",), "grouped": ("grouped_product",)}
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}


class Tile(NamedTuple):
    """Sizes of `tiled_product`: a CUDA block multiplies TM tokens by TN outputs, TK channels at a time, with STAGES
    such tiles on their way; a warp has WM x WN of it; BLOCKS of them share a multiprocessor. Blocks share out the
    channels among `splits` where the tiles would leave multiprocessors idle."""

    TM: int
    TN: int
    TK: int = 128
    STAGES: int = 4
    WM: int = 32
    WN: int = 32
    BLOCKS: int = 2
    splits: int | None = None  # as many as fill the GPU

    @property
    def threads(self) -> int:
        return self.TM // self.WM * (self.TN // self.WN) * 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.STAGES * (self.TM * self.TK + self.TN * self.TK // 2)

    part = "tiled"


class Grouped(NamedTuple):
    """Sizes of `grouped_product`: GROUPS warp groups share TN outputs; TM is a multiple of 128."""

    TM: int
    TN: int
    GROUPS: int = 2
    STAGES: int = 4
    BLOCKS: int = 1
    splits: int | None = None
    TK = 128
    part = "grouped"

    @property
    def threads(self) -> int:
        return 128 * self.GROUPS

    @property
    def shared(self) -> int:
        """Bytes of shared memory; its tiles begin at a multiple of 1024."""
        return self.STAGES * (self.TM * 128 + self.TN * 64) + 1024


TILES = {"tiled 32": Tile(32, 128), "tiled 64": Tile(64, 128, WN=64), "tiled 128": Tile(128, 128, WM=64, WN=64),
         "grouped 128": Grouped(128, 128, BLOCKS=2), "grouped 256": Grouped(128, 256)}


def source(dtype, *parts: str, tile: Tile | Grouped | None = None) -> str:
    """The CUDA source of some parts for activations of this dtype, `tiled_product` with the sizes of a tile."""
    numbers = {"THREADS": THREADS, "TAC_BLOCK": TAC_BLOCK, "FEEDBACK_BLOCK": FEEDBACK_BLOCK, "WARPS": WARPS}
    sizes = {name: size for name, size in tile._asdict().items() if name.isupper()} if tile else {}
    names = {"REAL": TYPES[dtype], **numbers, **sizes, **{part.upper(): "" for part in parts}}
    return "".join(f"#define {name} {value}\n" for name, value in names.items()) + "".join(
        path.read_text() for path in SOURCES)

# ---- compiling -----------------------------------------------------------------------------------------------------


@contextmanager
def _without_cuda_home():
    """PyTorch's compiler call asks for the toolkit's include folder, which wheel-only installations lack and we never
    use."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = home or "."
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home


@cache
def _compiled(index: int, dtype, part: str, tile: Tile | Grouped | None = None) -> dict:
    """The kernels of a part by name: what `torch.cuda._compile_kernel` does for one, for all of a source at once."""
    tools, names = torch.cuda._utils, PARTS[part]
    # asked for at every launch, and loading a library takes longer than a small kernel
    if not hasattr(tools._get_gpu_runtime_library, "cache_info"):
        tools._get_gpu_runtime_library = cache(tools._get_gpu_runtime_library)
    with torch.cuda.device(index), _without_cuda_home():
        major, minor = torch.cuda.get_device_capability(index)
        # instructions of Hopper alone are compiled for sm_90a
        target = f"{major}{minor}{'a' * (part == 'grouped')}"
        code, _ = tools._nvrtc_compile(source(dtype, part, tile=tile), names[0], target)
        functions = tools._cuda_load_module(code, list(names))
        if tile:
            functions[names[0]].set_shared_memory_config(tile.shared)
        return functions


def _launch(name: str, dtype, grid, args, threads: int | None = None,
            tile: Tile | Grouped | None = None) -> None:
    device, part = args[0].device, next(part for part, names in PARTS.items() if name in names)
    with torch.cuda.device(device):
        _compiled(device.index, dtype, part, tile)[name](
            (*grid, *(1,) * (3 - len(grid))), (threads or THREADS, 1, 1), args, tile.shared if tile else 0)


def _blocks(n: int) -> int:
    return -(-n // THREADS)

# ---- the kernels as functions --------------------------------------------------------------------------------------


def centre(x, mean, state):
    """x (..., K) less the mean (2, K) fp32 of its token's state (...) bool."""
    (*_, K), x = x.shape, x.contiguous()
    out = torch.empty_like(x)
    _launch("centre", x.dtype, (x.numel() // K, _blocks(K // 4)), [x, state.contiguous(), mean, out, K])
    return out


def quantize_rows(x, state, d_m: int, d_u: int, bits: int, clip=None, grid_only: bool = False):
    """Gate, clip, quantize: x (M, K) fp32 or bf16, state (M,) bool -> codes (⌈M⌉32, K) int8, scale (M,), zero (M,)
    int32; clip (2,) fp32.

    The integers of `kernels.quantize_rows` on gated x; the rows from M on are zero, as `torch._int_mm` wants them. With
    grid_only the rows before are left for `feedback`. A token with NaN has scale NaN.
    """
    (M, K), x = x.shape, x.contiguous()
    rows = kernels._multiple(M, 32)
    codes = torch.empty(rows, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    zero = torch.empty(M, dtype=torch.int32, device=x.device)
    gates = state.contiguous() if d_m or d_u else codes  # never read without gates
    _launch("quantize_rows", x.dtype, (rows,), [x, gates, codes, scale, zero, scale if clip is None else clip, M, K,
                                                d_m, d_u, bits, int(clip is not None), int(grid_only)])
    return codes, scale, zero


def feedback(x, V, scale, zero, codes, bits: int):
    """Round x (M, K) by feedback into codes (≥ M, K): V (K/64, 64, 64) bf16, scale and zero (M,) of `quantize_rows`.

    The integers of `kernels.feedback_codes`.
    """
    (M, K), x = x.shape, x.contiguous()
    _launch("feedback", x.dtype, (_blocks(M), K // FEEDBACK_BLOCK), [x, scale, zero, V, codes, M, K, bits])


def unpack_int4(packed, out, dtype=torch.float32):
    """Rows of packed codes (n, K / 2) uint8 into out (n, K) int8, both contiguous, n K a multiple of 32; the kernel of
    the sources for `dtype` (all are alike)."""
    count = packed.numel() // 16
    _launch("unpack_int4", dtype, (_blocks(count),), [packed, out, count])
    return out


def _ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state):
    """What the kernels' `finish4` takes, and which of the optional ones there are; others are never read."""
    return ([scale, zero, scale if x_sum is None else x_sum, w_scale, w_sum, w_sum if w_zero is None else w_zero,
             w_scale if bias is None else bias, *((w_scale, w_scale) if shift is None else (shift, state))],
            [int(given is not None) for given in (w_zero, bias, shift)])


def epilogue(acc, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift=None, state=None):
    """acc (≥ M, n) int32 -> y (M, n), a slice of columns of a contiguous (M, N) fp32 or bf16 matrix; shift (2, n), a
    slice of columns of (2, N), with state (M,) bool."""
    width, (ends, given) = acc.shape[1], _ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state)
    _launch("epilogue", y.dtype, (y.shape[0], _blocks(width // 4)), [acc, *ends, y, width, y.stride(0), *given])


def packed_product(codes, packed, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift=None, state=None):
    """codes (⌈M⌉32, K) int8 times packed weights (N, K/2) uint8, and `epilogue`: into y (M, N) fp32 or bf16; N a
    multiple of 32, K of 128."""
    (M, N), (rows, K) = y.shape, codes.shape
    ends, given = _ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state)
    _launch("packed_product", y.dtype, (N // 32, rows // 32), [codes, packed, *ends, y, M, N, K, *given], 32 * WARPS)


def arrange_codes(codes, zero, order: str):
    """Codes (rows, K) int8 in the order of a product, K a multiple of 32: "plain", as they are; "paired", in every 32
    channels the even ones before the odd ones, as `tiled_product` takes them; "e4m3", X_c - z_c as fp8 numbers."""
    (rows, K), paired = codes.shape, order == "paired"
    if order == "plain":
        return codes
    out = torch.empty_like(codes, dtype=torch.int8 if paired else torch.float8_e4m3fn)
    _launch("arrange_codes", torch.float32, (rows, _blocks(K // 32)), [codes, zero, out, K, len(zero), int(paired)])
    return out


def unpack_e4m3(packed):
    """Packed codes (N, K / 2) uint8 -> (N, K) fp8 numbers, exactly."""
    N, half = packed.shape
    out = torch.empty(N, 2 * half, dtype=torch.float8_e4m3fn, device=packed.device)
    count = N * half // 8
    _launch("unpack_e4m3", torch.float32, (_blocks(count),), [packed, out, count])
    return out


def add_ends(y, bias, shift, state):
    """y (M, N) + bias (N,) + shift (2, N) of every token's state (M,), in y's place."""
    (M, N), none = y.shape, y  # an absent tensor is never read
    _launch("add_ends", y.dtype, (M, _blocks(N // 4)), [y, none if bias is None else bias,
            *((none, none) if shift is None else (shift, state)), N, int(bias is not None), int(shift is not None)])
    return y


@cache
def _counters(device):
    """Zeros, which `tiled_product` leaves as it found them. Products on two streams at once would share them."""
    return torch.zeros(2**16, dtype=torch.int32, device=device)


def tiled_product(tile: Tile | Grouped, codes, packed, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift=None,
                  state=None):
    """Paired codes (rows, K) int8 times packed weights (N, K/2) uint8, and `epilogue`: into y (M, N) fp32 or bf16; N a
    multiple of 16, K of tile.TK, rows K below 2³¹."""
    (M, N), (rows, K) = y.shape, codes.shape
    across, down = -(-M // tile.TM), -(-N // tile.TN)
    splits = tile.splits or _splits(across * down, K // tile.TK, tile.BLOCKS * _multiprocessors(y.device))
    partial = y if splits == 1 else torch.empty(across * down * splits * tile.TM * tile.TN, dtype=torch.int32,
                                                device=y.device)
    ends, given = _ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state)
    _launch(PARTS[tile.part][0], y.dtype, (across, down, splits),
            [codes, packed, *ends, y, partial, _counters(y.device), M, N, K, rows, *given], tile.threads, tile)


def _splits(tiles: int, steps: int, slots: int) -> int:
    """Among how many blocks a tile's channels are shared out: what fits beside each other, 4 steps each or more."""
    return max(1, min(slots // tiles, steps // 4, 16))


@cache
def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tac(z, M, bias):
    """Eq. 17 for z (..., C) with blocks of 16: M (C/16, 16, 16), bias (C/16, 16)."""
    z = z.contiguous()
    C = z.shape[-1]
    out, rows = torch.empty_like(z), z.numel() // C
    walkers = max(1, min(rows, 1024 // _blocks(C)))  # few, so that each reads its rows of M for many tokens
    _launch("tac", z.dtype, (walkers, _blocks(C)), [z, M, bias, out, rows, C])
    return out

# ---- the linear ----------------------------------------------------------------------------------------------------


def slice_width(M: int, N: int, K: int, packed: bool) -> int:
    """Columns per slice: accumulators (and unpacked weights) within L2_BYTES, but enough to keep the GPU busy."""
    width = max(min(L2_BYTES // (4 * M), L2_BYTES // K if packed else N), WAVE // M)
    return min(N, max(256, width // 256 * 256))


def token_codes(x, state, d_m: int, d_u: int, bits: int, clip=None, V=None):
    """`quantize_rows`, rounded by the feedback V where there is one."""
    integers, scale, zero = quantize_rows(x, state, d_m, d_u, bits, clip, V is not None)
    if V is not None:
        feedback(x, V, scale, zero, integers, bits)
    return integers, scale, zero


def int_linear(x, state, d_m: int, d_u: int, weight, w_scale, w_sum, bits: int, packed: bool, bias=None, w_zero=None,
               clip=None, V=None, shift=None):
    """Φ-gate, quantize, multiply, dequantize: x (M, K) transformed activations -> (M, N) in x's dtype.

    weight: (N, K/2) uint8 packed or (N, K) int8; w_scale (N,) fp32, w_sum, w_zero (N,) int32, bias (N,) fp32; clip (2,)
    fp32; V (K/64, 64, 64) bf16, the feedback, without gates only; shift (2, N) fp32 of either state.
    """
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    integers, scale, zero = token_codes(x, state, d_m, d_u, bits, clip, V)
    # Σ_k (X_c − z_c), only for asymmetric weights
    x_sum = None if w_zero is None else integers[:M].sum(-1, dtype=torch.int32) - K * zero

    def in_slices():
        width = slice_width(len(integers), N, K, packed)
        scratch = torch.empty(width, K, dtype=torch.int8, device=x.device) if packed else None
        largest = 2 ** (bits + (4 if packed else 8) - 2)
        for n in range(0, N, width):
            part = slice(n, min(n + width, N))
            w = unpack_int4(weight[part], scratch[: part.stop - n], x.dtype) if packed else weight[part]
            acc = kernels.product(lambda a, w: torch._int_mm(a, w.t()), integers, w, largest)
            epilogue(acc, scale, zero, x_sum, w_scale[part], w_sum[part], None if w_zero is None else w_zero[part],
                     None if bias is None else bias[part], y[:, part], None if shift is None else shift[:, part], state)

    def at_once():
        packed_product(integers, weight, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift, state)

    ways = [at_once, in_slices] if packed and few(integers, N, x.dtype) else [in_slices]
    fastest(ways, (x.device, x.dtype, len(integers), N, K))()
    return y


def few(codes, N: int, dtype) -> bool:
    """Whether `packed_product` serves codes (⌈M⌉32, K) and N outputs."""
    rows, K = codes.shape
    return (codes.is_cuda and rows <= FEW and K % 128 == 0 and N % 32 == 0
            and ready(codes.device.index, dtype, "packed"))
_FASTEST = {}  # (device, ...) -> position in the list of ways


def fastest(ways: list, key: tuple):
    """The fastest, when key was first met, of `ways`: functions that do the same on the device key[0]."""
    if len(ways) == 1:
        return ways[0]
    if key not in _FASTEST:
        if torch.cuda.is_current_stream_capturing():
            return ways[0]  # nothing can be timed now; a warm-up forward comes before any recording
        seconds = [_gpu_seconds(way, key[0]) for way in ways]
        _FASTEST[key] = seconds.index(min(seconds))
    return ways[_FASTEST[key]]


def _gpu_seconds(call, device, repeats: int = 5) -> float:
    """Median seconds of a call on the GPU alone, which is kept busy until all repeats are queued; before each of them
    the L2 cache is overwritten, since in a model the weights come from memory."""
    with torch.cuda.device(device):
        call()
        other = torch.empty(2**27, dtype=torch.uint8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(10_000_000)  # cycles, some 6 ms
        for start, end in events:
            other.zero_()
            start.record()
            call()
            end.record()
        end.synchronize()
        return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2] / 1000


def usable(x, N: int, V=None) -> bool:
    """Whether the kernels serve activations x (..., K), N outputs and the feedback V: a GPU, fp32 or bf16, K and N
    multiples of 16, blocks of feedback of 64."""
    return (x.is_cuda and x.dtype in TYPES and x.numel() > 0 and x.shape[-1] % 16 == 0 and N % 16 == 0
            and (V is None or V.shape[-1] == FEEDBACK_BLOCK)
            and all(ready(x.device.index, x.dtype, part) for part in ("linear", *(["feedback"] * (V is not None)))))


@cache
def ready(index: int, dtype, part: str = "linear") -> bool:
    """Compile a part on this device and compare its kernels with their eager twins once; say so and return False if
    they fail.

    Run it before a CUDA graph is captured (any warm-up forward does).
    """
    if kernels.backend("cuda") != "int_mm":
        return False  # said already
    try:
        wrong = self_check(torch.device("cuda", index), dtype, part)
        if wrong is None:
            return True
        reason = f"{wrong} differs from its eager twin"
    except (RuntimeError, OSError, AttributeError, TypeError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        telling = next((line for line in lines if "error" in line.lower() and not line.endswith(":")), lines[-1])
        reason = f"they do not compile or start here ({telling.strip()})"
    warnings.warn(f"Of the CUDA kernels {', '.join(PARTS[part])} are not used, because {reason}; others, or plain "
                  f"PyTorch, serve instead (slower).", stacklevel=2)
    return False


def self_check(device, dtype, part: str) -> str | None:
    """The kernels of a part against the eager formulas, on a ragged number of rows: the first that differs."""
    g = torch.Generator().manual_seed(0)
    M, d_m, d_u = 37, 24, 40
    K, N = (1152, 288) if part == "packed" else (1088, 272)
    state = (torch.rand(M, generator=g) < 0.5).to(device)
    x = torch.randn(M, K, generator=g).to(device, dtype)
    x[3] = 0
    clip = torch.tensor([0.9, 0.8], device=device)
    if part == "feedback":
        V = 0.1 * torch.randn(K // FEEDBACK_BLOCK, FEEDBACK_BLOCK, FEEDBACK_BLOCK, generator=g)
        V = V.to(device, torch.bfloat16)
        codes, _, _ = token_codes(x, None, 0, 0, 4, clip, V)
        return None if torch.equal(codes[:M], kernels.quantize_rows(x, 4, clip, V)[0]) else "feedback"
    w = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8).to(device)
    w_scale, bias = torch.rand(N, generator=g).to(device), torch.randn(N, generator=g).to(device)
    w_zero, packed, w_sum = w[:, 0].int(), kernels.pack_int4(w), w.sum(-1, dtype=torch.int32)
    mean, shift = torch.randn(2, K, generator=g).to(device), torch.randn(2, N, generator=g).to(device)
    column = torch.arange(K, device=device)
    off = torch.where(state[:, None], column >= K - d_u, (column >= K - d_u - d_m) & (column < K - d_u))
    gated = x.masked_fill(off, 0)
    codes, scale, zero = quantize_rows(x, state, d_m, d_u, 4, clip)
    want = kernels.int_linear(gated, w, w_scale, w_sum, 4, 4, bias, w_zero, "float", clip) + shift[state.long()]
    if part == "packed":
        y, x_sum = torch.empty(M, N, dtype=dtype, device=device), codes[:M].sum(-1, dtype=torch.int32) - K * zero
        packed_product(codes, packed, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift, state)
        return None if torch.equal(y, want.to(dtype)) else "packed_product"
    if not torch.equal(unpack_int4(packed, torch.empty_like(w), dtype), w):
        return "unpack_int4"
    if not torch.equal(centre(x, mean, state), (x - mean[state.long()]).to(dtype)):
        return "centre"
    eager = kernels.quantize_rows(gated, 4, clip)
    if not (torch.equal(codes[:M], eager[0]) and torch.equal(scale[:, None], eager[1])
            and torch.equal(zero[:, None], eager[2].int()) and not codes[M:].any()):
        return "quantize_rows"
    y = int_linear(x, state, d_m, d_u, packed, w_scale, w_sum, 4, True, bias, w_zero, clip, None, shift)
    if not torch.equal(y, want.to(dtype)):
        return "epilogue"
    z = torch.randn(M, 3 * TAC_BLOCK, generator=g).to(device, dtype)
    T = torch.randn(3, TAC_BLOCK, TAC_BLOCK, generator=g).to(device)
    d = torch.randn(3, TAC_BLOCK, generator=g).to(device)
    want = (torch.einsum("mbg,bhg->mbh", z.double().unflatten(-1, (3, -1)), T.double()) + d).flatten(-2)
    return "tac" if (tac(z, T, d) - want).abs().max() > (1e-4 if dtype == torch.float32 else 0.1) else None
