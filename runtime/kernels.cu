// The kernels of cuda.py, which says what they are for. It puts before this text the numbers THREADS, FEEDBACK_BLOCK,
// GPTQ_BLOCK, AT_ONCE and ROW_THREADS, the type REAL and the names of the parts that are wanted. Plain CUDA C++ without
// headers. A pointer to what is absent is null.
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
__device__ void load8(const float* x, float* v) { load4(x, v); load4(x + 4, v + 4); }
__device__ void load8(const bf16* x, float* v) {
    uint4 u = *(const uint4*)x;
    unsigned in[4] = {u.x, u.y, u.z, u.w};
    for (int j = 0; j < 4; j++) {
        v[2 * j] = __uint_as_float(in[j] << 16);
        v[2 * j + 1] = __uint_as_float(in[j] & 0xffff0000u);
    }
}
__device__ unsigned pair_bf16(float low, float high) {  // rounded to nearest, ties to even; NaN stays NaN
    unsigned u = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
#else
    for (int i = 0; i < 2; i++) {
        unsigned v = __float_as_uint(i ? low : high);
        u = u << 16 | ((v & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (v + 0x7fffu + (v >> 16 & 1u)) >> 16);
    }
#endif
    return u;
}
__device__ float rounded(float v, const float*) { return v; }  // to the type that is pointed to
__device__ float rounded(float v, const bf16*) { return __uint_as_float(pair_bf16(v, 0) << 16); }
__device__ void store4(float* y, const float v[4]) { *(float4*)y = make_float4(v[0], v[1], v[2], v[3]); }
__device__ void store4(bf16* y, const float v[4]) {
    *(uint2*)y = make_uint2(pair_bf16(v[0], v[1]), pair_bf16(v[2], v[3]));
}
__device__ void store8(float* y, const float* v) { store4(y, v); store4(y + 4, v + 4); }
__device__ void store8(bf16* y, const float* v) {
    *(uint4*)y = make_uint4(pair_bf16(v[0], v[1]), pair_bf16(v[2], v[3]), pair_bf16(v[4], v[5]), pair_bf16(v[6], v[7]));
}

// What a product ends with, `cuda.Ends`: the tokens' scale, zero point and sum, the outputs' scale, sum, zero point and
// bias, the output of the mean of either state, the tokens' states, and what y is added to.
#define ENDS const float *scale, const int *zero, const int *x_sum, const float *w_scale, const int *w_sum, \
             const int *w_zero, const float *bias, const float *shift, const unsigned char *state, const real *residual
#define THE_ENDS scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state, residual
// y[m, n] = s_m s_n (acc - z_m wsum_n - xsum_m zw_n) + bias_n + shift_s(m),n for four columns of N from n on. A residual
// is added to the rounded y.
__device__ void finish4(int sum[4], int m, int n, ENDS, real* y, int N) {
    int wu[4], wz[4];
    float v[4], ws[4], b[4], sh[4], r[4];
    load4(w_sum + n, wu);
    load4(w_scale + n, ws);
    if (w_zero) load4(w_zero + n, wz);
    if (bias) load4(bias + n, b);
    if (shift) load4(shift + (state[m] ? N : 0) + n, sh);
    if (residual) load4(residual + (long long)m * N + n, r);
    for (int j = 0; j < 4; j++) {
        sum[j] -= zero[m] * wu[j];
        if (w_zero) sum[j] -= x_sum[m] * wz[j];
        v[j] = __fmul_rn(__fmul_rn((float)sum[j], scale[m]), ws[j]);
        if (bias) v[j] = __fadd_rn(v[j], b[j]);
        if (shift) v[j] = __fadd_rn(v[j], sh[j]);
        if (residual) v[j] = __fadd_rn(rounded(v[j], y), r[j]);
    }
    store4(y + (long long)m * N + n, v);
}

// Two integers up to 16 in size as e4m3, exactly.
__device__ unsigned pair_e4m3(float low, float high) {
    unsigned short u = 0;
#if __CUDA_ARCH__ >= 890  // where products of fp8 numbers are, and so who asks for them
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(u) : "f"(high), "f"(low));
#endif
    return u;
}
const float ROUND = 12582912.0f;  // 1.5 * 2^23: v + ROUND is rounded to an integer, ties to even, which its lowest bits hold
__device__ unsigned bytes4(float a, float b, float c, float d) {  // integers as signed bytes, a lowest
    return __byte_perm(__byte_perm(__float_as_uint(a + ROUND), __float_as_uint(b + ROUND), 0x0040),
                       __byte_perm(__float_as_uint(c + ROUND), __float_as_uint(d + ROUND), 0x0040), 0x5410);
}
// Codes of channels k to k + 15 of a row, k a multiple of 16, as a product takes them; r = X_c - z_c. Order 0, X_c as they
// come; 1, in every 32 channels the even ones before the odd ones; 2, r as e4m3.
__device__ void store_codes(signed char* row, int k, const float* r, float z, int order) {
    unsigned even[2], odd[2], out[4];
    for (int j = 0; j < 2; j++) {
        const float* v = r + 8 * j;
        if (order == 2) {
            out[2 * j] = pair_e4m3(v[0], v[1]) | pair_e4m3(v[2], v[3]) << 16;
            out[2 * j + 1] = pair_e4m3(v[4], v[5]) | pair_e4m3(v[6], v[7]) << 16;
            continue;
        }
        even[j] = bytes4(v[0] + z, v[2] + z, v[4] + z, v[6] + z);
        odd[j] = bytes4(v[1] + z, v[3] + z, v[5] + z, v[7] + z);
        out[2 * j] = __byte_perm(even[j], odd[j], 0x5140);
        out[2 * j + 1] = __byte_perm(even[j], odd[j], 0x7362);
    }
    if (order == 1) {
        uint2* at = (uint2*)(row + k / 32 * 32 + k % 32 / 2);
        at[0] = make_uint2(even[0], even[1]);
        at[2] = make_uint2(odd[0], odd[1]);
    } else {
        *(uint4*)(row + k) = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

// The range of a token, which always includes 0, and whether it has a NaN.
struct Range {
    float low = 0, high = 0;
    bool nan = false;
    __device__ void see(float v) {
        low = fminf(low, v);
        high = fmaxf(high, v);
        nan |= v != v;
    }
    // Of all threads of a block with WARPS_OF warps; every thread has it afterwards. `warps` is shared and free again
    // after the next barrier but one.
    template <int WARPS_OF> __device__ void join(float (*warps)[2]) {
        if (nan) low = high = __int_as_float(0x7fffffff);
        for (int n = 16; n > 0; n /= 2) widen(__shfl_xor_sync(~0u, low, n), __shfl_xor_sync(~0u, high, n));
        if (threadIdx.x % 32 == 0) {
            warps[threadIdx.x / 32][0] = low;
            warps[threadIdx.x / 32][1] = high;
        }
        __syncthreads();
        for (int w = 0; w < WARPS_OF; w++) widen(warps[w][0], warps[w][1]);
    }
    __device__ void widen(float l, float h) {  // NaN stays, where fminf and fmaxf take the other number
        low = l < low || l != l ? l : low;
        high = h > high || h != h ? h : high;
    }
};
// s = max / levels - min / levels,  z_c = round(-min / s) - 2^(b-1),  r = clamp(round(x / s)) = X_c - z_c
struct Grid {
    float s, z, least, most, up, scaled, inverse;
    __device__ Grid(Range range, const float* clip, int bits) {
        float low = range.low, high = range.high, levels = (1 << bits) - 1, half = 1 << (bits - 1);
        if (clip) {  // each token's range narrowed to (c_0 low, c_1 high)
            low = fmaxf(low, __fmul_rn(low, clip[0]));
            high = fminf(high, __fmul_rn(high, clip[1]));
        }
        s = __fsub_rn(__fdiv_rn(high, levels), __fdiv_rn(low, levels));
        s = s > 1.17549435e-38f || s != s ? s : 1.17549435e-38f;
        float z_int = rintf(__fdiv_rn(-low, s));
        z = z_int - half;
        least = -z_int;
        most = levels - z_int;
        if (clip) {  // the code of a clipped number is that of the limit
            least = fmaxf(least, rintf(__fdiv_rn(low, s)));
            most = fminf(most, rintf(__fdiv_rn(high, s)));
        }
        up = s < 1e-24f ? 0x1p64f : s > 1e24f ? 0x1p-64f : 1;  // nothing that matters overflows or underflows
        scaled = s * up;
        inverse = __frcp_rn(scaled);
    }
    __device__ float code(float v) const {  // less its zero point
        // v / s correctly rounded from 1 / s correctly rounded (Markstein)
        v *= up;
        float q = __fmul_rn(v, inverse);
        q = __fmaf_rn(__fmaf_rn(-q, scaled, v), inverse, q);
        q = __fmaf_rn(__fmaf_rn(-q, scaled, v), inverse, q);
        return fminf(fmaxf(__fsub_rn(__fadd_rn(q, ROUND), ROUND), least), most);
    }
};

// rsqrt(mean(x²) + eps) of a token from every thread's share of Σ x², for all threads of a block with WARPS_OF warps.
// `warps` is shared and may be written again after one more barrier.
template <int WARPS_OF> __device__ float norm_factor(float sum, float* warps, int K, int eps_bits) {
    for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS_OF; w++) sum += warps[w];
    return rsqrtf(__fadd_rn(__fmul_rn(sum, __fdiv_rn(1, K)), __int_as_float(eps_bits)));
}
// y = (x rsqrt(mean(x²) + eps)) in x's type, times the gain, for eight channels.
template <typename T> __device__ void normed8(const T* x, const T* gain, float factor, float* v) {
    float g[8];
    load8(x, v);
    load8(gain, g);
    for (int j = 0; j < 8; j++) v[j] = __fmul_rn(g[j], rounded(__fmul_rn(v[j], factor), x));
}
// silu(gate) up for eight channels: silu(x) = x / (1 + e^-x), in x's type before it meets up.
template <typename T> __device__ void silu_up8(const T* gate, const T* up, float* v) {
    float u[8];
    load8(gate, v);
    load8(up, u);
    for (int j = 0; j < 8; j++) v[j] = __fmul_rn(rounded(__fdiv_rn(v[j], __fadd_rn(1, expf(-v[j]))), gate), u[j]);
}

#ifdef GLUE
// A norm with a gain, `normed8`. One block per token.
extern "C" __global__ void rms_norm(const real* x, const real* gain, real* out, int K, int eps_bits) {
    __shared__ float warps[THREADS / 32];
    x += (long long)blockIdx.x * K;
    out += (long long)blockIdx.x * K;
    float v[8], sum = 0;
    for (int k = 8 * threadIdx.x; k < K; k += 8 * THREADS) {
        load8(x + k, v);
        for (int j = 0; j < 8; j++) sum = __fmaf_rn(v[j], v[j], sum);
    }
    float factor = norm_factor<THREADS / 32>(sum, warps, K, eps_bits);
    for (int k = 8 * threadIdx.x; k < K; k += 8 * THREADS) {
        normed8(x + k, gain + k, factor, v);
        store8(out + k, v);
    }
}

__device__ float turned(float x, float cos, float other, float sin, int fp32) {  // in the type of cos and sin
    if (fp32) return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(other, sin));
    const real* type = 0;
    return rounded(__fadd_rn(rounded(__fmul_rn(x, cos), type), rounded(__fmul_rn(other, sin), type)), type);
}
// The first `heads` of a token's n heads of width h: both halves of each head turned by cos and sin of its position, (x_1
// cos - x_2 sin, x_2 cos + x_1 sin). One block per token; `period` rows of cos and sin serve it and its followers.
extern "C" __global__ void rope(const real* qkv, const void* cos, const void* sin, real* out, int period, int heads,
                                int n, int h, int fp32) {
    qkv += (long long)blockIdx.x * n * h;
    out += (long long)blockIdx.x * heads * h;
    long long row = (long long)(blockIdx.x % period) * h;
    for (int i = threadIdx.x; i < heads * h / 16; i += THREADS) {
        int k = i / (h / 16) * h + i % (h / 16) * 8, j = k % h;
        float first[8], second[8], c[8], s[8], v[8];
        load8(qkv + k, first);
        load8(qkv + k + h / 2, second);
        if (fp32) {
            load8((const float*)cos + row + j, c);
            load8((const float*)sin + row + j, s);
        } else {
            load8((const real*)cos + row + j, c);
            load8((const real*)sin + row + j, s);
        }
        for (int a = 0; a < 8; a++) v[a] = turned(first[a], c[a], -second[a], s[a], fp32);
        store8(out + k, v);
        for (int a = 0; a < 8; a++) v[a] = turned(second[a], c[a], first[a], s[a], fp32);
        store8(out + k + h / 2, v);
    }
}

