"""Integers: INT4 packing, per-token quantization, and the int4 x int4 linear on `torch._int_mm`.

How it works. A quantized linear (Eq. 13) needs Σ_k (X_int − z)_mk · W_int,nk. Both factors are integers of at most
8 bits, so the sum runs on int8 tensor cores (`torch._int_mm`, int8 x int8 -> int32) exactly; 4 bit is the storage
format. Codes are kept centred, X_c = X_int − 2^(b−1), so that every code of up to 8 bits fits an int8:

    Ŷ = s_x s_w (X_c − z_c)(W_c − zw_c)ᵀ
      = s_x s_w (X_c W_cᵀ − z_c rowsum(W_c) − rowsum(X_c) zw_c + K z_c zw_c)        symmetric weights: zw_c = 0

One integer matmul, one rank-one correction by precomputed row sums, two scales.

Packed weights are unpacked in slices, by two byte-wise operations into a scratch that stays in the caches: one code of
a byte shifted into its upper half, the other left there. Four bits in the upper half are 16 times their signed value,
so the sums are shifted back by 4. Both codes of a byte end up half a row apart; the activations' channels are put in
the same order instead.

Layout contract of `torch._int_mm` (self, mat2), private and strict on CUDA: 2-D int8, M a multiple of 32 (Hopper),
K and N multiples of 8 (16 here, the 16 bytes that vector loads are aligned to), self row-major, mat2 column-major. A
weight kept as [N, K] contiguous gives mat2 = w.t() with strides (1, K), no copy. Operands with stride 0 or fewer than
17 rows have been silently wrong in released versions, so A is always copied into fresh padded storage (zero rows and
columns are exact) and one self-check against exact integers runs before the first use on a device; if it fails, or a
shape is refused later, the exact fallback below serves, and, on a GPU, says so once. A CPU reorders mat2 at every call,
so there, for few tokens, the weight is self and the activations, transposed once for all slices, are mat2.

This file is the readable version, any device and any shape. On a GPU `cuda_kernels.py` does the same with the passes
fused; the integers are the same.

Exact fallback: an fp32 matmul of integer codes is exact while K · max|a| · max|w| < 2²⁴ (4-bit codes: K < 262144), an
fp64 one below 2⁵³. A CPU with int8 dot products (AVX512-VNNI) runs `_int_mm` several times as fast as fp32. On others
it is many times slower, or inexact, because it sums in 16 bits, which the self-check sees. `backend` names what serves.
"""

import time
import warnings
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange

SLICE = 2**22  # weights at a time: what is unpacked, and its part of the output, stays in the caches
PIECE = 2**19  # activations at a time, on a CPU: a dozen passes go over them


def by_rows(function, *tensors):
    """function(tensors), a tensor or several with a row for each of theirs: on a CPU piece by piece."""
    rows = max(PIECE // max(tensors[0].shape[-1], 1), 1)
    if tensors[0].device.type != "cpu" or len(tensors[0]) <= rows:
        return function(*tensors)
    pieces = [function(*piece) for piece in zip(*(t.split(rows) for t in tensors), strict=True)]
    return torch.cat(pieces) if torch.is_tensor(pieces[0]) else tuple(map(torch.cat, zip(*pieces, strict=True)))


# ---- packing -------------------------------------------------------------------------------------------------------


def pack_int4(codes):
    """Two codes a byte: (N, K) int8 in [-8, 7] -> (N, ⌈K/2⌉) uint8; the even column is the low nibble."""
    if codes.dtype != torch.int8 or (codes.numel() and (codes.min() < -8 or codes.max() > 7)):
        raise ValueError("pack_int4 takes int8 codes in [-8, 7].")
    codes = F.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8)
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack_int4(packed, k: int):
    """Inverse of `pack_int4`: (N, ⌈K/2⌉) uint8 -> (N, K) int8, by two arithmetic shifts.

    Both codes of a byte are put together as an int16, so that no write skips a byte (twice as fast on a CPU).
    """
    p = packed.contiguous().view(torch.int8)
    both = (p >> 4).to(torch.int16) << 8
    both |= (p << 4 >> 4).to(torch.int16) & 255  # the lower byte comes first in memory
    return both.view(torch.int8)[..., :k]


