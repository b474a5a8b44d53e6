// Scores of a tile of 64 tokens by tensor cores, keys unpacked in registers.
//
// mma.m16n8k16: rows 0 .. 7 of A are the high halves of the query rows, rows 8 .. 15 the low halves of the same, so a
// score is as good as in float32 and costs nothing more. B is 16 channels of 8 tokens. The order of channels is free as
// long as both sides agree, so a lane takes them as they come out of its words; which tokens make a column is free too,
// so a lane's columns are the tokens of the value words that it will read (attention_values.cuh): weights never change
// lanes.
//
// Lane = 4 * group + pair. Column `group` of product n is the token that lane pair group / 2 owns, its number 2 n +
// group % 2.
#pragma once

#define KEY_PLANE PLANE(KEY_BITS)
#define KEY_BYTES (HEAD_KEY * KEY_PLANE / 8)  // of a token, in the high plane
#define KEY_WORDS (KEY_BYTES / 16)            // of a token and lane
#define KEY_VECTOR (KEY_WORDS % 4 == 0 ? 4 : KEY_WORDS % 2 == 0 ? 2 : 1)
#define KEY_SPAN (16 * KEY_VECTOR)            // bytes that four lanes read at once
#define KEY_BATCH (KEY_WORDS >= 16 ? 1 : KEY_WORDS >= 8 ? 2 : 4)  // columns of 8 tokens whose words are held at once
#define KEY_STEPS (HEAD_KEY / 16)             // products of 16 channels
#define STEPS_A_WORD (PAIRS(KEY_BITS) / 2)

#define TILE_TOKENS 64
#define OWN_GROUPS 4  // a lane owns four runs of four tokens
#define OWN_BATCH (KEY_BATCH > 1 ? KEY_BATCH / 2 : 1)

// Place of a lane's words in a tile's keys and of its tokens in the tile.
struct Place {
    int lane, group, pair;
};

// First of the four tokens of run q that lane pair `pair` owns in the tile that begins at `tile`; member i is i behind
// it.
__device__ __forceinline__ int owned(int tile, int pair, int q) {
#if ALONG_CHANNELS(VALUE_CODEC) || VALUE_BITS == 8
    return tile + 16 * pair + 4 * q;
#else
    const int plane = PLANE(VALUE_BITS), line = PAGE * plane / 8;  // bytes of a channel's page
    int byte = tile * plane / 8 + (plane == 4 ? 8 * pair + q / 2 * 4 : 4 * pair);
    int field = plane == 4 ? q % 2 : q;
    return byte / line * PAGE + byte % line + field * line;
#endif
}

// Which channel half `e` of pair `o` of word `w` of a lane is: pairs 2 f and 2 f + 1 have four that follow each other.
__device__ __forceinline__ int channel_of(int w, int o, int e, int pair) {
    int chunk = w / KEY_VECTOR, inside = w % KEY_VECTOR;
    return (chunk * 4 + pair) * 4 * KEY_VECTOR + 4 * inside + o % 2 + 2 * e + o / 2 * KEY_BYTES;
}

// The group of channels that step s of a lane's words is in.
__device__ __forceinline__ int group_of_step(int s) {
    int w = s / STEPS_A_WORD, field = s % STEPS_A_WORD;
    return (w / KEY_VECTOR * KEY_SPAN + field * KEY_BYTES) / KEY_GROUP % KEY_GROUPS;
}

// What a tile's queries are multiplied with: unit a power of two that the fragments lack, sums[g] of a row's numbers in
// group g (in that unit), and bias.
struct Row {
    float unit, bias, sums[KEY_GROUPS];
};

// 2^k with |x| 2^-k in [2^12, 2^13): halves keep 37 bits below the largest; 1 for 0.
__device__ __forceinline__ float power_for(float most) {
    int exponent = __float_as_int(most) >> 23 & 255;
    exponent = max(exponent - 12, 1);
    return most > 0.0f ? __int_as_float(exponent << 23) : 1.0f;
}

__device__ __forceinline__ float inverse_power(float power) {
    return __int_as_float((254 << 23) - __float_as_int(power));
}

// Sums over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// Four numbers of a row that follow each other, times their channels' scale where there is one.
__device__ __forceinline__ void four_numbers(const float* numbers, const bfloat* scale, int c, float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = numbers[c + i];
    if (scale) {
        uint2 four = __ldg((const uint2*)(scale + c));
        x[0] *= bfloat_low(four.x), x[1] *= bfloat_high(four.x);
        x[2] *= bfloat_low(four.y), x[3] *= bfloat_high(four.y);
    }
}

