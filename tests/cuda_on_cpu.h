// Just enough of CUDA to compile this project's kernels as C++ and run them on a CPU, one block at a time.
// A block whose threads meet at barriers runs on real threads; the others run one thread after another.
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
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
        meeting = &barrier;
        std::vector<std::thread> all;
        for (int t = 0; t < threads; t++) all.emplace_back(one, t);
        for (auto& t : all) t.join();
    }
}
