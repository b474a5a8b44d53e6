// Weighted sums of a tile's values by tensor cores, values unpacked in registers.
//
// A has the weights: rows 0 .. 7 their high halves, rows 8 .. 15 the low ones. B is 16 tokens of 8 channels. Packed
// values lie channel by channel: four lanes share a channel's 64 tokens, each reads the bytes of the 16 that it owns,
// and the pairs of weights are in the order in which they come out of its words. e4m3 values lie token by token: a lane
// reads an eighth of each of its tokens and takes byte b of two tokens as a pair, so column `group` of product (i, b)
// is channel 8 W i + W group + b, W bytes being read at once.
#pragma once

#define OUT_STEPS (HEAD_VALUE / 8)
#define VALUE_PLANE PLANE(VALUE_BITS)
#define VALUE_WORDS (VALUE_PLANE / 2)  // of a channel and lane
#define WEIGHT_BITS 12  // the largest weight is below 2^(WEIGHT_BITS + 1)

// Sums of a warp: out[n] columns of 8 channels in units of 2^(exponent - 127 - WEIGHT_BITS), and what every channel of
// a group of channels gets more, which has its true size.
struct Sums {
    float out[OUT_STEPS][4], more[VALUE_GROUPS];
    int exponent;
};

__device__ __forceinline__ float power_of(int exponent) { return __int_as_float(exponent << 23); }  // 1 .. 254

__device__ __forceinline__ float member(uint2 four, int n, int e) {
    unsigned two = e ? four.y : four.x;
    return n % 2 ? bfloat_high(two) : bfloat_low(two);
}

// Pairs of weights as A fragments of four products of 16 tokens.
__device__ __forceinline__ void weight_fragments(const float (&weights)[8][2], unsigned (&a)[4][4]) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        unsigned* to = a[n / 2] + n % 2 * 2;
        split_pair(weights[n][0], weights[n][1], to, to + 1);
    }
}

// Scales of a lane's tokens for group g of channels, and their largest exponent in the warp's tile.
__device__ __forceinline__ int token_scales(const Work& work, int tile, Place at, int g, uint2 (&scale)[OWN_GROUPS]) {
    const size_t capacity = (size_t)work.run[CAPACITY];
    float most = 0.0f;
#pragma unroll
    for (int q = 0; q < OWN_GROUPS; q++) {
        int first = owned(tile, at.pair, q);
        size_t meta = ((size_t)work.line * VALUE_GROUPS + g) * capacity + (first < (int)capacity ? first : 0);
        scale[q] = __ldg((const uint2*)((const bfloat*)work.run[VALUE_SCALE] + meta));
        most = fmaxf(most, fmaxf(fmaxf(bfloat_low(scale[q].x), bfloat_high(scale[q].x)),
                                 fmaxf(bfloat_low(scale[q].y), bfloat_high(scale[q].y))));
    }
    return min(max(__float_as_int(quad_max(most)) >> 23, 1), 253);
}

// Words of channel block n for this lane: COUNT of the high plane and, for 3 bits, one of the low.
__device__ __forceinline__ void value_words(
        const Work& work, int tile, Place at, int n, unsigned (&words)[VALUE_WORDS], unsigned* low) {
    const size_t capacity = (size_t)work.run[CAPACITY], channel = (size_t)work.line * HEAD_VALUE + 8 * n + at.group;
    const int line = (int)(capacity * VALUE_PLANE / 8);
    int byte = tile * VALUE_PLANE / 8 + 4 * VALUE_WORDS * at.pair;
    if (byte >= line) byte = 0;  // behind the last page: these tokens weigh nothing
    const unsigned char* from = (const unsigned char*)work.run[VALUE_CODES] + channel * line + byte;
    load_words<VALUE_WORDS, VALUE_WORDS>(from, words);
    *low = 0;
#if VALUE_BITS == 3
    const int page = PAGE * 2 / 8, half = PAGE / 8;  // bytes of a page in the two planes
    int inside = byte % page;
    const unsigned char* lows = (const unsigned char*)work.run[VALUE_LOW] + channel * (capacity / 8);
    *low = __ldg((const unsigned*)(lows + byte / page * half + inside % half)) >> inside / half;
#endif
}

