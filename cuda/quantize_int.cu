// Integer codecs: groups of numbers with a scale and, unless they are symmetric, a centre. Layouts: codes.cuh.
//
// int (token): groups of neighbouring channels of a token. channel: groups of neighbouring tokens of a channel; a tile
// is a whole page then. Grid: one block for each tile of 8 * `width` tokens of a row; block: 256 threads. Dynamic
// shared memory: codes of 8 * width * `line` bytes (`line` = D rounded up to 8, and 4). Scales and centres: bfloat16.
// fmad: off
#include "codes.cuh"

extern __shared__ __align__(16) unsigned char kvc_smem[];

// How the codes of a group are found, the numbers' extremes known.
struct Grid {
    float centre, inverse, shift, lowest, highest;
    unsigned short scale_bits, centre_bits;
    __device__ __forceinline__ int code(float number) const {
        return (int)fminf(fmaxf(rintf((number - centre) * inverse + shift), lowest), highest);
    }
};

// unit: 1 / 127 where symmetric, else 2 / (2^nbits - 1). Codes are two's complement numbers but for the sign bits.
__device__ __forceinline__ Grid grid_of(float high, float low, int nbits, int symmetric, float unit) {
    Grid grid;
    int half = 1 << (nbits - 1);
    grid.centre_bits = symmetric ? 0 : bfloat16_nearest((high + low) * 0.5f);
    grid.centre = from_bfloat16(grid.centre_bits);
    float reach = fmaxf(high - grid.centre, grid.centre - low);
    grid.scale_bits = bfloat16_ceil(fmaxf(reach * unit, KVC_TINY));
    grid.inverse = 1.0f / from_bfloat16(grid.scale_bits);
    grid.shift = symmetric ? 0.0f : half - 0.5f;
    grid.lowest = symmetric ? -127.0f : 0.0f;
    grid.highest = symmetric ? 127.0f : 2.0f * half - 1.0f;
    return grid;
}


// x: number (row, token, channel) at row / inner * x_outer + row % inner * x_inner + token * x_token + channel.
// scale, centre: [rows, D / group, T], rows `scale_row` and groups `scale_line` apart; centre null where symmetric.
extern "C" __global__ void __launch_bounds__(256, 4) encode_token_int(
        const void* x, int dtype, int inner, long long x_outer, long long x_inner, int x_token,
        unsigned char* high, long long high_row, int high_line, unsigned char* low, long long low_row, int low_line,
        unsigned short* scale, unsigned short* centre, long long scale_row, int scale_line, long long centre_row,
        int centre_line, int dim, int pages, int page, int width, int nbits, int value, int group, float unit) {
    Tile at = tile_of(blockIdx.x, pages, page, width);
    int line = padded(dim) + 4, symmetric = centre == 0, flip = symmetric ? 0 : 1 << (nbits - 1);
    size_t base = (size_t)(at.row / inner) * x_outer + (size_t)(at.row % inner) * x_inner;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int l = warp; l < at.tokens(); l += blockDim.x / 32) {
        int token = at.token(l);
        size_t from = base + (size_t)token * x_token;
        for (int g = 0; g < dim / group; g++) {
            float highest = -KVC_LIMIT, lowest = KVC_LIMIT;
            for (int c = g * group + lane; c < (g + 1) * group; c += 32) {
                float number = clean(number_at(x, from + c, dtype));
                highest = fmaxf(highest, number);
                lowest = fminf(lowest, number);
            }
            Grid grid = grid_of(warp_max(highest), warp_min(lowest), nbits, symmetric, unit);
            for (int c = g * group + lane; c < (g + 1) * group; c += 32) {
                int code = grid.code(clean(number_at(x, from + c, dtype)));
                kvc_smem[l * line + c] = (unsigned char)(code ^ flip);
            }
            if (lane == 0) {
                scale[at.row * scale_row + (size_t)g * scale_line + token] = grid.scale_bits;
                if (centre) centre[at.row * centre_row + (size_t)g * centre_line + token] = grid.centre_bits;
            }
        }
    }
    __syncthreads();
    Planes out = planes_of(high, high_row, high_line, low, low_row, low_line, at.row);
    pack_tile(kvc_smem, line, at, out, dim, nbits, value);
}

