// Conversions and arithmetic of 16-bit numbers, compared with torch's in test_numbers.py. Any grid, any block.
// -DBFLOAT: 0 halves, 1 bfloat16.
#include "common.cuh"

#if BFLOAT
typedef __nv_bfloat16 Number;
typedef __nv_bfloat162 Pair;
__device__ __forceinline__ Number number(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ Pair pair(Number x, Number y) { return __halves2bfloat162(x, y); }
#else
typedef __half Number;
typedef __half2 Pair;
__device__ __forceinline__ Number number(float x) { return __float2half_rn(x); }
__device__ __forceinline__ Pair pair(Number x, Number y) { return __halves2half2(x, y); }
#endif

extern "C" __global__ void convert(const float* x, Number* out, const Number* y, float* back, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = number(x[i]);
    back[i] = to_float(y[i]);
}

// out [6, n]: sum, difference, product, quotient, fused product and sum, the same by pairs.
extern "C" __global__ void arithmetic(const Number* a, const Number* b, const Number* c, Number* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = __hadd(a[i], b[i]);
    out[n + i] = __hsub(a[i], b[i]);
    out[2 * n + i] = __hmul(a[i], b[i]);
    out[3 * n + i] = __hdiv(a[i], b[i]);
    out[4 * n + i] = __hfma(a[i], b[i], c[i]);
    Pair both = __hfma2(pair(a[i], b[i]), pair(b[i], a[i]), pair(c[i], c[i]));
    out[5 * n + i] = both.y;
}

// out [9, n]: integer conversions and bits of x, which may be anything, also out of range.
extern "C" __global__ void integers(const float* x, const unsigned* bits, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = __float2int_rn(x[i]);
    out[n + i] = __float2int_rz(x[i]);
    out[2 * n + i] = __float2int_rd(x[i]);
    out[3 * n + i] = (int)__float2uint_rn(x[i]);
    out[4 * n + i] = __popc(bits[i]);
    out[5 * n + i] = __clz((int)bits[i]);
    out[6 * n + i] = __ffs((int)bits[i]);
    out[7 * n + i] = (int)__byte_perm(bits[i], ~bits[i], 0x3715);
    out[8 * n + i] = (int)__funnelshift_r(bits[i], 5u, 7);
}
