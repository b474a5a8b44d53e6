// Parts that every kernel shares: numbers of the models, sums over a warp and a block.
//
// -DDTYPE says what the model computes in: 0 float32, 1 float16, 2 bfloat16. `scalar` is that type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef DTYPE
#define DTYPE 2
#endif
#if DTYPE == 0
typedef float scalar;
#elif DTYPE == 1
typedef __half scalar;
#else
typedef __nv_bfloat16 scalar;
#endif
typedef __nv_bfloat16 bfloat;

#define FULL_WARP 0xffffffffu

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// Sum over the `width` lanes that share lane / width; every lane gets it.
__device__ __forceinline__ float warp_sum(float x, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

__device__ __forceinline__ float warp_min(float x, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) x = fminf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
