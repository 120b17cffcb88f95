// The kernels of cuda_kernels.py, which says what they are for and puts the numbers and names defined outside (REAL,
// THREADS, TAC_BLOCK, FEEDBACK_BLOCK, WARPS; LINEAR, FEEDBACK, PACKED) before this text. Plain CUDA C++ without headers.
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

// y[m, n] = s_m s_n (acc - z_m wsum_n - xsum_m zw_n) + bias_n + shift_s(m),n for four columns from n on; y, and shift, the
// output of the mean of either state, have N columns.
__device__ void finish4(int sum[4], int m, int n, const float* scale, const int* zero, const int* x_sum,
                        const float* w_scale, const int* w_sum, const int* w_zero, const float* bias,
                        const float* shift, const unsigned char* state, real* y, int N, int has_zero, int has_bias,
                        int has_shift) {
    int wu[4], wz[4];
    float v[4], ws[4], b[4], sh[4];
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

// An integer up to 16 in size as e4m3, exactly: sign, 4 bits of exponent biased by 7, 3 of fraction.
__device__ unsigned e4m3(int v) {
    unsigned u = __float_as_uint((float)v);
    int magnitude = (int)(u >> 20 & 0x7ffu) - (120 << 3);
    return (u >> 24 & 0x80u) | (magnitude > 0 ? magnitude : 0);
}
// Codes X_c of channels k to k + 3 of a row, k a multiple of 4, as a product takes them: order 0, bytes as they come;
// 1, in every 32 channels the even ones before the odd ones; 2, X_c - z_c as e4m3.
__device__ void store_codes(signed char* row, int k, const int c[4], int z, int order) {
    if (order == 1) {
        unsigned short* at = (unsigned short*)(row + k / 32 * 32 + k % 32 / 2);
        at[0] = (unsigned short)((c[0] & 255) | (c[2] & 255) << 8);
        at[8] = (unsigned short)((c[1] & 255) | (c[3] & 255) << 8);
    } else if (order == 2) {
        *(unsigned*)(row + k) = e4m3(c[0] - z) | e4m3(c[1] - z) << 8 | e4m3(c[2] - z) << 16 | e4m3(c[3] - z) << 24;
    } else {
        *(char4*)(row + k) = make_char4((signed char)c[0], (signed char)c[1], (signed char)c[2], (signed char)c[3]);
    }
}

#ifdef LINEAR
// NaN stays NaN, where fminf and fmaxf take the other number
__device__ float least(float a, float b) { return a < b || a != a ? a : b; }
__device__ float most(float a, float b) { return a > b || a != a ? a : b; }

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
                                         int has_clip, int grid_only, int order) {
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
            low = least(low, v[j]);
            high = most(high, v[j]);
        }
    }
    lows[t] = low;
    highs[t] = high;
    for (int n = THREADS / 2; n > 0; n /= 2) {
        __syncthreads();
        if (t < n) {
            lows[t] = least(lows[t], lows[t + n]);
            highs[t] = most(highs[t], highs[t + n]);
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
    float s = most(__fsub_rn(__fdiv_rn(high, levels), __fdiv_rn(low, levels)), 1.17549435e-38f);
    float z = rintf(__fdiv_rn(-low, s));
    for (int k = 4 * t; k < K && !grid_only; k += 4 * THREADS) {  // else feedback rounds
        load4(in + k, v);
        int c[4];
        for (int j = 0; j < 4; j++) {
            if (k + j >= from && k + j < to) v[j] = 0;
            v[j] = fminf(fmaxf(v[j], low), high);
            c[j] = (int)(fminf(fmaxf(__fadd_rn(rintf(__fdiv_rn(v[j], s)), z), 0.0f), levels) - half);
        }
        store_codes(codes + (long long)row * K, k, c, (int)(z - half), order);
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

// `finish4` of int32 sums, for one slice of `width` columns.
extern "C" __global__ void epilogue(const int* acc, const float* scale, const int* zero, const int* x_sum,
                                    const float* w_scale, const int* w_sum, const int* w_zero, const float* bias,
                                    const float* shift, const unsigned char* state, real* y, int width, int N,
                                    int has_zero, int has_bias, int has_shift) {
    int m = blockIdx.x, n = 4 * (blockIdx.y * THREADS + threadIdx.x), sum[4];
    if (n >= width) return;
    load4(acc + (long long)m * width + n, sum);
    finish4(sum, m, n, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state, y, N, has_zero, has_bias,
            has_shift);
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
#endif  // LINEAR

#ifdef FEEDBACK  // by itself: its unrolled loops take seconds to compile
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
                                    signed char* codes, int M, int K, int bits, int order) {
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
    if (order == 0) {
#pragma unroll
        for (int i = 0; i < FEEDBACK_BLOCK; i += 16)
            *(uint4*)(codes + at + i) = make_uint4(pack4(v + i), pack4(v + i + 4), pack4(v + i + 8), pack4(v + i + 12));
    } else {
#pragma unroll
        for (int i = 0; i < FEEDBACK_BLOCK; i += 4) {
            int c[4] = {(int)v[i], (int)v[i + 1], (int)v[i + 2], (int)v[i + 3]};
            store_codes(codes + at, i, c, (int)z, order);
        }
    }
}
#endif  // FEEDBACK

#ifdef PACKED  // int8 tensor cores as `mma` has them: sm_80 and later
#ifdef __CUDACC__  // a test without a GPU brings its own
// c += a b by the 32 lanes of a warp: a 16 x 32 and b 32 x 8 signed bytes. Lane 4 g + t has, four to a register, bytes
// 4 t.. and 16 + 4 t.. of rows g and g + 8 of a and of column g of b, and columns 2 t, 2 t + 1 of rows g and g + 8 of c.
__device__ void mma(int c[4], const unsigned a[4], const unsigned b[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// The product and its epilogue for few tokens, straight from packed weights, which become bytes in registers. A CUDA
// block has 32 tokens and 32 columns; its warps share out K in chunks of 128 and add up at the end.
// Where all products are summed their order is free, so of a chunk lane t takes channels 32 t.. of every row: 16 bytes
// of weights at a time. Even channels come first, since they are the low halves of bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
packed_product(const signed char* __restrict__ x, const unsigned char* __restrict__ w, const float* scale,
               const int* zero, const int* x_sum, const float* w_scale, const int* w_sum, const int* w_zero,
               const float* bias, const float* shift, const unsigned char* state, real* y, int M, int N, int K,
               int has_zero, int has_bias, int has_shift) {
    __shared__ int4 sums[WARPS][32 * 32 / 4];
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    x += (long long)(32 * blockIdx.y + g) * K + 32 * t;
    w += (long long)(32 * blockIdx.x + g) * (K / 2) + 16 * t;
    int c[2][4][4] = {};  // 16 tokens by 8 columns, twice and four times
    uint4 next[4];  // weights are asked for one chunk ahead
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (128 * warp < K) next[j] = *(const uint4*)(w + (long long)4 * j * K + 64 * warp);
#pragma unroll 1
    for (int k = 128 * warp; k < K; k += 128 * WARPS) {
        unsigned in[4][8], packed[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // rows g + 8 i of both
            const uint4* row = (const uint4*)(x + (long long)8 * i * K + k);
            uint4 u = row[0], v = row[1], p = next[i];
            in[i][0] = u.x; in[i][1] = u.y; in[i][2] = u.z; in[i][3] = u.w;
            in[i][4] = v.x; in[i][5] = v.y; in[i][6] = v.z; in[i][7] = v.w;
            packed[i][0] = p.x; packed[i][1] = p.y; packed[i][2] = p.z; packed[i][3] = p.w;
            if (k + 128 * WARPS < K) next[i] = *(const uint4*)(w + (long long)4 * i * K + k / 2 + 64 * WARPS);
        }
#pragma unroll
        for (int s = 0; s < 4; s++) {  // eight channels
            unsigned a[2][4];
            for (int i = 0; i < 4; i++) {
                a[i / 2][i % 2] = __byte_perm(in[i][2 * s], in[i][2 * s + 1], 0x6420);
                a[i / 2][i % 2 + 2] = __byte_perm(in[i][2 * s], in[i][2 * s + 1], 0x7531);
            }
            for (int j = 0; j < 4; j++) {
                // four bits in the upper half of a byte are 16 times their signed value
                unsigned b[2] = {packed[j][s] << 4 & 0xf0f0f0f0u, packed[j][s] & 0xf0f0f0f0u};
                mma(c[0][j], a[0], b);
                mma(c[1][j], a[1], b);
            }
        }
    }
    int* mine = (int*)sums[warp];  // a row's four groups of columns turned by the row: else its rows would meet in a bank
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < 4; r++)
                mine[32 * (16 * i + r / 2 * 8 + g) + 8 * ((j + g) % 4) + 2 * t + r % 2] = c[i][j][r];
    __syncthreads();
    for (int o = threadIdx.x; o < 32 * 32 / 4; o += 32 * WARPS) {
        int m = 32 * blockIdx.y + o / 8, part[4], sum[4] = {};
        if (m >= M) return;
        for (int v = 0; v < WARPS; v++) {
            load4((const int*)(sums[v] + o / 8 * 8 + (o + o / 8 * 2) % 8), part);
            for (int j = 0; j < 4; j++) sum[j] += part[j];
        }
        for (int j = 0; j < 4; j++) sum[j] >>= 4;
        finish4(sum, m, 32 * blockIdx.x + o % 8 * 4, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state, y,
                N, has_zero, has_bias, has_shift);
    }
}
#endif  // PACKED
