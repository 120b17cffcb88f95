// The quantized linear on a CPU, in the order of the steps in layers.py, and the search for a weight's scales. cpu.py
// compiles this file, draws a packed weight and says which bits are those of the readable path. M tokens, K channels, N
// outputs. A vector holds one number of each of LANES tokens, or of each of LANES rows of the weight.
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512VNNI__
enum { LANES = 16, TOKENS = 8, PANELS = 2 };  // the product's tile, TOKENS x PANELS vectors of sums, fills the registers
#define SIMD(name) _mm512_##name
typedef __m512 floats;
#elif defined __AVX2__
enum { LANES = 8, TOKENS = 4, PANELS = 2 };
#define SIMD(name) _mm256_##name
typedef __m256 floats;
#else
#error "the file has no integer dot product for this processor"
#endif
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));  // bf16, the upper halves of fp32

typedef struct {                       // a factor of P multiplies n channels, `step` apart, by a matrix
    const float *T;                    // (n, up(n, 8)): rows are filled up with zeros
    long n, step, next;                // how far away the matrix of the next n channels is; 0 if it is the same
} Factor;

typedef struct {                       // the tensors of a QuantLinear; null where it does not have one
    long K, N, d_m, d_u, block;        // block: the channels that share a matrix of feedback
    long bits, packed, factors;        // bits of the activations; whether a byte of the weight holds two codes; of P
    const Factor *P;
    const uint8_t *weight;             // (N, K), or packed (N, ceil(K / 2))
    const float *scale, *bias, *clip;  // (N,), (N,), (2,)
    const int32_t *mean;               // (2, K), the bits of fp32: row 0 for unmasked tokens, row 1 for masked ones
    const float *shift;                // (2, N)
    const int32_t *sum, *zero;         // (N,): sums of the weight's rows, zero points of an asymmetric weight
    const float *feedback;             // (K / block, block, up(block, 8))
} Layer;

typedef struct { floats scale; ints masked, zero, rest, codes[]; } Tokens;  // LANES of them, four codes to a word

static inline long up(long n, long of) { return (n + of - 1) / of * of; }
static inline long least(long a, long b) { return a < b ? a : b; }
static inline void copy(void *to, const void *from, long bytes, long left) {  // no more than are left
    if (left >= bytes) memcpy(to, from, bytes);  // one instruction
    else if (left > 0) memcpy(to, from, left);
}
static inline ints load(const void *from, long left) {  // what is missing becomes zero
    ints v = {0};
    copy(&v, from, sizeof v, left);
    return v;
}
static inline ints to_ints(floats x) { return __builtin_convertvector(x, ints); }
static inline floats to_floats(ints x) { return __builtin_convertvector(x, floats); }
static inline ints to_bf16(ints x) { return x + 0x7fff + (x >> 16 & 1) & 0xffff0000; }  // to nearest, ties to even
static inline floats all(float x) { return SIMD(set1_ps)(x); }
static inline floats larger(floats a, floats b) { return SIMD(max_ps)(b, a); }  // a where one of them is NaN
static inline floats smaller(floats a, floats b) { return SIMD(min_ps)(b, a); }
static inline floats plus_product(floats a, floats b, float c) { return SIMD(fmadd_ps)(b, all(c), a); }
static inline floats rounded(floats x) {
    for (int t = 0; t < LANES; t++) x[t] = rintf(x[t]);
    return x;
}

// acc + four products: of four unsigned codes of a token with four signed ones of each of LANES rows of the weight
static inline ints dot(ints acc, int32_t x, ints w) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(x), (__m512i)w);
#elif defined __AVXVNNI__
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)acc, _mm256_set1_epi32(x), (__m256i)w);
#else  // the even codes and the odd ones, in 16 bits
    __m256i c = _mm256_set1_epi32(x), v = (__m256i)w, even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
    acc += (ints)_mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)), even);
    return acc + (ints)_mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(v, 8));
#endif
}

