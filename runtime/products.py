"""Which product serves a quantized linear on a GPU, and the whole way of a token through it.

`linear` is what `QuantLinear.forward` calls. It makes codes (`codes`: centring, transform, gates, rounding) and
multiplies them by the weight (`ways`). Four products do the same:

    tiled, grouped    INT4 weights read once and unpacked in registers, the epilogue inside; from few tokens to many
    fp8               codes of 4 bits as fp8 numbers, which is exact, on `torch._scaled_mm`
    slices            `torch._int_mm` and `epilogue`: the readable one, which always serves

`fastest` times those that serve a shape when it is first met, and keeps the fastest. The kernels are in `cuda.py`,
and `checks.py` says whether they may be used.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

import kernels
from runtime import checks, cuda
from runtime.processes import batches
from starquant import Across, Blocks, Kronecker, apply_basis


def slice_width(M: int, N: int, K: int, packed: bool, device) -> int:
    """Columns per slice. Their int32 sums fit a quarter of the L2 cache, and so do their unpacked weights, but they
    are enough to keep every multiprocessor busy with a tile of 128 x 128."""
    machine = torch.cuda.get_device_properties(device)
    cached, wave = machine.L2_cache_size // 4, machine.multi_processor_count * 128 * 128
    width = max(min(cached // (4 * M), cached // K if packed else N), wave // M)
    return min(N, max(256, width // 256 * 256))


class Way(NamedTuple):
    """A product of a linear: its order of codes (`quantize_rows`); multiply(layer, codes, ends, y) fills y (M, C)."""

    name: str
    order: str
    multiply: Callable


def serves(layer, x) -> bool:
    """Whether the kernels serve a QuantLinear and x, or what x becomes before it: `checks.usable`, d and C multiples of
    16, feedback of 64."""
    V = layer.feedback
    return (layer.in_features % 16 == len(layer.weight_scale) % 16 == 0
            and (V is None or V.shape[-1] == cuda.FEEDBACK_BLOCK)
            and checks.usable(x, "linear", *(() if V is None else ("feedback",))))


def linear(layer, x, state, before: cuda.Before | None = None, residual=None):
    """Eq. 13: x (..., d), state (...) or None -> (..., C) in x's dtype, by the fastest product of the shape. x passes
    `before` first; a residual (..., C) is added to the result."""
    state = None if state is None else state.flatten().contiguous()
    x, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]  # (M, d), or (M, 2 d) where SiLU comes before
    x, P, before = entered(layer, x, state, before)
    y = x.new_empty(len(x), len(layer.weight_scale))
    residual = None if residual is None else residual.reshape(y.shape)

    @cache  # for all products that take this order
    def taken(order):
        """Codes, and what every product ends with."""
        X_c, scale, zero = rounded(layer, x, P, before, state, order)
        # rowsum(X_c) - K z_c = Σ_k (X_c - z_c), only for asymmetric weights
        x_sum = None if layer.weight_zero is None else X_c[: len(x)].sum(-1, dtype=torch.int32) - X_c.shape[1] * zero
        return X_c, cuda.Ends(scale, zero, x_sum, layer.weight_scale, layer.weight_sum, layer.weight_zero, layer.bias,
                              layer.shift, state, residual)

    calls = {way.name: partial(lambda way: way.multiply(layer, *taken(way.order), y), way) for way in ways(layer, x)}
    calls[fastest(calls, (x.device, x.dtype, kernels.multiple(len(x), 32), y.shape[1], layer.in_features,
                          layer.packed))]()
    return y.reshape(*lead, -1)


def codes(layer, x, state, order: str = "plain", before: cuda.Before | None = None):
    """What a product takes: codes, scales and zero points of (x - μ_s) P, gated, as `cuda.quantize_rows` returns them.
    x (M, d), state (M,). They are rounded by feedback where the layer has it, in as few passes as possible."""
    return rounded(layer, *entered(layer, x, state, before), state, order)


def entered(layer, x, state, before: cuda.Before | None):
    """The first pass of `codes`, which does not depend on their order: x, the factors of P that are left, and `before`
    if it is still to be done. The kernel for blocks of 64 does SiLU. The one for a Kronecker rotation, which `rounded`
    starts, does SiLU or a norm. Where neither can, what comes before is done here by itself."""
    P, mean = layer.basis(x), layer.mean
    blocks = (P and isinstance(P[0], Blocks) and P[0].B.shape[-1] == 64
              and checks.ready(x.device.index, x.dtype, "blocks"))
    if before and (before.gain is not None if blocks else mean is not None or not rotation_of(x, P, before)):
        x, before = before(x), None
    if blocks:
        return cuda.centred_blocks(x, mean, state, P[0].B, before is not None), P[1:], None
    return x if mean is None else (x - mean[state.long()]).to(x.dtype), P, before


def rounded(layer, x, P: list, before: cuda.Before | None, state, order: str):
    """The other passes of `codes`."""
    given, V = (state, layer.d_m, layer.d_u, layer.abits, layer.clip, layer.feedback is not None, order), layer.feedback
    if rotation := rotation_of(x, P, before):
        x, integers, scale, zero = cuda.rotated_codes(rotation, x, P[0], *given, before)
    else:
        x = apply_basis(x, P)
        integers, scale, zero = cuda.quantize_rows(x, *given)
    if V is not None:
        cuda.feedback(x, V, scale, zero, integers, layer.abits, order)
    return integers, scale, zero


def rotation_of(x, P: list, before: cuda.Before | None = None) -> cuda.Rotation | None:
    """The sizes of `cuda.rotated_codes` for rows x (M, K), which pass `before`, and the factors P, or None where it
    does not serve."""
    if x.dtype != torch.bfloat16 or len(P) != 1 or not isinstance(P[0], Kronecker | Across):
        return None
    factor, kronecker, M = P[0], isinstance(P[0], Kronecker), len(x)
    n1, n2 = len(factor[0]), len(factor.P2) if kronecker else 64
    fits = n2 in (64, 128) if kronecker else before is None and x.shape[1] == 64 * n1
    # for many wide rows two passes are faster, also across many blocks (results/gpu-h200.md)
    fits = fits and (M <= 256 or (n1 <= 128 and (n1 * n2 <= 8192 or M <= 1024)))
    sizes = cuda.Rotation(n1, n2, int(kronecker), 0 if before is None else 2 if before.gain is None else 1)
    fits = fits and sizes.threads <= 1024 and sizes.shared <= cuda.shared_memory(x.device)
    return sizes if fits and checks.ready(x.device.index, x.dtype, sizes) else None


def ways(layer, x) -> list[Way]:
    """The products that serve a layer and rows x (M, ...); the last one always does. Where fp8 products serve unpacked
    weights, these become fp8 numbers, once for all; they take a byte each, as before."""
    M, K, index, found = x.shape[0], layer.in_features, x.device.index, []
    if layer.packed and x.is_cuda and M * K < 2**31:
        found += [Way(name, "paired", partial(_by_tiles, tile)) for name, tile in cuda.TILES.items()
                  if K % tile.TK == 0 and suits(tile, M, torch.cuda.get_device_capability(index))
                  and layer.abits <= (4 if tile.NIBBLES else 8) and checks.ready(index, x.dtype, tile)]
    if (max(layer.abits, layer.wbits) <= 4 and layer.weight_zero is None and K % 32 == 0 and x.dtype == torch.bfloat16
            and x.is_cuda and fp8_is_exact(index)):
        if not layer.packed:
            layer.weight_packed = layer.weight_packed.to(torch.float8_e4m3fn)
        found.append(Way("fp8", "e4m3", _by_fp8))
    return [*found, Way("slices", "plain", _in_slices)]


def suits(tile: cuda.Tile, M: int, capability: tuple) -> bool:
    """Whether a tile is worth a try: neither mostly empty nor read again and again, on a GPU with its instructions."""
    works = (capability == (9, 0) if tile.GROUPS else (8, 0) <= capability < (9, 0) if tile.NIBBLES
             else capability >= (8, 0))
    return works and (tile.TM <= 32 or tile.TM <= 2 * M) and (tile.TM >= 128 or M <= 4 * tile.TM)


def _by_tiles(tile, layer, codes, ends, y):
    cuda.tiled_product(tile, codes, layer.weight_packed, ends, y)


def _in_slices(layer, codes, ends, y):
    """`torch._int_mm` and `epilogue`, along N slice by slice: the readable way, of any shape and of up to 8 bits."""
    N, K = y.shape[1], layer.in_features
    width = slice_width(len(codes), N, K, layer.packed, y.device)
    scratch = torch.empty(width, K, dtype=torch.int8, device=y.device) if layer.packed else None
    for part in batches(N, width):
        w = layer.weight_packed[part]
        w = cuda.unpack(w, scratch[: len(w)], y.dtype) if layer.packed else w.to(torch.int8)
        acc = kernels.product(lambda a, w: torch._int_mm(a, w.t()), codes, w, 2 ** (layer.abits + layer.wbits - 2))
        cuda.epilogue(acc, ends.columns(part), y[:, part])


def _by_fp8(layer, codes, ends, y):
    """Y = s_x s_w Σ_k (X_c - z_c) W_c on fp8 tensor cores, exactly, and bias and shift behind y's rounding."""
    weight = layer.weight_packed
    if layer.packed:
        weight = cuda.unpack(weight, codes.new_empty(len(weight), layer.in_features), y.dtype)
    fp8_product(codes[: len(y)], weight, ends.scale, ends.w_scale, y)
    if any(end is not None for end in (ends.bias, ends.shift, ends.residual)):
        cuda.add_ends(y, ends.bias, ends.shift, ends.state, ends.residual)


