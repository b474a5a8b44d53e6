// Which tokens of a lane stay: the k with the highest keys, by radix select over 8 bits a pass.
//
// scores     [L, N] float32, or float64 with -DDOUBLE=1
// positions  [L, N] int32 or null (then a token's position is its index); below 0: no token
// ranges     [L, R, 3] int32 (start, end, level) or null; the last one that holds a position gives its level
// k          [L] int32
// kept       [L, width] int32 or null: indices of what stays, rising, then -1
// mask       [L, N] bytes or null: 1 for what stays
//
// Higher levels come first. In level 0 the score decides, above it the position; of equal ones the last stay.
// Levels below 0, scores of -inf or NaN and missing tokens never stay. With DOUBLE there are no ranges.
// variants: DOUBLE=0,1
// Grid: L. Block: a multiple of 32 threads, at most 512.

#ifndef DOUBLE
#define DOUBLE 0
#endif

#if DOUBLE
typedef unsigned long long Score;  // the bits
#define FIRST_SHIFT 56
#else
typedef unsigned Score;
#define FIRST_SHIFT 32
#endif

#define FULL 0xffffffffu
#define WARPS 16
#define DIGITS 256

typedef unsigned long long Key;

struct Lane {
    const Score* scores;
    const int* positions;
    const int* ranges;
    int range_count;
};

// A key that orders like the token; 0 for one that never stays.
__device__ Key key_of(const Lane& lane, int i) {
    int position = lane.positions ? lane.positions[i] : i;
    if (position < 0) return 0;
#if DOUBLE
    Key bits = lane.scores[i];
    const Key sign = 1ull << 63, infinity = 0x7ffull << 52;
    if ((bits & ~sign) > infinity || bits == (sign | infinity)) return 0;
    if (bits == sign) bits = 0;  // -0 equals +0
    return bits & sign ? ~bits : bits | sign;
#else
    int level = 0;
    for (int r = 0; r < lane.range_count; r++) {
        const int* range = lane.ranges + 3 * r;
        if (position >= range[0] && position < range[1]) level = range[2];
    }
    if (level < 0) return 0;
    Key above = (Key)(128 + level) << 32;
    if (level > 0) return above | (unsigned)position;
    unsigned bits = lane.scores[i];
    const unsigned sign = 1u << 31, infinity = 0xffu << 23;
    if ((bits & ~sign) > infinity || bits == (sign | infinity)) return 0;
    if (bits == sign) bits = 0;
    return above | (bits & sign ? ~bits : bits | sign);
#endif
}

