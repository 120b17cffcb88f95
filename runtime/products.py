"""Which product serves a quantized linear on a GPU, and the whole way of a token through it.

`linear` is what `QuantLinear.forward` calls. It makes codes (`codes`: centring, transform, gates, rounding) and
multiplies them by the weight (`ways`). Five products do the same:

    tiled, grouped    INT4 weights read once and unpacked in registers, the epilogue inside; from few tokens to many
    packed_product    the same for few tokens and narrow layers
    fp8               codes of 4 bits as fp8 numbers, which is exact, on `torch._scaled_mm`
    slices            `torch._int_mm` and `epilogue`: the readable one, which always serves

`fastest` times those that serve a shape when it is first met, and keeps the fastest. The kernels are in `cuda.py`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

import kernels
from runtime import cuda
from starquant import Blocks, apply_basis

FEW = 256  # tokens up to which packed_product is tried
L2_BYTES = 16 * 2**20  # of int32 accumulators, and of unpacked weights, in flight at a time
WAVE = 132 * 128 * 128  # of the product's elements that an H100 or H200 works on at once, a tile each multiprocessor


def slice_width(M: int, N: int, K: int, packed: bool) -> int:
    """Columns per slice: accumulators (and unpacked weights) within L2_BYTES, but enough to keep the GPU busy."""
    width = max(min(L2_BYTES // (4 * M), L2_BYTES // K if packed else N), WAVE // M)
    return min(N, max(256, width // 256 * 256))


def few(x, N: int) -> bool:
    """Whether `packed_product` serves activations x (M, K) and N outputs."""
    M, K = x.shape
    return x.is_cuda and M <= FEW and K % 128 == 0 and N % 32 == 0 and cuda.ready(x.device.index, x.dtype, "packed")


class Way(NamedTuple):
    """A product of a linear: the order in which it takes codes (`quantize_rows`), and
    multiply(layer, codes, scale, zero, y, state), which fills y (M, C)."""

    name: str
    order: str
    multiply: Callable


def serves(layer, x) -> bool:
    """Whether the kernels serve a QuantLinear and activations x (..., d): a GPU, fp32 or bf16, d and C multiples of 16,
    blocks of feedback of 64."""
    return cuda.usable(x, len(layer.weight_scale), layer.feedback)


def linear(layer, x, state):
    """Eq. 13: x (..., d), state (...) or None -> (..., C) in x's dtype, by the fastest product of the shape."""
    state = None if state is None else state.flatten().contiguous()
    x, lead = x.reshape(-1, layer.in_features), x.shape[:-1]  # (M, d)
    y = torch.empty(len(x), len(layer.weight_scale), dtype=x.dtype, device=x.device)
    taken = cache(lambda order: codes(layer, x, state, order))
    calls = {way.name: partial(lambda way: way.multiply(layer, *taken(way.order), y, state), way)
             for way in ways(layer, x)}
    calls[fastest(calls, (x.device, x.dtype, kernels._multiple(len(x), 32), y.shape[1], x.shape[1], layer.packed))]()
    return y.reshape(*lead, -1)


def codes(layer, x, state, order: str = "plain"):
    """What a product takes of x (M, d) with states (M,): `token_codes` of (x - μ_s) P, in as few passes as possible."""
    P, mean = layer.basis(x), layer.mean
    if (x.dtype == torch.bfloat16 and P and isinstance(P[0], Blocks) and P[0].B.shape[-1] == 64
            and cuda.ready(x.device.index, x.dtype, "blocks")):
        x, mean, P = cuda.centred_blocks(x, mean, state, P[0].B), None, P[1:]
    x = x if mean is None else cuda.centre(x, mean, state)
    if (rotation := cuda.rotation_of(x, P)) is None:
        return cuda.token_codes(apply_basis(x, P), state, layer.d_m, layer.d_u, layer.abits, layer.clip,
                                layer.feedback, order)
    V = layer.feedback
    y, integers, scale, zero = cuda.rotated_codes(rotation, x, P[0], state, layer.d_m, layer.d_u, layer.abits,
                                                  layer.clip, V is not None, order)
    if V is not None:
        cuda.feedback(y, V, scale, zero, integers, layer.abits, order)
    return integers, scale, zero


def ways(layer, x) -> list[Way]:
    """The products that serve a layer and rows x (M, d); the last one always does.

    Unpacked weights become fp8 numbers, a byte each as before, once for all, where fp8 products serve them.
    """
    (M, K), N, index = x.shape, len(layer.weight_scale), x.device.index
    found = []
    if layer.packed and x.is_cuda and M * K < 2**31:
        found += [Way(name, "paired", partial(_by_tiles, tile)) for name, tile in cuda.TILES.items()
                  if K % tile.TK == 0 and suits(tile, M, torch.cuda.get_device_capability(index))
                  and cuda.ready(index, x.dtype, name)]
    if (max(layer.abits, layer.wbits) <= 4 and layer.weight_zero is None and K % 32 == 0 and x.dtype == torch.bfloat16
            and x.is_cuda and fp8_is_exact(index)):
        if not layer.packed:
            layer.weight_packed = layer.weight_packed.to(torch.float8_e4m3fn)
        found.append(Way("fp8", "e4m3", _by_fp8))
    if layer.packed and few(x, N):
        found.append(Way("packed_product", "plain", _by_packed_product))
    return [*found, Way("slices", "plain", _in_slices)]