// silu(gate) up of a token's 2 F channels.
extern "C" __global__ void silu_up(const real* gate_up, real* out, int F) {
    int f = 8 * (blockIdx.y * THREADS + threadIdx.x);
    if (f >= F) return;
    const real* gate = gate_up + (long long)blockIdx.x * 2 * F + f;
    float v[8];
    silu_up8(gate, gate + F, v);
    store8(out + (long long)blockIdx.x * F + f, v);
}
#endif  // GLUE

#ifdef LINEAR
// One block per row of the output, which is padded to a multiple of 32 rows; the rows from M on become zeros.
extern "C" __global__ void quantize_rows(const real* x, const unsigned char* state, signed char* codes, float* scale,
                                         int* zero, const float* clip, int M, int K, int d_m, int d_u, int bits,
                                         int grid_only, int order) {
    __shared__ float warps[THREADS / 32][2];
    int row = blockIdx.x, t = threadIdx.x;
    codes += (long long)row * K;
    if (row >= M) {
        for (int k = 16 * t; k < K; k += 16 * THREADS) *(uint4*)(codes + k) = make_uint4(0, 0, 0, 0);
        return;
    }
    // G_m = diag(1_sh, 1_m, 0_u), G_u = diag(1_sh, 0_m, 1_u): channels [from, to) of this token are gated off
    bool masked = d_m + d_u > 0 && state[row];
    int from = masked ? K - d_u : K - d_u - d_m, to = masked ? K : K - d_u;
    x += (long long)row * K;
    auto load = [&](int k, float* v) {
        load8(x + k, v);
        load8(x + k + 8, v + 8);
        if (k + 16 > from && k < to)
            for (int j = 0; j < 16; j++)
                if (k + j >= from && k + j < to) v[j] = 0;
    };
    float v[16];
    Range range;
    for (int k = 16 * t; k < K; k += 16 * THREADS) {
        load(k, v);
        for (int j = 0; j < 16; j++) range.see(v[j]);
    }
    range.join<THREADS / 32>(warps);
    Grid grid(range, clip, bits);
    for (int k = 16 * t; k < K && !grid_only; k += 16 * THREADS) {  // else feedback rounds
        load(k, v);
        for (int j = 0; j < 16; j++) v[j] = grid.code(v[j]);
        store_codes(codes, k, v, grid.z, order);
    }
    if (t == 0) {
        scale[row] = grid.s;
        zero[row] = (int)grid.z;
    }
}

