// The quantized linear on a CPU, in the order of the steps in cpu.py, which compiles this file, describes the layout of
// a weight and checks every bit against the readable path. Plain C with vectors of 64 bytes, as gcc and clang have
// them; only the integer dot product and the transposition are written in a machine's own instructions.
//
// M tokens, K channels, N outputs. Pad(K) is K rounded up to 64; codes of padding are zero. Floating point goes by the
// readable path's operations in the readable path's order; cpu.py switches off what could change them.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t bf16;  // the upper half of an fp32

typedef struct {  // the tensors of a QuantLinear; a null pointer stands for one that it does not have
    long K, N, d_m, d_u, block;            // channels, outputs, gated channels, channels that share a feedback matrix
    int bits, packed;                      // of activations; whether a byte of the weight holds two codes
    const uint8_t *weight;                 // (N, K) int8 or (N, ceil(K / 2)), two codes a byte
    const float *scale, *bias, *clip;      // (N,), (N,), (2,)
    const float *mean, *shift;             // (2, K), (2, N): row 0 for unmasked, row 1 for masked tokens
    const int32_t *sum, *zero;             // (N,): sums of the weight's codes, zero points of an asymmetric weight
    const bf16 *feedback;                  // (K / block, block, block)
} Layer;

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

static inline long up(long n, long of) { return (n + of - 1) / of * of; }
static inline long least(long a, long b) { return a < b ? a : b; }

static inline void copy(void *to, const void *from, long bytes) {
    if (bytes == 64)
        memcpy(to, from, 64);  // one instruction instead of a call
    else
        memcpy(to, from, bytes);
}
static inline uint32_t bits(float x) { union { float x; uint32_t u; } both = {x}; return both.u; }
static inline float number(uint32_t u) { union { uint32_t u; float x; } both = {u}; return both.x; }
static inline float widen(bf16 x) { return number((uint32_t)x << 16); }
static inline bf16 narrow(float x) {  // to nearest, ties to even; NaN stays NaN
    return x != x ? 0x7fc0 : (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16;
}

// ---- what depends on the machine -----------------------------------------------------------------------------------

#ifdef __AVX512VNNI__
enum { TOKENS = 8, PANELS = 2 };  // a tile of the product: TOKENS x 16 PANELS sums, which fill the registers

// acc[n] + the sum of four products: four unsigned codes of a token, and of each of 16 weight rows four signed ones
static inline ints dot(ints acc, int32_t x, ints w) {
    return (ints)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(x), (__m512i)w);
}
static inline floats less_product(floats u, floats e, float v) {  // u - e v, where e v is exact
    return (floats)_mm512_fnmadd_ps((__m512)e, _mm512_set1_ps(v), (__m512)u);
}
static inline void exchange(ints r[16], int s) {  // the off-diagonal quarters of every 2s x 2s block
    ints i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, from = i + ((i & s) != 0 & 16 - s);
    #pragma GCC unroll 16
    for (int k = 0; k < 16; k++)
        if (!(k & s)) {
            __m512i a = (__m512i)r[k], b = (__m512i)r[k + s];
            r[k] = (ints)_mm512_permutex2var_epi32(a, (__m512i)from, b);
            r[k + s] = (ints)_mm512_permutex2var_epi32(a, (__m512i)(from + s), b);
        }
}
static inline void transpose(ints r[16]) {  // 16 x 16 words
    exchange(r, 1), exchange(r, 2), exchange(r, 4), exchange(r, 8);
}
#elif defined __AVX2__ && defined __FMA__
enum { TOKENS = 4, PANELS = 1 };

static inline ints dot(ints acc, int32_t x, ints w) {
    union { ints all; __m256i half[2]; } a = {acc}, b = {w};
    __m256i four = _mm256_set1_epi32(x);
    for (int i = 0; i < 2; i++) {
#ifdef __AVXVNNI__
        a.half[i] = _mm256_dpbusd_avx_epi32(a.half[i], four, b.half[i]);
#else  // pairs are added in 16 bits, which half bytes never fill: 2 * 15 * 128
        __m256i nibbles = _mm256_set1_epi8(15), high = _mm256_and_si256(_mm256_srli_epi16(four, 4), nibbles);
        __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(four, nibbles), b.half[i]);
        a.half[i] = _mm256_add_epi32(a.half[i], _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        high = _mm256_maddubs_epi16(high, b.half[i]);
        a.half[i] = _mm256_add_epi32(a.half[i], _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
#endif
    }
    return a.all;
}
static inline floats less_product(floats u, floats e, float v) { return u - e * v; }
static void transpose(ints r[16]) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            int32_t t = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = t;
        }
}
#else
#error "This file knows no integer dot product of this machine."
#endif

