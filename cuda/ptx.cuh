// All inline PTX of the project, one small wrapper an instruction.
//
// Each wrapper has a twin in C++ under KVC_EMULATED, for the CPU shim of tests/cuda_cpu. Layouts of fragments are those
// of the PTX ISA; eval/bench_gpu.py compares every wrapper with a known answer on a real GPU before it measures.
#pragma once
#include "common.cuh"

__device__ __forceinline__ unsigned bits_of(__half2 x) { return *reinterpret_cast<unsigned*>(&x); }
__device__ __forceinline__ unsigned bits_of(__nv_bfloat162 x) { return *reinterpret_cast<unsigned*>(&x); }
__device__ __forceinline__ __half2 half2_of(unsigned x) { return *reinterpret_cast<__half2*>(&x); }
__device__ __forceinline__ __nv_bfloat162 bfloat2_of(unsigned x) { return *reinterpret_cast<__nv_bfloat162*>(&x); }

// Two floats as two e4m3 bytes, `low` in the low byte; saturates at 448. Two e4m3 bytes as two halves, exact.
#if __CUDA_ARCH__ < 890  // the instructions came with sm_89
__device__ __forceinline__ unsigned e4m3_byte(float x) {
    unsigned sign = __float_as_uint(x) >> 31 << 7;
    if (x != x) return sign | 0x7fu;
    float size = fminf(fabsf(x), 448.0f);
    // Below 2^-6 the spacing is 2^-9; above, the low 20 bits of the mantissa are rounded away, ties to even.
    if (size < 0.015625f) return sign | (unsigned)__float2int_rn(size * 512.0f);
    unsigned bits = __float_as_uint(size);
    bits += 0x7ffffu + (bits >> 20 & 1u);
    return sign | ((bits >> 20) - (120u << 3));
}
__device__ __forceinline__ unsigned short e4m3_pair(float low, float high) {
    return (unsigned short)(e4m3_byte(low) | e4m3_byte(high) << 8);
}
__device__ __forceinline__ __half2 halves_of_e4m3(unsigned short pair) {
    unsigned spread = (pair & 0xffu) | (pair & 0xff00u) << 8;
    // As a half, the bits one place down mean 2^-8 of the number (bias 15 for 7); NaN is put in by hand.
    __half2 scaled = half2_of((spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 7);
    unsigned halves = bits_of(__hmul2(scaled, __float2half2_rn(256.0f)));
    if ((spread & 0x7fu) == 0x7fu) halves = (halves & 0xffff0000u) | 0x7fffu;
    if ((spread & 0x7f0000u) == 0x7f0000u) halves = (halves & 0xffffu) | 0x7fff0000u;
    return half2_of(halves);
}
#elif defined(KVC_EMULATED)
static inline unsigned short e4m3_pair(float low, float high) {
    return static_cast<unsigned short>(kvc::e4m3_bits(low) | kvc::e4m3_bits(high) << 8);
}
static inline __half2 halves_of_e4m3(unsigned short pair) {
    return __floats2half2_rn(kvc::e4m3_value(pair & 255), kvc::e4m3_value(pair >> 8));
}
#else
__device__ __forceinline__ unsigned short e4m3_pair(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ __half2 halves_of_e4m3(unsigned short pair) {
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
    return half2_of(halves);
}
#endif

#ifdef KVC_EMULATED

// Loads of data that is read once: they leave no copy in the L1 cache.
static inline uint4 load_once(const uint4* from) { return *from; }
static inline uint2 load_once(const uint2* from) { return *from; }
static inline unsigned load_once(const unsigned* from) { return *from; }

// Asks for 32 bytes to come into the L2 cache. Not to be used behind the end of a tensor.
static inline void prefetch(const void* address, KVC_HERE) { kvc::check_access(address, 1, kvc::READ, {file, line}); }

// Any function of three bits, bit by bit; TABLE is its value at (a, b, c) = (0xf0, 0xcc, 0xaa).
template <int TABLE>
static inline unsigned lop3(unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int i = 0; i < 8; ++i)
        if (TABLE >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

// 2^x, to two units in the last place.
static inline float fast_exp2(float x) { return exp2f(x); }

struct MmaFragments {
    unsigned a[4], b[2];
};

template <class Value>
static inline void mma_twin(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], const char* name,
                            kvc::Place place, Value value) {
    MmaFragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const kvc::Slots& slots = kvc::meet(FULL_WARP, mine, name, place);
    int group = kvc::lane() / 4, pair = kvc::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = group + i / 2 * 8, column = pair * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            unsigned left = kvc::value_of<MmaFragments>(slots, row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
            unsigned right = kvc::value_of<MmaFragments>(slots, column * 4 + k % 8 / 2).b[k / 8];
            sum += value(left >> k % 2 * 16 & 0xffffu) * value(right >> k % 2 * 16 & 0xffffu);
        }
        c[i] += sum;
    }
}

// c[16, 8] += a[16, 16] b[16, 8]. With group = lane / 4 and pair = lane % 4, a lane holds
//   a[0] row group, columns 2 pair and 2 pair + 1; a[1] row group + 8; a[2], a[3] the same rows, columns + 8
//   b[0] rows 2 pair and 2 pair + 1 of column group; b[1] rows + 8
//   c[0], c[1] row group, columns 2 pair and 2 pair + 1; c[2], c[3] row group + 8
static inline void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], KVC_HERE) {
    auto value = [](unsigned bits) { return kvc::half_value(static_cast<unsigned short>(bits)); };
    mma_twin(c, a, b, "mma_f16", {file, line}, value);
}
static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], KVC_HERE) {
    auto value = [](unsigned bits) { return kvc::bfloat_value(static_cast<unsigned short>(bits)); };
    mma_twin(c, a, b, "mma_bf16", {file, line}, value);
}

// Copies of 16 bytes from global to shared memory that go on while the thread works. They are there for the thread
// that asked after copies_wait (a barrier makes them visible to others); here they are made no earlier.
static inline void copy_async(void* shared, const void* global, KVC_HERE) {
    kvc::copy_later(shared, global, 16, {file, line});
}
static inline void copies_commit() { kvc::commit_copies(); }
// Waits until at most LEFT of the newest committed groups are still under way.
template <int LEFT>
static inline void copies_wait(KVC_HERE) { kvc::wait_copies(LEFT, {file, line}); }

#else

__device__ __forceinline__ uint4 load_once(const uint4* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}
__device__ __forceinline__ uint2 load_once(const uint2* from) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
    return x;
}
__device__ __forceinline__ unsigned load_once(const unsigned* from) {
    unsigned x;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

template <int TABLE>
__device__ __forceinline__ unsigned lop3(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return result;
}

__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(LEFT) : "memory");
}
#endif

#endif
