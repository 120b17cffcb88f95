// Products of activation codes with packed INT4 weights, after the text of kernels.cu, which has `load4` and `finish4`.
// `runtime/cuda.py` puts the sizes of a tile before it: TM tokens x TN columns x TK channels, STAGES tiles in flight.

// ---- cp.async and ldmatrix: sm_80 and later
__device__ void copy16(unsigned to, const void* from, bool there) {  // zeros where there is nothing
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Lane 8 i + r names row r, 16 bytes, of matrix i; lane 4 g + t receives, of every matrix, word t of row g.
__device__ void load_matrices(unsigned v[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from) : "memory");
}
// Blocks that share out K, gridDim.z for each tile, add up their sums, COUNT a lane; whether this one ended last and has
// them all. It sets `ended`, a counter of every tile, back to 0. The order does not matter to integers.
template <int COUNT, int LANES> __device__ bool joined(int* c, int4* partial, int* ended) {
    __shared__ int last;
    int tile = blockIdx.y * gridDim.x + blockIdx.x;
    partial += (long long)tile * gridDim.z * (COUNT / 4) * LANES + threadIdx.x;
    int4* mine = partial + (long long)blockIdx.z * (COUNT / 4) * LANES;
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++)
        mine[i * LANES] = make_int4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ended + tile, 1) == gridDim.z - 1;
    __syncthreads();
    if (!last) return false;
    __threadfence();
    if (threadIdx.x == 0) ended[tile] = 0;
#pragma unroll 1
    for (int z = 0; z < gridDim.z; z++) {
        if (z == blockIdx.z) continue;
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++) {
            int4 more = __ldcg(partial + ((long long)z * (COUNT / 4) + i) * LANES);
            c[4 * i] += more.x; c[4 * i + 1] += more.y; c[4 * i + 2] += more.z; c[4 * i + 3] += more.w;
        }
    }
    return true;
}
__device__ void load2(const bf16* x, float* v) {
    unsigned u = *(const unsigned*)x;
    v[0] = __uint_as_float(u << 16); v[1] = __uint_as_float(u & 0xffff0000u);
}
__device__ void load2(const float* x, float* v) { float2 f = *(const float2*)x; v[0] = f.x; v[1] = f.y; }
template <int COUNT> __device__ void load(const real* x, float* v) {  // 2 or 4
    if (COUNT == 4) load4(x, v);
    else load2(x, v);
}
__device__ void store2(bf16* y, const float* v) { *(unsigned*)y = pair_bf16(v[0], v[1]); }
__device__ void store2(float* y, const float* v) { *(float2*)y = make_float2(v[0], v[1]); }
template <int COUNT> __device__ void store(real* y, const float* v) {  // 2 or 4
    if (COUNT == 4) store4(y, v);
    else store2(y, v);
}

#if defined TILED_PRODUCT || defined GROUPED_PRODUCT
const int TILE_X = TM * TK, STAGE = TILE_X + TN * TK / 2;  // bytes
// Where 16 bytes of a row lie in a tile: for x so that neither eight neighbours of a row nor eight rows meet in a bank.
__device__ unsigned place_x(unsigned row, unsigned piece) { return row * TK + 16 * (piece ^ row % 8); }
__device__ unsigned place_w(unsigned row, unsigned piece);
// Asks for channels k.. of tokens m0.. and of outputs n0.., by all threads of a block.
template <int LANES> __device__ void fetch(unsigned to, const unsigned char* x, const unsigned char* w, unsigned m0,
                                           unsigned n0, unsigned k, int rows, int N, unsigned K) {
#pragma unroll
    for (unsigned j = 0; j < TILE_X / 16 / LANES; j++) {
        unsigned i = threadIdx.x + j * LANES, row = i / (TK / 16), piece = i % (TK / 16);
        bool there = m0 + row < rows;
        copy16(to + place_x(row, piece), x + (there ? (m0 + row) * K + k + 16 * piece : 0), there);
    }
#pragma unroll
    for (unsigned j = 0; j < (STAGE - TILE_X) / 16 / LANES; j++) {
        unsigned i = threadIdx.x + j * LANES, row = i / (TK / 32), piece = i % (TK / 32);
        bool there = n0 + row < N;
        copy16(to + TILE_X + place_w(row, piece), w + (there ? (n0 + row) * (K / 2) + k / 2 + 16 * piece : 0), there);
    }
}
#endif

