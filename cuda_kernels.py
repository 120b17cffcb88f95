"""The integer linear on a GPU: six one-pass CUDA kernels around `torch._int_mm`.

PyTorch operations would walk over the activations about ten times (gate, minimum, maximum, divide, round, add, clamp,
cast, ... and again after the product), and on a GPU these walks cost more than the int8 product saves. So there is

    centre           x less the mean of its token's state (starquant+)               one read, one write
    quantize_rows    gate by token state, clip, scale and zero point of a token, codes one read of x, one write of codes
    feedback         the same codes rounded by feedback (starquant+)                 one read of x, one write of codes
    unpack_int4      two codes a byte -> int8, into a scratch                        one read, one write
    torch._int_mm    int8 tensor cores, int32 out                                    (cuBLAS)
    epilogue         zero point, both scales, bias, mean's output, int32 -> bf16     one read, one write
    tac              Eq. 17 for blocks of 16                                         one read, one write

The sources below are plain CUDA C++ without headers. They are compiled at first use, as `torch.cuda._compile_kernel`
does it, with the NVRTC library that PyTorch ships: neither nvcc nor Triton is needed. Every kernel has its eager twin
(`kernels.py`, `starquant.tac_apply`); the integer ones agree with it bit for bit, because they use the same IEEE
operations in the same order (`__fdiv_rn`, `rintf`: no fused multiply-add, no fast division). `ready` compares both once
per device.

The weight is walked in slices along N, so that what one slice writes and the next kernel reads (int32 accumulators,
unpacked codes) is still in the L2 cache. Scratch memory comes from PyTorch's caching allocator, which hands out the
same block again; inside a CUDA graph nothing is allocated at all, and the launch cost (some 10 us from Python) is gone.

What a production library does beyond this: a product kernel of its own that unpacks in registers and ends in the
epilogue, so that neither int8 weights nor int32 sums ever leave the chip.
"""

import warnings
from contextlib import contextmanager
from functools import cache

import torch

import kernels

THREADS = 256
TAC_BLOCK = 16
FEEDBACK_BLOCK = 64  # the only size that the kernel serves: a token's block lies in the registers of one thread
L2_BYTES = 16 * 2**20  # of int32 accumulators, and of unpacked weights, in flight at a time
WAVE = 132 * 128 * 128  # of the product's elements that an H100 or H200 works on at once, a tile each multiprocessor

COMMON = r"""
typedef unsigned short bf16;  // the upper half of an fp32
typedef REAL real;

__device__ void load4(const float* x, float v[4]) {
    float4 f = *(const float4*)x;
    v[0] = f.x; v[1] = f.y; v[2] = f.z; v[3] = f.w;
}
__device__ void load4(const int* x, int v[4]) {
    int4 i = *(const int4*)x;
    v[0] = i.x; v[1] = i.y; v[2] = i.z; v[3] = i.w;
}
__device__ void load4(const bf16* x, float v[4]) {
    uint2 u = *(const uint2*)x;
    v[0] = __uint_as_float(u.x << 16); v[1] = __uint_as_float(u.x & 0xffff0000u);
    v[2] = __uint_as_float(u.y << 16); v[3] = __uint_as_float(u.y & 0xffff0000u);
}
__device__ unsigned round_bf16(float y) {  // to nearest, ties to even; NaN stays NaN
    unsigned u = __float_as_uint(y);
    return y != y ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
__device__ void store4(float* y, const float v[4]) { *(float4*)y = make_float4(v[0], v[1], v[2], v[3]); }
__device__ void store4(bf16* y, const float v[4]) {
    *(uint2*)y = make_uint2(round_bf16(v[0]) | round_bf16(v[1]) << 16, round_bf16(v[2]) | round_bf16(v[3]) << 16);
}
__device__ void store1(float* y, float v) { *y = v; }
__device__ void store1(bf16* y, float v) { *y = (bf16)round_bf16(v); }
"""

