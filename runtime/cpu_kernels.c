// The quantized linear on a CPU, in the order of the steps in cpu.py. That file compiles this one, draws a packed
// weight and compares every bit with the readable path, whose operations floating point takes here in the same order.
// M tokens, K channels, N outputs; 16 numbers make a vector.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t bf16;  // the upper half of an fp32

typedef struct {                       // the tensors of a QuantLinear; null where it does not have one
    long K, N, d_m, d_u, block;        // block: the channels that share a matrix of feedback
    int bits, packed;                  // bits of the activations; whether a byte of the weight holds two codes
    const uint8_t *weight;             // (N, K), or packed (N, ceil(K / 2))
    const float *scale, *bias, *clip;  // (N,), (N,), (2,)
    const float *mean, *shift;         // (2, K), (2, N): row 0 for unmasked tokens, row 1 for masked ones
    const int32_t *sum, *zero;         // (N,): sums of the weight's rows, zero points of an asymmetric weight
    const bf16 *feedback;              // (K / block, block, block)
} Layer;

static inline long up(long n, long of) { return (n + of - 1) / of * of; }
static inline long least(long a, long b) { return a < b ? a : b; }
static inline uint32_t bits(float x) { union { float x; uint32_t u; } both = {x}; return both.u; }
static inline float number(uint32_t u) { union { uint32_t u; float x; } both = {u}; return both.x; }
static inline float widen(bf16 x) { return number((uint32_t)x << 16); }
static inline bf16 narrow(float x) {  // to nearest, ties to even; NaN stays NaN
    return x != x ? 0x7fc0 : (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16;
}
static inline ints load(const void *from, long bytes) {  // what is missing of 64 bytes becomes zero
    ints v = {0};
    if (bytes >= 64)
        memcpy(&v, from, 64);  // one instruction
    else if (bytes > 0)
        memcpy(&v, from, bytes);
    return v;
}

// ---- what depends on the processor ---------------------------------------------------------------------------------

#ifdef __AVX512VNNI__
enum { TOKENS = 8, PANELS = 2 };  // the product's tile, TOKENS x 16 PANELS sums, fills the registers

// acc_n + four products: of four unsigned codes of a token with four signed ones of each of 16 rows of the weight
static inline ints dot(ints acc, int32_t x, ints w) {
    return (ints)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(x), (__m512i)w);
}
static inline floats less_product(floats u, floats e, float v) {  // u - e v; e v is exact
    return (floats)_mm512_fnmadd_ps((__m512)e, _mm512_set1_ps(v), (__m512)u);
}
static inline floats rounded(floats u, floats low, floats high) {  // clamp(round(u)); NaN stays NaN
    __m512 r = _mm512_roundscale_ps((__m512)u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (floats)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, r));
}
static inline void exchange(ints r[16], int s) {  // corners of 2s x 2s blocks change places
    ints i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, from = i + ((i & s) != 0 & (16 - s));
    #pragma GCC unroll 16
    for (int k = 0; k < 16; k++)
        if (!(k & s)) {
            ints a = r[k], b = r[k + s];
            r[k] = (ints)_mm512_permutex2var_epi32((__m512i)a, (__m512i)from, (__m512i)b);
            r[k + s] = (ints)_mm512_permutex2var_epi32((__m512i)a, (__m512i)(from + s), (__m512i)b);
        }
}
static inline void transpose(ints r[16]) { exchange(r, 1), exchange(r, 2), exchange(r, 4), exchange(r, 8); }
#elif defined __AVX2__
enum { TOKENS = 4, PANELS = 1 };

static inline __m256i dot8(__m256i acc, __m256i x, __m256i w) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, x, w);
#else  // two products are added in 16 bits, where those of half a byte fit: 2 * 15 * 128
    __m256i half = _mm256_set1_epi8(15), low = _mm256_and_si256(x, half);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), half);
    low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, w), _mm256_set1_epi16(1));
    high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, w), _mm256_set1_epi16(16));
    return _mm256_add_epi32(acc, _mm256_add_epi32(low, high));