// Four signed 4-bit numbers in the low halves of four bytes -> four signed bytes, without carries between them.
__device__ unsigned sign_extend4(unsigned n) { return (((n ^ 0x08080808u) | 0x80808080u) - 0x08080808u) ^ 0x80808080u; }

// A thread unpacks 8 bytes: low and high halves apart, then interleaved byte by byte.
extern "C" __global__ void unpack_int4(const uint2* packed, uint4* codes, int count) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    unsigned in[2] = {packed[i].x, packed[i].y}, out[4];
    for (int j = 0; j < 2; j++) {
        unsigned low = sign_extend4(in[j] & 0x0f0f0f0fu), high = sign_extend4(in[j] >> 4 & 0x0f0f0f0fu);
        out[2 * j] = __byte_perm(low, high, 0x5140);      // low 0, high 0, low 1, high 1
        out[2 * j + 1] = __byte_perm(low, high, 0x7362);  // low 2, high 2, low 3, high 3
    }
    codes[i] = make_uint4(out[0], out[1], out[2], out[3]);
}

// `finish4` of int32 sums, for one slice of `width` columns.
extern "C" __global__ void epilogue(const int* acc, ENDS, real* y, int width, int N) {
    int m = blockIdx.x, n = 4 * (blockIdx.y * THREADS + threadIdx.x), sum[4];
    if (n >= width) return;
    load4(acc + (long long)m * width + n, sum);
    finish4(sum, m, n, THE_ENDS, y, N);
}
#endif  // LINEAR

