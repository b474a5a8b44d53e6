// Decode attention over packed pages without tensor cores: every codec, every head size up to 256, sm_75 and later. The
// cross-check of attention_mma.cu, which is as it is but for the packed runs.
//
// spills: 16
// variants: HEAD_KEY=128 HEAD_VALUE=128 KEY_CODEC=54 KEY_GROUP=1 VALUE_CODEC=54 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
// variants: HEAD_KEY=80 HEAD_VALUE=80 KEY_CODEC=54 KEY_GROUP=1 VALUE_CODEC=54 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=0
// variants: HEAD_KEY=64 HEAD_VALUE=64 KEY_CODEC=34 KEY_GROUP=64 VALUE_CODEC=24 VALUE_GROUP=64 PAGE=64 ROWS=8 DTYPE=2
// variants: HEAD_KEY=256 HEAD_VALUE=256 KEY_CODEC=0 KEY_GROUP=1 VALUE_CODEC=18 VALUE_GROUP=1 PAGE=32 ROWS=8 DTYPE=2
//
// The lines above are examples. Arguments and layouts: attention_tiles.cuh. Grid: slots of work, tiles of ROWS query
// rows. Block: THREADS. Dynamic shared memory: none. Output: scratch, float32: sums [slots, M, HEAD_VALUE] of all
// launches, then top [slots, M, 2]; logits float32 or null.
#include "ptx.cuh"
#include "rotation.cuh"
#include "attention_formats.cuh"
#include "attention_tiles.cuh"
#include "attention_numbers.cuh"
#include "attention_plain.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) attention_plain(
        const void* __restrict__ query, const long long* __restrict__ table, const long long* __restrict__ masks,
        int works_at, const void* __restrict__ new_keys, const void* __restrict__ new_values, int window, int causal,
        const float* __restrict__ signs, const float* __restrict__ hartley, float* __restrict__ scratch,
        float* __restrict__ logits, float factor, float softcap) {
    __shared__ PlainRoom room;
    __shared__ float query_rows[1 + ODD_KEY][ROWS * (HEAD_KEY | 1)];
    __shared__ float bias[ROWS];
    const Call call = call_of(table, masks, new_keys, new_values, window, causal);
    const Work work = work_of(call, works_at, blockIdx.x);
    const int rows = call.groups * call.queries, first_row = blockIdx.y * ROWS, count = min(ROWS, rows - first_row);
    float* prepared = prepare_queries(call, work, (const scalar*)query, factor, first_row, count, signs, hartley,
                                      query_rows[0], query_rows[ODD_KEY], bias);
    int line = 0;
    float* own_logits = logits_of(call, work, logits, rows, &line);
    const size_t slot = (works_at - table[WORKS_AT]) / 2 + blockIdx.x;
    float* sums = scratch + slot * rows * HEAD_VALUE;
    float* top = scratch + table[SLOTS] * rows * HEAD_VALUE + slot * rows * 2;
    attend_plainly(call, work, prepared, bias, first_row, count, softcap, &room, sums, top, own_logits, line);
}