// ---- 1. transform: a token loses the mean of its state, and channels of the other state are gated off ----------------

void centre(const Layer *l, const void *x, const uint8_t *state, float *rows, long M, int half, int threads) {
    long K = l->K;
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < M; m++) {
        const float *mean = l->mean + (state[m] ? K : 0), *full = (const float *)x + m * K;
        const bf16 *upper = (const bf16 *)x + m * K;
        if (half)
            for (long k = 0; k < K; k++) rows[m * K + k] = widen(upper[k]) - mean[k];
        else
            for (long k = 0; k < K; k++) rows[m * K + k] = full[k] - mean[k];
    }
}

// G_m = diag(1_sh, 1_m, 0_u), G_u = diag(1_sh, 0_m, 1_u)
static void gate(const Layer *l, float *x, int masked) {
    long end = masked ? l->K : l->K - l->d_u;
    for (long k = end - (masked ? l->d_u : l->d_m); k < end; k++) x[k] *= 0;
}

// ---- 2. quantize: X_int = clamp(round(x / s) + z, 0, 2^b - 1), unsigned; s and z - 2^(b-1) as kernels.quantize_rows ---

static void quantize(const Layer *l, const float *restrict x, uint8_t *restrict codes, float *scale, float *zero) {
    float levels = (1 << l->bits) - 1, half = 1 << (l->bits - 1);
    long K = l->K;
    // the bits of positive numbers are in order as signed integers, those of negative ones, backwards, as unsigned ones;
    // NaN lies beyond infinity. Both start at 0, as the range does.
    int32_t highest = 0;
    uint32_t lowest = 0x80000000;
    for (long k = 0; k < K; k++) {
        int32_t i = bits(x[k]);
        uint32_t u = i;
        highest = i > highest ? i : highest;
        lowest = u > lowest ? u : lowest;
    }
    float low = number(lowest), high = number(highest);
    if (highest > 0x7f800000 || lowest > 0xff800000) low = high = NAN;
    if (l->clip && low * l->clip[0] > low) low *= l->clip[0];
    if (l->clip && high * l->clip[1] < high) high *= l->clip[1];
    // s = (max - min) / (2^b - 1),  z = round(-min / s)
    float s = high / levels - low / levels;
    s = s < 0x1p-126f ? 0x1p-126f : s;
    float z = rintf(-low / s) - half, a = -half, c = levels - half;
    *scale = s;
    *zero = z;
    for (long k = 0; k < (l->feedback ? 0 : K); k++) {
        float v = x[k] < low ? low : x[k];
        v = rintf((v > high ? high : v) / s) + z;
        v = v < a ? a : v;
        codes[k] = (int)(v > c ? c : v) + (int)half;
    }
}

// r = clamp(round(u)), the error e = u - r in bf16; u becomes the code r + z. Returns e.
static inline floats settle(floats *u, const floats *low, const floats *high, const floats *zero) {
    floats e;
    float *at = (float *)u, *error = (float *)&e;
    const float *lo = (const float *)low, *hi = (const float *)high, *z = (const float *)zero;
    #pragma omp simd
    for (int t = 0; t < 16; t++) {
        float r = rintf(at[t]);
        r = r < lo[t] ? lo[t] : r;
        r = r > hi[t] ? hi[t] : r;
        error[t] = widen(narrow(at[t] - r));
        at[t] = r + z[t];
    }
    return e;
}

