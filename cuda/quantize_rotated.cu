// Codecs that rotate (turbo, eqrot): one code a coordinate, one scale a token. Layouts: codes.cuh, rotation.cuh.
//
// Grid: one block for each tile of 8 * `width` tokens of a row; block: any number of threads that is at least that.
// Dynamic shared memory, in this order: the tile and a second one of 8 * width * (D | 1) floats each, a float a thread,
// codes of 8 * width * `line` bytes (`line` = D rounded up to 8, and 4). Statistics, scales: bfloat16.
// fmad: off
#include "codes.cuh"
#include "rotation.cuh"

extern __shared__ __align__(16) unsigned char kvc_smem[];

struct Room {
    float *tile, *other, *threads;
    unsigned char* codes;
    int line;
};

__device__ __forceinline__ Room room_of(int tokens, int dim) {
    Room room;
    room.tile = (float*)kvc_smem;
    room.other = room.tile + tokens * (dim | 1);
    room.threads = room.other + tokens * (dim | 1);
    room.codes = (unsigned char*)(room.threads + blockDim.x);
    room.line = padded(dim) + 4;
    return room;
}

// x: number (row, token, channel) at row / inner * x_outer + row % inner * x_inner + token * x_token + channel.
// mean, spread: [rows, D], rows `statistics_row` apart; null for values and turbo.
// signs [D], hartley [rest, rest]: ops/hadamard.py. root: sqrt(D).
// bins, squares: [4096] codes and squares of the Lloyd-Max levels nearest to coordinates -4 .. 4; null: uniform codes
// with `inverse_step`. power: 0, or -0.5 or -1: the scale gets a factor cos^power of the angle to the vector.
extern "C" __global__ void __launch_bounds__(256, 4) encode_rotated(
        const void* x, int dtype, int inner, long long x_outer, long long x_inner, int x_token,
        const unsigned short* mean, const unsigned short* spread, long long statistics_row,
        const float* signs, const float* hartley, const unsigned char* bins, const float* squares,
        unsigned char* high, long long high_row, int high_line, unsigned char* low, long long low_row, int low_line,
        unsigned short* scale, long long scale_row,
        int dim, int pages, int page, int width, int nbits, int value,
        float root, float inverse_root, float inverse_step, float power) {
    Tile at = tile_of(blockIdx.x, pages, page, width);
    int tokens = at.tokens(), half = 1 << (nbits - 1);
    Room room = room_of(tokens, dim);
    size_t base = (size_t)(at.row / inner) * x_outer + (size_t)(at.row % inner) * x_inner;

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int l = warp; l < tokens; l += blockDim.x / 32) {
        size_t from = base + (size_t)at.token(l) * x_token;
        for (int c = lane; c < dim; c += 32) {
            float number = clean(number_at(x, from + c, dtype));
            if (mean) {
                size_t own = (size_t)at.row * statistics_row + c;
                number = (number - from_bfloat16(mean[own])) * (1.0f / from_bfloat16(spread[own]));
                number = fminf(fmaxf(number, -KVC_LIMIT), KVC_LIMIT);
            }
            room.tile[l * (dim | 1) + c] = number;
        }
    }
    __syncthreads();

    // The vector's length, found without overflow; then rotate, and bring it to sqrt(D).
    Worker me = worker_of(tokens, dim);
    float *v = me.of(room.tile), *w = me.of(room.other), own = 0.0f;
    for (int c = me.first; c < dim; c += me.steps) own = fmaxf(own, fabsf(v[c]));
    float size = fmaxf(largest(own, room.threads, me, tokens), KVC_TINY), shrink = 1.0f / size;
    for (int c = me.first; c < dim; c += me.steps) {
        float number = v[c] * shrink;
        v[c] = number * signs[c];
        w[c] = number * number;
    }
    __syncthreads();
    float norm = sqrtf(tree_sum(room.other, me, dim));
    float* turned = mix(room.tile, room.other, hartley, me, dim);
    float* spare = turned == room.tile ? room.other : room.tile;
    float stretch = 1.0f / fmaxf(norm, KVC_TINY) * root;
    norm *= size;

    v = me.of(turned);
    w = me.of(spare);
    for (int c = me.first; c < dim; c += me.steps) {
        float z = v[c] * stretch;
        int code;
        if (bins) {
            int bin = (int)fminf(fmaxf(z * 512.0f + 2048.0f, 0.0f), 4095.0f);
            code = bins[bin];
            w[c] = squares[bin];
        } else {
            float step = fminf(fmaxf(floorf(z * inverse_step), -(float)half), half - 1.0f), number = step + 0.5f;
            code = (int)step + half;
            w[c] = number * number;
            v[c] = number * z;
        }
        room.codes[me.vector * room.line + c] = (unsigned char)(code ^ half);
    }
    __syncthreads();
    float length = sqrtf(tree_sum(spare, me, dim)), kept = norm / length;
    if (power != 0.0f) {
        float cosine = tree_sum(turned, me, dim) / length * inverse_root;
        cosine = fminf(fmaxf(cosine, 0.5f), 1.0f);
        kept *= power == -1.0f ? 1.0f / cosine : 1.0f / sqrtf(cosine);
    }
    if (me.first == 0) scale[(size_t)at.row * scale_row + at.token(me.vector)] = bfloat16_nearest(kept);

    Planes out = planes_of(high, high_row, high_line, low, low_row, low_line, at.row);
    pack_tile(room.codes, room.line, at, out, dim, nbits, value);
}

// out: [rows, T, D] numbers of `dtype`. numbers: what each stored code stands for. The rest is as above.
extern "C" __global__ void __launch_bounds__(256, 4) decode_rotated(
        const unsigned char* high, long long high_row, int high_line,
        const unsigned char* low, long long low_row, int low_line, const unsigned short* scale,
        long long scale_row, const unsigned short* mean, const unsigned short* spread, long long statistics_row,
        const float* signs, const float* hartley, const float* numbers, void* out, int dtype,
        int dim, int pages, int page, int width, int nbits, int value) {
    Tile at = tile_of(blockIdx.x, pages, page, width);
    int tokens = at.tokens();
    Room room = room_of(tokens, dim);
    Planes in = planes_of(high, high_row, high_line, low, low_row, low_line, at.row);
    unpack_tile(room.codes, room.line, at, in, dim, nbits, value);
    __syncthreads();

    Worker me = worker_of(tokens, dim);
    float *v = me.of(room.tile), own = from_bfloat16(scale[(size_t)at.row * scale_row + at.token(me.vector)]);
    for (int c = me.first; c < dim; c += me.steps) v[c] = numbers[room.codes[me.vector * room.line + c]] * own;
    __syncthreads();
    float* turned = mix(room.tile, room.other, hartley, me, dim);

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int l = warp; l < tokens; l += blockDim.x / 32) {
        size_t to = ((size_t)at.row * pages * page + at.token(l)) * dim;
        for (int c = lane; c < dim; c += 32) {
            float number = turned[l * (dim | 1) + c] * signs[c];
            if (mean) {
                size_t one = (size_t)at.row * statistics_row + c;
                number = number * from_bfloat16(spread[one]) + from_bfloat16(mean[one]);
            }
            put_number(out, to + c, number, dtype);
        }
    }
}
