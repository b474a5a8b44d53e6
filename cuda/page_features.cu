// What pages are like, and exact comparisons of pairs of them.
//
// pages     [P, T, D] in float32, float16 or bfloat16 (dtype as in codes.cuh)
// features  [P, 2 D + 1 + S] float32: mean and standard deviation of every channel, norm of the page, sketch
// pairs     [M, 2] int64
// sums      [M, 4] float32: x.x, y.y, x.y and |x - y|^2 of every pair
//
// The sketch is a random projection with one sign a number, +-1 by a hash of its place and the seed: number (t, d) goes
// to sum (d + 7 t) % S. Inner products of sketches estimate those of pages.
// Grid: P or M. Block: a multiple of 32, at most 256.
#include "codes.cuh"
#include "common.cuh"

#define TOKEN_SHIFT 7
#define WARPS 8

__device__ float signed_number(float x, unsigned place, unsigned seed) {
    unsigned h = place * 0x9e3779b1u ^ seed;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return (h ^ h >> 16) & 1u ? -x : x;
}

// Sum over the block; thread 0 gets it.
__device__ float block_sum(float x) {
    __shared__ float sums[WARPS];
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < (int)(blockDim.x >> 5); w++) total += sums[w];
    __syncthreads();
    return total;
}

extern "C" __global__ void __launch_bounds__(256) page_features(
    const void* __restrict__ pages, float* __restrict__ features, int tokens, int dim, int sketch, int seed,
    int dtype) {
    const size_t page = (size_t)blockIdx.x * tokens * dim;
    float* out = features + (size_t)blockIdx.x * (2 * dim + 1 + sketch);
    float squares = 0.0f;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        float sum = 0.0f, spread = 0.0f;
        for (int t = 0; t < tokens; t++) sum += clean(number_at(pages, page + (size_t)t * dim + c, dtype));
        const float mean = sum / tokens;
        for (int t = 0; t < tokens; t++) {
            const float x = clean(number_at(pages, page + (size_t)t * dim + c, dtype));
            spread = fmaf(x - mean, x - mean, spread);
            squares = fmaf(x, x, squares);
        }
        out[c] = mean;
        out[dim + c] = sqrtf(spread / tokens);
    }
    const float total = block_sum(squares);
    if (threadIdx.x == 0) out[2 * dim] = sqrtf(total);
    for (int s = threadIdx.x; s < sketch; s += blockDim.x) {
        float sum = 0.0f;
        for (int t = 0; t < tokens; t++) {
            const int behind = (s - TOKEN_SHIFT * t) % sketch;
            for (int c = behind < 0 ? behind + sketch : behind; c < dim; c += sketch) {
                const unsigned place = (unsigned)(t * dim + c);
                sum += signed_number(clean(number_at(pages, page + place, dtype)), place, (unsigned)seed);
            }
        }
        out[2 * dim + 1 + s] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) page_pairs(
    const void* __restrict__ pages, const void* __restrict__ others, const long long* __restrict__ pairs,
    float* __restrict__ sums, int numbers, int dtype) {
    const size_t first = (size_t)pairs[2 * (size_t)blockIdx.x] * numbers;
    const size_t second = (size_t)pairs[2 * (size_t)blockIdx.x + 1] * numbers;
    float xx = 0.0f, yy = 0.0f, xy = 0.0f, apart = 0.0f;
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
        const float x = clean(number_at(pages, first + i, dtype)), y = clean(number_at(others, second + i, dtype));
        xx = fmaf(x, x, xx);
        yy = fmaf(y, y, yy);
        xy = fmaf(x, y, xy);
        apart = fmaf(x - y, x - y, apart);
    }
    xx = block_sum(xx);
    yy = block_sum(yy);
    xy = block_sum(xy);
    apart = block_sum(apart);
    if (threadIdx.x == 0) {
        float* out = sums + 4 * (size_t)blockIdx.x;
        out[0] = xx;
        out[1] = yy;
        out[2] = xy;
        out[3] = apart;
    }
}