def unpack_halves(packed, out):
    """16 times the codes in two halves, even columns and odd ones: (N, K/2) uint8 -> out (N, K) int8.

    With activations of 8 bits the sums of 16-fold codes stay within int32 for K < 2¹⁷.
    """
    even, odd = out.view(torch.uint8).chunk(2, -1)
    torch.bitwise_left_shift(packed, 4, out=even)
    torch.bitwise_and(packed, 240, out=odd)
    return out


def halves(codes):
    """The columns of codes (M, K) in the order of `unpack_halves`, (M, 2⌈K/2⌉)."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return torch.cat((codes[:, 0::2], codes[:, 1::2]), -1)


def row_sums(codes, k: int | None = None):
    """rowsum(W_c): (N, K) int8, or packed (N, ⌈K/2⌉) uint8 with k = K, -> (N,) int32, in pieces that stay in the
    caches."""
    parts = codes.split(max(SLICE // max(codes.shape[1], 1), 1))
    parts = (unpack_int4(part, k) if part.dtype == torch.uint8 else part for part in parts)
    return torch.cat([part.sum(-1, dtype=torch.int32) for part in parts])


# ---- integer matmul ------------------------------------------------------------------------------------------------


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def weights_first(device, M: int) -> bool:
    """Whether the weight is the first operand of `_int_mm`, whose second one a CPU reorders at every call.

    For more tokens than this it is read more often than reordered, and the result would have to be transposed.
    """
    return device.type == "cpu" and M <= 256


def padded(a):
    """a (M, K) int8 as an operand of `_int_mm`: (⌈M⌉32, ⌈K⌉16) in fresh storage with true strides, or that transposed
    (`weights_first`)."""
    M, K = a.shape
    rows = torch.zeros(_multiple(max(M, 32), 32), _multiple(max(K, 16), 16), dtype=torch.int8, device=a.device)
    rows[:M, :K] = a
    return rows.t().contiguous() if weights_first(a.device, M) else rows


def int_mm(a, w, operand=None):
    """Σ_k a_mk w_nk in int32 by `torch._int_mm`: a (M, K), w (N, K) int8 -> (M, N); operand: `padded(a)`, if it is
    needed more than once."""
    (M, K), N = a.shape, w.shape[0]
    K16, N16 = _multiple(max(K, 16), 16), _multiple(max(N, 16), 16)
    operand = padded(a) if operand is None else operand
    if (K16, N16) != (K, N) or not w.is_contiguous():
        w = F.pad(w, (0, K16 - K, 0, N16 - N)).contiguous()
    if weights_first(a.device, M):
        return torch._int_mm(w, operand).t()[:M, :N]
    return torch._int_mm(operand, w.t())[:M, :N]


def float_mm(a, w, largest: int = 128 * 128):
    """The same integers through a floating-point matmul wide enough to be exact; `largest` bounds |a_mk · w_nk|, of
    16-fold codes (`unpack_halves`) those of the codes: multiples of 16 are exact 16 times as far."""
    wide = torch.float32 if a.shape[1] * largest < 2**24 else torch.float64
    return (a.to(wide) @ w.to(wide).t()).to(torch.int32)


_REFUSED = set()  # (device, M, K, N) for which there is no integer product
REFUSALS = ("NOT_SUPPORTED", "INVALID_VALUE", "Expected")  # of cuBLAS, which has no algorithm, and of PyTorch's checks


def product(multiply, a, w, largest: int = 128 * 128):
    """multiply(a, w), an integer product, or the exact fallback for a shape that it refuses, said once for each."""
    (M, K), N = a.shape, len(w)
    if (a.device, M, K, N) not in _REFUSED:
        try:
            return multiply(a, w)
        except RuntimeError as error:
            if not any(word in str(error) for word in REFUSALS):
                raise  # out of memory, or what an earlier kernel left
            _REFUSED.add((a.device, M, K, N))
            warnings.warn(f"torch._int_mm refuses {M} x {K} times {K} x {N} ({str(error).splitlines()[0]}); using the "
                          f"exact float fallback (slower).", stacklevel=2)
    return float_mm(a, w, largest)


def _self_check(device) -> bool:
    """`int_mm` against exact integers of the whole range, on a small awkward shape, a large even one and one of many
    tokens, once per device."""
    g = torch.Generator().manual_seed(0)
    try:
        for M, K, N in ((33, 24, 40), (64, 512, 512), (257, 24, 40)):
            a, w = (torch.randint(-128, 128, s, generator=g, dtype=torch.int8) for s in ((M, K), (N, K)))
            if not torch.equal(int_mm(a.to(device), w.to(device)).cpu(), float_mm(a, w)):
                return False
    except RuntimeError:
        return False
    return True


def _seconds(calls) -> list[float]:
    """The least time of each call in five rounds, in turn, after one that warms up."""
    rounds = []
    for _ in range(6):
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        rounds.append([after - before for before, after in pairwise(times)])
    return [min(times) for times in zip(*rounds[1:], strict=True)]


@cache
def backend(device_type: str) -> str:
    """"int_mm" or "float": what `int_matmul` uses on this kind of device."""
    if device_type == "cpu":
        # large enough to tell them clearly apart, and so small that `float_mm` takes fp32
        a, w = (torch.ones(n, 1008, dtype=torch.int8) for n in (64, 1008))
        wide = w.float()
        if not _self_check("cpu"):
            return "float"
        integer, floating = _seconds([lambda: int_mm(a, w), lambda: float_mm(a, wide)])
        return "int_mm" if integer < floating else "float"
    if not _self_check(device_type):
        warnings.warn(f"torch._int_mm fails its self-check on {device_type}; using the exact float fallback (slower).",
                      stacklevel=2)
        return "float"
    return "int_mm"


def int_matmul(a, w, largest: int = 128 * 128, use: str | None = None, operand=None):
    """Exact integer accumulators X_c W_cᵀ: a (M, K) int8, w (N, K) int8 -> (M, N) int32; operand as for `int_mm`."""
    if (use or backend(a.device.type)) == "int_mm":
        return product(partial(int_mm, operand=operand), a, w, largest)
    return float_mm(a, w, largest)


# ---- the quantized linear ------------------------------------------------------------------------------------------


def quantize_rows(x, bits: int, clip=None, feedback=None):
    """Per-token asymmetric quantization (Eqs. 2-4), centred: x (M, K) -> codes (M, K) int8, scale, zero (M, 1) fp32.

    The same integers as `starquant.quantize` minus 2^(bits-1); one expression per pass over the data. clip (2,) narrows
    the range of every token (`clip_range`); feedback (n, b, b) rounds by feedback within it (`feedback_codes`).
    """
    levels, half, x = 2**bits - 1, 2 ** (bits - 1), x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if clip is not None:  # to what `clip_range` leaves
        low, high = torch.maximum(low, low * clip[0]), torch.minimum(high, high * clip[1])
    steps = x.new_full((), levels)  # a tensor: CUDA multiplies by the reciprocal of a Python number, one ulp off
    scale = (high / steps - low / steps).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.round(-low / scale) - half
    if feedback is not None:
        return feedback_codes(x, scale, zero, feedback, bits), scale, zero
    x = x if clip is None else torch.minimum(torch.maximum(x, low), high)
    return (x / scale).round_().add_(zero).clamp_(-half, levels - half).to(torch.int8), scale, zero


def token_codes(x, bits: int, clip=None, feedback=None):
    """`quantize_rows`, by pieces but for feedback, whose steps are short already."""
    if feedback is not None:
        return quantize_rows(x, bits, clip, feedback)
    return by_rows(partial(quantize_rows, bits=bits, clip=clip), x)


def fake_quantize_rows(x, bits: int, clip=None, feedback=None):
    """s (X_c − z) of `quantize_rows`, the activations that the integers stand for: x (..., K) -> (..., K) fp32."""
    codes, scale, zero = quantize_rows(x.reshape(-1, x.shape[-1]), bits, clip, feedback)
    return (scale * (codes - zero)).reshape(x.shape)


def feedback_codes(x, scale, zero, feedback, bits: int):
    """Codes (M, K) int8 of x (M, K) fp32 on the grid of `quantize_rows` (scale, zero (M, 1)), rounded by feedback.

    Channel after channel of a block, for all tokens and blocks at once and in units of their steps: what one channel
    loses to rounding (and to clipping) changes the channels of its block that are still open, as `feedback.py` says.
    feedback (n, b, b) bf16, of which the part above the diagonal counts. Errors are rounded to bf16, too: a product of
    two bf16 numbers is exact in fp32, so that a fused multiply-add and a product with a subtraction give the same bits
    on every device.
    """
    u, zero = rearrange(x, "m (n b) -> b n m", n=len(feedback)).clone(memory_format=torch.contiguous_format), zero.mT
    u /= scale.mT
    V = rearrange(feedback.float(), "n i j -> i j n 1")
    low, high = -(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero
    for i in range(len(V)):
        # r = clamp(⌊u_i⌉),  e = u_i − r,  u_j ← u_j − e V_ij, j > i
        r = torch.round(u[i]).clamp_(low, high)
        e = (u[i] - r).to(torch.bfloat16).float()
        u[i + 1 :].addcmul_(e, V[i, i + 1 :], value=-1)
        u[i] = r
    # X_c = r + z
    return rearrange(u.add_(zero), "b n m -> m (n b)").to(torch.int8)


@torch.no_grad()  # rounding has no gradient
def int_linear(x, weight, weight_scale, weight_sum, bits: int, weight_bits: int, bias=None, weight_zero=None,
               use: str | None = None, clip=None, feedback=None, shift=None, state=None, dtype=torch.float32):
    """The integer path of Eq. 13: x (M, K) transformed activations -> (M, N), rounded to dtype at the end.

    weight (N, K) int8 centred codes or (N, ⌈K/2⌉) uint8 packed ones, weight_scale (N,) fp32, weight_sum (N,) int32 =
    rowsum of the codes, weight_zero (N,) int32 or None for symmetric weights; clip and feedback as in `quantize_rows`;
    shift (2, N), added to tokens by their state (M,) bool. A token with NaN comes out as NaN.
    """
    (M, K), N = x.shape, len(weight)
    codes, scale, zero = token_codes(x, bits, clip, feedback)
    y, zero, packed = x.new_empty(M, N, dtype=dtype), zero.to(torch.int32), weight.dtype == torch.uint8
    if weight_zero is not None:
        # rowsum(X_c) − K z_c
        x_sum = codes.sum(-1, keepdim=True, dtype=torch.int32) - K * zero
    use, codes = use or backend(x.device.type), halves(codes) if packed else codes
    operand = padded(codes) if use == "int_mm" else None
    size = SLICE if x.device.type == "cpu" else 16 * SLICE  # fewer launches
    width = max(size // max(K, 1) // 16 * 16, 16)  # as `int_mm` wants them, without a copy
    scratch = codes.new_empty(min(width, N), codes.shape[1]) if packed else None
    for part in (slice(n, min(n + width, N)) for n in range(0, N, width)):
        w = unpack_halves(weight[part], scratch[: part.stop - part.start]) if packed else weight[part]
        acc = int_matmul(codes, w, 2 ** (bits + weight_bits - 2), use, operand)
        if packed:
            acc >>= 4
        # X_c W_cᵀ − z_c rowsum(W_c): exact in int32
        acc.addcmul_(zero, weight_sum[part], value=-1)
        if weight_zero is not None:
            # − rowsum(X_c) zw_c + K z_c zw_c = − Σ_k (X_c − z_c) zw_c
            acc.addcmul_(x_sum, weight_zero[part], value=-1)
        out = acc.float().mul_(scale).mul_(weight_scale[part])
        if bias is not None:
            out += bias[part]
        if shift is not None:
            out += torch.where(state[:, None], shift[1, part], shift[0, part])
        y[:, part] = out
    return y
