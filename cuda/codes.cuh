// Packed codes: numbers in, bytes out, and back. The layout is that of ops/packing.py.
//
// A tile is some tokens of one page of one row (a key-value head of a sequence), with all their channels: the code of
// token l and channel c stands in shared memory at codes[l * line + c]. Eight elements that stand n / 8 apart, n the
// elements packed together, are a bundle: they fill `nbits` whole bytes that stand n / 8 apart as well. Keys are packed
// along the channels, n = D rounded up to 8; values along the tokens of a page. So that bundles of tokens are whole, a
// tile has `width` neighbours from each eighth of a page.
#pragma once
#include "common.cuh"

#define KVC_LIMIT 1e37f  // as ops/numeric.py: inputs beyond it are clamped
#define KVC_TINY 1e-37f  // as ops/numeric.py: the smallest scale that is divided by

// The planes of a packed tensor. Keys: line = bytes of a token; values: line = bytes of a channel.
struct Planes {
    unsigned char* high;  // the only plane, or the 2-bit plane of 3-bit codes
    unsigned char* low;   // the 1-bit plane of 3-bit codes
    size_t high_line, low_line;
};

__device__ __forceinline__ Planes planes_of(
        const unsigned char* high, long long high_row, int high_line, const unsigned char* low, long long low_row,
        int low_line, int row) {
    Planes planes;
    planes.high = (unsigned char*)high + row * high_row;
    planes.low = low ? (unsigned char*)low + row * low_row : 0;
    planes.high_line = (size_t)high_line;
    planes.low_line = (size_t)low_line;
    return planes;
}

// Where a tile's tokens are in their row: local token l is number `first + l % width + l / width * eighth`.
struct Tile {
    int row, first, width, eighth;
    __device__ __forceinline__ int tokens() const { return 8 * width; }
    __device__ __forceinline__ int token(int l) const { return first + l % width + l / width * eighth; }
};

// The tile of block `index` when a row has `pages` pages of `page` tokens.
__device__ __forceinline__ Tile tile_of(int index, int pages, int page, int width) {
    Tile tile;
    int slices = page / 8 / width, per_row = pages * slices;
    tile.row = index / per_row;
    int rest = index % per_row;
    tile.first = rest / slices * page + rest % slices * width;
    tile.width = width;
    tile.eighth = page / 8;
    return tile;
}

// -- numbers ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float from_bfloat16(unsigned short bits) { return __int_as_float((int)bits << 16); }