// Codes by feedback of 32 tokens from m on in block n, as cpu.feedback_codes. The 16 numbers of a vector belong to 16
// tokens. Eight channels at a time take the errors of all channels before them, then those of each other.
static void feed_back(const Layer *l, const float *x, uint8_t *codes, const float *scale, const float *zero, long m,
                      long n, long M, void *scratch) {
    long b = l->block, B = up(b, 16);
    float half = 1 << (l->bits - 1);
    floats *u = scratch, *e = u + 2 * B, s[2], z[2], low[2], high[2];  // u, e (2, B)
    float *V = (float *)(e + 2 * B);                                   // (B, B)
    memset(V, 0, 4 * B * B);
    for (long i = 0; i < b; i++)
        for (long j = 0; j < b; j++) V[i * B + j] = widen(l->feedback[(n * b + i) * b + j]);
    for (int g = 0; g < 2; g++) {
        for (int t = 0; t < 16; t++) {
            long token = least(m + 16 * g + t, M - 1);
            s[g][t] = scale[token];
            z[g][t] = zero[token];
        }
        low[g] = -half - z[g];
        high[g] = half - 1 - z[g];
        for (long c = 0; c < B; c += 16) {
            ints t[16] = {0};
            for (int i = 0; i < 16; i++)
                copy(&t[i], x + least(m + 16 * g + i, M - 1) * l->K + n * b + c, 4 * least(b - c, 16));
            transpose(t);
            for (int i = 0; i < 16; i++) u[g * B + c + i] = (floats)t[i] / s[g];
        }
    }
    for (long j = 0; j < B; j += 8) {
        floats a[2][8];
        memcpy(a[0], u + j, sizeof a[0]);
        memcpy(a[1], u + B + j, sizeof a[1]);
        for (long i = 0; i < j; i++)
            #pragma GCC unroll 8
            for (int q = 0; q < 8; q++) {
                a[0][q] = less_product(a[0][q], e[i], V[i * B + j + q]);
                a[1][q] = less_product(a[1][q], e[B + i], V[i * B + j + q]);
            }
        #pragma GCC unroll 8
        for (int q = 0; q < 8; q++)
            #pragma GCC unroll 2
            for (int g = 0; g < 2; g++) {
                floats error = e[g * B + j + q] = settle(&a[g][q], low + g, high + g, z + g);
                // u_j <- u_j - e V_ij
                #pragma GCC unroll 8
                for (int p = q + 1; p < 8; p++) a[g][p] = less_product(a[g][p], error, V[(j + q) * B + j + p]);
            }
        memcpy(u + j, a[0], sizeof a[0]);
        memcpy(u + B + j, a[1], sizeof a[1]);
    }
    for (int g = 0; g < 2; g++)
        for (long c = 0; c < B; c += 16) {
            ints t[16];
            for (int i = 0; i < 16; i++) t[i] = __builtin_convertvector(u[g * B + c + i], ints) + (int)half;
            transpose(t);
            for (int i = 0; i < 16 && m + 16 * g + i < M; i++) {
                uint8_t *to = codes + (m + 16 * g + i) * up(l->K, 128) + n * b + c;
                if (b - c >= 16)
                    for (int k = 0; k < 16; k++) to[k] = t[i][k];
                else
                    for (int k = 0; k < b - c; k++) to[k] = t[i][k];
            }
        }
}

// ---- 3. multiply: sum_k X_int W_c in int32 -----------------------------------------------------------------------------

// 16 PANELS rows of the weight from n on, as `multiply` reads them: w (K / 4, PANELS, 16 rows, 4 channels). A word of a
// packed row holds 8 codes; it becomes 16 times the even ones and 16 times the odd ones.
static void arrange(const Layer *l, long n, ints *w) {
    long stride = l->packed ? (l->K + 1) / 2 : l->K, end = up(stride, 64);
    for (int p = 0; p < PANELS; p++, n += 16)
        for (long b = 0; b < end; b += 64) {
            ints r[16] = {0};
            for (int i = 0; i < least(16, l->N - n); i++) {
                const uint8_t *row = l->weight + (n + i) * stride + b;
                __builtin_prefetch(row + 16 * PANELS * stride);
                copy(&r[i], row, least(stride - b, 64));
            }
            transpose(r);
            for (int i = 0; i < 16; i++)
                if (l->packed) {
                    w[(b / 2 + 2 * i) * PANELS + p] = r[i] << 4 & 0xf0f0f0f0;
                    w[(b / 2 + 2 * i + 1) * PANELS + p] = r[i] & 0xf0f0f0f0;
                } else
                    w[(b / 4 + i) * PANELS + p] = r[i];
        }
}

// In every 8 codes the even ones before the odd ones, as `arrange` orders those of a packed weight.
static void pair(uint8_t *codes, long width) {
    for (long k = 0; k < width; k += 8) {
        uint8_t c[8];
        memcpy(c, codes + k, 8);
        for (int j = 0; j < 4; j++) {
            codes[k + j] = c[2 * j];
            codes[k + 4 + j] = c[2 * j + 1];
        }
    }
}