#endif
}
static inline ints dot(ints acc, int32_t x, ints w) {
    union { ints all; __m256i half[2]; } a = {acc}, b = {w};
    for (int i = 0; i < 2; i++) a.half[i] = dot8(a.half[i], _mm256_set1_epi32(x), b.half[i]);
    return a.all;
}
static inline floats less_product(floats u, floats e, float v) { return u - e * v; }
static inline floats rounded(floats u, floats low, floats high) {
    for (int t = 0; t < 16; t++) {
        float r = rintf(u[t]), above = r < low[t] ? low[t] : r;
        u[t] = above > high[t] ? high[t] : above;
    }
    return u;
}
static inline void transpose(ints r[16]) {
    int32_t t[16][16];
    memcpy(t, r, sizeof t);
    for (int i = 0; i < 256; i++) r[i / 16][i % 16] = t[i % 16][i / 16];
}
#else
#error "the file has no integer dot product for this processor"
#endif

// ---- 1. transform: tokens lose the mean of their state before P, and channels of the other state behind it ----------

void centre(const Layer *l, const void *x, const uint8_t *state, float *rows, long M, int half, int threads) {
    long K = l->K;
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < M; m++) {
        const float *restrict mean = l->mean + (state[m] ? K : 0), *restrict full = (const float *)x + m * K;
        const bf16 *restrict upper = (const bf16 *)x + m * K;
        float *restrict row = rows + m * K;
        for (long k = 0; half && k < K; k++) row[k] = widen(upper[k]) - mean[k];
        for (long k = 0; !half && k < K; k++) row[k] = full[k] - mean[k];
    }
}

static void gate(const Layer *l, float *x, int masked) {  // G_m = diag(1_sh, 1_m, 0_u), G_u = diag(1_sh, 0_m, 1_u)
    long end = masked ? l->K : l->K - l->d_u;
    for (long k = end - (masked ? l->d_u : l->d_m); k < end; k++) x[k] *= 0;
}

// ---- 2. quantize: X_int = clamp(round(x / s) + z, 0, 2^b - 1) -------------------------------------------------------

// Scale and zero point, centred as in kernels.quantize_rows, and the codes unless feedback rounds them.
static void quantize(const Layer *l, const float *restrict x, uint8_t *restrict codes, float *scale, float *zero) {
    float levels = (1 << l->bits) - 1, half = 1 << (l->bits - 1);
    long K = l->K;
    // The bits of positive numbers are ordered as signed integers, those of negative numbers, the other way round, as
    // unsigned ones. NaN lies beyond infinity. The range starts at 0.
    int32_t highest = 0;
    uint32_t lowest = 0x80000000;
    for (long k = 0; k < K; k++) {
        int32_t u = bits(x[k]);
        highest = u > highest ? u : highest;
        lowest = (uint32_t)u > lowest ? (uint32_t)u : lowest;
    }
    float low = number(lowest), high = number(highest);
    if (highest > 0x7f800000 || lowest > 0xff800000) low = high = NAN;
    if (l->clip && low * l->clip[0] > low) low *= l->clip[0];
    if (l->clip && high * l->clip[1] < high) high *= l->clip[1];
    // s = (max - min) / (2^b - 1),  z = round(-min / s)
    float s = high / levels - low / levels;
    *scale = s = s < 0x1p-126f ? 0x1p-126f : s;
    float z = *zero = rintf(-low / s) - half, least = -half, most = levels - half;
    for (long k = 0; k < (l->feedback ? 0 : K); k++) {
        float v = x[k] < low ? low : x[k];
        v = rintf((v > high ? high : v) / s) + z;
        v = v < least ? least : v;
        codes[k] = (int)(v > most ? most : v) + (int)half;
    }
}

