// Decode attention over packed pages with tensor cores.
//
// needs: sm_80
// spills: 96
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=54 KEY_GROUP=1 VALUE_CODEC=54 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=53 KEY_GROUP=1 VALUE_CODEC=52 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=44 KEY_GROUP=1 VALUE_CODEC=43 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=24 KEY_GROUP=64 VALUE_CODEC=24 VALUE_GROUP=64 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=34 KEY_GROUP=64 VALUE_CODEC=24 VALUE_GROUP=64 PAGE=64 ROWS=8 DTYPE=2
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=18 KEY_GROUP=1 VALUE_CODEC=18 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=64 HEAD_VALUE=64 KEY_CODEC=54 KEY_GROUP=1 VALUE_CODEC=54 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=256 HEAD_VALUE=256 KEY_CODEC=54 KEY_GROUP=1 VALUE_CODEC=54 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
//
// The lines above are examples, there are too many combinations to list. Arguments, layouts and macros stand in
// attention_tiles.cuh and attention_formats.cuh. Head sizes are multiples of 64, at most 256. Grid: slots of work,
// tiles of ROWS = 8 query rows. Block: THREADS; every warp goes through tiles of 64 tokens by itself and all are joined
// at the end. Output: as attention_plain.cu.
//
// Bound: a tile of 4-bit keys and values of 128 channels is 8448 bytes, 450 clocks of an H200's memory for one
// processor. It takes 128 products (about 200 clocks of the tensor cores) and about 1000 further instructions (250
// clocks of the four schedulers), so memory decides: every warp asks for its next tile before it works on one, 100 KB a
// processor with three blocks on it. At 2 bits bytes are half of that and instructions hardly fewer: there both count.
#include "ptx.cuh"
#include "rotation.cuh"
#include "attention_formats.cuh"
#include "attention_tiles.cuh"
#include "attention_numbers.cuh"
#include "attention_plain.cuh"
#include "attention_unpack.cuh"
#include "attention_keys.cuh"
#include "attention_values.cuh"

#define TILE_STEP (PAGE > TILE_TOKENS ? PAGE : TILE_TOKENS)  // whole pages, since a tile may hold parts of a page

#if HEAD_VALUE <= 64
#define BLOCKS 4  // on a processor: as many as registers allow
#elif HEAD_VALUE <= 128 && HEAD_KEY <= 128
#define BLOCKS (KEY_GROUPS * VALUE_GROUPS == 1 && KEY_BITS < 8 && VALUE_BITS < 8 ? 3 : 2)
#else
#define BLOCKS 2
#endif

union Room {
    PlainRoom plain;
    uint4 fragments[KEY_FAMILY == CHANNELS ? WARPS : 1][KEY_STEPS * 32];
    struct {
        float sums[WARPS][ROWS][HEAD_VALUE], highest[WARPS][ROWS], total[WARPS][ROWS];
    } joined;
};

// Ask for a tile, if there is one: its bytes come while the one before is worked on.
__device__ __forceinline__ void prefetch_tile(const Work& work, int tile, int lane) {
    if (tile >= work.end) return;
    prefetch_keys(work, tile, lane);
    prefetch_values(work, tile, lane);
}

// Take away what row m may not see (a row that is none sees all there is), and note the logits.
__device__ __forceinline__ void hide(
        const Call& call, const Work& work, int tile, Place at, int m, bool real, float* logits, int logits_line,
        float (&scores)[8][2]) {
    const Sight sight = sight_of(call, work);
    const int group = m / call.queries, query = m % call.queries;
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = owned(tile, at.pair, n / 2) + n % 2 + 2 * e;
            bool seen = sight.exists(token) && (!real || allows(sight.masks, group, query, token));
            scores[n][e] = seen ? scores[n][e] : NO_SCORE;
            if (logits && token < work.end) logits[(size_t)m * logits_line + token] = scores[n][e] * LN2;
        }
    }
}

// Attend to a range of packed tokens; results as attend_plainly leaves them.
__device__ __forceinline__ void attend_packed(
        const Call& call, const Work& work, const float* rows, const float* biases, int first_row, int count,
        float softcap, Room* room, float* sums_out, float* top, float* logits, int logits_line) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Place at = {lane, lane / 4, lane % 4};
    const bool real = at.group < count, open = !call.masks && !work.run[POSITIONS] && !logits;
    const float* numbers = rows + at.group * (HEAD_KEY | 1);
    uint4* fragments = room->fragments[KEY_FAMILY == CHANNELS ? warp : 0];
    Row row;
#if KEY_FAMILY != CHANNELS
    row = make_row(numbers, biases[at.group], nullptr, nullptr, at, warp == 0, fragments);
    __syncthreads();
#endif
    Sums sums;