#ifdef TILED_PRODUCT  // `mma` of bytes: sm_80 and later
const int LANES = TM / WM * (TN / WN) * 32;  // a warp has WM x WN of the tile

// c += a b by the 32 lanes of a warp: a 16 x 32 and b 32 x 8 signed bytes. Lane 4 g + t has, four to a register, bytes
// 4 t.. and 16 + 4 t.. of rows g and g + 8 of a and of column g of b, and columns 2 t, 2 t + 1 of rows g and g + 8 of c.
// With NIBBLES, numbers of 4 bits take the place of bytes, twice as many: eight to a register, 8 t.. and 32 + 8 t..
#if NIBBLES
#define MMA "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32"
#else
#define MMA "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
#endif
__device__ void multiply(int c[4], const unsigned a[4], unsigned b0, unsigned b1) {
    asm(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// No two rows of a matrix of `load_matrices` meet in a bank: 0, 1, 8, 9, 16, 17, 24, 25 and as many after them.
__device__ unsigned place_w(unsigned row, unsigned piece) {
    return row * (TK / 2) + 16 * (piece ^ (TK == 128 ? row / 8 % 4 : row / 8 % 4 | row % 2 * 4));
}

// One tile of the product and its epilogue. The codes x (rows, K) come with the even channels before the odd ones in
// every 32, as the halves of packed bytes have them; four bits in the upper half of a byte are 16 times their signed
// value. With NIBBLES the codes are packed like the weights, in registers. gridDim.z blocks share out K (`joined`).
extern "C" __global__ void __launch_bounds__(LANES, RESIDENT)
tiled_product(const unsigned char* __restrict__ x, const unsigned char* __restrict__ w, ENDS, real* y, int4* partial,
              int* ended, int M, int N, unsigned K, int rows) {
    extern __shared__ __align__(128) unsigned char tiles[];
    unsigned base = (unsigned)__cvta_generic_to_shared(tiles);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    unsigned m0 = blockIdx.x * TM, n0 = blockIdx.y * TN, wm = warp % (TM / WM) * WM, wn = warp / (TM / WM) * WN;
    unsigned steps = K / TK, from = steps * blockIdx.z / gridDim.z;
    steps = steps * (blockIdx.z + 1) / gridDim.z - from;

    auto ask = [&](unsigned step) {
        fetch<LANES>(base + step % STAGES * STAGE, x, w, m0, n0, (from + step) * TK, rows, N, K);
    };
    int c[WM / 16][WN / 8][4] = {};
    for (unsigned s = 0; s < STAGES - 1; s++) {
        if (s < steps) ask(s);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    // of each 32 columns tile j of 8 has columns 2 j, 2 j + 1, 8 + 2 j, 9 + 2 j, ...: so a lane ends with 8 neighbours
    int row_x = wm + lane % 16, row_w = wn + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
#pragma unroll 1
    for (unsigned step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();
        if (step + STAGES - 1 < steps) ask(step + STAGES - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        unsigned at = base + step % STAGES * STAGE;
#pragma unroll
        for (int s = 0; s < TK / 32; s += 1 + NIBBLES) {
            unsigned a[WM / 16][4], b[1 + NIBBLES][WN / 32][4];
#pragma unroll
            for (int h = 0; h <= NIBBLES; h++)
#pragma unroll
                for (int j = 0; j < WN / 32; j++) load_matrices(b[h][j], at + TILE_X + place_w(row_w + 32 * j, s + h));
#pragma unroll
            for (int i = 0; i < WM / 16; i++) {
#if NIBBLES
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    unsigned v[4];  // even channels of rows g and g + 8, then odd ones
                    load_matrices(v, at + place_x(row_x + 16 * i, 2 * (s + h) + lane / 16));
                    a[i][2 * h] = v[0] & 0x0f0f0f0fu | v[2] << 4 & 0xf0f0f0f0u;
                    a[i][2 * h + 1] = v[1] & 0x0f0f0f0fu | v[3] << 4 & 0xf0f0f0f0u;
                }
#else
                load_matrices(a[i], at + place_x(row_x + 16 * i, 2 * s + lane / 16));
#endif
            }
#pragma unroll
            for (int j = 0; j < WN / 8; j++) {
                unsigned w0 = b[0][j / 4][j % 4], w1 = b[NIBBLES][j / 4][j % 4];
                if (!NIBBLES) w0 = w0 << 4 & 0xf0f0f0f0u, w1 &= 0xf0f0f0f0u;  // even channels, odd channels
#pragma unroll
                for (int i = 0; i < WM / 16; i++) multiply(c[i][j], a[i], w0, w1);
            }
        }
    }
    if (gridDim.z > 1 && !joined<WM * WN / 32, LANES>(&c[0][0][0], partial, ended)) return;
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int m = m0 + wm + 16 * i + 8 * r + g;
            if (m >= M) continue;
#pragma unroll
            for (int j = 0; j < WN / 8; j += 2) {
                int n = n0 + wn + j / 4 * 32 + 8 * t + j % 4 * 2;
                int sum[4] = {c[i][j][2 * r], c[i][j][2 * r + 1], c[i][j + 1][2 * r], c[i][j + 1][2 * r + 1]};
                for (int k = 0; k < 4 && !NIBBLES; k++) sum[k] >>= 4;
                if (n < N) finish4(sum, m, n, THE_ENDS, y, N);
            }
        }
}
#endif  // TILED_PRODUCT

#ifdef GROUPED_PRODUCT  // wgmma: sm_90a
// c (64 x 128, 64 registers a lane) += a b by the 128 lanes of a warp group: a 64 x 32 bytes in registers, as `multiply`
// has 16 rows for each warp; b 128 rows of 32 bytes in shared memory, where `rows` says. Asynchronous: a must stay until
// `wgmma.wait_group`.
#define FOUR(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
__device__ void group_multiply(int* c, const unsigned* a, unsigned long long rows) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
        "}, {%64, %65, %66, %67}, %68, 1;"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows));
}

