// Products of activation codes with packed INT4 weights, after the text of kernels.cu, which has `load4` and `finish4`.
// `runtime/cuda.py` puts the sizes of a tile before it: TM tokens x TN columns x TK channels, STAGES tiles in flight,
// and WM x WN of it for each warp.

#ifdef TILED  // cp.async, ldmatrix and `mma` of bytes: sm_80 and later
const int TILE_X = TM * TK, TILE_W = TN * TK / 2, STAGE = TILE_X + TILE_W;  // bytes
const int LANES = TM / WM * (TN / WN) * 32;

__device__ void copy16(unsigned to, const void* from, bool there) {  // zeros where there is nothing
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Lane 8 i + r names row r, 16 bytes, of matrix i; lane 4 g + t receives, of every matrix, word t of row g.
__device__ void load_matrices(unsigned v[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from) : "memory");
}
// c += a b by the 32 lanes of a warp: a 16 x 32 and b 32 x 8 signed bytes. Lane 4 g + t has, four to a register, bytes
// 4 t.. and 16 + 4 t.. of rows g and g + 8 of a and of column g of b, and columns 2 t, 2 t + 1 of rows g and g + 8 of c.
__device__ void multiply(int c[4], const unsigned a[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where 16 bytes of a row lie in a tile, so that neither eight neighbours of a row nor the eight rows of a matrix meet in
// a bank. The rows of a matrix of x are neighbours; those of w are 0, 1, 8, 9, 16, 17, 24, 25 and as many after them.
__device__ int place_x(int row, int piece) { return row * TK + 16 * (piece ^ row % 8); }
__device__ int place_w(int row, int piece) {
    return row * (TK / 2) + 16 * (piece ^ (TK == 128 ? row / 8 % 4 : row / 8 % 4 | row % 2 * 4));
}

// One tile of the product and its epilogue. The codes x (rows, K) come with the even channels before the odd ones in
// every 32, as the halves of packed bytes have them; four bits in the upper half of a byte are 16 times their signed
// value. gridDim.z blocks share out K; whoever ends last adds up what the others left in `partial`, and sets `ended`,
// a counter of every tile, back to 0. Sums of integers do not depend on that order.
extern "C" __global__ void __launch_bounds__(LANES, BLOCKS)
tiled_product(const unsigned char* __restrict__ x, const unsigned char* __restrict__ w, const float* scale,
              const int* zero, const int* x_sum, const float* w_scale, const int* w_sum, const int* w_zero,
              const float* bias, const float* shift, const unsigned char* state, real* y, int4* partial, int* ended,
              int M, int N, int K, int rows, int has_zero, int has_bias, int has_shift) {
    extern __shared__ __align__(128) unsigned char tiles[];
    unsigned base = (unsigned)__cvta_generic_to_shared(tiles);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int m0 = blockIdx.x * TM, n0 = blockIdx.y * TN, wm = warp % (TM / WM) * WM, wn = warp / (TM / WM) * WN;
    int steps = K / TK, from = steps * blockIdx.z / gridDim.z;
    steps = steps * (blockIdx.z + 1) / gridDim.z - from;

    auto fetch = [&](int step) {
        unsigned to = base + step % STAGES * STAGE;
        long long k = (long long)(from + step) * TK;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_X / 16; i += LANES) {
            int row = i / (TK / 16), piece = i % (TK / 16);
            bool there = m0 + row < rows;
            copy16(to + place_x(row, piece), x + (there ? (long long)(m0 + row) * K + k + 16 * piece : 0), there);
        }
#pragma unroll
        for (int i = threadIdx.x; i < TILE_W / 16; i += LANES) {
            int row = i / (TK / 32), piece = i % (TK / 32);
            bool there = n0 + row < N;
            copy16(to + TILE_X + place_w(row, piece),
                   w + (there ? (long long)(n0 + row) * (K / 2) + k / 2 + 16 * piece : 0), there);
        }
    };

    int c[WM / 16][WN / 8][4] = {};
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) fetch(s);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    // of each 32 columns tile j of 8 has columns 2 j, 2 j + 1, 8 + 2 j, 9 + 2 j, ...: so a lane ends with 8 neighbours
    int row_x = wm + lane % 16, row_w = wn + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();
        if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        unsigned at = base + step % STAGES * STAGE;
#pragma unroll
        for (int s = 0; s < TK / 32; s++) {
            unsigned a[WM / 16][4], b[WN / 32][4];
#pragma unroll
            for (int j = 0; j < WN / 32; j++) load_matrices(b[j], at + TILE_X + place_w(row_w + 32 * j, s));
#pragma unroll
            for (int i = 0; i < WM / 16; i++) load_matrices(a[i], at + place_x(row_x + 16 * i, 2 * s + lane / 16));
#pragma unroll
            for (int j = 0; j < WN / 8; j++) {
                unsigned even = b[j / 4][j % 4] << 4 & 0xf0f0f0f0u, odd = b[j / 4][j % 4] & 0xf0f0f0f0u;
#pragma unroll
                for (int i = 0; i < WM / 16; i++) multiply(c[i][j], a[i], even, odd);
            }
        }
    }
    if (gridDim.z > 1) {
        __shared__ int last;
        const int PARTS = WM / 16 * (WN / 8);
        int tile = blockIdx.y * gridDim.x + blockIdx.x;
        int4* tile_parts = partial + (long long)tile * gridDim.z * PARTS * LANES + threadIdx.x;
        int4* mine = tile_parts + (long long)blockIdx.z * PARTS * LANES;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const int* v = c[i / (WN / 8)][i % (WN / 8)];
            mine[i * LANES] = make_int4(v[0], v[1], v[2], v[3]);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(ended + tile, 1) == gridDim.z - 1;
        __syncthreads();
        if (!last) return;
        __threadfence();
        if (threadIdx.x == 0) ended[tile] = 0;
#pragma unroll 1
        for (int z = 0; z < gridDim.z; z++) {
            if (z == blockIdx.z) continue;
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                int* v = c[i / (WN / 8)][i % (WN / 8)];
                int4 more = __ldcg(tile_parts + ((long long)z * PARTS + i) * LANES);
                v[0] += more.x; v[1] += more.y; v[2] += more.z; v[3] += more.w;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int m = m0 + wm + 16 * i + 8 * r + g;
            if (m >= M) continue;
#pragma unroll
            for (int j = 0; j < WN / 8; j += 2) {
                int n = n0 + wn + j / 4 * 32 + 8 * t + j % 4 * 2;
                int sum[4] = {c[i][j][2 * r] >> 4, c[i][j][2 * r + 1] >> 4, c[i][j + 1][2 * r] >> 4,
                              c[i][j + 1][2 * r + 1] >> 4};
                if (n < N) finish4(sum, m, n, scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state, y, N,
                                   has_zero, has_bias, has_shift);
            }
        }
}
#endif  // TILED