#ifdef FEEDBACK  // by itself: its unrolled loops take seconds to compile
// Codes of x on the grid that quantize_rows found, rounded by feedback: a thread goes through the channels of one token's
// part of a block. All threads of a CUDA block read the same V, from shared memory. Products of two bf16 numbers are exact
// in fp32: whether the compiler fuses them with the subtraction changes no bit. Two tokens a thread, and V in bf16, were
// tried and were slower (results/gpu-h200.md).
extern "C" __global__ void __launch_bounds__(THREADS)
feedback(const real* x, const float* scale, const int* zero, const bf16* V, signed char* codes, int M, int K, int bits,
         int order) {
    __shared__ float4 shared_V[FEEDBACK_BLOCK][FEEDBACK_BLOCK / 4];  // 0 on and below the diagonal
    const bf16* mine = V + (long long)blockIdx.y * FEEDBACK_BLOCK * FEEDBACK_BLOCK;
#pragma unroll
    for (int k = 8 * threadIdx.x; k < FEEDBACK_BLOCK * FEEDBACK_BLOCK; k += 8 * THREADS) {
        float w[8];
        load8(mine + k, w);
        for (int j = 0; j < 8; j++) w[j] = k % FEEDBACK_BLOCK + j > k / FEEDBACK_BLOCK ? w[j] : 0;
        store8((float*)shared_V + k, w);
    }
    __syncthreads();
    int m = blockIdx.x * THREADS + threadIdx.x;
    if (m >= M) return;
    long long at = (long long)m * K + blockIdx.y * FEEDBACK_BLOCK;
    float v[FEEDBACK_BLOCK], s = scale[m], z = zero[m], half = 1 << (bits - 1);
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i += 8) load8(x + at + i, v + i);
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i++) v[i] = __fdiv_rn(v[i], s);
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i++) {
        // r = clamp(round(u_i)),  e = u_i - r,  u_j <- u_j - e V_ij, j > i;  X_c = r + z
        float r = fminf(fmaxf(rintf(v[i]), -half - z), half - 1 - z);
        float e = rounded(__fsub_rn(v[i], r), (const bf16*)0);
        v[i] = r;
#pragma unroll
        for (int j = (i + 1) / 4; j < FEEDBACK_BLOCK / 4; j++) {  // four at a time; finished ones lose e * 0
            float4 w = shared_V[i][j];
            v[4 * j] -= e * w.x;
            v[4 * j + 1] -= e * w.y;
            v[4 * j + 2] -= e * w.z;
            v[4 * j + 3] -= e * w.w;
        }
    }
#pragma unroll
    for (int i = 0; i < FEEDBACK_BLOCK; i += 16) store_codes(codes + at, i, v + i, z, order);
}
#endif  // FEEDBACK

// ---- bf16 tensor cores: sm_80 and later
// c += a b by the 32 lanes of a warp: a 16 x 16 and b 16 x 8 bf16. Lane 4 g + t has, two to a register, columns 2 t, 2 t + 1
// and 8 + 2 t, 9 + 2 t of rows g and g + 8 of a (rows first), the same rows of column g of b, and columns 2 t, 2 t + 1 of
// rows g and g + 8 of c.
__device__ void multiply_bf16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifdef TAC
// Z_tac = Z M^T + d in blocks of 16 channels: a warp has one of them and walks down the tokens, 16 at a time. M is the sum
// of two bf16 matrices, 16 of its bits. Lane t takes channels 4 t.. of a token; which of them is which of mma's does not
// matter.
extern "C" __global__ void tac(const bf16* __restrict__ z, const float* __restrict__ M,
                               const float* __restrict__ bias, bf16* __restrict__ out, int rows, int C) {
    int warp = blockIdx.y * (THREADS / 32) + threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (16 * warp >= C) return;
    unsigned high[2][2], low[2][2];
    for (int j = 0; j < 2; j++) {  // output 4 (g / 2) + 2 j + g % 2 of the block: so lane t ends with 4 t..
        float m[4], rest[4];
        load4(M + ((long long)16 * warp + 4 * (g / 2) + 2 * j + g % 2) * 16 + 4 * t, m);
        for (int i = 0; i < 2; i++) {
            high[j][i] = pair_bf16(m[2 * i], m[2 * i + 1]);
            rest[2 * i] = m[2 * i] - __uint_as_float(high[j][i] << 16);
            rest[2 * i + 1] = m[2 * i + 1] - __uint_as_float(high[j][i] & 0xffff0000u);
            low[j][i] = pair_bf16(rest[2 * i], rest[2 * i + 1]);
        }
    }
    float b[4];
    load4(bias + 16 * warp + 4 * t, b);
    z += 16 * warp + 4 * t;
    out += 16 * warp + 4 * t;
#pragma unroll 4
    for (int r = 16 * blockIdx.x + g; r < rows + g; r += 16 * gridDim.x) {  // all lanes of a warp stay together
        uint2 none = make_uint2(0, 0);
        uint2 top = r < rows ? *(const uint2*)(z + (long long)r * C) : none;
        uint2 bottom = r + 8 < rows ? *(const uint2*)(z + (long long)(r + 8) * C) : none;
        unsigned a[4] = {top.x, bottom.x, top.y, bottom.y};
        float c[2][4], v[4];
        for (int j = 0; j < 2; j++) {
            c[j][0] = c[j][2] = b[2 * j];
            c[j][1] = c[j][3] = b[2 * j + 1];
            multiply_bf16(c[j], a, low[j][0], low[j][1]);
            multiply_bf16(c[j], a, high[j][0], high[j][1]);
        }
        for (int i = 0; i < 2; i++) {
            v[0] = c[0][2 * i]; v[1] = c[0][2 * i + 1]; v[2] = c[1][2 * i]; v[3] = c[1][2 * i + 1];
            if (r + 8 * i < rows) store4(out + (long long)(r + 8 * i) * C, v);
        }
    }
}
#endif  // TAC