// The codes of block n in 32 tokens from m on, as cpu.feedback_codes. A vector holds one channel of 16 tokens. Eight
// channels at a time take the errors of the channels before them and then those of one another.
static void feed_back(const Layer *l, const float *x, uint8_t *codes, long width, const float *scale, const float *zero,
                      long m, long n, long M, void *scratch) {
    long b = l->block, B = up(b, 16);
    float half = 1 << (l->bits - 1), *V = scratch;  // V (b, B)
    floats (*u)[2] = (void *)(V + B * B), (*e)[2] = u + B, low[2], high[2], z[2];
    for (long i = 0; i < b; i++) {
        const bf16 *restrict row = l->feedback + (n * b + i) * b;
        for (long j = 0; j < b; j++) V[i * B + j] = widen(row[j]);
    }
    for (int g = 0; g < 2; g++) {
        long first = m + 16 * g, count = least(M - first, 16);
        floats s = (floats)load(scale + first, 4 * count);
        z[g] = (floats)load(zero + first, 4 * count);
        low[g] = -half - z[g];
        high[g] = half - 1 - z[g];
        for (long c = 0; c < B; c += 16) {
            ints r[16] = {0};
            for (int t = 0; t < count; t++) r[t] = load(x + (first + t) * l->K + n * b + c, 4 * (b - c));
            transpose(r);
            for (int i = 0; i < 16; i++) u[c + i][g] = (floats)r[i] / s;
        }
    }
    for (long j = 0; j < b; j += 8) {
        floats a[8][2];
        memcpy(a, u + j, sizeof a);
        for (long i = 0; i < j; i++)
            #pragma GCC unroll 16
            for (int q = 0; q < 16; q++)
                a[q / 2][q % 2] = less_product(a[q / 2][q % 2], e[i][q % 2], V[i * B + j + q / 2]);
        #pragma GCC unroll 16
        for (int q = 0; q < 16; q++) {
            int i = q / 2, g = q % 2;
            // r = clamp(round(u_i)),  e = u_i - r in bf16,  u_j <- u_j - e V_ij
            floats r = rounded(a[i][g], low[g], high[g]);
            ints error = (ints)(a[i][g] - r);
            error = (error + 0x7fff + (error >> 16 & 1)) & 0xffff0000;
            e[j + i][g] = (floats)error;
            #pragma GCC unroll 8
            for (int p = i + 1; p < 8; p++) a[p][g] = less_product(a[p][g], (floats)error, V[(j + i) * B + j + p]);
            a[i][g] = r + z[g];  // the code
        }
        memcpy(u + j, a, sizeof a);
    }
    for (int g = 0; g < 2; g++)
        for (long c = 0; c < b; c += 16) {
            ints r[16];
            for (int i = 0; i < 16; i++) r[i] = __builtin_convertvector(u[c + i][g], ints) + (int)half;
            transpose(r);
            for (int t = 0; t < 16 && m + 16 * g + t < M; t++) {
                bytes out = __builtin_convertvector(r[t], bytes);
                uint8_t *to = codes + (m + 16 * g + t) * width + n * b + c;
                b - c < 16 ? memcpy(to, &out, b - c) : memcpy(to, &out, 16);
            }
        }
}

// ---- 3. multiply: sum_k X_int W_c -----------------------------------------------------------------------------------

// 16 PANELS rows of the weight from n on, as `multiply` reads them: w (K / 4, PANELS, 16 rows, 4 channels). A word of a
// packed row holds eight codes and becomes 16 times the even ones and 16 times the odd ones.
static void arrange(const Layer *l, long n, ints *w) {
    long stride = l->packed ? (l->K + 1) / 2 : l->K;
    for (int p = 0; p < PANELS; p++, n += 16)
        for (long b = 0; b < stride; b += 64) {
            ints r[16] = {0};
            for (int i = 0; i < least(16, l->N - n); i++) r[i] = load(l->weight + (n + i) * stride + b, stride - b);
            transpose(r);
            for (int i = 0; i < 16; i++)
                if (l->packed) {
                    w[(b / 2 + 2 * i) * PANELS + p] = r[i] << 4 & 0xf0f0f0f0;
                    w[(b / 2 + 2 * i + 1) * PANELS + p] = r[i] & 0xf0f0f0f0;
                } else
                    w[(b / 4 + i) * PANELS + p] = r[i];
        }
}

static void pair(uint8_t *codes, long K) {  // of every eight codes the even ones first, as in a packed weight
    for (long k = 0; k < K; k += 8) {
        uint8_t c[8];
        memcpy(c, codes + k, 8);
        for (int j = 0; j < 8; j++) codes[k + j] = c[j < 4 ? 2 * j : 2 * j - 7];
    }
}