def suits(tile: cuda.Tile | cuda.Grouped, M: int, capability: tuple) -> bool:
    """Whether a tile is worth a try: neither mostly empty nor read again and again, on a GPU with its instructions."""
    works = capability == (9, 0) if tile.part == "grouped" else capability >= (8, 0)
    return works and (tile.TM <= 32 or tile.TM <= 2 * M) and (tile.TM >= 128 or M <= 4 * tile.TM)


def _ends_of(layer, codes, scale, zero, state) -> dict:
    """What every product of our own ends with."""
    # rowsum(X_c) - K z_c = Σ_k (X_c - z_c), only for asymmetric weights
    x_sum = None if layer.weight_zero is None else (
        codes[: len(zero)].sum(-1, dtype=torch.int32) - layer.in_features * zero)
    return {"scale": scale, "zero": zero, "x_sum": x_sum, "w_scale": layer.weight_scale, "w_sum": layer.weight_sum,
            "w_zero": layer.weight_zero, "bias": layer.bias, "shift": layer.shift, "state": state}


def _by_tiles(tile, layer, codes, scale, zero, y, state):
    cuda.tiled_product(tile, codes, layer.weight_packed, **_ends_of(layer, codes, scale, zero, state), y=y)


def _by_packed_product(layer, codes, scale, zero, y, state):
    cuda.packed_product(codes, layer.weight_packed, **_ends_of(layer, codes, scale, zero, state), y=y)


def _in_slices(layer, codes, scale, zero, y, state):
    """`torch._int_mm` and `epilogue`, along N slice by slice: the readable way, of any shape and of up to 8 bits."""
    ends, (N, K) = _ends_of(layer, codes, scale, zero, state), (len(layer.weight_scale), layer.in_features)
    width = slice_width(len(codes), N, K, layer.packed)
    scratch = torch.empty(width, K, dtype=torch.int8, device=y.device) if layer.packed else None
    for n in range(0, N, width):
        part = slice(n, min(n + width, N))
        w = layer.weight_packed[part]
        w = cuda.unpack_int4(w, scratch[: len(w)], y.dtype) if layer.packed else w.to(torch.int8)
        acc = kernels.product(lambda a, w: torch._int_mm(a, w.t()), codes, w, 2 ** (layer.abits + layer.wbits - 2))
        of_part = {name: ends[name] if ends[name] is None else ends[name][..., part]
                   for name in ("w_scale", "w_sum", "w_zero", "bias", "shift")}
        cuda.epilogue(acc, **(ends | of_part), y=y[:, part])


def _by_fp8(layer, codes, scale, zero, y, state):
    """Y = s_x s_w Σ_k (X_c - z_c) W_c on fp8 tensor cores, exactly, and bias and shift behind y's rounding."""
    weight = cuda.unpack_e4m3(layer.weight_packed) if layer.packed else layer.weight_packed
    fp8_product(codes[: len(y)], weight, scale, layer.weight_scale, y)
    if layer.bias is not None or layer.shift is not None:
        cuda.add_ends(y, layer.bias, layer.shift, state)


def fp8_product(codes, weight, scale, w_scale, y):
    """y (M, N) bf16 = scale (M,) w_scale (N,) Σ_k codes (M, K) weight (N, K), both e4m3, in one kernel of cuBLAS.

    Integers up to 15 times integers up to 8 are exact, and so are their sums in fp32 without fast accumulation."""
    torch._scaled_mm(codes, weight.t(), scale_a=scale[:, None], scale_b=w_scale[None], out_dtype=y.dtype,
                     use_fast_accum=False, out=y)


@cache
def fp8_is_exact(index: int) -> bool:
    """Whether this GPU has fp8 tensor cores whose sums equal integers, also the largest: tried once."""
    if torch.cuda.get_device_capability(index) < (8, 9):
        return False
    device, g = torch.device("cuda", index), torch.Generator().manual_seed(0)
    try:
        for M, K, N in ((33, 1056, 272), (128, 12288, 512)):
            a, w = torch.randint(-15, 16, (M, K), generator=g), torch.randint(-8, 8, (N, K), generator=g)
            a[0], w[0] = 15, -8
            a, w = a.to(device, torch.float32), w.to(device, torch.float32)
            scale, w_scale = torch.rand(M, generator=g).to(device), torch.rand(N, generator=g).to(device)
            y = torch.empty(M, N, dtype=torch.bfloat16, device=device)
            fp8_product(a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), scale, w_scale, y)
            want = (a.double() @ w.double().t()).float() * scale[:, None] * w_scale
            if not torch.equal(y, want.bfloat16()):
                return False
        return cuda.ready(index, torch.float32, "fp8")
    except (RuntimeError, AttributeError, TypeError):  # no such call, or no such shape
        return False


_FASTEST = {}  # (device, ...) -> name of a way


def chosen() -> dict:
    """Which product serves which shape so far: "M x K -> N" and the residency of the weights -> its name."""
    return {f"{M} x {K} -> {N}, {'packed' if packed else 'a byte each'}": name
            for (_, _, M, N, K, packed, _), name in _FASTEST.items()}


def fastest(calls: dict, key: tuple) -> str:
    """The name of the fastest, when key was first met, of `calls`: functions that do the same on the device key[0].

    One that fails for want of memory is not taken, unless it is the last one.
    """
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
    _FASTEST[key] = min(calls, key=seconds.get) if min(seconds.values()) < math.inf else last
    return _FASTEST[key]


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