// To the nearest, ties to even; `x` is finite.
__device__ __forceinline__ unsigned short bfloat16_nearest(float x) {
    unsigned bits = (unsigned)__float_as_int(x);
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The smallest bfloat16 that is not below x >= 0.
__device__ __forceinline__ unsigned short bfloat16_ceil(float x) {
    return (unsigned short)(((unsigned)__float_as_int(x) + 0xffffu) >> 16);
}

// dtype: 0 float32, 1 float16, 2 bfloat16
__device__ __forceinline__ float number_at(const void* x, size_t i, int dtype) {
    if (dtype == 0) return ((const float*)x)[i];
    return dtype == 1 ? to_float(((const __half*)x)[i]) : to_float(((const __nv_bfloat16*)x)[i]);
}

__device__ __forceinline__ void put_number(void* x, size_t i, float number, int dtype) {
    if (dtype == 0) store((float*)x + i, number);
    if (dtype == 1) store((__half*)x + i, number);
    if (dtype == 2) store((__nv_bfloat16*)x + i, number);
}

// Non-finite numbers become 0, others stay within the limit, -0 becomes +0.
__device__ __forceinline__ float clean(float x) {
    x = fabsf(x) <= 3.402823466e38f ? x : 0.0f;
    return fminf(fmaxf(x, -KVC_LIMIT), KVC_LIMIT) + 0.0f;
}

// -- packing ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int padded(int n) { return (n + 7) / 8 * 8; }

// Bits of the high plane, and how far it stands above the low one.
__device__ __forceinline__ int high_bits(int nbits) { return nbits == 3 ? 2 : nbits; }
__device__ __forceinline__ int low_bits(int nbits) { return nbits == 3 ? 1 : 0; }

// Byte `part` of a bundle's plane of `bits` bits; `code` is the bundle's first, the next is `apart` behind it.
// Only the first `known` of the bundle's eight codes exist; the others count as 0.
__device__ __forceinline__ unsigned char pack_byte(
        const unsigned char* code, int apart, int known, int part, int bits, int shift) {
    unsigned byte = 0, mask = (1u << bits) - 1u;
    for (int i = part, place = 0; place < 8; i += bits, place += bits) {
        if (i < known) byte |= ((unsigned)code[i * apart] >> shift & mask) << place;
    }
    return (unsigned char)byte;
}

__device__ __forceinline__ void unpack_byte(
        unsigned byte, unsigned char* code, int apart, int known, int part, int bits, int shift, bool add) {
    unsigned mask = (1u << bits) - 1u;
    for (int i = part, place = 0; place < 8; i += bits, place += bits) {
        if (i < known) {
            unsigned field = (byte >> place & mask) << shift;
            code[i * apart] = (unsigned char)(add ? code[i * apart] | field : field);
        }
    }
}

// How many of a bundle's eight channels there are: only a head size that is no multiple of 8 lacks some.
__device__ __forceinline__ int known_channels(int r, int eighth, int dim) {
    int known = (dim - r + eighth - 1) / eighth;
    return known < 8 ? known : 8;
}

// Write a tile's codes. All threads of the block; the tile is complete and a barrier has passed.
__device__ __forceinline__ void pack_tile(
        const unsigned char* codes, int line, Tile tile, Planes out, int dim, int nbits, bool value) {
    int bits = high_bits(nbits), low = low_bits(nbits);
    if (value) {  // neighbouring threads write neighbouring bytes of a channel
        for (int i = threadIdx.x; i < dim * tile.width; i += blockDim.x) {
            int c = i / tile.width, r = i % tile.width;
            const unsigned char* first = codes + r * line + c;
            // byte number of the bundle's first byte: pages before this one take page * bits / 8 bytes each
            int page = tile.first / (8 * tile.eighth), inside = tile.first % (8 * tile.eighth) + r;
            unsigned char* at = out.high + c * out.high_line + (size_t)page * tile.eighth * bits + inside;
            for (int m = 0; m < bits; m++) at[m * tile.eighth] = pack_byte(first, tile.width * line, 8, m, bits, low);
            if (low) {
                out.low[c * out.low_line + (size_t)page * tile.eighth + inside] =
                        pack_byte(first, tile.width * line, 8, 0, 1, 0);
            }
        }
        return;
    }
    int eighth = padded(dim) / 8;
    for (int i = threadIdx.x; i < tile.tokens() * eighth; i += blockDim.x) {
        int l = i / eighth, r = i % eighth, known = known_channels(r, eighth, dim);
        const unsigned char* first = codes + l * line + r;
        size_t token = tile.token(l);
        unsigned char* at = out.high + token * out.high_line + r;
        for (int m = 0; m < bits; m++) at[m * eighth] = pack_byte(first, eighth, known, m, bits, low);
        if (low) out.low[token * out.low_line + r] = pack_byte(first, eighth, known, 0, 1, 0);
    }
}

// Read a tile's codes back: the same walk in the other direction. A barrier must follow.
__device__ __forceinline__ void unpack_tile(
        unsigned char* codes, int line, Tile tile, Planes in, int dim, int nbits, bool value) {
    int bits = high_bits(nbits), low = low_bits(nbits);
    if (value) {
        for (int i = threadIdx.x; i < dim * tile.width; i += blockDim.x) {
            int c = i / tile.width, r = i % tile.width;
            unsigned char* first = codes + r * line + c;
            int page = tile.first / (8 * tile.eighth), inside = tile.first % (8 * tile.eighth) + r;
            const unsigned char* at = in.high + c * in.high_line + (size_t)page * tile.eighth * bits + inside;
            for (int m = 0; m < bits; m++) {
                unpack_byte(at[m * tile.eighth], first, tile.width * line, 8, m, bits, low, false);
            }
            if (low) {
                unsigned byte = in.low[c * in.low_line + (size_t)page * tile.eighth + inside];
                unpack_byte(byte, first, tile.width * line, 8, 0, 1, 0, true);
            }
        }
        return;
    }
    int eighth = padded(dim) / 8;
    for (int i = threadIdx.x; i < tile.tokens() * eighth; i += blockDim.x) {
        int l = i / eighth, r = i % eighth, known = known_channels(r, eighth, dim);
        unsigned char* first = codes + l * line + r;
        size_t token = tile.token(l);
        const unsigned char* at = in.high + token * in.high_line + r;
        for (int m = 0; m < bits; m++) unpack_byte(at[m * eighth], first, eighth, known, m, bits, low, false);
        if (low) unpack_byte(in.low[token * in.low_line + r], first, eighth, known, 0, 1, 0, true);
    }
}
