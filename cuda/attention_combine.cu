// Joins the slots of work of every query row: one softmax over all tokens, and the rotation of packed values undone
// once.
// spills: 16
// variants: HEAD_VALUE=128 DTYPE=0,1,2 ROTATED=1
// variants: HEAD_VALUE=80,256 DTYPE=2 ROTATED=0,1
//
// table    int64, of attention_tiles.cuh: a lane's entries begin where its owner entry says, each slot | rotated << 32
// scratch  float32 sums [slots, M, HEAD_VALUE], then top [slots, M, 2]: largest score (base 2) and sum of weights
// sinks    float32 [heads * groups] logits without a value, or null
// out      [B, queries, heads * groups, HEAD_VALUE] of DTYPE
// lse      float32 [lanes, M]: logarithm of the sum of exp(logit), -inf where a query sees nothing
//
// Grid: lanes, M. Block: COMBINE threads; a warp adds every eighth slot. Reads 4 (HEAD_VALUE + 2) bytes a slot and row.
#include "ptx.cuh"
#include "rotation.cuh"
#include "attention_header.cuh"

#define COMBINE 256
#define WARPS 8
#define OWN_CHANNELS ((HEAD_VALUE + 31) / 32)

extern "C" __global__ void __launch_bounds__(COMBINE) attention_combine(
        const long long* __restrict__ table, const float* __restrict__ scratch, const float* __restrict__ sinks,
        const float* __restrict__ signs, const float* __restrict__ hartley, void* __restrict__ out,
        float* __restrict__ lse) {
    __shared__ float parts[WARPS][2][HEAD_VALUE];
    __shared__ float turned[2][HEAD_VALUE | 1];
    __shared__ float plain[HEAD_VALUE];
    __shared__ float highest_of[WARPS], total_of[WARPS];
    const int heads = (int)table[HEADS], groups = (int)table[GROUPS], queries = (int)table[QUERIES];
    const int own = blockIdx.x, row = blockIdx.y, rows = groups * queries;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* sums = scratch;
    const float* top = scratch + table[SLOTS] * rows * HEAD_VALUE;
    const long long* slots = table + table[ENTRIES_AT];
    const int first = (int)table[table[OWNERS_AT] + own], last = (int)table[table[OWNERS_AT] + own + 1];
    const int head = own % heads * groups + row / queries;
    float highest = sinks ? sinks[head] * LOG2E : NO_SCORE;
    const float sink = highest;  // in base 2
    for (int i = first + threadIdx.x; i < last; i += COMBINE) {
        highest = fmaxf(highest, top[((size_t)(unsigned)slots[i] * rows + row) * 2]);
    }
    highest = warp_max(highest);
    if (lane == 0) highest_of[warp] = highest;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) highest = fmaxf(highest, highest_of[i]);

    float acc[2][OWN_CHANNELS], total = 0.0f;
#pragma unroll
    for (int k = 0; k < OWN_CHANNELS; k++) acc[0][k] = acc[1][k] = 0.0f;
    for (int i = first + warp; i < last; i += WARPS) {
        long long entry = slots[i];
        size_t at = (size_t)(unsigned)entry * rows + row;
        float own_highest = top[2 * at];
        if (own_highest == NO_SCORE) continue;  // it saw nothing, and its sums are all zero
        float part = exp2f(own_highest - highest);
        total = fmaf(top[2 * at + 1], part, total);
        float plain_part = entry >> 32 ? 0.0f : part, turned_part = entry >> 32 ? part : 0.0f;
#pragma unroll
        for (int k = 0; k < OWN_CHANNELS; k++) {
            int c = lane + 32 * k;
            float x = c < HEAD_VALUE ? sums[at * HEAD_VALUE + c] : 0.0f;
            acc[0][k] = fmaf(x, plain_part, acc[0][k]);
            acc[1][k] = fmaf(x, turned_part, acc[1][k]);
        }
    }
#pragma unroll
    for (int k = 0; k < OWN_CHANNELS; k++) {
        int c = lane + 32 * k;
        if (c < HEAD_VALUE) parts[warp][0][c] = acc[0][k], parts[warp][1][c] = acc[1][k];
    }
    if (lane == 0) total_of[warp] = total;
    __syncthreads();
    total = sinks ? exp2f(sink - highest) : 0.0f;
    for (int i = 0; i < WARPS; i++) total += total_of[i];
    for (int c = threadIdx.x; c < HEAD_VALUE; c += COMBINE) {
        float x = 0.0f, y = 0.0f;
        for (int i = 0; i < WARPS; i++) x += parts[i][0][c], y += parts[i][1][c];
        plain[c] = x;
        turned[0][c] = y;
    }
    __syncthreads();
    float* back = turned[0];
#if ROTATED
    back = mix(turned[0], turned[1], hartley, worker_of(1, HEAD_VALUE), HEAD_VALUE);
#endif
    float divisor = total > 0.0f ? 1.0f / total : 0.0f;
    size_t token = (size_t)(own / heads) * queries + row % queries;
    for (int c = threadIdx.x; c < HEAD_VALUE; c += COMBINE) {
        float x = plain[c];
#if ROTATED
        x = fmaf(back[c], signs[c], x);
#endif
        store((scalar*)out + (token * heads * groups + head) * HEAD_VALUE + c, x * divisor);
    }
    if (threadIdx.x == 0 && lse) {
        lse[(size_t)own * rows + row] = total > 0.0f ? (highest + log2f(total)) * LN2 : NO_SCORE;
    }
}