LINEAR = r"""
// x - mu_s of every token's state s: row 0 of mean for unmasked, row 1 for masked tokens.
extern "C" __global__ void centre(const real* x, const unsigned char* state, const float* mean, real* out, int K) {
    int row = blockIdx.x, k = 4 * (blockIdx.y * THREADS + threadIdx.x);
    if (k >= K) return;
    const float* mu = mean + (state[row] ? K : 0) + k;
    float v[4];
    load4(x + (long long)row * K + k, v);
    for (int j = 0; j < 4; j++) v[j] = __fsub_rn(v[j], mu[j]);
    store4(out + (long long)row * K + k, v);
}

// One block per row of the output, which is padded to a multiple of 32 rows; the rows from M on become zeros.
extern "C" __global__ void quantize_rows(const real* x, const unsigned char* state, signed char* codes, float* scale,
                                         int* zero, const float* clip, int M, int K, int d_m, int d_u, int bits,
                                         int has_clip) {
    __shared__ float lows[THREADS], highs[THREADS];
    int row = blockIdx.x, t = threadIdx.x;
    char4* out = (char4*)(codes + (long long)row * K);
    if (row >= M) {
        for (int k = t; k < K / 4; k += THREADS) out[k] = make_char4(0, 0, 0, 0);
        return;
    }
    // G_m = diag(1_sh, 1_m, 0_u), G_u = diag(1_sh, 0_m, 1_u): channels [from, to) of this token are gated off
    bool masked = d_m + d_u > 0 && state[row];
    int from = masked ? K - d_u : K - d_u - d_m, to = masked ? K : K - d_u;
    const real* in = x + (long long)row * K;
    float v[4], low = 0, high = 0;  // the range always includes 0
    for (int k = 4 * t; k < K; k += 4 * THREADS) {
        load4(in + k, v);
        for (int j = 0; j < 4; j++) {
            if (k + j >= from && k + j < to) v[j] = 0;
            low = fminf(low, v[j]);
            high = fmaxf(high, v[j]);
        }
    }
    lows[t] = low;
    highs[t] = high;
    for (int n = THREADS / 2; n > 0; n /= 2) {
        __syncthreads();
        if (t < n) {
            lows[t] = fminf(lows[t], lows[t + n]);
            highs[t] = fmaxf(highs[t], highs[t + n]);
        }
    }
    __syncthreads();
    low = lows[0];
    high = highs[0];
    if (has_clip) {  // each token's range narrowed to (c_0 low, c_1 high)
        low = fmaxf(low, __fmul_rn(low, clip[0]));
        high = fminf(high, __fmul_rn(high, clip[1]));
    }
    float levels = (1 << bits) - 1, half = 1 << (bits - 1);
    // s = max / levels - min / levels,  z = round(-min / s),  X_c = clamp(round(x / s) + z, 0, levels) - 2^(b-1)
    float s = fmaxf(__fsub_rn(__fdiv_rn(high, levels), __fdiv_rn(low, levels)), 1.17549435e-38f);
    float z = rintf(__fdiv_rn(-low, s));
    for (int k = 4 * t; k < K; k += 4 * THREADS) {
        load4(in + k, v);
        signed char c[4];
        for (int j = 0; j < 4; j++) {
            if (k + j >= from && k + j < to) v[j] = 0;
            v[j] = fminf(fmaxf(v[j], low), high);
            c[j] = (signed char)(fminf(fmaxf(__fadd_rn(rintf(__fdiv_rn(v[j], s)), z), 0.0f), levels) - half);
        }
        out[k / 4] = make_char4(c[0], c[1], c[2], c[3]);
    }
    if (t == 0) {
        scale[row] = s;
        zero[row] = (int)(z - half);
    }
}

// Four signed 4-bit numbers in the low halves of four bytes -> four signed bytes, without carries between them.
__device__ unsigned sign_extend4(unsigned n) { return (((n ^ 0x08080808u) | 0x80808080u) - 0x08080808u) ^ 0x80808080u; }

// One thread unpacks 16 bytes = 32 codes: low and high nibbles apart, then interleaved byte by byte.
extern "C" __global__ void unpack_int4(const uint4* packed, uint4* codes, int count) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    uint4 p = packed[i];
    unsigned in[4] = {p.x, p.y, p.z, p.w}, out[8];
    for (int j = 0; j < 4; j++) {
        unsigned low = sign_extend4(in[j] & 0x0f0f0f0fu), high = sign_extend4((in[j] >> 4) & 0x0f0f0f0fu);
        out[2 * j] = __byte_perm(low, high, 0x5140);      // low 0, high 0, low 1, high 1
        out[2 * j + 1] = __byte_perm(low, high, 0x7362);  // low 2, high 2, low 3, high 3
    }
    codes[2 * i] = make_uint4(out[0], out[1], out[2], out[3]);
    codes[2 * i + 1] = make_uint4(out[4], out[5], out[6], out[7]);
}

// y[m, n] = s_m s_n (acc - z_m wsum_n - xsum_m zw_n) + bias_n + shift_s(m),n for one slice of `width` columns; y and
// shift, the output of the mean of either state, have N of them.
extern "C" __global__ void epilogue(const int* acc, const float* scale, const int* zero, const int* x_sum,
                                    const float* w_scale, const int* w_sum, const int* w_zero, const float* bias,
                                    const float* shift, const unsigned char* state, real* y, int width, int N,
                                    int has_zero, int has_bias, int has_shift) {
    int m = blockIdx.x, n = 4 * (blockIdx.y * THREADS + threadIdx.x);
    if (n >= width) return;
    int sum[4], wu[4], wz[4];
    float v[4], ws[4], b[4], sh[4];
    load4(acc + (long long)m * width + n, sum);
    load4(w_sum + n, wu);
    load4(w_scale + n, ws);
    if (has_zero) load4(w_zero + n, wz);
    if (has_bias) load4(bias + n, b);
    if (has_shift) load4(shift + (state[m] ? N : 0) + n, sh);
    for (int j = 0; j < 4; j++) {
        sum[j] -= zero[m] * wu[j];
        if (has_zero) sum[j] -= x_sum[m] * wz[j];
        v[j] = __fmul_rn(__fmul_rn((float)sum[j], scale[m]), ws[j]);
        if (has_bias) v[j] = __fadd_rn(v[j], b[j]);
        if (has_shift) v[j] = __fadd_rn(v[j], sh[j]);
    }
    store4(y + (long long)m * N + n, v);
}

// Z_tac = Z M^T + d in blocks of 16 channels: a thread keeps its row of M and walks down the tokens.
extern "C" __global__ void tac(const real* __restrict__ z, const float* __restrict__ M,
                               const float* __restrict__ bias, real* __restrict__ out, int rows, int C) {
    int c = blockIdx.y * THREADS + threadIdx.x;
    if (c >= C) return;
    float m[TAC_BLOCK];
    for (int j = 0; j < TAC_BLOCK; j++) m[j] = M[(long long)c * TAC_BLOCK + j];
#pragma unroll 4
    for (int r = blockIdx.x; r < rows; r += gridDim.x) {  // several rows in flight
        const real* block = z + (long long)r * C + c / TAC_BLOCK * TAC_BLOCK;
        float v[4], sum = bias[c];
        for (int j = 0; j < TAC_BLOCK; j += 4) {
            load4(block + j, v);
            for (int i = 0; i < 4; i++) sum += m[j + i] * v[i];
        }
        store1(out + (long long)r * C + c, sum);
    }
}
"""
FEEDBACK = r"""
__device__ void load8(const float* x, float* v) { load4(x, v); load4(x + 4, v + 4); }
__device__ void load8(const bf16* x, float* v) {  // 16 bytes at once: neighbours in a warp read rows far apart
    uint4 u = *(const uint4*)x;
    unsigned in[4] = {u.x, u.y, u.z, u.w};
    for (int j = 0; j < 4; j++) {
        v[2 * j] = __uint_as_float(in[j] << 16);
        v[2 * j + 1] = __uint_as_float(in[j] & 0xffff0000u);
    }
}
__device__ unsigned pack4(const float* v) {  // four small integers as signed bytes, the first lowest
    return ((int)v[0] & 255) | ((int)v[1] & 255) << 8 | ((int)v[2] & 255) << 16 | (unsigned)((int)v[3] & 255) << 24;
}

// Codes of x on the grid that quantize_rows found, rounded by feedback: a thread takes one token's part of a block and
// goes through its channels; all threads of a CUDA block read the same V, from shared memory. Products of two bf16
// numbers are exact in fp32: whether the compiler fuses them with the subtraction changes no bit.
extern "C" __global__ void feedback(const real* x, const float* scale, const int* zero, const bf16* V,
                                    signed char* codes, int M, int K, int bits) {
    __shared__ float4 shared_V[FEEDBACK_BLOCK][FEEDBACK_BLOCK / 4];  // 0 on and below the diagonal
    const bf16* mine = V + (long long)blockIdx.y * FEEDBACK_BLOCK * FEEDBACK_BLOCK;
    for (int k = threadIdx.x; k < FEEDBACK_BLOCK * FEEDBACK_BLOCK; k += THREADS)
        ((float*)shared_V)[k] = k % FEEDBACK_BLOCK > k / FEEDBACK_BLOCK ? __uint_as_float((unsigned)mine[k] << 16) : 0;
    __syncthreads();
    int m = blockIdx.x * THREADS + threadIdx.x;
    if (m >= M) return;
    long long at = (long long)m * K + blockIdx.y * FEEDBACK_BLOCK;
    float v[FEEDBACK_BLOCK];
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i += 8) load8(x + at + i, v + i);
    float s = scale[m], z = zero[m], low = -(1 << (bits - 1)) - z, high = (1 << (bits - 1)) - 1 - z;
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i++) v[i] = __fdiv_rn(v[i], s);
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i++) {
        // r = clamp(round(u_i)),  e = u_i - r,  u_j <- u_j - e V_ij, j > i;  X_c = r + z
        float r = fminf(fmaxf(rintf(v[i]), low), high);
        float e = __uint_as_float(round_bf16(__fsub_rn(v[i], r)) << 16);
        v[i] = r + z;
#pragma unroll
        for (int j = (i + 1) / 4; j < FEEDBACK_BLOCK / 4; j++) {  // four at a time; finished ones lose e * 0
            float4 w = shared_V[i][j];
            v[4 * j] -= e * w.x; v[4 * j + 1] -= e * w.y; v[4 * j + 2] -= e * w.z; v[4 * j + 3] -= e * w.w;
        }
    }
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i += 16)
        *(uint4*)(codes + at + i) = make_uint4(pack4(v + i), pack4(v + i + 4), pack4(v + i + 8), pack4(v + i + 12));
}
"""
# feedback is a part by itself: its unrolled loops take seconds to compile, which only those should wait for who use it
PARTS = {"linear": (LINEAR, ("centre", "quantize_rows", "unpack_int4", "epilogue", "tac")),
         "feedback": (FEEDBACK, ("feedback",))}
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}