const int ROWS = TN / GROUPS, PER = ROWS / 64, COUNT = PER * (TM / 128) * 64;  // outputs of a warp group, sums of a lane
const int LANES = 128 * GROUPS;

// Weights of a warp, 16 PER rows, lie so that lane 4 g + t ends with 2 PER neighbouring outputs: row 2 PER g + 2 p + h
// is row 8 h + g of the p-th 16. Two rows share 128 bytes; who is first changes every 8.
__device__ unsigned place_w(unsigned row, unsigned piece) {
    unsigned part = row / (16 * PER) * (16 * PER), in = row % (16 * PER);
    unsigned at = part + in % (2 * PER) / 2 * 16 + in % 2 * 8 + in / (2 * PER);
    return at / 2 * 128 + 64 * ((at ^ at >> 3) & 1) + 16 * (piece ^ at / 2 % 4);
}

// `tiled_product` for Hopper: TM tokens x TN outputs x 128 channels, the weights as the left factor, which `wgmma` takes
// from registers, where they become bytes. Each of GROUPS warp groups has ROWS outputs and all TM tokens.
extern "C" __global__ void __launch_bounds__(LANES, RESIDENT)
grouped_product(const unsigned char* __restrict__ x, const unsigned char* __restrict__ w, ENDS, real* y, int4* partial,
                int* ended, int M, int N, unsigned K, int rows) {
    extern __shared__ __align__(1024) unsigned char tiles[];
    unsigned base = ((unsigned)__cvta_generic_to_shared(tiles) + 1023u) & ~1023u;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    unsigned m0 = blockIdx.x * TM, n0 = blockIdx.y * TN, wn = warp * 16 * PER;
    unsigned steps = K / TK, from = steps * blockIdx.z / gridDim.z;
    steps = steps * (blockIdx.z + 1) / gridDim.z - from;

    auto ask = [&](unsigned step) {
        fetch<LANES>(base + step % STAGES * STAGE, x, w, m0, n0, (from + step) * TK, rows, N, K);
    };
    auto unpack = [&](unsigned step, unsigned (*a)[4]) {  // the warp's weights: a[4 p + s], s of four times 32 channels
        unsigned at = base + step % STAGES * STAGE + TILE_X;
#pragma unroll
        for (int i = 0; i < 2 * PER; i++) {
            unsigned b[4];
            int slot = wn + i / 2 * 16 + lane % 16, piece = i % 2 * 2 + lane / 16;
            load_matrices(b, at + slot / 2 * 128 + 64 * ((slot ^ slot >> 3) & 1) + 16 * (piece ^ slot / 2 % 4));
            for (int s = 0; s < 2; s++) {
                unsigned* to = a[i / 2 * 4 + i % 2 * 2 + s];
                to[0] = b[2 * s] << 4 & 0xf0f0f0f0u;
                to[1] = b[2 * s + 1] << 4 & 0xf0f0f0f0u;
                to[2] = b[2 * s] & 0xf0f0f0f0u;
                to[3] = b[2 * s + 1] & 0xf0f0f0f0u;
            }
        }
    };

    int c[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) c[i] = 0;
    for (unsigned s = 0; s < STAGES - 1; s++) {
        if (s < steps) ask(s);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    unsigned a[2][4 * PER][4];
    asm volatile("cp.async.wait_group %0;\n fence.proxy.async.shared::cta;" :: "n"(STAGES - 2) : "memory");
    __syncthreads();
    unpack(0, a[0]);
    // A step starts its products, and while they run it waits for the next tiles, asks for those after and unpacks.
    auto advance = [&](unsigned step, unsigned (*now)[4], unsigned (*next)[4]) {
        // a descriptor: address / 16, 1024 bytes from eight rows to the next, swizzle of 128 bytes
        unsigned long long where = (base + step % STAGES * STAGE) >> 4 | 64ull << 32 | 1ull << 16 | 1ull << 62;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int p = 0; p < PER; p++)
#pragma unroll
                for (int b = 0; b < TM / 128; b++)
                    group_multiply(c + (p * (TM / 128) + b) * 64, now[4 * p + s], where + 2 * s + 1024 * b);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("cp.async.wait_group %0;\n fence.proxy.async.shared::cta;" :: "n"(STAGES - 3) : "memory");
        __syncthreads();
        if (step + STAGES - 1 < steps) ask(step + STAGES - 1);  // where the step before has ended for all
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (step + 1 < steps) unpack(step + 1, next);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    };
    unsigned step = 0;
#pragma unroll 1
    for (; step + 1 < steps; step += 2) {
        advance(step, a[0], a[1]);
        advance(step + 1, a[1], a[0]);
    }
    if (step < steps) advance(step, a[0], a[1]);

    if (gridDim.z > 1 && !joined<COUNT, LANES>(c, partial, ended)) return;

    int n = n0 + wn + 2 * PER * g;  // this lane's outputs n, ..
    if (n >= N) return;
    const int OWN = 2 * PER;
    int wu[OWN], wz[OWN];
    float ws[OWN], add[OWN], sh[2][OWN];
    for (int i = 0; i < OWN; i++) {
        wu[i] = w_sum[n + i];
        ws[i] = w_scale[n + i];
        if (w_zero) wz[i] = w_zero[n + i];
        if (bias) add[i] = bias[n + i];
        for (int k = 0; k < 2 && shift; k++) sh[k][i] = shift[k * N + n + i];
    }
#pragma unroll
    for (int j = 0; j < TM / 4; j++) {  // token 8 (j / 2) + 2 t + j % 2
        int m = m0 + j / 2 * 8 + 2 * t + j % 2;
        if (m >= M) continue;
        float v[OWN], r[OWN], s = scale[m];
        if (residual) load<OWN>(residual + (long long)m * N + n, r);
        int z = zero[m], xs = w_zero ? x_sum[m] : 0, masked = shift ? state[m] : 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int sum = c[(i / 2 * (TM / 128) + j / 32) * 64 + j / 2 % 16 * 4 + i % 2 * 2 + j % 2] >> 4;
            sum -= z * wu[i];
            if (w_zero) sum -= xs * wz[i];
            v[i] = __fmul_rn(__fmul_rn((float)sum, s), ws[i]);
            if (bias) v[i] = __fadd_rn(v[i], add[i]);
            if (shift) v[i] = __fadd_rn(v[i], masked ? sh[1][i] : sh[0][i]);
            if (residual) v[i] = __fadd_rn(rounded(v[i], y), r[i]);
        }
        store<OWN>(y + (long long)m * N + n, v);
    }
}
#endif  // GROUPED_PRODUCT

