"""The CUDA kernels as functions: passes over activations, and products. `products.py` chooses among them.

Passes over activations
-----------------------
PyTorch's operations would walk over the activations about ten times to quantize them (gate, minimum, maximum, divide,
round, ...) and again after the product. On a GPU these walks cost more than the integer product saves. Every kernel
here reads its input once and writes its output once.

    centre           x less the mean of its token's state (starquant+)
    centred_blocks   the same, times blocks of 64 (bf16 tensor cores)
    quantize_rows    the gate of the token's state, the token's range, scale, zero point and codes
    rotated_codes    a Kronecker or an Across factor and then `quantize_rows` (bf16 tensor cores)
    feedback         codes rounded by feedback (starquant+)
    tac, correct     Eq. 17 for blocks of 16; `correct` uses bf16 tensor cores
    rms_norm, rope, silu_up   what both models do between their linears ("glue")
    gptq_columns     the inner loop of GPTQ, for calibration

Products
--------
    torch._int_mm    int8 tensor cores of cuBLAS, between `unpack_int4` and `epilogue`: the readable way, of any shape
    packed_product   unpacking, product and epilogue at once, for few tokens
    tiled_product, grouped_product   the same for any number of tokens (`products.cu`)
    fp8              `torch._scaled_mm` on 4-bit codes less their zero point, which fp8 numbers hold exactly

All of them give the same sums. The fp8 product rounds to bf16 before a bias is added, the others after it.

How a kernel gets onto the GPU
------------------------------
The sources are plain CUDA C++ without headers. They are compiled at first use, as `torch.cuda._compile_kernel` does it,
with the NVRTC library that PyTorch ships: neither nvcc nor Triton is needed. Every kernel has a readable twin
(`kernels.py`, `runtime/cpu.py`, `model.py`, `starquant.tac_apply`). Kernels of integers agree with their twins bit for
bit, because they use the same IEEE operations in the same order. Kernels that sum real numbers have another order.
`ready` compares a kernel with its twin once per device. Inside a CUDA graph nothing is allocated, and the cost of a
launch (some 10 us from Python) is gone.
"""

import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
from runtime import cpu
from starquant import Across, Kronecker

THREADS = 256
TAC_BLOCK = 16
FEEDBACK_BLOCK = 64  # the only size that the kernel serves: a token's block lies in the registers of one thread
GPTQ_BLOCK = 32  # columns that a thread of gptq_columns has in its registers
FUSED_GLUE = True  # norms, rope and SiLU of both models by one kernel each; `eager_glue` turns it off
WARPS = 8  # of a CUDA block of packed_product, each with its part of K
SOURCE, PRODUCTS_SOURCE = (Path(__file__).parent / name for name in ("kernels.cu", "products.cu"))
# Parts are compiled by themselves: the unrolled loops of feedback take seconds, for which only its users should wait,
# and packed_product needs tensor cores as sm_80 has them.
PARTS = {"linear": ("centre", "quantize_rows", "unpack_int4", "epilogue", "tac"), "feedback": ("feedback",),
         "packed": ("packed_product",), "glue": ("rms_norm", "rope", "silu_up"), "correct": ("correct",),
         "blocks": ("centred_blocks",), "gptq": ("gptq_columns",)}
PRODUCTS = {"fp8": ("unpack_e4m3", "add_ends"), "tiled": ("tiled_product",),
            "grouped": ("grouped_product",), "rotate": ("rotated_codes",)}
ORDERS = ("plain", "paired", "e4m3")  # of codes
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}


class Tile(NamedTuple):
    """Sizes of `tiled_product`: a CUDA block multiplies TM tokens by TN outputs, TK channels at a time, with STAGES
    such tiles on their way; a warp has WM x WN of it; RESIDENT of them share a multiprocessor. Blocks share out the
    channels among `splits` where the tiles would leave multiprocessors idle."""

    TM: int
    TN: int
    TK: int = 128
    STAGES: int = 4
    WM: int = 32
    WN: int = 32
    RESIDENT: int = 2
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
    RESIDENT: int = 1
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