// Constants of row `group`, from its numbers in shared memory, and if this warp writes them the fragments of all steps
// at room[step * 32 + lane]. Keys by channel: of the tile's page, whose scale and centre come along.
__device__ __forceinline__ Row make_row(
        const float* numbers, float bias, const bfloat* scale, const bfloat* centre, Place at, bool writes,
        uint4* room) {
    Row row;
    float most = 0.0f, along[KEY_GROUPS] = {}, centres = 0.0f, x[4];
#pragma unroll 4
    for (int s = 0; s < KEY_STEPS; s++) {  // a step has four channels of a lane, side by side
        int c = channel_of(s / STEPS_A_WORD, s % STEPS_A_WORD * 2, 0, at.pair);
        if (centre) {
            four_numbers(numbers, centre, c, x);
            centres += x[0] + x[1] + x[2] + x[3];
        }
        four_numbers(numbers, scale, c, x);
        most = fmaxf(fmaxf(most, fmaxf(fabsf(x[0]), fabsf(x[1]))), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++)
            if (group_of_step(s) == g) along[g] += x[0] + x[1] + x[2] + x[3];
    }
    row.unit = power_for(quad_max(most));
    float down = inverse_power(row.unit);
#pragma unroll
    for (int g = 0; g < KEY_GROUPS; g++) row.sums[g] = quad_sum(along[g]) * down;
    row.bias = bias + (centre ? quad_sum(centres) : 0.0f);
    if (!writes) return row;
#pragma unroll 4
    for (int s = 0; s < KEY_STEPS; s++) {
        four_numbers(numbers, scale, channel_of(s / STEPS_A_WORD, s % STEPS_A_WORD * 2, 0, at.pair), x);
        unsigned high[2], low[2];
        split_pair(x[0] * down, x[2] * down, &high[0], &low[0]);
        split_pair(x[1] * down, x[3] * down, &high[1], &low[1]);
        room[s * 32 + at.lane] = make_uint4(high[0], low[0], high[1], low[1]);
    }
    return row;
}

// Ask for the keys of the tile that begins at `tile`, scales included.
__device__ __forceinline__ void prefetch_keys(const Work& work, int tile, int lane) {
    const size_t capacity = (size_t)work.run[CAPACITY], first = work.line * capacity + tile;
    const int tokens = min(TILE_TOKENS, (int)capacity - tile);
    const unsigned char* codes = (const unsigned char*)work.run[KEY_CODES] + first * KEY_BYTES;
    for (int i = 32 * lane; i < tokens * KEY_BYTES; i += 1024) prefetch(codes + i);
#if KEY_BITS == 3
    const unsigned char* lows = (const unsigned char*)work.run[KEY_LOW] + first * (HEAD_KEY / 8);
    for (int i = 32 * lane; i < tokens * (HEAD_KEY / 8); i += 1024) prefetch(lows + i);
#endif
#if KEY_FAMILY != CHANNELS
    for (int i = lane; i < 4 * KEY_GROUPS; i += 32) {
        size_t meta = ((size_t)work.line * KEY_GROUPS + i / 4) * capacity + tile + i % 4 * 16;
        if (i % 4 * 16 >= tokens) continue;
        prefetch((const bfloat*)work.run[KEY_SCALE] + meta);
        if (CENTRED(KEY_CODEC)) prefetch((const bfloat*)work.run[KEY_CENTRE] + meta);
    }
#endif
}

