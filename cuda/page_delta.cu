// Pages as quantized differences to other pages, and back: x = gain * base + scale * code.
//
// pages, bases  [P, T, D], [Q, T, D] in float32, float16 or bfloat16 (dtype as in codes.cuh)
// members, base_of  [M] int64: pages to code, and what each is coded against
// codes         [M, T, padded(D) * bits / 8] bytes, packed along the channels as ops/packing.py does: 4 or 8 bits in
//               two's complement; for -DNBITS=12 the high 8 bits, and in `low` the low 4
// scale         [M, T] bfloat16, a step's size for every token; gain [M] bfloat16, the least-squares fit of the page
//
// variants: NBITS=4,8,12
// fmad: off
// Sums run in the order of `tree_sum` (ops/numeric.py) in float64: over the channels, then over the tokens.
// Grid: M. Block: a multiple of 32. Dynamic shared memory of delta_encode: 16 * (warps * D + T) bytes.
#include "codes.cuh"
#include "common.cuh"

#ifndef NBITS
#define NBITS 8
#endif
#define TOP ((1 << (NBITS - 1)) - 1)
#define LARGEST_GAIN 8.0

extern __shared__ __align__(16) unsigned char kvc_smem[];

// Sum of x[0 .. n) by halving, in place; all lanes of a warp get it.
__device__ double halving_sum(double* x, int n) {
    const int lane = threadIdx.x & 31;
    while (n > 1) {
        const int half = n / 2;
        for (int i = lane; i < half; i += 32) x[i] += x[half + i];
        if (n % 2 && lane == 0) x[0] += x[n - 1];
        __syncwarp();
        n = half;
    }
    double sum = x[0];
    __syncwarp();
    return sum;
}

struct Pair {
    const void *pages, *bases;
    size_t member, base;
    int dim, dtype;
    float gain;

    __device__ float page(int t, int c) const { return clean(number_at(pages, member + (size_t)t * dim + c, dtype)); }
    __device__ float base_at(int t, int c) const { return clean(number_at(bases, base + (size_t)t * dim + c, dtype)); }
    __device__ float difference(int t, int c) const { return page(t, c) - gain * base_at(t, c); }
    __device__ unsigned code(int t, int c, float inverse) const {
        if (c >= dim) return 0;
        float steps = rintf(difference(t, c) * inverse);
        return (unsigned)(int)fminf(fmaxf(steps, -(float)TOP), (float)TOP);
    }
};

extern "C" __global__ void __launch_bounds__(256, 1) delta_encode(
    const void* __restrict__ pages, const void* __restrict__ bases, const long long* __restrict__ members,
    const long long* __restrict__ base_of, unsigned char* __restrict__ codes, unsigned char* __restrict__ low,
    unsigned short* __restrict__ scale, unsigned short* __restrict__ gain, int tokens, int dim, int dtype) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    double* products = (double*)kvc_smem + (size_t)warp * 2 * dim;
    double* squares = products + dim;
    double* page_products = (double*)kvc_smem + (size_t)warps * 2 * dim;
    double* page_squares = page_products + tokens;
    __shared__ unsigned short found;

    Pair pair;
    pair.pages = pages;
    pair.bases = bases;
    pair.member = (size_t)members[blockIdx.x] * tokens * dim;
    pair.base = (size_t)base_of[blockIdx.x] * tokens * dim;
    pair.dim = dim;
    pair.dtype = dtype;

    for (int t = warp; t < tokens; t += warps) {
        for (int c = lane; c < dim; c += 32) {
            double base = pair.base_at(t, c);
            products[c] = (double)pair.page(t, c) * base;
            squares[c] = base * base;
        }
        __syncwarp();
        double product = halving_sum(products, dim), square = halving_sum(squares, dim);
        if (lane == 0) {
            page_products[t] = product;
            page_squares[t] = square;
        }
    }
    __syncthreads();
    if (warp == 0) {
        double product = halving_sum(page_products, tokens), square = halving_sum(page_squares, tokens);
        double fit = square > 0.0 ? product / square : 0.0;
        fit = fit < LARGEST_GAIN ? fit : LARGEST_GAIN;
        fit = fit > -LARGEST_GAIN ? fit : -LARGEST_GAIN;
        if (lane == 0) {
            found = bfloat16_nearest((float)fit);
            gain[blockIdx.x] = found;
        }
    }
    __syncthreads();
    pair.gain = from_bfloat16(found);

    const int bytes = padded(dim);
    for (int t = warp; t < tokens; t += warps) {
        float reach = 0.0f;
        for (int c = lane; c < dim; c += 32) reach = fmaxf(reach, fabsf(pair.difference(t, c)));
        const unsigned short step = bfloat16_ceil(fmaxf(warp_max(reach) * (1.0f / TOP), KVC_TINY));
        const float inverse = 1.0f / from_bfloat16(step);
        const size_t token = (size_t)blockIdx.x * tokens + t;
        if (lane == 0) scale[token] = step;
#if NBITS == 8
        for (int c = lane; c < bytes; c += 32) codes[token * bytes + c] = (unsigned char)pair.code(t, c, inverse);
#else
        const int half = bytes / 2;
        for (int c = lane; c < half; c += 32) {
            unsigned first = pair.code(t, c, inverse), second = pair.code(t, c + half, inverse);
            unsigned char nibbles = (unsigned char)((first & 15u) | (second & 15u) << 4);
#if NBITS == 4
            codes[token * half + c] = nibbles;
#else
            codes[token * bytes + c] = (unsigned char)(first >> 4);
            codes[token * bytes + half + c] = (unsigned char)(second >> 4);
            low[token * half + c] = nibbles;
#endif
        }
#endif
    }
}

extern "C" __global__ void __launch_bounds__(256) delta_decode(
    const void* __restrict__ bases, const long long* __restrict__ base_of, const unsigned char* __restrict__ codes,
    const unsigned char* __restrict__ low, const unsigned short* __restrict__ scale,
    const unsigned short* __restrict__ gain, void* __restrict__ out, int tokens, int dim, int dtype, int out_dtype) {
    const float own_gain = from_bfloat16(gain[blockIdx.x]);
    const size_t base = (size_t)base_of[blockIdx.x] * tokens * dim, first = (size_t)blockIdx.x * tokens;
    for (int i = threadIdx.x; i < tokens * dim; i += blockDim.x) {
        const int t = i / dim, c = i % dim;
        const size_t token = first + t;
#if NBITS == 8
        const int code = (signed char)codes[token * padded(dim) + c];
#else
        const int half = padded(dim) / 2;
        const unsigned char pair = (NBITS == 4 ? codes : low)[token * half + c % half];
        const int nibble = c < half ? pair & 15 : pair >> 4;
#if NBITS == 4
        const int code = (nibble ^ 8) - 8;
#else
        const int code = (int)(signed char)codes[token * 2 * half + c] * 16 + nibble;
#endif
#endif
        const float from_base = own_gain * clean(number_at(bases, base + i, dtype));
        put_number(out, first * dim + i, from_base + from_bfloat16(scale[token]) * (float)code, out_dtype);
    }
}
