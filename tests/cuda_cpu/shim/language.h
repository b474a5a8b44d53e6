// CUDA's words, vector types, bit operations and mathematics, for kernels compiled by g++.
#pragma once
#include <cmath>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One section for all static shared variables, so that the runtime knows where they are. build.py takes the
// declaration of kvc_smem out, since an extern variable cannot be static.
#define __shared__ static __attribute__((section("kvc_shared")))
#define kvc_smem (kvc::machine.dynamic)
#define threadIdx (kvc::machine.current->index)
#define blockIdx (kvc::machine.block)
#define blockDim (kvc::machine.block_size)
#define gridDim (kvc::machine.grid_size)
#define warpSize 32
#define KVC_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

using uint3 = kvc::Index;
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

#define KVC_VECTORS(type, name)                                                          \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                             \
    struct name##3 { type x, y, z; };                                                    \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                     \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }          \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 uint3_of_ints  // threadIdx has that type already
KVC_VECTORS(signed char, char)
KVC_VECTORS(unsigned char, uchar)
KVC_VECTORS(short, short)
KVC_VECTORS(unsigned short, ushort)
KVC_VECTORS(int, int)
KVC_VECTORS(unsigned, uint)
KVC_VECTORS(float, float)
KVC_VECTORS(double, double)
KVC_VECTORS(long long, longlong)
KVC_VECTORS(unsigned long long, ulonglong)
#undef uint3

template <class To, class From>
inline To kvc_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int x) { return kvc_bits<float>(x); }
inline int __float_as_int(float x) { return kvc_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return kvc_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return kvc_bits<unsigned>(x); }

// Bits
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
    return reversed;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned pick = selector >> 4 * i & 15, byte = both >> 8 * (pick & 7) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
    return sum;
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32); }

// Mathematics. The fast functions of the GPU err by a few units in the last place more than these.
#define KVC_MIN_MAX(type)                                        \
    inline type min(type a, type b) { return b < a ? b : a; }    \
    inline type max(type a, type b) { return a < b ? b : a; }
KVC_MIN_MAX(int)
KVC_MIN_MAX(unsigned)
KVC_MIN_MAX(long long)
KVC_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Rounded by themselves: never contracted into a fused operation.
inline __attribute__((noinline)) float kvc_rounded(float x) { asm volatile("" : "+m"(x)); return x; }
inline float __fadd_rn(float a, float b) { return kvc_rounded(a + b); }
inline float __fsub_rn(float a, float b) { return kvc_rounded(a - b); }
inline float __fmul_rn(float a, float b) { return kvc_rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x != x ? 0.0f : fminf(fmaxf(x, 0.0f), 1.0f); }
// Conversions saturate and turn NaN into 0, as on the GPU; in C++ both are undefined.
inline int kvc_to_int(double x) { return x != x ? 0 : x >= 2147483647.0 ? 2147483647 : x <= -2147483648.0 ? -2147483647 - 1 : static_cast<int>(x); }
inline unsigned kvc_to_uint(double x) { return !(x > 0) ? 0u : x >= 4294967295.0 ? 4294967295u : static_cast<unsigned>(x); }
inline int __float2int_rn(float x) { return kvc_to_int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return kvc_to_int(truncf(x)); }
inline int __float2int_rd(float x) { return kvc_to_int(floorf(x)); }
inline int __float2int_ru(float x) { return kvc_to_int(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return kvc_to_uint(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return kvc_to_uint(truncf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// Loads with a hint for the cache
template <class T> inline T __ldg(const T* address) { return *address; }
template <class T> inline T __ldcs(const T* address) { return *address; }
template <class T> inline T __ldcg(const T* address) { return *address; }
template <class T> inline void __stcs(T* address, T value) { *address = value; }
template <class T> inline void __stcg(T* address, T value) { *address = value; }