// Rows of N columns into shared memory, PITCH apart, zeros from row `from` on. Of each 64 columns tile j of 8 has 16 i + 2 j
// and its neighbour for i = 0 to 3: so lane 4 g + t of a product ends with columns 16 t.. of a row.
template <int N, int PITCH> __device__ void spread(bf16* to, const bf16* in, int from, int rows, int lanes) {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * N / 8; i += lanes) {
        int row = i / (N / 8), column = i % (N / 8) * 8;
        uint4 v = row < from ? *(const uint4*)(in + row * N + column) : make_uint4(0, 0, 0, 0);
        unsigned* at = (unsigned*)(to + row * PITCH + column / 64 * 64 + column % 16 / 2 * 8 + column % 64 / 16 * 2);
        at[0] = v.x; at[4] = v.y; at[8] = v.z; at[12] = v.w;
    }
}
// Lane 8 i + r names row r of matrix i, 8 numbers; lane 4 g + t receives rows 2 t, 2 t + 1 of column g of each.
__device__ void load_columns(unsigned* v, const bf16* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"((unsigned)__cvta_generic_to_shared(from)) : "memory");
}
// c (16 x 64) = a P: a holds rows g and g + 8, of each 32 of N channels 8 t.., as loads of 16 bytes have them; P by
// `spread`.
template <int N, int PITCH> __device__ void times(float (*c)[4], const uint4 (*a)[2], const bf16* P) {
    int lane = threadIdx.x % 32, row = lane % 8 / 2 * 8 + lane % 2 + lane % 16 / 8 * 2;
#pragma unroll
    for (int s = 0; s < N / 16; s++) {
        uint4 top = a[s / 2][0], bottom = a[s / 2][1];
        unsigned in[4] = {s % 2 ? top.z : top.x, s % 2 ? bottom.z : bottom.x, s % 2 ? top.w : top.y,
                          s % 2 ? bottom.w : bottom.y};
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            unsigned b[4];
            load_columns(b, P + (s / 2 * 32 + s % 2 * 4 + row) * PITCH + 8 * j + lane / 16 * 8);
            multiply_bf16(c[j], in, b[0], b[1]);
            multiply_bf16(c[j + 1], in, b[2], b[3]);
        }
    }
}

#ifdef BLOCKS
// (x - mu_s) P for blocks P of 64 channels: a warp takes 16 tokens at a time, all warps the same block. Without mean, x P.
// With `silu`, x has twice K channels and becomes silu(gate) up first.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
centred_blocks(const bf16* __restrict__ x, const unsigned char* state, const float* __restrict__ mean,
               const bf16* __restrict__ P, bf16* __restrict__ out, int M, int K, int silu) {
    __shared__ __align__(16) bf16 matrix[64 * 72];
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    x += 64 * blockIdx.x;
    out += 64 * blockIdx.x;
    int tile = blockIdx.y * (THREADS / 32) + threadIdx.x / 32;
    for (int m = 16 * tile; m < M || m == 16 * tile; m += 16 * (THREADS / 32) * gridDim.y) {
        uint4 a[2][2];
        float c[8][4] = {};
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int p = 0; p < 2; p++) {
                int row = m + g + 8 * i;
                const bf16* at = x + (long long)row * (silu ? 2 * K : K) + 32 * p + 8 * t;
                a[p][i] = row < M ? *(const uint4*)at : make_uint4(0, 0, 0, 0);
                if (silu && row < M) {
                    float v[8];
                    silu_up8((const bf16*)&a[p][i], at + K, v);
                    store8((bf16*)&a[p][i], v);
                }
            }
        if (m == 16 * tile) {  // while the first tokens are on their way
            spread<64, 72>(matrix, P + (long long)blockIdx.x * 64 * 64, 64, 64, THREADS);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = m + g + 8 * i;
            if (!mean || row >= M) continue;
            const float* mu_s = mean + (state[row] ? K : 0) + 64 * blockIdx.x + 8 * t;
#pragma unroll
            for (int p = 0; p < 2; p++) {
                float v[8], mu[8];
                load8((const bf16*)&a[p][i], v);
                load8(mu_s + 32 * p, mu);
                for (int j = 0; j < 8; j++) v[j] = __fsub_rn(v[j], mu[j]);
                store8((bf16*)&a[p][i], v);
            }
        }
        times<64, 72>(c, a, matrix);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (m + g + 8 * i >= M) continue;
            float v[16];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                v[2 * j] = c[j][2 * i];
                v[2 * j + 1] = c[j][2 * i + 1];
            }
            store8(out + (long long)(m + g + 8 * i) * K + 16 * t, v);
            store8(out + (long long)(m + g + 8 * i) * K + 16 * t + 8, v + 8);
        }
    }
}
#endif  // BLOCKS