static inline void transpose(ints r[LANES]) {
#ifdef __AVX512VNNI__
    ints i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    #pragma GCC unroll 4
    for (int s = 1; s < 16; s *= 2)
        #pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
            if (!(k & s)) {  // corners of 2s x 2s blocks change places
                __m512i a = (__m512i)r[k], b = (__m512i)r[k + s], from = (__m512i)(i + ((i & s) != 0 & 16 - s));
                r[k] = (ints)_mm512_permutex2var_epi32(a, from, b);
                r[k + s] = (ints)_mm512_permutex2var_epi32(a, (__m512i)((ints)from + s), b);
            }
#else
    int32_t t[LANES][LANES];
    memcpy(t, r, sizeof t);
    for (int i = 0; i < LANES * LANES; i++) r[i / LANES][i % LANES] = t[i % LANES][i / LANES];
#endif
}

// ---- 1. transform: tokens lose the mean of their state, are multiplied by P, and lose the channels of the other state

// a_j += sum_i x_i T_ij, summed and rounded as torch's libraries mostly do, which fuse from four channels on
static inline void add_products(floats a[8], const floats *x, const float *T, long n, long stride) {
    for (long i = 0; i < n; i++, T += stride)
        #pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            if (n < 4) a[j] += x[i] * T[j];
            else a[j] = plus_product(a[j], x[i], T[j]);
}

static void transform(const Layer *l, const char *tokens, long count, int half, ints masked, floats *x, floats *old) {
    long K = l->K;  // x (K, LANES)
    for (long k = 0; k < K; k += LANES) {
        ints *r = (ints *)x + k;
        for (long t = 0; t < LANES; t++) {
            long at = t * K + k, left = t < count ? K - k : 0;
            halves upper = {0};
            if (half) copy(&upper, tokens + 2 * at, sizeof upper, 2 * left);
            r[t] = half ? __builtin_convertvector(upper, ints) << 16 : load(tokens + 4 * at, 4 * left);
        }
        transpose(r);
    }
    for (long k = 0; l->mean && k < K; k++) x[k] -= (floats)((masked & l->mean[K + k]) | (~masked & l->mean[k]));
    for (const Factor *f = l->P; f < l->P + l->factors; f++)
        for (long p = 0, n = f->n; p < K / n; p++) {
            floats *part = x + p * (f->step == 1 ? n : 1);
            for (long k = 0; k < n; k++) old[k] = part[k * f->step];
            for (long j = 0; j < n; j += 8) {
                floats y[8] = {0};
                add_products(y, old, f->T + p * f->next + j, n, up(n, 8));
                for (long i = 0; i < least(8, n - j); i++) part[(j + i) * f->step] = y[i];
            }
        }
    floats m = -to_floats(masked), u = 1 - m;  // G_m = diag(1_sh, 1_m, 0_u), G_u = diag(1_sh, 0_m, 1_u)
    for (long k = K - l->d_u - l->d_m; k < K; k++) x[k] *= k < K - l->d_u ? m : u;
}

// ---- 2. quantize: X_int = clamp(round(x / s) + z, 0, 2^b - 1) -------------------------------------------------------

// x (b, LANES) becomes the codes of block n, as cpu.feedback_codes. Eight channels at a time take the errors e of the
// channels before them, which are kept with the other sign, and then those of one another.
static void feed_back(const Layer *l, floats *x, long n, floats s, floats z, floats *e) {
    long b = l->block, B = up(b, 8);
    float half = 1 << (l->bits - 1);
    const float *V = l->feedback + n * b * B;
    for (long k = 0; k < b; k += 8) {
        floats u[8];
        for (int i = 0; i < 8; i++) u[i] = x[k + i] / s;
        add_products(u, e, V + k, k, B);
        #pragma GCC unroll 8
        for (int i = 0; i < 8 && k + i < b; i++) {
            // r = clamp(round(u_i)),  e = u_i - r in bf16,  u_j <- u_j - e V_ij
            floats r = smaller(larger(rounded(u[i]), -half - z), half - 1 - z);
            floats error = -(floats)to_bf16((ints)(u[i] - r));
            #pragma GCC unroll 8
            for (int j = i + 1; j < 8; j++) u[j] = plus_product(u[j], error, V[(k + i) * B + k + j]);
            e[k + i] = error, x[k + i] = r + z;
        }
    }
}