static void multiply(const uint8_t *codes, long width, const ints *w, long K, ints sums[TOKENS][PANELS]) {
    ints acc[TOKENS][PANELS] = {0};
    for (long k = 0; k < K; k += 4, w += PANELS)
        #pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
            int32_t four;
            memcpy(&four, codes + t * width + k, 4);
            #pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) acc[t][p] = dot(acc[t][p], four, w[p]);
        }
    memcpy(sums, acc, sizeof acc);
}

// ---- 4. finish: y = s_x s_w (sum_k X_int W_c - z_x sum_k W_c - z_w sum_k (X_int - z_x)) + bias + shift --------------

static inline void finish(const Layer *l, const int32_t *sums, long n, long count, float scale, int zero, int rest,
                          const float *shift, void *y, int half) {
    float v[16 * PANELS];
    for (long j = 0; j < count; j++) {
        int32_t sum = (l->packed ? sums[j] >> 4 : sums[j]) - zero * l->sum[n + j];
        if (l->zero) sum -= rest * l->zero[n + j];
        v[j] = sum * scale * l->scale[n + j];
    }
    for (long j = 0; l->bias && j < count; j++) v[j] += l->bias[n + j];
    for (long j = 0; shift && j < count; j++) v[j] += shift[n + j];
    for (long j = 0; half && j < count; j++) ((bf16 *)y)[n + j] = narrow(v[j]);
    if (!half) memcpy((float *)y + n, v, 4 * count);
}

// rows (M, K) fp32 behind P, which the gates change in place, state (M,) -> y (M, N), fp32 or, if half, bf16. Returns 1
// if there is no memory for the codes, else 0.
int linear(const Layer *l, float *rows, const uint8_t *state, void *y, long M, int half, int threads) {
    long K = l->K, N = l->N, width = up(K, 128), T = up(M, 16), B = up(l->block, 16);
    long room = up(16 * PANELS * width + 4 * B * (B + 64), 64);  // a thread's own: rows of the weight, or a block
    int middle = 1 << (l->bits - 1);
    uint8_t *codes = aligned_alloc(64, T * width + threads * room + 12 * up(T, 64));
    if (!codes) return 1;
    float *scale = (float *)(codes + T * width + threads * room), *zero = scale + T;
    int32_t *rest = (int32_t *)(zero + T);
    #pragma omp parallel num_threads(threads)
    {
        void *mine = codes + T * width + omp_get_thread_num() * room;
        #pragma omp for
        for (long m = 0; m < T; m++) {
            memset(codes + m * width, 0, width);
            if (m >= M) continue;
            if (l->d_m + l->d_u) gate(l, rows + m * K, state[m]);
            quantize(l, rows + m * K, codes + m * width, scale + m, zero + m);
        }
        #pragma omp for collapse(2)
        for (long n = 0; n < (l->feedback ? K / l->block : 0); n++)
            for (long m = 0; m < M; m += 32) feed_back(l, rows, codes, width, scale, zero, m, n, M, mine);
        #pragma omp for
        for (long m = 0; m < M; m++) {
            rest[m] = -K * ((int)zero[m] + middle);
            for (long k = 0; l->zero && k < K; k++) rest[m] += codes[m * width + k];
            if (l->packed) pair(codes + m * width, K);
        }
        #pragma omp for schedule(dynamic)
        for (long n = 0; n < N; n += 16 * PANELS) {
            arrange(l, n, mine);
            for (long m = 0; m < M; m += TOKENS) {
                ints sums[TOKENS][PANELS];
                multiply(codes + m * width, width, mine, up(K, 8), sums);
                for (long t = m; t < least(m + TOKENS, M); t++) {
                    const float *shift = l->shift ? l->shift + (state[t] ? N : 0) : NULL;
                    finish(l, (int32_t *)sums[t - m], n, least(N - n, 16 * PANELS), scale[t], (int)zero[t] + middle,
                           rest[t], shift, (char *)y + t * N * (half ? 2 : 4), half);
                }
            }
        }
    }
    free(codes);
    return 0;
}
