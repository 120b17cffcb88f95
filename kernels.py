"""Integers: INT4 packing, per-token quantization, and the INT4 x INT4 linear on `torch._int_mm`.

How INT4 runs on an INT8 product
--------------------------------
PyTorch has no product of 4-bit numbers. It has `torch._int_mm`, which multiplies int8 matrices on the int8 tensor cores
of a GPU (or the int8 dot products of a CPU) and sums in int32. Every 4-bit code is also an int8 number, so that product
computes the sums of Eq. 13 exactly. Four bits are the storage format: two codes share a byte (`pack_int4`), a quarter
of what 16 bits take. They are unpacked before they are multiplied.

What the integers mean
----------------------
A token x and a weight row w stand on their own grids (Eq. 3): x ≈ s_x (X_int − z) and w ≈ s_w (W_int − z_w). Codes of b
bits run from 0 to 2^b − 1, which does not fit an int8 for b = 8, so codes and zero points are stored centred, that is
less 2^(b−1). The differences do not change: X_c − z_x = X_int − z. An output is then

    y = s_x s_w Σ_k (X_c − z_x)(W_c − z_w)
      = s_x s_w (Σ_k X_c W_c  −  z_x Σ_k W_c  −  z_w (Σ_k X_c − K z_x))

The first sum is the integer product. Σ_k W_c belongs to the weight and Σ_k X_c to the token, one number each. Symmetric
weights have z_w = 0 and need no third term. Everything inside the brackets is int32 and exact; the only rounding of a
quantized linear, beside the two quantizers, is the multiplication by the scales.

What `torch._int_mm` wants
--------------------------
It is a private function with strict operands on CUDA: two int8 matrices, the left one (M, K) row-major, the right one
(K, N) column-major, K and N multiples of 8, more than 16 rows, and on Hopper a multiple of 32 of them. A weight stored
as (N, K) is column-major when it is transposed, so it needs no copy. Released versions computed wrong numbers for a
left operand of stride 0 or of fewer than 17 rows. `int_mm` therefore copies the activations into fresh storage, padded
with zeros, which change no sum. Where it is wrong or slow, or refuses a shape, `float_mm` gives the same integers.

This file is for reading and serves every device and shape. What runs is `runtime/cuda.py` and `runtime/cpu.py`, which
fuse the same steps; tests hold their integers to be these.

M, K and N are the sizes of a product: tokens, input channels (d elsewhere), output channels (C elsewhere).
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F

# ---- packing -------------------------------------------------------------------------------------------------------


def pack_int4(codes):
    """Two codes a byte: (N, K) int8 in [-8, 7] -> (N, ⌈K/2⌉) uint8; the even column is the low nibble. ValueError for
    other codes."""
    if codes.dtype != torch.int8 or (codes.numel() and (codes.min() < -8 or codes.max() > 7)):
        raise ValueError("pack_int4 takes int8 codes in [-8, 7].")
    codes = F.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8)
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack_int4(packed, k: int):
    """Inverse of `pack_int4`: (N, ⌈K/2⌉) uint8 -> (N, K) int8, K = k."""
    codes = packed.view(torch.int8)
    # arithmetic shifts extend the sign: codes << 4 >> 4 are the even columns, codes >> 4 the odd ones
    return torch.stack((codes << 4 >> 4, codes >> 4), -1).flatten(-2)[..., :k]


def row_sums(codes, k: int | None = None):
    """Σ_k W_c of every row: (N, K) int8, or packed (N, ⌈K/2⌉) uint8 with K = k, -> (N,) int32."""
    parts = codes.split(1024)  # unpacked at once, an 8B model's largest weight would take a gigabyte
    parts = (unpack_int4(part, k) if part.dtype == torch.uint8 else part for part in parts)
    return torch.cat([part.sum(-1, dtype=torch.int32) for part in parts])


# ---- integer matmul ------------------------------------------------------------------------------------------------


def multiple(n: int, of: int) -> int:
    """The least multiple of `of`, at least one of it, that is not below n."""
    return max(-(-n // of), 1) * of


def int_mm(a, w):
    """Σ_k a_mk w_nk by `torch._int_mm`: a (M, K), w (N, K) int8 -> (M, N) int32; RuntimeError for a refused shape."""
    (M, K), N = a.shape, w.shape[0]
    M32, K16, N16 = multiple(M, 32), multiple(K, 16), multiple(N, 16)  # 16 bytes: vector loads are aligned to them
    rows = torch.zeros(M32, K16, dtype=torch.int8, device=a.device)
    rows[:M, :K] = a
    if (N16, K16) != (N, K) or not w.is_contiguous():
        w = F.pad(w, (0, K16 - K, 0, N16 - N)).contiguous()
    return torch._int_mm(rows, w.t())[:M, :N]


def float_mm(a, w, largest: int = 128 * 128):
    """The same integers by a floating-point product; `largest` bounds |a_mk w_nk|.

    fp32 holds integers up to 2²⁴ and fp64 up to 2⁵³, so that no sum of K products is rounded.
    """
    wide = torch.float32 if a.shape[1] * largest < 2**24 else torch.float64
    return (a.to(wide) @ w.to(wide).t()).to(torch.int32)


# a shape without a kernel: cuBLAS has no algorithm for it, or PyTorch's own checks of sizes fail
REFUSALS = ("NOT_SUPPORTED", "INVALID_VALUE", "needs to be greater than")
_REFUSED = set()  # (device, M, K, N) that were refused


def refuses(error: RuntimeError) -> bool:
    """Whether the error says that a shape is not served. Lost memory and faults of earlier kernels say other things."""
    return any(word in str(error) for word in REFUSALS)


def product(multiply, a, w, largest: int = 128 * 128):
    """multiply(a, w), an integer product such as `int_mm`, or `float_mm` for a shape that it refuses, said once."""
    (M, K), N = a.shape, len(w)
    if (a.device, M, K, N) not in _REFUSED:
        try:
            return multiply(a, w)
        except RuntimeError as error:
            if not refuses(error):
                raise
            _REFUSED.add((a.device, M, K, N))
            warnings.warn(f"torch._int_mm refuses {M} x {K} times {K} x {N} ({str(error).splitlines()[0]}); using the "
                          f"exact float fallback (slower).", stacklevel=2)
    return float_mm(a, w, largest)


@cache
def backend(device_type: str) -> str:
    """"int_mm" or "float": what `int_matmul` uses on this kind of device; "float" where `int_mm` is wrong or slow."""
    if device_type == "cpu" and not torch.cpu._is_vnni_supported():  # no int8 dot products
        return "float"
    fault = self_check(device_type)
    if fault and device_type != "cpu":
        warnings.warn(f"torch._int_mm {fault} on {device_type}; using the exact float fallback (slower).", stacklevel=2)
    return "float" if fault else "int_mm"


def self_check(device_type: str) -> str | None:
    """What is wrong with `int_mm`, or None: it is compared with exact integers of the whole range of int8 for an
    awkward shape, a large even one and one of many tokens. Shapes that it refuses do not count, unless it refuses all.
    """
    g, served = torch.Generator().manual_seed(0), 0
    for M, K, N in ((33, 24, 40), (64, 512, 512), (257, 24, 40)):
        a, w = (torch.randint(-128, 128, size, generator=g, dtype=torch.int8) for size in ((M, K), (N, K)))
        try:
            got = int_mm(a.to(device_type), w.to(device_type)).cpu()
        except RuntimeError as error:
            if not refuses(error):
                if device_type == "cuda":
                    torch.cuda.synchronize()  # an error that ended the CUDA context is raised again, and ends the run
                return f"fails ({str(error).splitlines()[0]})"
            continue
        if not torch.equal(got, float_mm(a, w)):
            return f"gives wrong numbers for {M} x {K} times {K} x {N}"
        served += 1
    return None if served else "refuses every shape of its self-check"


def int_matmul(a, w, largest: int = 128 * 128):
    """Σ_k a_mk w_nk exactly, on any device: a (M, K), w (N, K) int8 -> (M, N) int32; `largest` as in `float_mm`."""
    return product(int_mm, a, w, largest) if backend(a.device.type) == "int_mm" else float_mm(a, w, largest)


# ---- the quantized linear ------------------------------------------------------------------------------------------


def quantize_rows(x, bits: int, clip=None):
    """Each token on its own grid (Eqs. 2-4): x (M, K) -> codes (M, K) int8, scale and zero (M, 1) fp32, both codes and
    zero centred.

    The integers are those of `starquant.quantize` less 2^(b−1). clip (2,) shrinks the range of every token: its minimum
    by the first factor, its maximum by the second.
    """
    levels, half, x = 2**bits - 1, 2 ** (bits - 1), x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)  # (M, 1)
    if clip is not None:
        low, high = torch.maximum(low, low * clip[0]), torch.minimum(high, high * clip[1])
        x = torch.minimum(torch.maximum(x, low), high)
    steps = x.new_full((), levels)  # a tensor: CUDA multiplies by the reciprocal of a Python number, one ulp off
    # s = (X_max − X_min) / (2ᵇ − 1)
    scale = (high / steps - low / steps).clamp_min(torch.finfo(torch.float32).tiny)
    # z = ⌊−X_min / s⌉ − 2^(b−1)
    zero = torch.round(-low / scale) - half
    # X_c = clamp(⌊X / s⌉ + z, −2^(b−1), 2^(b−1) − 1)
    return (x / scale).round_().add_(zero).clamp_(-half, levels - half).to(torch.int8), scale, zero


def scaled_product(codes, scale_x, zero_x, weight, scale_w, zero_w=None, sum_w=None, largest: int = 128 * 128):
    """The product of dequantized tokens and weights (Eq. 3 for both), its sums in exact integers: (M, N) fp32.

    codes (M, K), scale_x and zero_x (M, 1) of `quantize_rows`; weight (N, K) int8 centred codes; scale_w (N,) fp32;
    zero_w (N,) int32, centred, or None for symmetric weights; sum_w (N,): `row_sums` of the weight, where they are
    known; `largest` as in `float_mm`.
    """
    zero_x = zero_x.to(torch.int32)
    # Σ_k (X_c − z_x) W_c = Σ_k X_c W_c − z_x Σ_k W_c
    sums = int_matmul(codes, weight, largest) - zero_x * (row_sums(weight) if sum_w is None else sum_w)  # (M, N) int32
    if zero_w is not None:
        # − z_w Σ_k (X_c − z_x)
        sums -= (row_sums(codes)[:, None] - codes.shape[1] * zero_x) * zero_w
    # Y = s_x s_w Σ_k (X_c − z_x)(W_c − z_w)
    return sums.float() * scale_x * scale_w


@torch.no_grad()  # rounding has no gradient
def int_linear(x, weight, scale_w, bits: int, zero_w=None, bias=None, clip=None):
    """Eq. 13 in exact integers: transformed activations x (M, K) -> (M, N) fp32.

    weight (N, K) int8 codes, or packed (N, ⌈K/2⌉) uint8; bias (N,); bits and clip of `quantize_rows`; the rest as in
    `scaled_product`. A token with NaN comes out as NaN.
    """
    weight = unpack_int4(weight, x.shape[1]) if weight.dtype == torch.uint8 else weight
    y = scaled_product(*quantize_rows(x, bits, clip), weight, scale_w, zero_w)
    return y if bias is None else y + bias