static void quantize(const Layer *l, floats *x, Tokens *to, floats *errors) {
    float levels = (1 << l->bits) - 1, half = 1 << (l->bits - 1);
    long K = l->K;
    floats low = {0}, high = {0};
    ints nan = {0};
    for (long k = 0; k < K; k++) low = smaller(low, x[k]), high = larger(high, x[k]), nan |= x[k] != x[k];
    low = (floats)((ints)low | nan), high = (floats)((ints)high | nan);
    if (l->clip) low = larger(low, low * l->clip[0]), high = smaller(high, high * l->clip[1]);
    // s = (max - min) / (2^b - 1),  z = round(-min / s), centred as in kernels.quantize_rows
    floats s = larger(high / levels - low / levels, all(0x1p-126f)), z = rounded(-low / s) - half;
    for (long n = 0; l->block && n < K / l->block; n++) feed_back(l, x + n * l->block, n, s, z, errors);
    for (long k = 0; !l->block && k < K; k++) {
        floats v = rounded(smaller(larger(x[k], low), high) / s) + z;
        x[k] = smaller(larger(v, all(-half)), all(levels - half));
    }
    to->scale = s, to->zero = to_ints(z) + (int)half, to->rest = -(int)K * to->zero;
    memset(to->codes, 0, sizeof(ints) * up(K, 8) / 4);
    for (long k = 0; k < K; k++) {  // of eight codes the even ones share a word and the odd ones, as in a packed weight
        ints code = to_ints(x[k]) + (int)half & 255;
        to->rest += code;
        to->codes[l->packed ? k / 8 * 2 + k % 2 : k / 4] |= code << 8 * (l->packed ? k % 8 / 2 : k % 4);
    }
}

// ---- 3. multiply: sum_k X_int W_c -----------------------------------------------------------------------------------

// Rows of the weight from n on, as `multiply` reads them: w (K / 4, PANELS, LANES rows, 4 channels). A word of a packed
// row holds eight codes and becomes 16 times the even ones and 16 times the odd ones.
static void arrange(const Layer *l, long n, ints *w) {
    long bytes = l->packed ? (l->K + 1) / 2 : l->K;
    for (int p = 0; p < PANELS; p++, n += LANES)
        for (long b = 0; b < bytes; b += 4 * LANES) {
            ints r[LANES] = {0};
            for (int i = 0; i < least(LANES, l->N - n); i++) r[i] = load(l->weight + (n + i) * bytes + b, bytes - b);
            transpose(r);
            for (int i = 0; i < LANES; i++) {
                ints *to = w + (b / 4 + i) * (1 + l->packed) * PANELS + p;
                to[0] = l->packed ? r[i] << 4 & 0xf0f0f0f0 : r[i];
                if (l->packed) to[PANELS] = r[i] & 0xf0f0f0f0;
            }
        }
}

static void multiply(const int32_t *codes, const ints *w, long K, ints sums[TOKENS][PANELS]) {
    ints acc[TOKENS][PANELS] = {0};
    for (long k = 0; k < K; k += 4, w += PANELS, codes += LANES)
        #pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
            #pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) acc[t][p] = dot(acc[t][p], codes[t], w[p]);
    memcpy(sums, acc, sizeof acc);
}

// ---- 4. finish: y = s_x s_w (sum_k X_int W_c - z_x sum_k W_c - z_w sum_k (X_int - z_x)) + bias + shift --------------

static inline void finish(const Layer *l, ints sum, const Tokens *x, long t, long n, char *y, int half) {
    long left = 4 * (l->N - n);
    sum = (l->packed ? sum >> 4 : sum) - x->zero[t] * load(l->sum + n, left);
    if (l->zero) sum -= x->rest[t] * load(l->zero + n, left);
    floats v = to_floats(sum) * x->scale[t] * (floats)load(l->scale + n, left);
    if (l->bias) v += (floats)load(l->bias + n, left);
    if (l->shift) v += (floats)load(l->shift + (x->masked[t] ? l->N : 0) + n, left);
    ints nan = v != v, upper = ((to_bf16((ints)v) & ~nan) | (0x7fc00000 & nan)) >> 16;
    halves narrow = __builtin_convertvector(upper, halves);
    half ? copy(y + 2 * n, &narrow, sizeof narrow, left / 2) : copy(y + 4 * n, &v, sizeof v, left);
}

