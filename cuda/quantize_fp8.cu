// fp8 codec: e4m3 numbers and one bfloat16 scale a token.
//
// Grid: one block for each 8 tokens of all rows; block: 256 threads, a warp takes a token. codes [rows, T, D], rows
// `code_row` apart; scale [rows, T], rows `scale_row` apart.
// fmad: off
#include "codes.cuh"
#include "ptx.cuh"

// x: number (row, token, channel) at row / inner * x_outer + row % inner * x_inner + token * x_token + channel.
extern "C" __global__ void __launch_bounds__(256) encode_fp8(
        const void* x, int dtype, int inner, long long x_outer, long long x_inner, int x_token,
        unsigned char* codes, long long code_row, unsigned short* scale, long long scale_row,
        int dim, int rows, int tokens, float unit) {
    int job = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (job >= rows * tokens) return;
    int row = job / tokens, token = job % tokens;
    size_t from = row / inner * x_outer + row % inner * x_inner + (size_t)token * x_token;
    int lane = threadIdx.x % 32;
    float size = 0.0f;
    for (int c = lane; c < dim; c += 32) size = fmaxf(size, fabsf(clean(number_at(x, from + c, dtype))));
    unsigned short bits = bfloat16_ceil(fmaxf(warp_max(size) * unit, KVC_TINY));
    float inverse = 1.0f / from_bfloat16(bits);
    for (int c = lane; c < dim; c += 32) {
        float number = clean(number_at(x, from + c, dtype)) * inverse;
        codes[row * code_row + (size_t)token * dim + c] = (unsigned char)e4m3_pair(number, 0.0f);
    }
    if (lane == 0) scale[row * scale_row + token] = bits;
}

// out: [rows, T, D] numbers of `dtype`.
extern "C" __global__ void __launch_bounds__(256) decode_fp8(
        const unsigned char* codes, long long code_row, const unsigned short* scale, long long scale_row,
        void* out, int dtype, int dim, int rows, int tokens) {
    int job = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (job >= rows * tokens) return;
    int row = job / tokens, token = job % tokens;
    float step = from_bfloat16(scale[row * scale_row + token]);
    for (int c = threadIdx.x % 32; c < dim; c += 32) {
        float number = __low2float(halves_of_e4m3(codes[row * code_row + (size_t)token * dim + c]));
        put_number(out, (size_t)job * dim + c, number * step, dtype);
    }
}
