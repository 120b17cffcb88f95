// Just enough of CUDA to compile this project's kernels as C++ and run them on a CPU, one block at a time.
// A block whose threads meet at barriers runs on real threads; the others run one thread after another.
#include <array>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static  // blocks run one after another, so one copy serves each in turn
struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static std::barrier<>* meeting;
static void __syncthreads() { meeting->arrive_and_wait(); }

struct float4 { float x, y, z, w; };
struct int4 { int x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct char4 { signed char x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

// c += a b by the 32 threads of a warp, which show each other their registers: fragments as PTX lays them out for
// mma.m16n8k32 with bytes.
struct Warp {
    std::barrier<> all{32};
    std::array<const unsigned*, 32> a, b;
};
static std::vector<Warp>* warps;
static int byte_of(unsigned word, int i) { return (signed char)(word >> 8 * i); }
static void mma(int* c, const unsigned* a, const unsigned* b) {
    Warp& warp = (*warps)[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    warp.a[lane] = a;
    warp.b[lane] = b;
    warp.all.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; k++) {
            unsigned left = warp.a[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
            unsigned right = warp.b[column * 4 + k % 16 / 4][k / 16];
            c[i] += byte_of(left, k % 4) * byte_of(right, k % 4);
        }
    }
    warp.all.arrive_and_wait();  // what they showed may change again
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) { kernel(*(A*)args[I]...); }

// Arguments come as cuLaunchKernel takes them: pointers to the values.
template <class... A>
void launch(void (*kernel)(A...), int gx, int gy, int threads, bool meets, void** args) {
    gridDim = {gx, gy, 1};
    for (int b = 0; b < gx * gy; b++) {
        auto one = [=](int t) {
            blockIdx = {b % gx, b / gx, 0};
            threadIdx = {t, 0, 0};
            call(kernel, args, std::index_sequence_for<A...>{});
        };
        if (!meets) {
            for (int t = 0; t < threads; t++) one(t);
            continue;
        }
        std::barrier<> barrier(threads);
        std::vector<Warp> own(threads / 32);
        meeting = &barrier;
        warps = &own;
        std::vector<std::thread> all;
        for (int t = 0; t < threads; t++) all.emplace_back(one, t);
        for (auto& t : all) t.join();
    }
}