extern "C" __global__ void __launch_bounds__(512, 1) select_tokens(
    const Score* __restrict__ scores, const int* __restrict__ positions, const int* __restrict__ ranges,
    const int* __restrict__ k, int* __restrict__ kept, unsigned char* __restrict__ mask, int tokens, int range_count,
    int width) {
    __shared__ unsigned histogram[WARPS][DIGITS];
    __shared__ Key found_threshold;
    __shared__ int found_wanted, found_equal;
    __shared__ int warp_above[WARPS], warp_equal[WARPS];

    const int thread = threadIdx.x, warp = thread >> 5, in_warp = thread & 31;
    const int threads = blockDim.x, warps = threads >> 5;
    const size_t row = blockIdx.x;
    Lane lane;
    lane.scores = scores + row * tokens;
    lane.positions = positions ? positions + row * tokens : 0;
    lane.ranges = ranges ? ranges + row * range_count * 3 : 0;
    lane.range_count = ranges ? range_count : 0;

    // The threshold, digit by digit from the top: `wanted` of the keys that begin like it stay, and all above it.
    int wanted = k[row];
    if (kept && wanted > width) wanted = width;
    Key threshold = 0;
    int equal = 0;
    for (int shift = FIRST_SHIFT; shift >= 0 && wanted > 0; shift -= 8) {
        for (int i = thread; i < warps * DIGITS; i += threads) (&histogram[0][0])[i] = 0;
        __syncthreads();
        for (int i = thread; i < tokens; i += threads) {
            Key key = key_of(lane, i);
            if (key && (shift == FIRST_SHIFT || key >> (shift + 8) == threshold >> (shift + 8)))
                atomicAdd(&histogram[warp][key >> shift & (DIGITS - 1)], 1u);
        }
        __syncthreads();
        if (warp == 0) {  // lane l counts the eight digits 255 - 8 l .. 248 - 8 l
            int counts[8], sum = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                counts[j] = 0;
                for (int w = 0; w < warps; w++) counts[j] += histogram[w][DIGITS - 1 - 8 * in_warp - j];
                sum += counts[j];
            }
            int through = sum;  // of all digits down to this lane's last
#pragma unroll
            for (int step = 1; step < 32; step <<= 1) {
                int other = __shfl_up_sync(FULL, through, step);
                if (in_warp >= step) through += other;
            }
            int all = __shfl_sync(FULL, through, 31);
            int left = wanted < all ? wanted : all;  // fewer tokens than wanted: all of them stay
            int before = through - sum;
            if (left == 0 && in_warp == 0) {
                found_wanted = 0;
                found_equal = 0;
                found_threshold = 0;
            } else if (before < left && left <= through) {
                bool open = true;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (open && left <= before + counts[j]) {
                        found_threshold = threshold | (Key)(DIGITS - 1 - 8 * in_warp - j) << shift;
                        found_wanted = left - before;
                        found_equal = counts[j];
                        open = false;
                    }
                    before += counts[j];
                }
            }
        }
        __syncthreads();
        threshold = found_threshold;
        wanted = found_wanted;
        equal = found_equal;
        if (wanted == equal) break;  // all that begin like the threshold stay
    }
    const bool some = wanted > 0;
    const int skipped = equal - wanted;  // the first ones of those that equal the threshold

    // Every warp writes a span of its own; how much those before it write is counted first.
    int span = (tokens + threads - 1) / threads * 32;
    int start = warp * span < tokens ? warp * span : tokens;
    int end = start + span < tokens ? start + span : tokens;
    int above = 0, same = 0;
    for (int i = start; i < end; i += 32) {
        Key key = some && i + in_warp < end ? key_of(lane, i + in_warp) : 0;
        same += __popc(__ballot_sync(FULL, some && key == threshold));
        above += __popc(__ballot_sync(FULL, some && key > threshold));
    }
    if (in_warp == 0) {
        warp_above[warp] = above;
        warp_equal[warp] = same;
    }
    __syncthreads();
    int at = 0, seen = 0, total = 0;  // written, and equal ones passed, by the warps before this one
    for (int w = 0, passed = 0; w < warps; w++) {
        int first = passed < skipped ? passed : skipped;
        passed += warp_equal[w];
        int last = passed < skipped ? passed : skipped;
        if (w == warp) {
            at = total;
            seen = passed - warp_equal[w];
        }
        total += warp_above[w] + warp_equal[w] - (last - first);
    }
    const unsigned lower = (1u << in_warp) - 1;
    for (int i = start; i < end; i += 32) {
        Key key = some && i + in_warp < end ? key_of(lane, i + in_warp) : 0;
        unsigned alike = __ballot_sync(FULL, some && key == threshold);
        bool stays = some && (key > threshold || (key == threshold && seen + __popc(alike & lower) >= skipped));
        unsigned staying = __ballot_sync(FULL, stays);
        if (kept && stays) kept[row * width + at + __popc(staying & lower)] = i + in_warp;
        if (mask && i + in_warp < end) mask[row * tokens + i + in_warp] = stays;
        at += __popc(staying);
        seen += __popc(alike);
    }
    if (kept)
        for (int i = total + thread; i < width; i += threads) kept[row * width + i] = -1;
}