#ifdef ROTATED_CODES
const int ROWS = (N1 + 15) / 16 * 16, LANES = ROWS * N2 / 32;  // a warp for 16 rows and 64 columns
enum { NORM = 1, SILU };
const int PITCH = N2 + 8, PITCH_1 = ROWS + 8;  // of matrices in shared memory, so that eight rows do not meet in a bank

// A token is a matrix X (N1, N2): P1^T X P2, or P1^T X where FIRST is 0, both products rounded to bf16 as those of
// PyTorch are; then what quantize_rows does. With y the result goes there, and of the grid only scale and zero point are
// found. A block takes one token after the other. BEFORE is what a token passes first where FIRST is 1: with NORM it is
// normed with the gain, and with SILU it has twice as many channels and becomes silu(gate) up.
extern "C" __global__ void __launch_bounds__(LANES, RESIDENT)
rotated_codes(const bf16* __restrict__ x, const bf16* __restrict__ P1, const bf16* __restrict__ P2,
              const bf16* __restrict__ gain, const unsigned char* state, bf16* y, signed char* codes, float* scale,
              int* zero, const float* clip, int M, int rows, int d_m, int d_u, int bits, int order, int eps_bits) {
    extern __shared__ __align__(128) unsigned char tiles[];
    __shared__ float warps[LANES / 32][2];
    const int K = N1 * N2;
    bf16* p1 = (bf16*)tiles;                     // (ROWS, ROWS), zeros around P1
    bf16* p2 = p1 + ROWS * PITCH_1;              // P2 and
    bf16* between = p2 + FIRST * N2 * PITCH;     // (ROWS, N2), both as by `spread`
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int first = warp % (ROWS / 16) * 16, part = warp / (ROWS / 16) * 64;  // of rows and of columns
#if FIRST
    // X of a token is asked for while the one before is at work, as far as registers allow
    const bool AHEAD = N2 == 64 && BEFORE != SILU;
    uint4 a[N2 / 32][2];
    auto ask = [&](int m) {
#pragma unroll
        for (int p = 0; p < N2 / 32; p++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = first + g + 8 * i;
                const bf16* at = BEFORE == SILU ? between + row * PITCH : x + (long long)m * K + row * N2;
                a[p][i] = row < N1 && m < M ? *(const uint4*)(at + 32 * p + 8 * t) : make_uint4(0, 0, 0, 0);
            }
    };
    auto silu = [&](int m) {  // into `between`, where every part finds all columns
#pragma unroll 2
        for (int i = threadIdx.x; i < K / 8; i += LANES) {
            float v[8];
            const bf16* gate = x + (long long)m * 2 * K + 8 * i;
            silu_up8(gate, gate + K, v);
            store8(between + 8 * i / N2 * PITCH + 8 * i % N2, v);
        }
        __syncthreads();
    };
    auto norm = [&]() {
        __shared__ float sums[LANES / 32];
        float v[8], sum = 0;
#pragma unroll
        for (int i = 0; i < N2 / 32 * 2; i++) {
            load8((const bf16*)&a[i / 2][i % 2], v);
            for (int j = 0; j < 8; j++) sum = __fmaf_rn(v[j], v[j], sum);
        }
        float factor = norm_factor<LANES / 32>(part ? 0 : sum, sums, K, eps_bits);  // every part has all columns
#pragma unroll
        for (int i = 0; i < N2 / 32 * 2; i++) {
            int row = first + g + 8 * (i % 2);
            if (row >= N1) continue;
            normed8((const bf16*)&a[i / 2][i % 2], gain + row * N2 + 32 * (i / 2) + 8 * t, factor, v);
            store8((bf16*)&a[i / 2][i % 2], v);
        }
    };
    if (AHEAD) ask(blockIdx.x);
    spread<N2, PITCH>(p2, P2, N2, N2, LANES);
#endif
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * ROWS / 8; i += LANES) {
        int row = i / (ROWS / 8), column = i % (ROWS / 8) * 8;
        const bf16* from = P1 + row * N1 + column;
        bf16* to = p1 + row * PITCH_1 + column;
        if (N1 % 8 == 0) *(uint4*)to = row < N1 && column < N1 ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
        else for (int j = 0; j < 8; j++) to[j] = row < N1 && column + j < N1 ? from[j] : 0;
    }
    __syncthreads();
    for (int m = blockIdx.x; m < rows; m += gridDim.x) {
        if (m >= M) {
            for (int k = 16 * threadIdx.x; k < K; k += 16 * LANES)
                *(uint4*)(codes + (long long)m * K + k) = make_uint4(0, 0, 0, 0);
            continue;
        }
        float c[8][4] = {};
#if FIRST
        if (BEFORE == SILU) silu(m);
        if (!AHEAD) ask(m);
        if (BEFORE == NORM) norm();
        times<N2, PITCH>(c, a, p2 + part);
        if (BEFORE == SILU) __syncthreads();  // all have read what goes now
        if (AHEAD) ask(m + gridDim.x);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                *(unsigned*)(between + (first + g + 8 * i) * PITCH + part + 8 * j + 2 * t) =
                    pair_bf16(c[j][2 * i], c[j][2 * i + 1]);
                c[j][2 * i] = c[j][2 * i + 1] = 0;
            }
#else
        spread<N2, PITCH>(between, x + (long long)m * K, N1, ROWS, LANES);
#endif
        __syncthreads();