static void multiply(const uint8_t *codes, const ints *w, long width, ints sums[TOKENS][PANELS]) {
    ints acc[TOKENS][PANELS] = {0};
    for (long k = 0; k < width; k += 4, w += PANELS)
        #pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
            int32_t four;
            memcpy(&four, codes + t * width + k, 4);
            #pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) acc[t][p] = dot(acc[t][p], four, w[p]);
        }
    memcpy(sums, acc, sizeof acc);
}

// ---- 4. finish: y = s_x s_w (sum_k X_int W_c - z_x sum_k W_c - z_w sum_k (X_int - z_x)) + bias + shift ---------------

static inline void finish(const Layer *l, const int32_t *sums, long n, long count, float scale, int zero, int rest,
                          const float *shift, void *out, int half) {
    float y[16 * PANELS];
    for (long j = 0; j < count; j++) {
        int32_t sum = (l->packed ? sums[j] >> 4 : sums[j]) - zero * l->sum[n + j];
        if (l->zero) sum -= rest * l->zero[n + j];
        y[j] = sum * scale * l->scale[n + j];
    }
    if (l->bias)
        for (long j = 0; j < count; j++) y[j] += l->bias[n + j];
    if (shift)
        for (long j = 0; j < count; j++) y[j] += shift[j];
    for (long j = 0; j < count; j++)
        if (half)
            ((bf16 *)out)[j] = narrow(y[j]);
        else
            ((float *)out)[j] = y[j];
}

// rows (M, K) fp32 behind the transform, which the gates change in place, state (M,) -> y (M, N), fp32 or bf16.
// Returns 0, or 1 if there is no memory.
int linear(const Layer *l, float *rows, const uint8_t *state, void *y, long M, int half, int threads) {
    long K = l->K, N = l->N, width = up(K, 128), T = up(M, TOKENS), blocks = l->feedback ? K / l->block : 0;
    long B = up(l->block, 16), room = up(16 * PANELS * width, 64), needed = 4 * (64 * B + B * B);
    if (blocks && room < needed) room = up(needed, 64);
    uint8_t *memory = aligned_alloc(64, up(T * width, 64) + threads * room + up(12 * T, 64));
    if (!memory) return 1;
    uint8_t *codes = memory, *scratch = codes + up(T * width, 64);
    float *scale = (float *)(scratch + threads * room), *zero = scale + T;
    int32_t *rest = (int32_t *)(zero + T);
    #pragma omp parallel num_threads(threads)
    {
        uint8_t *mine = scratch + omp_get_thread_num() * room;
        #pragma omp for
        for (long m = 0; m < T; m++) {
            memset(codes + m * width + (m < M ? K : 0), 0, m < M ? width - K : width);
            if (m < M && l->d_m + l->d_u) gate(l, rows + m * K, state[m]);
            if (m < M) quantize(l, rows + m * K, codes + m * width, scale + m, zero + m);
        }
        #pragma omp for collapse(2)
        for (long n = 0; n < blocks; n++)
            for (long m = 0; m < M; m += 32) feed_back(l, rows, codes, scale, zero, m, n, M, mine);
        #pragma omp for
        for (long m = 0; m < M; m++) {
            if (l->zero) {
                rest[m] = -K * (int)(zero[m] + (1 << (l->bits - 1)));
                for (long k = 0; k < K; k++) rest[m] += codes[m * width + k];
            }
            if (l->packed) pair(codes + m * width, width);
        }
        #pragma omp for schedule(dynamic, 4)
        for (long n = 0; n < N; n += 16 * PANELS) {
            arrange(l, n, (ints *)mine);
            for (long m = 0; m < M; m += TOKENS) {
                ints sums[TOKENS][PANELS];
                multiply(codes + m * width, (ints *)mine, width, sums);
                for (long t = m; t < least(m + TOKENS, M); t++) {
                    const float *shift = l->shift ? l->shift + (state[t] ? N : 0) + n : NULL;
                    const int32_t *sum = (int32_t *)sums[t - m];
                    int z = (int)zero[t] + (1 << (l->bits - 1)), r = l->zero ? rest[t] : 0;
                    char *to = (char *)y + (t * N + n) * (half ? 2 : 4);
                    if (N - n >= 16 * PANELS)
                        finish(l, sum, n, 16 * PANELS, scale[t], z, r, shift, to, half);
                    else
                        finish(l, sum, n, N - n, scale[t], z, r, shift, to, half);
                }
            }
        }
    }
    free(memory);
    return 0;
}
