// Rounding with error feedback (ops/feedback.py): a code's error goes into the channels that are not coded yet.
//
// Grid: x over tiles of 32 tokens, y over heads. Block: 32 threads, a token each, times any number of parts; when an
// error is passed on a part takes every (parts)th channel. Dynamic shared memory: the tile, 32 * D floats, by channel.
// z and codes [H, D, T] float32: what is coded, and whole numbers + 0.5; weights [H, D, D].
// fmad: off
#include "common.cuh"

extern __shared__ __align__(16) unsigned char kvc_smem[];

extern "C" __global__ void __launch_bounds__(256) round_with_feedback(
        const float* z, const float* weights, float* codes, int dim, int tokens, float step, float half) {
    float* tile = (float*)kvc_smem;
    int lane = threadIdx.x % 32, part = threadIdx.x / 32, parts = blockDim.x / 32;
    int token = blockIdx.x * 32 + lane;
    bool real = token < tokens;
    size_t base = (size_t)blockIdx.y * dim * tokens + token;
    const float* weight = weights + (size_t)blockIdx.y * dim * dim;
    for (int c = part; c < dim; c += parts) tile[c * 32 + lane] = real ? z[base + (size_t)c * tokens] : 0.0f;
    __syncthreads();
    for (int c = 0; c < dim; c++) {
        float number = tile[c * 32 + lane];
        float code = fminf(fmaxf(floorf(number / step), -half), half - 1.0f) + 0.5f, error = number - step * code;
        if (part == 0 && real) codes[base + (size_t)c * tokens] = code;
        for (int later = c + 1 + part; later < dim; later += parts) {
            tile[later * 32 + lane] -= weight[(size_t)c * dim + later] * error;
        }
        __syncthreads();
    }
}