#pragma unroll
        for (int s = 0; s < ROWS / 16; s++) {
            unsigned left[4];  // rows first + g, first + g + 8 of P1^T
            load_columns(left, p1 + (16 * s + lane / 16 * 8 + lane % 8) * PITCH_1 + first + lane % 16 / 8 * 8);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                unsigned b[4];
                load_columns(b, between + (16 * s + lane % 16) * PITCH + part + 8 * j + lane / 16 * 8);
                multiply_bf16(c[j], left, b[0], b[1]);
                multiply_bf16(c[j + 1], left, b[2], b[3]);
            }
        }
        // this lane's channels: 16 t.. of the warp's 64, in rows g and g + 8
        bool masked = d_m + d_u > 0 && state[m];
        int from = masked ? K - d_u : K - d_u - d_m, to = masked ? K : K - d_u;
        Range range;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int k = (first + g + 8 * i) * N2 + part + 16 * t;
            bool gates = k + 16 > from && k < to;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float* v = c[j] + 2 * i;
                unsigned u = pair_bf16(v[0], v[1]);
                v[0] = gates && k + 2 * j >= from && k + 2 * j < to ? 0 : __uint_as_float(u << 16);
                v[1] = gates && k + 2 * j + 1 >= from && k + 2 * j + 1 < to ? 0 : __uint_as_float(u & 0xffff0000u);
                range.see(v[0]);
                range.see(v[1]);
            }
        }
        range.join<LANES / 32>(warps);
        Grid grid(range, clip, bits);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = first + g + 8 * i, k = row * N2 + part + 16 * t;
            float v[16];
#pragma unroll
            for (int j = 0; j < 16; j++) v[j] = c[j / 2][2 * i + j % 2];
            if (row >= N1) continue;
            if (y) {
                store8(y + (long long)m * K + k, v);
                store8(y + (long long)m * K + k + 8, v + 8);
                continue;
            }
#pragma unroll
            for (int j = 0; j < 16; j++) v[j] = grid.code(v[j]);
            store_codes(codes + (long long)m * K, k, v, grid.z, order);
        }
        if (threadIdx.x == 0) {
            scale[m] = grid.s;
            zero[m] = (int)grid.z;
        }
    }
}
#endif  // ROTATED_CODES

#ifdef GPTQ
// GPTQ's columns of a part of the weight, GPTQ_BLOCK or less: w (n, C) has what is to be rounded, a column of the weight
// in each row, and e (n, C) the weight itself; R (n, n) has R_ij / R_jj of H = R R^T. A thread takes one output channel
// through all columns and leaves their codes and, in e, their errors.
extern "C" __global__ void gptq_columns(const double* w, double* e, const double* R, const double* scale,
                                        signed char* codes, int n, int C, int bits) {
    __shared__ double shared_R[GPTQ_BLOCK][GPTQ_BLOCK];
    for (int k = threadIdx.x; k < GPTQ_BLOCK * GPTQ_BLOCK; k += blockDim.x) {
        int i = k / GPTQ_BLOCK, j = k % GPTQ_BLOCK;
        shared_R[i][j] = i < n && j < n ? R[i * n + j] : 0;
    }
    __syncthreads();
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    double v[GPTQ_BLOCK], s = scale[c], half = 1 << (bits - 1);
#pragma unroll
    for (int i = 0; i < GPTQ_BLOCK; i++) v[i] = i < n ? w[(long long)i * C + c] : 0;
#pragma unroll
    for (int i = 0; i < GPTQ_BLOCK; i++) {
        if (i >= n) break;
        // q_i = clamp(round(v_i / s)),  e_i = w_i - s q_i;  v_j <- v_j + e_i R_ij / R_jj, j > i
        double q = fmin(fmax(rint(v[i] / s), -half), half - 1);
        double error = __dsub_rn(e[(long long)i * C + c], __dmul_rn(s, q));
#pragma unroll
        for (int j = i + 1; j < GPTQ_BLOCK; j++) v[j] += error * shared_R[i][j];
        codes[(long long)i * C + c] = (signed char)q;
        e[(long long)i * C + c] = error;
    }
}
#endif  // GPTQ

#ifdef SCALES
// losses (C, n) of the rows of a weight w (C, d) if they stand on the grids of scales (C, n). A CUDA block takes a row and
// AT_ONCE of its scales, and a thread every THREADS-th channel.
extern "C" __global__ void rounding_losses(const float* w, const float* scales, float* losses, int d, int n, int bits,
                                           int norm_bits) {
    __shared__ float warps[THREADS / 32][AT_ONCE];
    int first = blockIdx.y * AT_ONCE;
    float norm = __int_as_float(norm_bits), half = 1 << (bits - 1), s[AT_ONCE], sum[AT_ONCE] = {};
    w += (long long)blockIdx.x * d;
    scales += (long long)blockIdx.x * n;
    for (int i = 0; i < AT_ONCE; i++) s[i] = first + i < n ? scales[first + i] : 1;
    for (int k = threadIdx.x; k < d; k += THREADS)
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            // sum_k |s q - w_k|^norm,  q = clamp(round(w_k / s))
            float q = fminf(fmaxf(rintf(w[k] / s[i]), -half), half - 1);
            sum[i] += exp2f(norm * log2f(fabsf(__fsub_rn(__fmul_rn(q, s[i]), w[k]))));
        }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        for (int t = 16; t > 0; t /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], t);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][i] = sum[i];
    }
    __syncthreads();
    int i = threadIdx.x;
    if (i >= AT_ONCE || first + i >= n) return;
    float total = 0;
    for (int t = 0; t < THREADS / 32; t++) total += warps[t][i];
    losses[(long long)blockIdx.x * n + first + i] = total;
}
#endif  // SCALES

