"""The CUDA kernels as functions: passes over activations, and products.

Why they are here
    PyTorch's operations would walk over the activations about ten times to quantize them and again after the product.
    On a GPU these walks cost more than the integer product saves. Every kernel here reads its input from memory once
    (a second look finds it in a cache) and writes its output once. `checks.py` compares each with its readable twin
    once per device; `products.py` chooses among products.

The kernels and their readable twins
    quantize_rows    the gate of a token's state, its range, scale, zero point and codes: `kernels.quantize_rows`
    centred_blocks   x less the mean of its token's state, times blocks of 64 (starquant+): `starquant.Blocks`
    rotated_codes    a Kronecker or an Across factor and then `quantize_rows`
    feedback         codes rounded by feedback (starquant+): `cpu.feedback_codes`
    tac              Eq. 17 for blocks of 16: `starquant.tac_apply`
    rms_norm, rope, silu_up   what both models do between their linears ("glue"): `model.py`
    gptq_columns     the inner loop of GPTQ, for calibration: `methods/gptq.py`
    rounding_losses  the search for a weight's scales, for calibration: `methods/gptq.py`
    fake_quantize, fake_quantize_gradient   Q(x) and its gradient, for training: `starquant.FakeQuantize`
    tiled_product, grouped_product   codes times packed weights and `epilogue` at once: `kernels.int_linear`
    unpack_int4, epilogue     what stands before and after `torch._int_mm`, the readable product
    unpack_e4m3, add_ends     the same for `torch._scaled_mm`: fp8 numbers hold 4-bit codes exactly

How they are made
    Kernels of integers agree with their twins bit for bit, because they use the same IEEE operations in the same order.
    Kernels that sum real numbers have another order. The sources are plain CUDA C++ without headers, compiled at first
    use with the NVRTC library that PyTorch ships: neither nvcc nor Triton is needed. Inside a CUDA graph nothing is
    allocated, and the cost of a launch (some 10 us from Python) is gone.
"""

import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

import kernels

THREADS = 256
TAC_BLOCK = 16
FEEDBACK_BLOCK = 64  # the only size that the kernel serves: a token's block lies in the registers of one thread
GPTQ_BLOCK = 32  # columns that a thread of gptq_columns has in its registers
AT_ONCE = 8  # scales that a thread of rounding_losses tries on a weight that it has read
ROW_THREADS = 512  # of a row in training: few rows are at work, so that a second pass over them finds them in a cache
SOURCE, PRODUCTS_SOURCE = (Path(__file__).parent / name for name in ("kernels.cu", "products.cu"))
# Compiled together. The unrolled loops of feedback take seconds; tac and blocks need tensor cores as sm_80 has them.
PARTS = {"linear": ("quantize_rows", "unpack_int4", "epilogue"), "feedback": ("feedback",), "tac": ("tac",),
         "glue": ("rms_norm", "rope", "silu_up"), "blocks": ("centred_blocks",), "gptq": ("gptq_columns",),
         "scales": ("rounding_losses",), "training": ("fake_quantize", "fake_quantize_gradient"),
         "fp8": ("unpack_e4m3", "add_ends")}
ORDERS = ("plain", "paired", "e4m3")  # of codes
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}