// Ask for the values of the tile that begins at `tile`, scales included.
__device__ __forceinline__ void prefetch_values(const Work& work, int tile, int lane) {
    const size_t capacity = (size_t)work.run[CAPACITY];
    const int tokens = min(TILE_TOKENS, (int)capacity - tile);
    const unsigned char* codes = (const unsigned char*)work.run[VALUE_CODES];
#if ALONG_CHANNELS(VALUE_CODEC)
    codes += (work.line * capacity + tile) * HEAD_VALUE;
    for (int i = 32 * lane; i < tokens * HEAD_VALUE; i += 1024) prefetch(codes + i);
#else
    const size_t line = capacity * VALUE_PLANE / 8;
    codes += work.line * HEAD_VALUE * line + tile * VALUE_PLANE / 8;
    for (int c = lane; c < HEAD_VALUE; c += 32) {
        for (int i = 0; i < tokens * VALUE_PLANE / 8; i += 32) prefetch(codes + c * line + i);
#if VALUE_BITS == 3
        const size_t low_line = ((size_t)work.line * HEAD_VALUE + c) * (capacity / 8);
        prefetch((const unsigned char*)work.run[VALUE_LOW] + low_line + tile / 8);
#endif
    }
#endif
#if VALUE_FAMILY != CHANNELS
    for (int i = lane; i < 4 * VALUE_GROUPS; i += 32) {
        size_t meta = ((size_t)work.line * VALUE_GROUPS + i / 4) * capacity + tile + i % 4 * 16;
        if (i % 4 * 16 >= tokens) continue;
        prefetch((const bfloat*)work.run[VALUE_SCALE] + meta);
        if (CENTRED(VALUE_CODEC)) prefetch((const bfloat*)work.run[VALUE_CENTRE] + meta);
    }
#endif
}

// sums of channel block n += weights (as fragments) of the lane's 16 tokens times their codes.
__device__ __forceinline__ void add_block(
        float (&sums)[4], const unsigned (&a)[4][4], const unsigned (&words)[VALUE_WORDS], unsigned low) {
#pragma unroll
    for (int w = 0; w < VALUE_WORDS; w++) {
        unsigned pairs[PAIRS(VALUE_BITS)];
        unpack<VALUE_CODEC>(words[w], low, pairs);
#pragma unroll
        for (int i = 0; i < PAIRS(VALUE_BITS) / 2; i++) {
            const unsigned tokens[2] = {pairs[2 * i], pairs[2 * i + 1]};
            mma_f16(sums, a[w * (PAIRS(VALUE_BITS) / 2) + i], tokens);
        }
    }
}

// Bring a warp's sums to a larger exponent, and shrink row `group` by `shrink`.
__device__ __forceinline__ void rescale(Sums& sums, float shrink, int exponent) {
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g++) sums.more[g] *= shrink;
    if (exponent > sums.exponent) {
        shrink *= exponent - sums.exponent > 126 ? 0.0f : power_of(127 + sums.exponent - exponent);
    }
    sums.exponent = max(exponent, sums.exponent);
#pragma unroll
    for (int n = 0; n < OUT_STEPS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums.out[n][i] *= shrink;
    }
}

#define VALUE_BATCH (VALUE_WORDS == 4 ? 4 : 8)  // channel blocks whose words are held at once

// Blocks first .. last of packed values.
__device__ __forceinline__ void add_blocks(
        const Work& work, int tile, Place at, const unsigned (&a)[4][4], float tile_weight, int g, Sums& sums) {
    const int blocks = OUT_STEPS / VALUE_GROUPS;
#pragma unroll
    for (int first = 0; first < blocks; first += VALUE_BATCH) {
        unsigned words[VALUE_BATCH][VALUE_WORDS], low[VALUE_BATCH];
#pragma unroll
        for (int b = 0; b < VALUE_BATCH; b++)
            if (first + b < blocks) value_words(work, tile, at, g * blocks + first + b, words[b], &low[b]);
#pragma unroll
        for (int b = 0; b < VALUE_BATCH; b++) {
            if (first + b >= blocks) break;
            int n = g * blocks + first + b;
#if VALUE_FAMILY == CHANNELS
            float own[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            add_block(own, a, words[b], low[b]);
            const size_t page = work.line * (size_t)(work.run[CAPACITY] / VALUE_GROUP) + tile / VALUE_GROUP;
            const size_t meta = page * HEAD_VALUE + 8 * n + 2 * at.pair;
            unsigned scale = __ldg((const unsigned*)((const bfloat*)work.run[VALUE_SCALE] + meta));
            unsigned centre = __ldg((const unsigned*)((const bfloat*)work.run[VALUE_CENTRE] + meta));
            float one = bfloat_low(scale), two = bfloat_high(scale);
            sums.out[n][0] = fmaf(own[0], one, fmaf(tile_weight, fmaf(0.5f, one, bfloat_low(centre)), sums.out[n][0]));
            sums.out[n][1] = fmaf(own[1], two, fmaf(tile_weight, fmaf(0.5f, two, bfloat_high(centre)), sums.out[n][1]));
            sums.out[n][2] = fmaf(own[2], one, sums.out[n][2]);
            sums.out[n][3] = fmaf(own[3], two, sums.out[n][3]);
#else
            add_block(sums.out[n], a, words[b], low[b]);
#endif
        }
    }
}

#if VALUE_FAMILY == FP8
#define LINE_WORDS (HEAD_VALUE / 32)  // of a token and lane
#define LINE_VECTOR (LINE_WORDS % 4 == 0 ? 4 : LINE_WORDS % 2 == 0 ? 2 : 1)

// e4m3 values: two by two tokens, all channels.
__device__ __forceinline__ void add_lines(const Work& work, int tile, Place at, const unsigned (&a)[4][4], Sums& sums) {
    const size_t capacity = (size_t)work.run[CAPACITY];
    const unsigned char* codes = (const unsigned char*)work.run[VALUE_CODES] + work.line * capacity * HEAD_VALUE;
#pragma unroll
    for (int s = 0; s < 4; s++) {
        unsigned words[4][LINE_WORDS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            size_t token = owned(tile, at.pair, s) + i / 2 + i % 2 * 2;  // the members of products 2 s and 2 s + 1
            token = token < capacity ? token : capacity - 1;
#pragma unroll
            for (int v = 0; v < LINE_WORDS; v += LINE_VECTOR) {
                const unsigned char* from = codes + token * HEAD_VALUE + v * 32 + at.group * 4 * LINE_VECTOR;
                load_words<LINE_VECTOR, LINE_VECTOR>(from, *(unsigned(*)[LINE_VECTOR]) & words[i][v]);
            }
        }
#pragma unroll
        for (int v = 0; v < LINE_WORDS; v++) {
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const unsigned both = b | (4 + b) << 4;
                const unsigned tokens[2] = {
                    bits_of(halves_of_e4m3((unsigned short)__byte_perm(words[0][v], words[1][v], both))),
                    bits_of(halves_of_e4m3((unsigned short)__byte_perm(words[2][v], words[3][v], both)))};
                mma_f16(sums.out[4 * v + b], a[s], tokens);
            }
        }
    }
}
#endif