class Rotation(NamedTuple):
    """Sizes of `rotated_codes`: a token is a matrix (N1, N2); FIRST is 1 where P2 multiplies it, too."""

    N1: int
    N2: int
    FIRST: int
    part = "rotate"

    @property
    def resident(self) -> int:
        """CUDA blocks at a time on a multiprocessor: so many leave 80 registers to a thread, or 96."""
        return 5 if self.threads <= 128 else max(1, 768 // self.threads)

    @property
    def threads(self) -> int:
        return kernels._multiple(self.N1, 16) * self.N2 // 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory: P1, P2 and the result of its product, in bf16."""
        rows = kernels._multiple(self.N1, 16)
        return 2 * (rows * (rows + 8) + (self.FIRST * self.N2 + rows) * (self.N2 + 8))


# of 24 sizes, those that were the fastest somewhere on an H200 (results/gpu-h200.md); other GPUs have no "grouped"
TILES = {"tiled 32": Tile(32, 128, TK=256), "tiled 128": Tile(128, 128, WM=64, WN=64),
         "grouped": Grouped(128, 128, RESIDENT=2), "grouped deep": Grouped(128, 128, STAGES=6)}


def source(dtype, *parts: str, tile: Tile | Grouped | Rotation | None = None) -> str:
    """The CUDA source of some parts for activations of this dtype, `tiled_product` with the sizes of a tile."""
    numbers = {"THREADS": THREADS, "TAC_BLOCK": TAC_BLOCK, "FEEDBACK_BLOCK": FEEDBACK_BLOCK, "WARPS": WARPS,
               "GPTQ_BLOCK": GPTQ_BLOCK}
    sizes = {name: size for name, size in tile._asdict().items() if name.isupper()} if tile else {}
    if isinstance(tile, Rotation):
        sizes["RESIDENT"] = tile.resident
    names = {"REAL": TYPES[dtype], **numbers, **sizes, **{part.upper(): "" for part in parts}}
    return "".join(f"#define {name} {value}\n" for name, value in names.items()) + "".join(
        path.read_text(encoding="utf-8") for path in (SOURCE, PRODUCTS_SOURCE))

# ---- compiling -----------------------------------------------------------------------------------------------------


def target(capability: tuple, part: str) -> str:
    """The architecture to compile a part for; instructions that only Hopper has need an a behind it."""
    return f"{capability[0]}{capability[1]}{'a' * (part == 'grouped')}"


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
def _compiled(index: int, dtype, part: str, tile: Tile | Grouped | Rotation | None = None) -> dict:
    """The kernels of a part by name: what `torch.cuda._compile_kernel` does for one, for all of a source at once."""
    tools, names = torch.cuda._utils, (PARTS | PRODUCTS)[part]
    # asked for at every launch, and loading a library takes longer than a small kernel
    if not hasattr(tools._get_gpu_runtime_library, "cache_info"):
        tools._get_gpu_runtime_library = cache(tools._get_gpu_runtime_library)
    with torch.cuda.device(index), _without_cuda_home():
        capability = torch.cuda.get_device_capability(index)
        code, _ = tools._nvrtc_compile(source(dtype, part, tile=tile), names[0], target(capability, part))
        functions = tools._cuda_load_module(code, list(names))
        if tile:
            functions[names[0]].set_shared_memory_config(tile.shared)
        return functions


def _launch(name: str, dtype, grid, args, threads: int | None = None,
            tile: Tile | Grouped | Rotation | None = None) -> None:
    device, part = args[0].device, next(part for part, names in (PARTS | PRODUCTS).items() if name in names)
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


def quantize_rows(x, state, d_m: int, d_u: int, bits: int, clip=None, grid_only: bool = False, order: str = "plain"):
    """Gate, clip, quantize: x (M, K) fp32 or bf16, state (M,) bool -> codes (⌈M⌉32, K) int8, scale (M,), zero (M,)
    int32; clip (2,) fp32.

    The integers of `kernels.quantize_rows` on gated x; the rows from M on are zero, as `torch._int_mm` wants them. With
    grid_only the rows before are left for `feedback`. A token with NaN has scale NaN. The order of codes is what a
    product takes: "plain", channel by channel; "paired", in every 32 channels the even ones before the odd ones, K a
    multiple of 32; "e4m3", X_c - z_c as fp8 numbers.
    """
    (M, K), x = x.shape, x.contiguous()
    rows = kernels._multiple(M, 32)
    codes = torch.empty(rows, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    zero = torch.empty(M, dtype=torch.int32, device=x.device)
    gates = state.contiguous() if d_m or d_u else codes  # never read without gates
    _launch("quantize_rows", x.dtype, (rows,),
            [x, gates, codes, scale, zero, scale if clip is None else clip, M, K, d_m, d_u, bits, int(clip is not None),
             int(grid_only), ORDERS.index(order)])
    return codes.view(torch.float8_e4m3fn) if order == "e4m3" else codes, scale, zero


def centred_blocks(x, mean, state, B):
    """(x - μ_s) times blocks of 64: x (M, K) bf16, mean (2, K) fp32 or None, state (M,), B (K/64, 64, 64) bf16. The
    difference is rounded to bf16 before the product, as that of `centre`."""
    (M, K), x = x.shape, x.contiguous()
    out = torch.empty_like(x)
    down = max(1, min(-(-M // (THREADS // 2)), 6 * _multiprocessors(x.device) * 64 // K))  # two waves
    _launch("centred_blocks", x.dtype, (K // 64, down), [
        x, *((x, x) if mean is None else (state.contiguous(), mean)), B, out, M, K, int(mean is not None)])
    return out


def rotation_of(x, P: list) -> Rotation | None:
    """The sizes of `rotated_codes` for rows x (M, K) and the factors P, or None where it does not serve."""
    if x.dtype != torch.bfloat16 or len(P) != 1 or (x.shape[1] > 8192 and len(x) > 1024):
        return None  # the last: two passes are faster then (results/gpu-h200.md)
    (factor,), (n1, *_) = P, P[0][0].shape
    if isinstance(factor, Kronecker) and len(factor.P2) in (64, 128) and n1 <= 128:
        rotation = Rotation(n1, len(factor.P2), 1)
    elif isinstance(factor, Across) and x.shape[1] == 64 * n1 and n1 <= 128:  # wider ones are slower than two passes
        rotation = Rotation(n1, 64, 0)
    else:
        return None
    return rotation if n1 % 8 == 0 and ready(x.device.index, x.dtype, rotation) else None


def rotated_codes(rotation: Rotation, x, factor, state, d_m: int, d_u: int, bits: int, clip=None, to_y: bool = False,
                  order: str = "plain"):
    """`quantize_rows` of x (M, K) bf16 times a Kronecker or an Across factor, and what it is of: with to_y the product
    y (M, K) bf16 is returned, and of the codes only the rows of zeros behind the M-th are there."""
    (M, K), x, P = x.shape, x.contiguous(), [matrix.contiguous() for matrix in factor]
    rows = kernels._multiple(M, 32)
    codes = torch.empty(rows, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    zero = torch.empty(M, dtype=torch.int32, device=x.device)
    y = torch.empty_like(x) if to_y else None
    gates = state.contiguous() if d_m or d_u else codes  # never read without gates
    _launch("rotated_codes", x.dtype, (min(rows, rotation.resident * _multiprocessors(x.device)),),
            [x, P[0], P[-1], gates, y if to_y else x, codes, scale, zero, scale if clip is None else clip, M, rows, d_m,
             d_u, bits, int(clip is not None), int(to_y), ORDERS.index(order)], rotation.threads, rotation)
    return y, codes.view(torch.float8_e4m3fn) if order == "e4m3" else codes, scale, zero


def feedback(x, V, scale, zero, codes, bits: int, order: str = "plain"):
    """Round x (M, K) by feedback into codes (≥ M, K): V (K/64, 64, 64) bf16, scale and zero (M,) of `quantize_rows`.

    The integers of `cpu.feedback_codes`.
    """
    (M, K), x = x.shape, x.contiguous()
    _launch("feedback", x.dtype, (_blocks(M), K // FEEDBACK_BLOCK),
            [x, scale, zero, V, codes, M, K, bits, ORDERS.index(order)])


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
    splits = tile.splits or _splits(across * down, K // tile.TK, tile.RESIDENT * _multiprocessors(y.device))
    partial = y if splits == 1 else torch.empty(across * down * splits * tile.TM * tile.TN, dtype=torch.int32,
                                                device=y.device)
    ends, given = _ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state)
    _launch(PRODUCTS[tile.part][0], y.dtype, (across, down, splits),
            [codes, packed, *ends, y, partial, _counters(y.device), M, N, K, rows, *given], tile.threads,
            tile._replace(splits=None))  # one compilation for any number


def _splits(tiles: int, steps: int, slots: int) -> int:
    """Among how many blocks a tile's channels are shared out: what fits beside each other, 4 steps each or more."""
    return max(1, min(slots // tiles, steps // 4, 16))


@cache
def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tac(z, M, bias):
    """Eq. 17 for z (..., C) with blocks of 16: M (C/16, 16, 16), bias (C/16, 16)."""
    if z.is_cuda and z.dtype == torch.bfloat16 and ready(z.device.index, z.dtype, "correct"):
        return correct(z, M, bias)
    z = z.contiguous()
    C = z.shape[-1]
    out, rows = torch.empty_like(z), z.numel() // C
    walkers = max(1, min(rows, 1024 // _blocks(C)))  # few, so that each reads its rows of M for many tokens
    _launch("tac", z.dtype, (walkers, _blocks(C)), [z, M, bias, out, rows, C])
    return out


def correct(z, M, bias):
    """`tac` of z in bf16 on tensor cores, with 16 bits of M."""
    z = z.contiguous()
    C = z.shape[-1]
    out, rows, across = torch.empty_like(z), z.numel() // C, -(-C // (THREADS // 2))
    walkers = max(1, min(-(-rows // 16), 8 * _multiprocessors(z.device) // across))
    _launch("correct", z.dtype, (walkers, across), [z, M, bias, out, rows, C])
    return out


def gptq_columns(columns, U, scale, bits: int):
    """GPTQ's inner loop: codes (n, C) int8 of columns (n, C) fp64 of a weight, n ≤ GPTQ_BLOCK, and in their place the
    errors; U (n, n), scale (C,), fp64 both."""
    (n, C), codes, U = columns.shape, torch.empty_like(columns, dtype=torch.int8), U.contiguous()
    _launch("gptq_columns", torch.float32, (-(-C // 64),), [columns, U, scale.contiguous(), codes, n, C, bits], 64)
    return codes

# ---- glue: what both models do between their linears ---------------------------------------------------------------


def glues(x, *others) -> bool:
    """Whether the glue kernels serve x, contiguous, of a width that 16 divides, and others of its dtype: on a GPU,
    where no gradient is wanted and nothing is being compiled."""
    tensors = (x, *others)
    return (FUSED_GLUE and not torch.compiler.is_compiling() and x.device.type == "cuda" and x.dtype in TYPES
            and x.shape[-1] % 16 == 0 and x.numel() > 0
            and all(t.dtype == x.dtype and t.is_contiguous() for t in tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and ready(x.device.index, x.dtype, "glue"))


@contextmanager
def eager_glue():
    """Inside, norms, rope and SiLU are the lines of model.py."""
    global FUSED_GLUE
    before, FUSED_GLUE = FUSED_GLUE, False
    try:
        yield
    finally:
        FUSED_GLUE = before


def rms_norm(x, gain, eps: float):
    """`model.RMSNorm` of x (..., K) with the gain (K,)."""
    out, K = torch.empty_like(x), x.shape[-1]
    bits = torch.tensor(eps, dtype=torch.float32).view(torch.int32).item()
    _launch("rms_norm", x.dtype, (x.numel() // K,), [x, gain, out, K, bits])
    return out


def rope(qkv, cos, sin, heads: int, h: int):
    """The first `heads` heads of qkv (B, L, n h), turned as by `model.rope`: (B, heads, L, h), with the memory of
    (B, L, heads, h). cos, sin (L, h) or (B, 1, L, h)."""
    B, L, width = qkv.shape
    out = torch.empty(B, L, heads, h, dtype=qkv.dtype, device=qkv.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    _launch("rope", qkv.dtype, (B * L,), [qkv, cos, sin, out, cos.numel() // h, heads, width // h, h,
                                          int(cos.dtype == torch.float32)])
    return out.transpose(1, 2)


def silu_up(gate_up):
    """silu(gate) up of gate_up (..., 2 F): (..., F)."""
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    _launch("silu_up", out.dtype, (out.numel() // F, _blocks(F // 8)), [gate_up, out, F])
    return out

# ---- codes, and whether a kernel may be used -----------------------------------------------------------------------


def token_codes(x, state, d_m: int, d_u: int, bits: int, clip=None, V=None, order: str = "plain"):
    """`quantize_rows`, rounded by the feedback V where there is one."""
    integers, scale, zero = quantize_rows(x, state, d_m, d_u, bits, clip, V is not None, order)
    if V is not None:
        feedback(x, V, scale, zero, integers, bits, order)
    return integers, scale, zero


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
    if part not in ("glue", "gptq") and kernels.backend("cuda") != "int_mm":
        return False  # said already
    try:
        wrong = self_check(torch.device("cuda", index), dtype, part)
        if wrong is None:
            return True
        reason = f"{wrong} differs from its eager twin"
    except (RuntimeError, OSError, AttributeError, TypeError, ImportError) as error:
        torch.cuda.synchronize(index)  # an error that ended the CUDA context is raised again, and ends the run
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        telling = next((line for line in lines if "error" in line.lower() and not line.endswith(":")), lines[-1])
        reason = f"they do not compile or start here ({telling.strip()})"
    names = (PARTS | PRODUCTS).get(part, [str(part)])
    warnings.warn(f"Of the CUDA kernels {', '.join(names)} are not used, because {reason}; others, or plain "
                  f"PyTorch, serve instead (slower).", stacklevel=2)
    return False


def self_check(device, dtype, part: str) -> str | None:
    """The kernels of a part against the eager formulas, on a ragged number of rows: the first that differs."""
    g = torch.Generator().manual_seed(0)
    if part in ("glue", "correct", "blocks", "gptq") or isinstance(part, Rotation):
        return _check_pass(device, dtype, part, g)
    M, d_m, d_u = 19, 24, 40
    K, N = (1280, 288) if part in ("packed", "fp8", *TILES) else (1088, 272)
    state = (torch.rand(M, generator=g) < 0.5).to(device)
    x = torch.randn(M, K, generator=g).to(device, dtype)
    x[3] = 0
    clip = torch.tensor([0.9, 0.8], device=device)
    if part == "feedback":
        x, K = x[:, :128], 128
        V = 0.1 * torch.randn(K // FEEDBACK_BLOCK, FEEDBACK_BLOCK, FEEDBACK_BLOCK, generator=g)
        V = V.to(device, torch.bfloat16)
        codes, _, _ = token_codes(x, None, 0, 0, 4, clip, V)
        return None if torch.equal(codes[:M], cpu.token_codes(x, 4, clip, V)[0]) else "feedback"
    w = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8).to(device)
    w_scale, bias = torch.rand(N, generator=g).to(device), torch.randn(N, generator=g).to(device)
    w_zero, packed, w_sum = w[:, 0].int(), kernels.pack_int4(w), w.sum(-1, dtype=torch.int32)
    mean, shift = torch.randn(2, K, generator=g).to(device), torch.randn(2, N, generator=g).to(device)
    column = torch.arange(K, device=device)
    off = torch.where(state[:, None], column >= K - d_u, (column >= K - d_u - d_m) & (column < K - d_u))
    gated = x.masked_fill(off, 0)
    codes, scale, zero = quantize_rows(x, state, d_m, d_u, 4, clip)

    def in_order(order):
        return quantize_rows(x, state, d_m, d_u, 4, clip, order=order)[0]

    want = kernels.int_linear(gated, w, w_scale, 4, w_zero, bias, clip) + shift[state.long()]
    if part in ("packed", *TILES):
        y, x_sum = torch.empty(M, N, dtype=dtype, device=device), codes[:M].sum(-1, dtype=torch.int32) - K * zero
        ends = (packed, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift, state)
        for splits in (1, 2):
            if part == "packed":
                packed_product(codes, *ends)
            else:
                tiled_product(TILES[part]._replace(splits=splits), in_order("paired"), *ends)
            if not torch.equal(y, want.to(dtype)):
                return "packed_product" if part == "packed" else part
        return None
    if part == "fp8":
        y = want.to(dtype)
        differ = {"unpack_e4m3": unpack_e4m3(packed).float() - w,
                  "quantize_rows": in_order("e4m3")[:M].float() - (codes[:M] - zero[:, None]),
                  "add_ends": add_ends(y.clone(), bias, shift, state) - (y + bias + shift[state.long()]).to(dtype)}
        return next((name for name, by in differ.items() if by.any()), None)
    if not torch.equal(unpack_int4(packed, torch.empty_like(w), dtype), w):
        return "unpack_int4"
    if not torch.equal(centre(x, mean, state), (x - mean[state.long()]).to(dtype)):
        return "centre"
    eager = kernels.quantize_rows(gated, 4, clip)
    if not (torch.equal(codes[:M], eager[0]) and torch.equal(scale[:, None], eager[1])
            and torch.equal(zero[:, None], eager[2].int()) and not codes[M:].any()):
        return "quantize_rows"
    y, x_sum = torch.empty(M, N, dtype=dtype, device=device), codes[:M].sum(-1, dtype=torch.int32) - K * zero
    acc = kernels.product(lambda a, w: torch._int_mm(a, w.t()), codes, w, 2**6)
    epilogue(acc, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift, state)
    if not torch.equal(y, want.to(dtype)):
        return "epilogue"
    z = torch.randn(M, 3 * TAC_BLOCK, generator=g).to(device, dtype)
    T = torch.randn(3, TAC_BLOCK, TAC_BLOCK, generator=g).to(device)
    d = torch.randn(3, TAC_BLOCK, generator=g).to(device)
    want = (torch.einsum("mbg,bhg->mbh", z.double().unflatten(-1, (3, -1)), T.double()) + d).flatten(-2)
    return "tac" if (tac(z, T, d) - want).abs().max() > (1e-4 if dtype == torch.float32 else 0.1) else None


def _check_pass(device, dtype, part, g) -> str | None:
    """`self_check` of the passes that are made of products or of functions. Those of matrices get small integers times
    powers of two, whose sums are exact in any order."""
    M, BF16 = 37, torch.bfloat16
    state = (torch.rand(M, generator=g) < 0.5).to(device)

    def integers(*shape, of: int = 8):
        return torch.randint(-of, of + 1, shape, generator=g).to(device, BF16)

    if part == "glue":
        x, gain = (torch.randn(*shape, generator=g).to(device, dtype) for shape in ((2, 19, 288), (288,)))
        y = x.float()
        norm = gain * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        angle = torch.rand(19, 16, generator=g).to(device).repeat(1, 2)
        turned = {}
        for table in {torch.float32, dtype}:
            cos, sin = angle.cos().to(table), angle.sin().to(table)
            heads = x.unflatten(-1, (9, 32))[:, :, :6].transpose(1, 2).to(table)  # (B, 6, L, 32)
            first, second = heads.chunk(2, -1)
            want = (heads * cos + torch.cat((-second, first), -1) * sin).to(dtype)
            turned[table] = torch.equal(rope(x, cos, sin, 6, 32), want)
        silu = torch.nn.functional.silu(x[..., :144]) * x[..., 144:]
        close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        good = {"rms_norm": torch.allclose(rms_norm(x, gain, 1e-5), norm, **close), "rope": all(turned.values()),
                "silu_up": torch.allclose(silu_up(x), silu, **close)}
        return next((name for name, right in good.items() if not right), None)
    if part == "correct":
        z, T = integers(M, 96), torch.randn(6, TAC_BLOCK, TAC_BLOCK, generator=g).to(device)
        bias = torch.randn(6, TAC_BLOCK, generator=g).to(device)
        want = (torch.einsum("mbg,bhg->mbh", z.double().unflatten(-1, (6, -1)), T.double()) + bias).flatten(-2)
        return "correct" if ((correct(z, T, bias) - want).abs() > 2**-8 * want.abs() + 0.01).any() else None
    if part == "gptq":
        columns, U = torch.randn(21, 70, generator=g).double().to(device), torch.eye(40).double().to(device)
        U += torch.rand(40, 40, generator=g).double().triu(1).to(device) / 8
        scale, work = torch.rand(70, generator=g).double().to(device) + 0.2, columns.clone()
        got = gptq_columns(work, U[3:24, 3:24], scale, 4)
        for i in range(21):
            code = (columns[i] / scale).round().clamp(-8, 7)
            error = (columns[i] - scale * code) / U[3 + i, 3 + i]
            columns[i + 1:] -= U[3 + i, 4 + i:24, None] * error
            if not (torch.equal(got[i], code.to(torch.int8)) and torch.allclose(work[i], error, rtol=1e-9, atol=1e-12)):
                return "gptq_columns"
        return None
    if part == "blocks":
        x, B, mean = integers(M, 192), integers(3, 64, 64, of=1) / 8, integers(2, 192).float()
        for centred in (mean, None):
            rows = (x if centred is None else (x - centred[state.long()]).to(BF16)).float().unflatten(-1, (3, 64))
            want = torch.einsum("mnb,nbc->mnc", rows, B.float()).flatten(-2).to(BF16)
            if not torch.equal(centred_blocks(x, centred, state, B), want):
                return "centred_blocks"
        return None
    n1, n2, first = part
    M, state = 5, state[:5]
    x, P = integers(M, n1 * n2), [integers(n, n, of=1) / 8 for n in (n1, n2)]
    clip, d_m, d_u = torch.tensor([0.9, 0.8], device=device), 24, 40
    y = x.float().unflatten(-1, (n1, n2))
    y = (y @ P[1].float()).to(BF16).float() if first else y
    y = (P[0].float().mT @ y).to(BF16).flatten(-2)
    column = torch.arange(n1 * n2, device=device)
    end = n1 * n2 - torch.where(state, 0, d_u)[:, None]
    y[(column >= end - torch.where(state, d_u, d_m)[:, None]) & (column < end)] = 0
    want = kernels.quantize_rows(y, 4, clip)
    factor = Kronecker(*P) if first else Across(P[0])
    rotated, codes, scale, zero = rotated_codes(part, x, factor, state, d_m, d_u, 4, clip)
    same = torch.equal(codes[:M], want[0]) and torch.equal(scale[:, None], want[1]) and not codes[M:].any()
    rotated, codes, *_ = rotated_codes(part, x, factor, state, d_m, d_u, 4, clip, True)
    return None if same and torch.equal(zero[:, None], want[2].int()) and torch.equal(rotated, y) else "rotated_codes"