class Tile(NamedTuple):
    """Sizes of `tiled_product`: a CUDA block multiplies TM tokens by TN outputs, TK channels at a time, with STAGES
    such tiles on their way. A warp has WM x WN of the tile, and RESIDENT blocks share a multiprocessor. With NIBBLES,
    for Ampere and Ada, tensor cores multiply codes of 4 bits instead of bytes, twice as fast. With GROUPS, for Hopper,
    that many warp groups share TN outputs instead; then TM is a multiple of 128, and TK is 128."""

    TM: int
    TN: int
    TK: int = 128
    STAGES: int = 4
    WM: int = 32
    WN: int = 32
    RESIDENT: int = 2
    NIBBLES: int = 0
    GROUPS: int = 0

    @property
    def kernel(self) -> str:
        return "grouped_product" if self.GROUPS else "tiled_product"

    @property
    def threads(self) -> int:
        return 128 * self.GROUPS if self.GROUPS else self.TM // self.WM * (self.TN // self.WN) * 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory; tiles of groups begin at a multiple of 1024."""
        return self.STAGES * (self.TM * self.TK + self.TN * self.TK // 2) + (1024 if self.GROUPS else 0)


class Before(NamedTuple):
    """What a linear's input passes first: a norm with the gain (K,) and eps where there is a gain, else silu(gate) up
    of 2 K channels."""

    gain: torch.Tensor | None = None
    eps: float = 0.0

    def __call__(self, x):
        return silu_up(x) if self.gain is None else rms_norm(x, self.gain, self.eps)


class Rotation(NamedTuple):
    """Sizes of `rotated_codes`: a token is a matrix (N1, N2); FIRST is 1 where P2 multiplies it, too. Then a token may
    pass a norm (BEFORE is 1) or silu(gate) up (2) first."""

    N1: int
    N2: int
    FIRST: int
    BEFORE: int = 0
    kernel = "rotated_codes"

    @property
    def RESIDENT(self) -> int:
        """CUDA blocks that share a multiprocessor. So many leave 80 or 96 registers to a thread."""
        return 5 if self.threads <= 128 else max(1, 768 // self.threads)

    @property
    def threads(self) -> int:
        return kernels.multiple(self.N1, 16) * self.N2 // 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory: P1, P2 and the result of its product, in bf16."""
        rows = kernels.multiple(self.N1, 16)
        return 2 * (rows * (rows + 8) + (self.FIRST * self.N2 + rows) * (self.N2 + 8))


Sizes = Tile | Rotation
# of 24 sizes, those that were the fastest somewhere on an H200 (results/gpu-h200.md); other GPUs have no "grouped"
TILES = {"tiled 32": Tile(32, 128, TK=256), "tiled 128 of 4 bits": Tile(128, 128, WM=64, WN=64, NIBBLES=1),
         "tiled 128": Tile(128, 128, WM=64, WN=64),
         "grouped": Tile(128, 128, GROUPS=2), "grouped deep": Tile(128, 128, GROUPS=2, STAGES=6, RESIDENT=1)}

# ---- compiling -----------------------------------------------------------------------------------------------------


def kernels_of(part: str | Sizes) -> tuple:
    """The names of the kernels that are compiled together."""
    return PARTS[part] if isinstance(part, str) else (part.kernel,)


def source(dtype, *parts: str | Sizes) -> str:
    """The CUDA source of some parts for activations of this dtype."""
    names = {"REAL": TYPES[dtype], "THREADS": THREADS, "FEEDBACK_BLOCK": FEEDBACK_BLOCK, "GPTQ_BLOCK": GPTQ_BLOCK,
             "AT_ONCE": AT_ONCE, "ROW_THREADS": ROW_THREADS}
    for part in parts:
        names |= {part.upper(): ""} if isinstance(part, str) else {
            part.kernel.upper(): "", "RESIDENT": part.RESIDENT, **part._asdict()}
    return "".join(f"#define {name} {value}\n" for name, value in names.items()) + "".join(
        path.read_text(encoding="utf-8") for path in (SOURCE, PRODUCTS_SOURCE))


def _machine_code(dtype, part: str | Sizes, capability: tuple) -> bytes:
    from torch.utils import cpp_extension

    # PyTorch's compiler call asks for the toolkit's folder, which wheel-only installations lack and we never use
    with mock.patch.object(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME or "."):
        name, *_ = kernels_of(part)
        hopper = "a" if name == "grouped_product" else ""  # instructions that only Hopper has
        return torch.cuda._utils._nvrtc_compile(source(dtype, part), name, f"{capability[0]}{capability[1]}{hopper}")[0]


@cache
def _compiled(index: int, dtype, part: str | Sizes) -> dict:
    """The kernels of a part by name: what `torch.cuda._compile_kernel` does for one, for all of a source at once."""
    tools = torch.cuda._utils
    # asked for at every launch, and loading a library takes longer than a small kernel
    if not hasattr(tools._get_gpu_runtime_library, "cache_info"):
        tools._get_gpu_runtime_library = cache(tools._get_gpu_runtime_library)
    with torch.cuda.device(index):
        code = _machine_code(dtype, part, torch.cuda.get_device_capability(index))
        functions = tools._cuda_load_module(code, list(kernels_of(part)))
        if not isinstance(part, str):
            functions[part.kernel].set_shared_memory_config(part.shared)
        return functions


@cache
def _absent(device):
    """A tensor without numbers: its address is null."""
    return torch.empty(0, device=device)


def _launch(name: str, dtype, grid, args, threads: int | None = None, sizes: Sizes | None = None) -> None:
    """Start a kernel on the current stream of its tensors' device; None becomes a null pointer."""
    device, part = args[0].device, sizes or next(part for part, names in PARTS.items() if name in names)
    args = [_absent(device) if arg is None else arg for arg in args]
    with torch.cuda.device(device):
        _compiled(device.index, dtype, part)[name](
            (*grid, *(1,) * (3 - len(grid))), (sizes.threads if sizes else threads or THREADS, 1, 1), args,
            sizes.shared if sizes else 0)


def _bits(number: float) -> int:
    """A launch takes integers: the one that has the bits of an fp32 number."""
    return struct.unpack("i", struct.pack("f", number))[0]


def _blocks(n: int) -> int:
    return -(-n // THREADS)


@cache
def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count



@cache
def shared_memory(device) -> int:
    """Bytes of shared memory that a launch may give a CUDA block: 1 KiB is left to what kernels declare."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10) - 1024

# ---- passes over activations ---------------------------------------------------------------------------------------


def quantize_rows(x, state, d_m: int, d_u: int, bits: int, clip=None, grid_only: bool = False, order: str = "plain"):
    """Gate, clip, quantize: x (M, K) fp32 or bf16, state (M,) bool, or None without gates, clip (2,) fp32 -> codes
    (M rounded up to 32, K) int8, scale (M,), zero (M,) int32; a token with NaN has scale NaN.

    The rows of codes from M on are zero, as `torch._int_mm` wants them. With grid_only the rows before are left for
    `feedback`. The order of codes is what a product takes: "plain", channel by channel; "paired", in every 32 channels
    the even ones before the odd ones (K is a multiple of 32); "e4m3", the fp8 numbers X_c - z_c.
    """
    x, (codes, scale, zero) = x.contiguous(), _empty_codes(*x.shape, x, order)
    _launch("quantize_rows", x.dtype, (len(codes),), [x, state.contiguous() if d_m or d_u else None, codes, scale, zero,
            clip, *x.shape, d_m, d_u, bits, int(grid_only), ORDERS.index(order)])
    return codes, scale, zero


def _empty_codes(M: int, K: int, x, order: str):
    kind = torch.float8_e4m3fn if order == "e4m3" else torch.int8
    return (x.new_empty(kernels.multiple(M, 32), K, dtype=kind), x.new_empty(M, dtype=torch.float32),
            x.new_empty(M, dtype=torch.int32))


def centred_blocks(x, mean, state, B, silu: bool = False):
    """(x - μ_s) times blocks of 64: x (M, K) bf16, mean (2, K) fp32 or None, state (M,), B (K/64, 64, 64) bf16. The
    difference is rounded to bf16 before the product. With silu, x (M, 2 K) becomes silu(gate) up first."""
    (M, K), x = (len(x), 64 * len(B)), x.contiguous()
    out = x.new_empty(M, K)
    down = max(1, min(-(-M // (THREADS // 2)), 6 * _multiprocessors(x.device) * 64 // K))  # two waves
    _launch("centred_blocks", x.dtype, (K // 64, down),
            [x, None if mean is None else state.contiguous(), mean, B, out, M, K, int(silu)])
    return out


def rotated_codes(rotation: Rotation, x, factor, state, d_m: int, d_u: int, bits: int, clip=None, to_y: bool = False,
                  order: str = "plain", before: Before | None = None):
    """y, the product of x (M, K) bf16 and a Kronecker or an Across factor, and the `quantize_rows` of y. With to_y, y
    (M, K) bf16 is returned and only the zeros behind the M-th row of codes are written. Without it, y is None. The
    sizes say which `before` there is."""
    M, K, x, gain, eps = len(x), rotation.N1 * rotation.N2, x.contiguous(), *(before or Before())
    codes, scale, zero = _empty_codes(M, K, x, order)
    P, y = [matrix.contiguous() for matrix in factor], x.new_empty(M, K) if to_y else None
    blocks = min(len(codes), rotation.RESIDENT * _multiprocessors(x.device))
    _launch(rotation.kernel, x.dtype, (blocks,),
            [x, P[0], P[-1], gain, state.contiguous() if d_m or d_u else None, y, codes, scale, zero, clip, M,
             len(codes), d_m, d_u, bits, ORDERS.index(order), _bits(eps)], sizes=rotation)
    return y, codes, scale, zero


def feedback(x, V, scale, zero, codes, bits: int, order: str = "plain"):
    """Round x (M, K) by feedback into codes (≥ M, K): V (K/64, 64, 64) bf16, scale and zero (M,) of `quantize_rows`."""
    (M, K), x = x.shape, x.contiguous()
    _launch("feedback", x.dtype, (_blocks(M), K // FEEDBACK_BLOCK),
            [x, scale, zero, V, codes, M, K, bits, ORDERS.index(order)])


def tac(z, M, bias):
    """Eq. 17 for z (..., C) bf16 with blocks of 16: M (C/16, 16, 16), of which it takes 16 bits, bias (C/16, 16)."""
    z, C = z.contiguous(), z.shape[-1]
    out, rows, across = torch.empty_like(z), z.numel() // C, -(-C // (THREADS // 2))
    walkers = max(1, min(-(-rows // 16), 8 * _multiprocessors(z.device) // across))
    _launch("tac", z.dtype, (walkers, across), [z, M, bias, out, rows, C])
    return out


def gptq_columns(columns, errors, R, scale, bits: int):
    """GPTQ's inner loop: codes (n, C) int8 of columns (n, C) fp64, n ≤ GPTQ_BLOCK. errors (n, C) hold the columns of
    the weight, whose place their errors take. R (n, n), R_ij / R_jj, and scale (C,) are fp64."""
    (n, C), codes, R = columns.shape, torch.empty_like(columns, dtype=torch.int8), R.contiguous()
    _launch("gptq_columns", torch.float32, (-(-C // 64),),
            [columns, errors, R, scale.contiguous(), codes, n, C, bits], 64)
    return codes


def rounding_losses(weight, scales, bits: int, norm: float):
    """`methods.gptq.rounding_losses` without H: weight (C, d), contiguous scales (C, n), both fp32 -> (C, n)."""
    (C, d), n, losses = weight.shape, scales.shape[1], torch.empty_like(scales)
    _launch("rounding_losses", torch.float32, (C, -(-n // AT_ONCE)),
            [weight.contiguous(), scales, losses, d, n, bits, _bits(norm)])
    return losses


def fake_quantize(x, bits: int, symmetric: bool):
    """Q(x) of x (..., K) fp32, K a multiple of 4, and the ends of every row's range (..., 2)."""
    x_hat, ends = torch.empty_like(x), x.new_empty(*x.shape[:-1], 2)
    _launch("fake_quantize", x.dtype, (ends.numel() // 2,), [x, x_hat, ends, x.shape[-1], bits, int(symmetric)],
            ROW_THREADS)
    return x_hat, ends


def fake_quantize_gradient(grad, x, ends, bits: int, symmetric: bool):
    """The gradient of x by grad, that of Q(x)."""
    out = torch.empty_like(x)
    _launch("fake_quantize_gradient", x.dtype, (ends.numel() // 2,),
            [grad, x, ends, out, x.shape[-1], bits, int(symmetric)], ROW_THREADS)
    return out


class FakeQuantize(torch.autograd.Function):
    """`starquant.FakeQuantize` by these two; of what the gradient needs, it keeps x and two numbers of each row."""

    @staticmethod
    def forward(ctx, x, bits, symmetric):
        x, ctx.options = x.contiguous(), (bits, symmetric)
        x_hat, ends = fake_quantize(x, *ctx.options)
        ctx.save_for_backward(x, ends)
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        return fake_quantize_gradient(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None

# ---- products ------------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """What turns the sums of a product into its outputs y (M, N), `finish4` of kernels.cu."""

    scale: torch.Tensor  # (M,) of the tokens
    zero: torch.Tensor  # (M,) int32
    x_sum: torch.Tensor | None  # Σ_k X_c - K z_c, (M,) int32, for asymmetric weights
    w_scale: torch.Tensor  # (N,) of the outputs
    w_sum: torch.Tensor  # (N,) int32
    w_zero: torch.Tensor | None = None  # (N,) int32
    bias: torch.Tensor | None = None  # (N,)
    shift: torch.Tensor | None = None  # the output of the mean of either state, (2, N)
    state: torch.Tensor | None = None  # (M,) bool
    residual: torch.Tensor | None = None  # (M, N) of y's dtype, contiguous: what the rounded outputs are added to

    def columns(self, part: slice) -> "Ends":
        """The ends of a slice of the outputs."""
        return Ends(*(t if t is None or name in ("scale", "zero", "x_sum", "state") else t[..., part]
                      for name, t in self._asdict().items()))


def unpack(packed, out, dtype):
    """Write packed codes (n, K / 2) uint8 into out (n, K), int8 or fp8, which holds them exactly. Both are contiguous,
    and n K is a multiple of 16. The kernel comes from the sources for activations of `dtype`; it is the same in all."""
    name, count = "unpack_int4" if out.dtype == torch.int8 else "unpack_e4m3", packed.numel() // 8
    _launch(name, dtype, (_blocks(count),), [packed, out, count])
    return out


def epilogue(acc, ends: Ends, y):
    """acc (≥ M, n) int32 -> y (M, n), a slice of columns of a contiguous (M, N) fp32 or bf16 matrix."""
    width = acc.shape[1]
    _launch("epilogue", y.dtype, (y.shape[0], _blocks(width // 4)), [acc, *ends, y, width, y.stride(0)])


def add_ends(y, bias, shift, state, residual=None):
    """y (M, N) + bias (N,) + shift (2, N) of every token's state (M,), rounded, + residual (M, N), in y's place."""
    M, N = y.shape
    _launch("add_ends", y.dtype, (M, _blocks(N // 4)), [y, bias, shift, state, residual, N])
    return y


@cache
def _counters(device):
    """Zeros, which `tiled_product` leaves as it found them. Products on two streams at once would share them."""
    return torch.zeros(2**16, dtype=torch.int32, device=device)


def tiled_product(tile: Tile, codes, packed, ends: Ends, y, splits: int | None = None):
    """Write into y (M, N) fp32 or bf16 the `epilogue` of paired codes (rows, K) int8 times packed weights (N, K/2).

    N is a multiple of 16, K of tile.TK, and rows K is below 2³¹. Where the tiles would leave multiprocessors idle,
    `splits` blocks share a tile's channels: as many as fit beside each other with at least 4 steps each.
    """
    (M, N), (rows, K) = y.shape, codes.shape
    across, down = -(-M // tile.TM), -(-N // tile.TN)
    slots = tile.RESIDENT * _multiprocessors(y.device)
    splits = splits or max(1, min(slots // (across * down), K // tile.TK // 4, 16))
    partial = None if splits == 1 else y.new_empty(across * down * splits * tile.TM * tile.TN, dtype=torch.int32)
    _launch(tile.kernel, y.dtype, (across, down, splits),
            [codes, packed, *ends, y, partial, _counters(y.device), M, N, K, rows], sizes=tile)

# ---- glue: what both models do between their linears ---------------------------------------------------------------


def rms_norm(x, gain, eps: float):
    """`model.RMSNorm` of x (..., K) with the gain (K,)."""
    out, K = torch.empty_like(x), x.shape[-1]
    _launch("rms_norm", x.dtype, (x.numel() // K,), [x, gain, out, K, _bits(eps)])
    return out


def rope(qkv, cos, sin, heads: int, h: int):
    """The first `heads` heads of qkv (B, L, n h), turned as by `model.rotate`: (B, heads, L, h), with the memory of
    (B, L, heads, h). cos, sin (L, h) or (B, 1, L, h)."""
    B, L, width = qkv.shape
    out, cos, sin = qkv.new_empty(B, L, heads, h), cos.contiguous(), sin.contiguous()
    _launch("rope", qkv.dtype, (B * L,),
            [qkv, cos, sin, out, cos.numel() // h, heads, width // h, h, int(cos.dtype == torch.float32)])
    return out.transpose(1, 2)


def silu_up(gate_up):
    """silu(gate) up of gate_up (..., 2 F): (..., F)."""
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    _launch("silu_up", out.dtype, (out.numel() // F, _blocks(F // 8)), [gate_up, out, F])
    return out