#pragma unroll
    for (int n = 0; n < OUT_STEPS; n++) sums.out[n][0] = sums.out[n][1] = sums.out[n][2] = sums.out[n][3] = 0.0f;
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g++) sums.more[g] = 0.0f;
    sums.exponent = 0;
    float highest = NO_SCORE, total = 0.0f;
    const int end = (work.end + TILE_STEP - 1) / TILE_STEP * TILE_STEP;
    for (int tile = work.first + warp * TILE_TOKENS; tile < end; tile += WARPS * TILE_TOKENS) {
        prefetch_tile(work, tile + WARPS * TILE_TOKENS, lane);
#if KEY_FAMILY == CHANNELS
        const size_t page = work.line * (size_t)(work.run[CAPACITY] / KEY_GROUP) + tile / KEY_GROUP;
        row = make_row(numbers, biases[at.group], (const bfloat*)work.run[KEY_SCALE] + page * HEAD_KEY,
                       (const bfloat*)work.run[KEY_CENTRE] + page * HEAD_KEY, at, true, fragments);
        __syncwarp();
#endif
        float scores[8][2];
        tile_scores(work, tile, at, row, fragments, scores);
        if (softcap > 0.0f) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                scores[n][0] = capped(scores[n][0], softcap);
                scores[n][1] = capped(scores[n][1], softcap);
            }
        }
        if (!open || tile + TILE_STEP > work.end) {
            // All that this needs is looked up here, so that it takes no registers where nothing is hidden.
            hide(call, work, tile, at, first_row + at.group, real, real ? logits : nullptr, logits_line, scores);
        }
        float most = NO_SCORE;
#pragma unroll
        for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(scores[n][0], scores[n][1]));
        most = fmaxf(quad_max(most), highest);
        const float base = most == NO_SCORE ? 0.0f : most;
        const float shrink = highest == NO_SCORE ? (most == NO_SCORE ? 1.0f : 0.0f) : fast_exp2(highest - base);
        float along = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                scores[n][e] = fast_exp2(scores[n][e] - base);
                along += scores[n][e];
            }
        }
        total = fmaf(total, shrink, along);
        highest = most;
        add_values(work, tile, at, scores, shrink, sums);
    }
    __syncthreads();  // the fragments are no longer needed
    float more[VALUE_GROUPS];
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g++) more[g] = quad_sum(sums.more[g]);
    total = quad_sum(total);
#pragma unroll
    for (int n = 0; n < OUT_STEPS; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            room->joined.sums[warp][at.group][out_channel(n, e, at.pair)] = sum_of(sums, n, e, more);
        }
    }
    if (at.pair == 0) {
        room->joined.highest[warp][at.group] = highest;
        room->joined.total[warp][at.group] = total;
    }
    __syncthreads();
    for (int r = 0; r < count; r++) {
        float best = NO_SCORE, all = 0.0f, part[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, room->joined.highest[w][r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            part[w] = best == NO_SCORE ? 0.0f : fast_exp2(room->joined.highest[w][r] - best);
            all = fmaf(room->joined.total[w][r], part[w], all);
        }
        for (int c = threadIdx.x; c < HEAD_VALUE; c += THREADS) {
            float x = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) x = fmaf(room->joined.sums[w][r][c], part[w], x);
            sums_out[(size_t)(first_row + r) * HEAD_VALUE + c] = x;
        }
        if (threadIdx.x == 0) {
            top[2 * (first_row + r)] = best;
            top[2 * (first_row + r) + 1] = all;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_mma(
        const void* __restrict__ query, const long long* __restrict__ table, const long long* __restrict__ masks,
        int works_at, const void* __restrict__ new_keys, const void* __restrict__ new_values, int window, int causal,
        const float* __restrict__ signs, const float* __restrict__ hartley, float* __restrict__ scratch,
        float* __restrict__ logits, float factor, float softcap) {
    __shared__ Room room;
    __shared__ float query_rows[1 + ODD_KEY][ROWS * (HEAD_KEY | 1)];
    __shared__ float bias[ROWS];
    const Call call = call_of(table, masks, new_keys, new_values, window, causal);
    const Work work = work_of(call, works_at, blockIdx.x);
    if (!work.exact) prefetch_tile(work, work.first + threadIdx.x / 32 * TILE_TOKENS, threadIdx.x % 32);
    const int rows = call.groups * call.queries, first_row = blockIdx.y * ROWS, count = min(ROWS, rows - first_row);
    float* prepared = prepare_queries(call, work, (const scalar*)query, factor, first_row, count, signs, hartley,
                                      query_rows[0], query_rows[ODD_KEY], bias);
    int line = 0;
    float* own_logits = logits_of(call, work, logits, rows, &line);
    const size_t slot = (works_at - table[WORKS_AT]) / 2 + blockIdx.x;
    float* sums = scratch + slot * rows * HEAD_VALUE;
    float* top = scratch + table[SLOTS] * rows * HEAD_VALUE + slot * rows * 2;
    if (work.exact) {
        attend_plainly(call, work, prepared, bias, first_row, count, softcap, &room.plain, sums, top, own_logits, line);
    } else {
        attend_packed(call, work, prepared, bias, first_row, count, softcap, &room, sums, top, own_logits, line);
    }
}