#ifdef TRAINING
// The grid of a row by its range, or of symmetric codes by the range of |x|, whose lower end is 0:
// s = max / steps - min / steps,  z = round(-min / s);  steps = 2^b - 1, or 2^(b-1) - 1
struct RowGrid {
    float s, steps, most;  // most = steps - z
    __device__ RowGrid(float low, float high, int bits, int symmetric) {
        steps = (1 << (bits - symmetric)) - 1;
        s = __fsub_rn(__fdiv_rn(high, steps), __fdiv_rn(low, steps));
        s = s > 1.17549435e-38f || s != s ? s : 1.17549435e-38f;
        most = __fsub_rn(steps, rintf(__fdiv_rn(-low, s)));
    }
    // s min(round(x / s), most), and whether the code is x's own: none is below 0. NaN stays NaN.
    __device__ float operator()(float x, bool& inside) const {
        float q = rintf(__fdiv_rn(x, s)), limit = 3.40282347e38f;
        inside = !(q > most);
        q = __fmul_rn(inside ? q : most, s);
        return q > limit ? limit : q < -limit ? -limit : q;
    }
};

// `starquant.FakeQuantize` of rows of K numbers, and the ends of each row's range for its gradient. One block per row.
extern "C" __global__ void fake_quantize(const float* x, float* x_hat, float* ends, int K, int bits, int symmetric) {
    __shared__ float warps[ROW_THREADS / 32][2];
    x += (long long)blockIdx.x * K;
    x_hat += (long long)blockIdx.x * K;
    float v[4];
    Range range;
    for (int k = 4 * threadIdx.x; k < K; k += 4 * ROW_THREADS) {
        load4(x + k, v);
        for (int j = 0; j < 4; j++) range.see(symmetric ? fabsf(v[j]) : v[j]);
    }
    range.join<ROW_THREADS / 32>(warps);
    RowGrid grid(range.low, range.high, bits, symmetric);
    bool inside;
    for (int k = 4 * threadIdx.x; k < K; k += 4 * ROW_THREADS) {
        load4(x + k, v);
        for (int j = 0; j < 4; j++) v[j] = grid(v[j], inside);
        store4(x_hat + k, v);
    }
    if (threadIdx.x == 0) {
        ends[2 * blockIdx.x] = range.low;
        ends[2 * blockIdx.x + 1] = range.high;
    }
}

// The gradient of x by that of x_hat. Every number gets its own share as it is read. What the ends get depends on the
// whole row, and is added by the few threads that have seen a number there.
extern "C" __global__ void __launch_bounds__(ROW_THREADS, 3)
fake_quantize_gradient(const float* grad, const float* x, const float* ends, float* out, int K, int bits,
                       int symmetric) {
    __shared__ float warps[ROW_THREADS / 32][4];
    grad += (long long)blockIdx.x * K;
    x += (long long)blockIdx.x * K;
    out += (long long)blockIdx.x * K;
    float low = ends[2 * blockIdx.x], high = ends[2 * blockIdx.x + 1], v[4], g[4];
    RowGrid grid(low, high, bits, symmetric);
    // sum g (x_hat - [inside] x), sum g ([inside] - 1), and how many x are the lower and the upper end
    float sum[4] = {};
    for (int k = 4 * threadIdx.x; k < K; k += 4 * ROW_THREADS) {
        load4(x + k, v);
        load4(grad + k, g);
        for (int j = 0; j < 4; j++) {
            bool inside;
            float x_hat = grid(v[j], inside);
            sum[0] += __fmul_rn(g[j], __fsub_rn(x_hat, inside ? v[j] : 0));
            sum[1] -= inside ? 0 : g[j];
            sum[2] += !symmetric && v[j] == low;
            sum[3] += (symmetric ? fabsf(v[j]) : v[j]) == high;
            g[j] = inside ? g[j] : 0;
        }
        store4(out + k, g);
    }
    bool saw_an_end = sum[2] + sum[3] > 0;
    for (int i = 0; i < 4; i++) {
        for (int t = 16; t > 0; t /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], t);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][i] = sum[i];
    }
    __syncthreads();
    if (!saw_an_end) return;
    for (int i = 0; i < 4; i++) {
        sum[i] = 0;
        for (int w = 0; w < ROW_THREADS / 32; w++) sum[i] += warps[w][i];
    }
    // dx_hat/ds = (X_int - z) - [inside] x / s, nothing where s is held at its least value;  dx_hat/dz = s ([inside] - 1)
    float d_scale = grid.s > 1.17549435e-38f ? __fdiv_rn(sum[0], grid.s) : 0, d_zero = sum[1];
    float d_high = __fdiv_rn(__fadd_rn(d_scale, __fmul_rn(d_zero, __fdiv_rn(low, grid.s))), grid.steps);
    float to_low = __fdiv_rn(-d_high - d_zero, sum[2]), to_high = __fdiv_rn(d_high, sum[3]);
    for (int k = 4 * threadIdx.x; k < K; k += 4 * ROW_THREADS)
        for (int j = k; j < k + 4; j++) {
            if (!symmetric && x[j] == low) out[j] += to_low;
            if ((symmetric ? fabsf(x[j]) : x[j]) == high) out[j] += symmetric && x[j] < 0 ? -to_high : to_high;
        }
}
#endif  // TRAINING