def source(dtype, *parts: str) -> str:
    """The CUDA source of some parts for activations of this dtype."""
    numbers = {"THREADS": THREADS, "TAC_BLOCK": TAC_BLOCK, "FEEDBACK_BLOCK": FEEDBACK_BLOCK}
    lines = (f"#define {k} {v}\n" for k, v in {"REAL": TYPES[dtype], **numbers}.items())
    return "".join([*lines, COMMON, *(PARTS[part][0] for part in parts)])


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
def _compiled(index: int, dtype, part: str) -> dict:
    """The kernels of a part by name: what `torch.cuda._compile_kernel` does for one, for all of a source at once."""
    tools, names = torch.cuda._utils, PARTS[part][1]
    # asked for at every launch, and loading a library takes longer than a small kernel
    if not hasattr(tools._get_gpu_runtime_library, "cache_info"):
        tools._get_gpu_runtime_library = cache(tools._get_gpu_runtime_library)
    with torch.cuda.device(index), _without_cuda_home():
        code, _ = tools._nvrtc_compile(source(dtype, part), names[0])
        return tools._cuda_load_module(code, list(names))


def _launch(name: str, dtype, grid, args) -> None:
    device, part = args[0].device, next(part for part, (_, names) in PARTS.items() if name in names)
    with torch.cuda.device(device):
        _compiled(device.index, dtype, part)[name]((*grid, *(1,) * (3 - len(grid))), (THREADS, 1, 1), args)