// A tile's 16 scores of this lane's row and tokens: scores[n][e] is of member (n % 2 + 2 e) of run n / 2.
__device__ __forceinline__ void tile_scores(
        const Work& work, int tile, Place at, const Row& row, const uint4* fragments, float (&scores)[8][2]) {
    const long long* run = work.run;
    const size_t capacity = (size_t)run[CAPACITY];
    const unsigned char* codes = (const unsigned char*)run[KEY_CODES] + work.line * capacity * KEY_BYTES;
    const int word_at = at.pair * 4 * KEY_VECTOR;
#if KEY_BITS == 3
    const unsigned char* lows = (const unsigned char*)run[KEY_LOW] + work.line * capacity * (HEAD_KEY / 8);
#endif
#pragma unroll
    for (int first = 0; first < 8; first += KEY_BATCH) {
        unsigned words[KEY_BATCH][KEY_WORDS], low[KEY_BATCH][KEY_WORDS];
#pragma unroll
        for (int b = 0; b < KEY_BATCH; b++) {
            int n = first + b;
            size_t token = owned(tile, at.group / 2, n / 2) + n % 2 + 2 * (at.group % 2);
            token = token < capacity ? token : capacity - 1;
#pragma unroll
            for (int i = 0; i < KEY_WORDS; i += KEY_VECTOR) {
                const unsigned char* from = codes + token * KEY_BYTES + i / KEY_VECTOR * KEY_SPAN + word_at;
                load_words<KEY_VECTOR, KEY_VECTOR>(from, *(unsigned(*)[KEY_VECTOR]) & words[b][i]);
#if KEY_BITS == 3
                int byte = i / KEY_VECTOR * KEY_SPAN + word_at, half = HEAD_KEY / 8;
                unsigned(&planes)[KEY_VECTOR] = *(unsigned(*)[KEY_VECTOR]) & low[b][i];
                load_words<KEY_VECTOR, KEY_VECTOR>(lows + token * half + byte % half, planes);
#pragma unroll
                for (int v = 0; v < KEY_VECTOR; v++) planes[v] >>= byte / half;
#else
#pragma unroll
                for (int v = 0; v < KEY_VECTOR; v++) low[b][i + v] = 0;
#endif
            }
        }
        uint2 scale[KEY_GROUPS][OWN_BATCH], centre[KEY_GROUPS][OWN_BATCH];
#if KEY_FAMILY != CHANNELS
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++) {
#pragma unroll
            for (int q = 0; q < OWN_BATCH; q++) {
                int token = owned(tile, at.pair, first / 2 + q);
                size_t meta = ((size_t)work.line * KEY_GROUPS + g) * capacity + (token < (int)capacity ? token : 0);
                scale[g][q] = __ldg((const uint2*)((const bfloat*)run[KEY_SCALE] + meta));
                if (CENTRED(KEY_CODEC)) centre[g][q] = __ldg((const uint2*)((const bfloat*)run[KEY_CENTRE] + meta));
            }
        }
#endif
        float sums[KEY_BATCH][4];
#pragma unroll
        for (int b = 0; b < KEY_BATCH; b++) {
            scores[first + b][0] = scores[first + b][1] = row.bias;
            sums[b][0] = sums[b][1] = sums[b][2] = sums[b][3] = 0.0f;
        }
        // Steps are gone through group by group, so that one sum at a time is enough.
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++) {
#pragma unroll
            for (int w = 0; w < KEY_WORDS; w++) {
#pragma unroll
                for (int b = 0; b < KEY_BATCH; b++) {
                    unsigned pairs[PAIRS(KEY_BITS)];
                    unpack<KEY_CODEC>(words[b][w], low[b][w], pairs);
#pragma unroll
                    for (int i = 0; i < STEPS_A_WORD; i++) {
                        int s = w * STEPS_A_WORD + i;
                        if (group_of_step(s) != g) continue;
                        uint4 a = fragments[s * 32 + at.lane];
                        const unsigned rows[4] = {a.x, a.y, a.z, a.w}, tokens[2] = {pairs[2 * i], pairs[2 * i + 1]};
                        mma_f16(sums[b], rows, tokens);
                    }
                }
            }
#pragma unroll
            for (int b = 0; b < KEY_BATCH; b++) {
                int n = first + b, q = b / 2;
                float half_sum = HALF_STEP(KEY_CODEC) ? 0.5f * row.sums[g] : 0.0f;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float dot = (sums[b][e] + sums[b][2 + e] + half_sum) * row.unit;
#if KEY_FAMILY == CHANNELS
                    scores[n][e] += dot;
#else
                    unsigned two = e ? scale[g][q].y : scale[g][q].x;
                    float one = n % 2 ? bfloat_high(two) : bfloat_low(two);
                    if (KEY_FAMILY == TURBO) one *= LEVEL_UNIT(KEY_BITS);
                    scores[n][e] = fmaf(dot, one, scores[n][e]);
                    if (CENTRED(KEY_CODEC)) {
                        two = e ? centre[g][q].y : centre[g][q].x;
                        one = n % 2 ? bfloat_high(two) : bfloat_low(two);
                        scores[n][e] = fmaf(row.sums[g] * row.unit, one, scores[n][e]);
                    }
#endif
                }
                sums[b][0] = sums[b][1] = sums[b][2] = sums[b][3] = 0.0f;
            }
        }
    }
}