// scale, centre: [rows, T / group, D], rows `scale_row` and groups `scale_line` apart. width: an eighth of the page.
extern "C" __global__ void __launch_bounds__(256, 4) encode_channel_int(
        const void* x, int dtype, int inner, long long x_outer, long long x_inner, int x_token,
        unsigned char* high, long long high_row, int high_line, unsigned char* low, long long low_row, int low_line,
        unsigned short* scale, unsigned short* centre, long long scale_row, int scale_line, long long centre_row,
        int centre_line, int dim, int pages, int page, int width, int nbits, int value, int group, float unit) {
    Tile at = tile_of(blockIdx.x, pages, page, width);
    int line = padded(dim) + 4, flip = 1 << (nbits - 1);
    size_t base = (size_t)(at.row / inner) * x_outer + (size_t)(at.row % inner) * x_inner;
    // A warp takes 16 channels of a group, which fill a sector of half precision numbers; two lanes share a channel.
    int lane = threadIdx.x % 16, part = threadIdx.x / 16 % 2, runs = (dim + 15) / 16, groups = page / group;
    for (int job = threadIdx.x / 32; job < runs * groups; job += blockDim.x / 32) {
        int c = job % runs * 16 + lane, first = job / runs * group;
        float highest = -KVC_LIMIT, lowest = KVC_LIMIT;
        if (c < dim) {
            for (int l = first + part; l < first + group; l += 2) {
                float number = clean(number_at(x, base + (size_t)(at.first + l) * x_token + c, dtype));
                highest = fmaxf(highest, number);
                lowest = fminf(lowest, number);
            }
        }
        highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 16));
        lowest = fminf(lowest, __shfl_xor_sync(FULL_WARP, lowest, 16));
        if (c < dim) {
            Grid grid = grid_of(highest, lowest, nbits, 0, unit);
            for (int l = first + part; l < first + group; l += 2) {
                int code = grid.code(clean(number_at(x, base + (size_t)(at.first + l) * x_token + c, dtype)));
                kvc_smem[l * line + c] = (unsigned char)(code ^ flip);
            }
            if (part == 0) {
                size_t unit_number = (at.first + first) / group;
                scale[at.row * scale_row + unit_number * scale_line + c] = grid.scale_bits;
                centre[at.row * centre_row + unit_number * centre_line + c] = grid.centre_bits;
            }
        }
    }
    __syncthreads();
    Planes out = planes_of(high, high_row, high_line, low, low_row, low_line, at.row);
    pack_tile(kvc_smem, line, at, out, dim, nbits, value);
}

// out: [rows, T, D] numbers of `dtype`. by_channel: groups of `group` tokens, else of `group` channels. centre: null
// where symmetric. The rest is as above.
extern "C" __global__ void __launch_bounds__(256, 4) decode_int(
        const unsigned char* high, long long high_row, int high_line,
        const unsigned char* low, long long low_row, int low_line,
        const unsigned short* scale, const unsigned short* centre, long long scale_row, int scale_line,
        long long centre_row, int centre_line, void* out, int dtype,
        int dim, int pages, int page, int width, int nbits, int value, int group, int by_channel) {
    Tile at = tile_of(blockIdx.x, pages, page, width);
    int line = padded(dim) + 4, half = 1 << (nbits - 1);
    Planes in = planes_of(high, high_row, high_line, low, low_row, low_line, at.row);
    unpack_tile(kvc_smem, line, at, in, dim, nbits, value);
    __syncthreads();
    float zero = centre ? half - 0.5f : half;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int l = warp; l < at.tokens(); l += blockDim.x / 32) {
        int token = at.token(l);
        size_t to = ((size_t)at.row * pages * page + token) * dim;
        for (int c = lane; c < dim; c += 32) {
            int meta = by_channel ? token / group : c / group, place = by_channel ? c : token;
            float number = (float)(kvc_smem[l * line + c] ^ half) - zero;
            number *= from_bfloat16(scale[at.row * scale_row + (size_t)meta * scale_line + place]);
            if (centre) number += from_bfloat16(centre[at.row * centre_row + (size_t)meta * centre_line + place]);
            put_number(out, to + c, number, dtype);
        }
    }
}