// x (M, K), state (M,) -> y (M, N), both fp32 or, if half, bf16. Returns 1 if there is no memory for the codes, else 0.
int linear(const Layer *l, const char *x, const uint8_t *state, char *y, long M, int half, int threads) {
    long K = l->K, N = l->N, size = half ? 2 : 4;
    long group = sizeof(Tokens) + sizeof(ints) * up(K, 8) / 4, groups = (M + LANES - 1) / LANES;
    long room = sizeof(ints) * 2 * up(K, 64);  // a thread's own: tokens and what they were, or a panel
    char *all = aligned_alloc(64, up(groups * group + threads * room, 64));
    if (!all) return 1;
    #pragma omp parallel num_threads(threads)
    {
        void *mine = all + groups * group + omp_get_thread_num() * room;
        #pragma omp for schedule(dynamic)
        for (long m = 0; m < M; m += LANES) {
            Tokens *to = (Tokens *)(all + m / LANES * group);
            to->masked = (ints){0};
            for (int t = 0; state && t < least(LANES, M - m); t++) to->masked[t] = -state[m + t];
            floats *scratch = (floats *)mine + up(K, LANES);
            transform(l, x + m * K * size, least(LANES, M - m), half, to->masked, mine, scratch);
            quantize(l, mine, to, scratch);
        }
        #pragma omp for schedule(dynamic)
        for (long n = 0; n < N; n += LANES * PANELS) {
            arrange(l, n, mine);
            for (long m = 0; m < M; m += TOKENS) {
                Tokens *from = (Tokens *)(all + m / LANES * group);
                ints sums[TOKENS][PANELS];
                multiply((int32_t *)from->codes + m % LANES, mine, up(K, 8), sums);
                for (long t = m; t < least(m + TOKENS, M); t++)
                    for (int p = 0; p < PANELS && n + p * LANES < N; p++)
                        finish(l, sums[t - m][p], from, t % LANES, n + p * LANES, y + t * N * size, half);
            }
        }
    }
    free(all);
    return 0;
}

// ---- the search for a weight's scales ------------------------------------------------------------------------------

static inline floats power(floats x, float p) {  // x^p = 2^(p log2 x) of numbers that are not negative
    ints e = ((ints)x - 0x3f3504f3) >> 23;
    // x = 2^e m, m in [sqrt(1/2), sqrt(2));  log2 m = 2 / ln 2 (t + t^3 / 3 + t^5 / 5 + ...),  t = (m - 1) / (m + 1)
    floats m = (floats)((ints)x - (e << 23)), t = (m - 1) / (m + 1), u = t * t;
    floats y = p * (to_floats(e) + t * (2.88539008f + u * (0.961796694f + u * (0.577078016f + u * 0.412198583f))));
    // 2^y = 2^n e^f,  f = (y - n) ln 2, by its series
    y = smaller(larger(y, all(-126)), all(127));
    floats n = rounded(y), f = (y - n) * 0.693147181f;
    floats s = 1 + f * (1 + f * (0.5f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
    return (floats)((ints)s + (to_ints(n) << 23));
}

// losses (C, n) of the rows of a weight w (C, d) if they stand on the grids of scales (C, n). A vector holds LANES channels.
void rounding_losses(const float *w, const float *scales, float *losses, long C, long d, long n, int bits, float norm,
                     int threads) {
    float half = 1 << (bits - 1);
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long c = 0; c < C; c++)
        for (long i = 0; i < n; i++) {
            float s = scales[c * n + i], total = 0;
            floats sum = {0};
            for (long k = 0; k < d; k += LANES) {
                // sum_k |s q - w_k|^norm,  q = clamp(round(w_k / s)); what is missing at the end is zero
                floats x = (floats)load(w + c * d + k, 4 * (d - k));
                floats e = s * smaller(larger(rounded(x / s), all(-half)), all(half - 1)) - x;
                sum += power((floats)((ints)e & 0x7fffffff), norm);
            }
            for (int t = 0; t < LANES; t++) total += sum[t];
            losses[c * n + i] = total;
        }
}