def fp8_product(codes, weight, scale, w_scale, y):
    """y (M, N) bf16 = scale (M,) w_scale (N,) Σ_k codes (M, K) weight (N, K), both e4m3, by cuBLAS. Products of numbers
    up to 15 and up to 8 are exact, and so are their sums in fp32 without fast accumulation."""
    torch._scaled_mm(codes, weight.t(), scale_a=scale[:, None], scale_b=w_scale[None], out_dtype=y.dtype,
                     use_fast_accum=False, out=y)


@cache
def fp8_is_exact(index: int) -> bool:
    """Whether this GPU has fp8 tensor cores whose sums equal integers, also the largest: tried once."""
    if not checks.ready(index, torch.bfloat16, "fp8"):
        return False
    device, g = torch.device("cuda", index), torch.Generator().manual_seed(0)
    a, w = torch.randint(-15, 16, (33, 12288), generator=g), torch.randint(-8, 8, (528, 12288), generator=g)
    a[0], w[0] = 15, -8
    a, w, y = a.to(device).float(), w.to(device).float(), torch.empty(33, 528, dtype=torch.bfloat16, device=device)
    try:
        fp8_product(*(t.to(torch.float8_e4m3fn) for t in (a, w)), torch.ones_like(a[:, 0]), torch.ones_like(w[:, 0]), y)
    except (RuntimeError, AttributeError, TypeError):  # no such call, or no such shape
        return False
    return torch.equal(y, (a.double() @ w.double().t()).bfloat16())