// Channel of half e of a lane's column in block n.
__device__ __forceinline__ int out_channel(int n, int e, int pair) {
#if VALUE_FAMILY == FP8
    int v = n / 4, chunk = v / LINE_VECTOR;
    return chunk * 32 * LINE_VECTOR + (2 * pair + e) * 4 * LINE_VECTOR + v % LINE_VECTOR * 4 + n % 4;
#else
    return 8 * n + 2 * pair + e;
#endif
}

// Add a tile: weights[n][e] of row `group` and this lane's tokens; `shrink` is what the sums so far of that row are
// worth.
__device__ __forceinline__ void add_values(
        const Work& work, int tile, Place at, const float (&weights)[8][2], float shrink, Sums& sums) {
    unsigned a[4][4];
#if VALUE_FAMILY == CHANNELS
    float scaled[8][2], along = 0.0f;
    if (__any_sync(FULL_WARP, shrink != 1.0f)) rescale(sums, shrink, sums.exponent);
#pragma unroll
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 2; e++) {
            scaled[n][e] = weights[n][e] * (float)(1 << WEIGHT_BITS);
            along += scaled[n][e];
        }
    weight_fragments(scaled, a);
    add_blocks(work, tile, at, a, quad_sum(along), 0, sums);
#else
    uint2 scale[VALUE_GROUPS][OWN_GROUPS];
    int exponent = 0;
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g++) exponent = max(exponent, token_scales(work, tile, at, g, scale[g]));
    if (__any_sync(FULL_WARP, shrink != 1.0f || exponent > sums.exponent)) rescale(sums, shrink, exponent);
    const float down = power_of(254 - sums.exponent), up = (float)(1 << WEIGHT_BITS);
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g++) {
        float scaled[8][2], more = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float one = member(scale[g][n / 2], n, e);
                if (HALF_STEP(VALUE_CODEC)) more = fmaf(weights[n][e], 0.5f * one, more);
                scaled[n][e] = one * down * (weights[n][e] * up);
            }
        if (CENTRED(VALUE_CODEC)) {
            const size_t capacity = (size_t)work.run[CAPACITY];
#pragma unroll
            for (int q = 0; q < OWN_GROUPS; q++) {
                int first = owned(tile, at.pair, q);
                size_t meta = ((size_t)work.line * VALUE_GROUPS + g) * capacity + (first < (int)capacity ? first : 0);
                uint2 centre = __ldg((const uint2*)((const bfloat*)work.run[VALUE_CENTRE] + meta));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    more = fmaf(weights[2 * q + i / 2][i % 2], member(centre, i / 2, i % 2), more);
                }
            }
        }
        sums.more[g] += more;
        weight_fragments(scaled, a);
#if VALUE_FAMILY == FP8
        add_lines(work, tile, at, a, sums);
#else
        add_blocks(work, tile, at, a, 0.0f, g, sums);
#endif
    }
#endif
}

// Number of channel out_channel(n, e, pair) in its true size.
__device__ __forceinline__ float sum_of(const Sums& sums, int n, int e, const float (&more)[VALUE_GROUPS]) {
    float x = sums.out[n][e] + sums.out[n][2 + e];
#if VALUE_FAMILY == CHANNELS
    return x * (1.0f / (1 << WEIGHT_BITS));
#else
    x *= power_of(max(sums.exponent, 1)) * (1.0f / (1 << WEIGHT_BITS));
    if (VALUE_FAMILY == TURBO) x *= LEVEL_UNIT(VALUE_BITS);
    return x + more[VALUE_GROUPS == 1 ? 0 : 8 * n / VALUE_GROUP];
#endif
}