#ifdef FP8
// For each of four nibbles its entry in a table of eight positive bytes, or 0 where the nibble's upper bit is set.
__device__ unsigned look_up(unsigned low, unsigned high, unsigned nibbles) {
    unsigned bytes;  // unlike __byte_perm, which drops the upper bits
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(nibbles));
    return bytes;
}
// Two codes a byte -> e4m3 bytes. A thread takes 8 packed bytes, so that a warp writes without gaps.
extern "C" __global__ void unpack_e4m3(const uint2* packed, uint4* codes, int count) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    uint2 p = packed[i];
    unsigned out[4];
    for (int j = 0; j < 4; j++) {
        unsigned n = (j < 2 ? p.x : p.y) >> 16 * (j % 2) & 0xffffu;
        unsigned above = look_up(0x44403800u, 0x4e4c4a48u, n);           // 0, 1, .., 7, and 0 for negative codes
        unsigned below = look_up(0x4a4c4e50u, 0x38404448u, n ^ 0x8888u);  // 8, 7, .., 1, and 0 for the others
        unsigned sign = (below | below << 1) & 0x40404040u;                   // 1 is 0x38: its bit 6 comes from bit 5
        out[j] = above | below | sign << 1;
    }
    codes[i] = make_uint4(out[0], out[1], out[2], out[3]);
}

// y + bias + the output of the mean of a token's state, and to the rounded sum the residual; four columns a thread.
extern "C" __global__ void add_ends(real* y, const float* bias, const float* shift, const unsigned char* state,
                                    const real* residual, int N) {
    int m = blockIdx.x, n = 4 * (blockIdx.y * THREADS + threadIdx.x);
    if (n >= N) return;
    float v[4], b[4];
    load4(y + (long long)m * N + n, v);
    if (bias) load4(bias + n, b);
    for (int j = 0; j < 4 && bias; j++) v[j] = __fadd_rn(v[j], b[j]);
    if (shift) load4(shift + (state[m] ? N : 0) + n, b);
    for (int j = 0; j < 4 && shift; j++) v[j] = __fadd_rn(v[j], b[j]);
    if (residual) load4(residual + (long long)m * N + n, b);
    for (int j = 0; j < 4 && residual; j++) v[j] = __fadd_rn(rounded(v[j], y), b[j]);
    store4(y + (long long)m * N + n, v);
}
#endif  // FP8