def _blocks(n: int) -> int:
    return -(-n // THREADS)


# ---- the kernels as functions --------------------------------------------------------------------------------------


def centre(x, mean, state):
    """x (..., K) less the mean (2, K) fp32 of its token's state (...) bool."""
    (*_, K), x = x.shape, x.contiguous()
    out = torch.empty_like(x)
    _launch("centre", x.dtype, (x.numel() // K, _blocks(K // 4)), [x, state.contiguous(), mean, out, K])
    return out


def quantize_rows(x, state, d_m: int, d_u: int, bits: int, clip=None):
    """Gate, clip, quantize: x (M, K) fp32 or bf16, state (M,) bool -> codes (⌈M⌉32, K) int8, scale (M,), zero (M,)
    int32; clip (2,) fp32.

    The integers of `kernels.quantize_rows` on gated x; the rows from M on are zero, as `torch._int_mm` wants them.
    """
    (M, K), x = x.shape, x.contiguous()
    rows = kernels._multiple(M, 32)
    codes = torch.empty(rows, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    zero = torch.empty(M, dtype=torch.int32, device=x.device)
    gates = state.contiguous() if d_m or d_u else codes  # never read without gates
    _launch("quantize_rows", x.dtype, (rows,), [x, gates, codes, scale, zero, scale if clip is None else clip, M, K,
                                                d_m, d_u, bits, int(clip is not None)])
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


def epilogue(acc, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, y, shift=None, state=None):
    """acc (≥ M, n) int32 -> y (M, n), a slice of columns of a contiguous (M, N) fp32 or bf16 matrix; shift (2, n), a
    slice of columns of (2, N), with state (M,) bool."""
    width = acc.shape[1]
    _launch("epilogue", y.dtype, (y.shape[0], _blocks(width // 4)),
            [acc, scale, zero, scale if x_sum is None else x_sum, w_scale, w_sum, w_sum if w_zero is None else w_zero,
             w_scale if bias is None else bias, *((w_scale, w_scale) if shift is None else (shift, state)), y, width,
             y.stride(0), int(w_zero is not None), int(bias is not None), int(shift is not None)])


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


def codes(x, state, d_m: int, d_u: int, bits: int, clip=None, V=None):
    """`quantize_rows`, rounded by the feedback V where there is one."""
    integers, scale, zero = quantize_rows(x, state, d_m, d_u, bits, clip)
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
    integers, scale, zero = codes(x, state, d_m, d_u, bits, clip, V)
    # Σ_k (X_c − z_c), only for asymmetric weights
    x_sum = None if w_zero is None else integers[:M].sum(-1, dtype=torch.int32) - K * zero
    width = slice_width(integers.shape[0], N, K, packed)
    scratch = torch.empty(width, K, dtype=torch.int8, device=x.device) if packed else None
    for n in range(0, N, width):
        part = slice(n, min(n + width, N))
        w = unpack_int4(weight[part], scratch[: part.stop - n], x.dtype) if packed else weight[part]
        epilogue(torch._int_mm(integers, w.t()), scale, zero, x_sum, w_scale[part], w_sum[part],
                 None if w_zero is None else w_zero[part], None if bias is None else bias[part], y[:, part],
                 None if shift is None else shift[:, part], state)
    return y


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
    warnings.warn(f"The CUDA kernels are not used, because {reason}; plain PyTorch serves instead (slower).",
                  stacklevel=2)
    return False


def self_check(device, dtype, part: str) -> str | None:
    """The kernels of a part against the eager formulas, on a ragged number of rows: the first that differs."""
    g = torch.Generator().manual_seed(0)
    M, K, N, d_m, d_u = 37, 1088, 272, 24, 40
    state = (torch.rand(M, generator=g) < 0.5).to(device)
    x = torch.randn(M, K, generator=g).to(device, dtype)
    x[3] = 0
    clip = torch.tensor([0.9, 0.8], device=device)
    if part == "feedback":
        V = 0.1 * torch.randn(K // FEEDBACK_BLOCK, FEEDBACK_BLOCK, FEEDBACK_BLOCK, generator=g)
        V = V.to(device, torch.bfloat16)
        codes, scale, zero = quantize_rows(x, None, 0, 0, 4, clip)
        feedback(x, V, scale, zero, codes, 4)
        return None if torch.equal(codes[:M], kernels.quantize_rows(x, 4, clip, V)[0]) else "feedback"
    w = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8).to(device)
    w_scale, bias = torch.rand(N, generator=g).to(device), torch.randn(N, generator=g).to(device)
    w_zero, packed, w_sum = w[:, 0].int(), kernels.pack_int4(w), w.sum(-1, dtype=torch.int32)
    mean, shift = torch.randn(2, K, generator=g).to(device), torch.randn(2, N, generator=g).to(device)
    if not torch.equal(unpack_int4(packed, torch.empty_like(w), dtype), w):
        return "unpack_int4"
    if not torch.equal(centre(x, mean, state), (x - mean[state.long()]).to(dtype)):
        return "centre"
    column = torch.arange(K, device=device)
    off = torch.where(state[:, None], column >= K - d_u, (column >= K - d_u - d_m) & (column < K - d_u))
    gated = x.masked_fill(off, 0)
    codes, scale, zero = quantize_rows(x, state, d_m, d_u, 4, clip)
    want = kernels.quantize_rows(gated, 4, clip)
    if not (torch.equal(codes[:M], want[0]) and torch.equal(scale[:, None], want[1])
            and torch.equal(zero[:, None], want[2].int()) and not codes[M:].any()):
        return "quantize_rows"
    y = int_linear(x, state, d_m, d_u, packed, w_scale, w_sum, 4, True, bias, w_zero, clip, None, shift)
    want = kernels.int_linear(gated, w, w_scale, w_sum, 4, 4, bias, w_zero, "float", clip) + shift[state.long()]
    if not torch.equal(y, want.to(dtype)):
        return "epilogue"
    z = torch.randn(M, 3 * TAC_BLOCK, generator=g).to(device, dtype)
    T = torch.randn(3, TAC_BLOCK, TAC_BLOCK, generator=g).to(device)
    d = torch.randn(3, TAC_BLOCK, generator=g).to(device)
    want = (torch.einsum("mbg,bhg->mbh", z.double().unflatten(-1, (3, -1)), T.double()) + d).flatten(-2)
    return "tac" if (tac(z, T, d) - want).abs().max() > (1e-4 if dtype == torch.float32 else 0.1) else None