_FASTEST = {}  # (device, ...) -> name of a way


def chosen() -> dict:
    """Which product serves which shape so far: "M x K -> N" and the residency of the weights -> its name."""
    return {f"{M} x {K} -> {N}, {'packed' if packed else 'a byte each'}": name
            for (_, _, M, N, K, packed, _), name in _FASTEST.items()}


def fastest(calls: dict, key: tuple) -> str:
    """The name of the fastest of `calls`, functions that do the same on the device key[0], as timed when the key was
    first met. One that runs out of memory is not taken, unless it is the last one."""
    *others, last = calls
    key = (*key, tuple(calls))  # another layer of the same shape may have other products
    if key in _FASTEST or not others:
        return _FASTEST.get(key, last)
    if torch.cuda.is_current_stream_capturing():
        return last  # nothing can be timed now; a warm-up forward comes before any recording
    seconds = {}
    for name, call in calls.items():
        try:
            seconds[name] = _gpu_seconds(call, key[0])
        except torch.OutOfMemoryError:
            seconds[name] = math.inf
    _FASTEST[key] = min((last, *others), key=seconds.get)
    return _FASTEST[key]


def _gpu_seconds(call, device) -> float:
    """Median seconds of five calls on the GPU alone, which is kept busy until all of them are queued. Before each, the
    L2 cache is overwritten, since in a model the weights come from memory."""
    with torch.cuda.device(device):
        call()
        other = torch.empty(2**27, dtype=torch.uint8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(5)]
        torch.cuda._sleep(10_000_000)  # cycles, some 6 ms
        for start, end in events:
            other.zero_()
            start.record()
            call()
            end.record()
        end.synchronize()
        return sorted(start.elapsed_time(end) for start, end in events)[2] / 1000