#ifdef ORDERS
// Codes (rows, K) as a product wants them. Paired: in every 32 channels the even ones come before the odd ones.
// Otherwise X_c - z_c of a token as e4m3 bytes: sign, 4 bits of exponent, 3 of fraction, exact for integers up to 16.
__device__ unsigned e4m3(int v) {
    unsigned u = __float_as_uint((float)v);
    int magnitude = (int)(u >> 20 & 0x7ffu) - (120 << 3);  // exponent and fraction, biased by 7 in place of 127
    return (u >> 24 & 0x80u) | (magnitude > 0 ? magnitude : 0);
}
extern "C" __global__ void arrange_codes(const uint4* codes, const int* zero, uint4* out, int K, int M, int paired) {
    int row = blockIdx.x, k = blockIdx.y * THREADS + threadIdx.x;  // 32 codes each
    if (k >= K / 32) return;
    long long i = (long long)row * (K / 32) + k;
    int z = row < M ? zero[row] : 0;
    uint4 u = codes[2 * i], v = codes[2 * i + 1];
    unsigned in[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w}, to[8];
    for (int j = 0; j < 8; j++) {
        if (paired) {
            int from = j % 4 * 2;
            to[j] = __byte_perm(in[from], in[from + 1], j < 4 ? 0x6420 : 0x7531);
        } else {
            to[j] = 0;
            for (int b = 0; b < 4; b++) to[j] |= e4m3((signed char)(in[j] >> 8 * b) - z) << 8 * b;
        }
    }
    out[2 * i] = make_uint4(to[0], to[1], to[2], to[3]);
    out[2 * i + 1] = make_uint4(to[4], to[5], to[6], to[7]);
}

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

// y + bias + the output of the mean of a token's state, four columns a thread.
extern "C" __global__ void add_ends(real* y, const float* bias, const float* shift, const unsigned char* state, int N,
                                    int has_bias, int has_shift) {
    int m = blockIdx.x, n = 4 * (blockIdx.y * THREADS + threadIdx.x);
    if (n >= N) return;
    float v[4], b[4];
    load4(y + (long long)m * N + n, v);
    if (has_bias) load4(bias + n, b);
    for (int j = 0; j < 4 && has_bias; j++) v[j] = __fadd_rn(v[j], b[j]);
    if (has_shift) load4(shift + (state[m] ? N : 0) + n, b);
    for (int j = 0; j < 4 && has_shift; j++) v[j] = __fadd_rn(v[j], b[j]);
    store4(y + (long long)m * N + n, v);
}
#endif  // ORDERS
