// Decode attention over packed pages: what all its kernels share.
//
// An attention call reads several runs: the exact tokens (sinks and window, then the new ones) and every slab or block
// of packed pages. A line of a run belongs to a lane, one key-value head of one row; a lane's M query rows (query heads
// of the group times queries) attend together, ROWS of them in one block. A slot of work is a range of tokens of one
// line; its block leaves a sum of values, not normalised, and (largest score, sum of weights) for each row, which
// attention_combine.cu joins. Scores are in base 2.
//
// Pointers and numbers that stay the same between two seals stand in `table`, int64: HEADER numbers, RUN_FIELDS a run,
// the last one the exact tokens', then two numbers a slot: run | line << 32 and first | end << 32, run -1 for the exact
// tokens.
//
// Macros: HEAD_KEY, HEAD_VALUE head sizes; ROWS; DTYPE of the model; and those of attention_formats.cuh.
#pragma once
#include "attention_header.cuh"

#define THREADS 128
#define WARPS 4
#define ODD_KEY ((HEAD_KEY & (HEAD_KEY - 1)) != 0)  // a rotation needs room for a copy
#define HEAD_MOST (HEAD_KEY > HEAD_VALUE ? HEAD_KEY : HEAD_VALUE)

#define RUN_FIELDS 18
enum RunField {
    KEY_CODES, KEY_LOW, KEY_SCALE, KEY_CENTRE, KEY_MEAN, KEY_SPREAD, VALUE_CODES, VALUE_LOW, VALUE_SCALE, VALUE_CENTRE,
    CAPACITY,     // tokens that a line has room for
    HELD,         // tokens of every line, where COUNTS is -1
    COUNTS,       // number in the table of the first line's (or row's) token count
    BY_LINE,      // counts and masks go by line, and else by row
    LANES,        // int64 lane of each line, or null: line i is of lane i
    POSITIONS,    // int32 [lines, CAPACITY], below 0 where there is no token; or null
    LOGITS_AT,    // first number of the run's logits [lines, M, LOGITS_LINE]
    LOGITS_LINE   // tokens of a line there
};
// The run of the exact tokens has these instead: sinks and window [B, H, n, D] and their strides in numbers.
enum ExactField { EXACT_KEYS, KEY_ROW, KEY_HEAD, KEY_TOKEN, EXACT_VALUES, VALUE_ROW, VALUE_HEAD, VALUE_TOKEN };

struct Masks {  // bytes, 1 where a query may look
    const unsigned char* at;
    bool given;
    size_t head, query;
};

// What one block does.
struct Work {
    const long long* run;
    int line, lane, row_of_batch, head, first, end, held, mask_number;
    bool exact;
};

struct Call {  // what several functions need of the arguments
    const long long* table;
    const long long* masks;  // [runs + 2, 4]: pointer or 0, strides of line or row, head, query; the last two are exact
    const void* new_keys;
    const void* new_values;
    int window, causal;  // exact tokens stored, and whether new ones see only those before them
    int news, heads, groups, queries, runs;
};

__device__ __forceinline__ Call call_of(
        const long long* table, const long long* masks, const void* new_keys, const void* new_values, int window,
        int causal) {
    return {table, masks, new_keys, new_values, window, causal, (int)table[NEWS], (int)table[HEADS], (int)table[GROUPS],
            (int)table[QUERIES], (int)table[RUNS]};
}

__device__ __forceinline__ Work work_of(const Call& call, int works_at, int slot) {
    Work work;
    long long place = call.table[works_at + 2 * slot], range = call.table[works_at + 2 * slot + 1];
    int run = (int)(unsigned)place;
    work.line = (int)(place >> 32);
    work.first = (int)(unsigned)range;
    work.end = (int)(range >> 32);
    work.exact = run < 0;
    work.run = call.table + HEADER + (size_t)(work.exact ? call.runs : run) * RUN_FIELDS;
    work.mask_number = run;
    work.lane = work.line;
    if (!work.exact && work.run[LANES]) work.lane = (int)((const long long*)work.run[LANES])[work.line];
    work.row_of_batch = work.lane / call.heads;
    work.head = work.lane % call.heads;
    work.held = work.exact ? call.window + call.news : (int)work.run[HELD];
    if (!work.exact && work.run[COUNTS] >= 0) {
        work.held = (int)call.table[work.run[COUNTS] + (work.run[BY_LINE] ? work.line : work.row_of_batch)];
    }
    if (work.end > work.held) work.end = work.held;
    return work;
}

// The mask of a run, or of the exact tokens' two halves (number call.runs and call.runs + 1).
__device__ __forceinline__ Masks masks_of(const Call& call, const Work& work, int number) {
    Masks masks;
    masks.given = call.masks && call.masks[4 * number];
    masks.at = nullptr;
    masks.head = masks.query = 0;
    if (masks.given) {
        const long long* entry = call.masks + 4 * number;
        bool by_line = !work.exact && work.run[BY_LINE];
        size_t first = (size_t)entry[1] * (by_line ? work.line : work.row_of_batch);
        if (!by_line) first += (size_t)entry[2] * work.head * call.groups;
        masks.at = (const unsigned char*)entry[0] + first;
        masks.head = (size_t)entry[2];
        masks.query = (size_t)entry[3];
    }
    return masks;
}

__device__ __forceinline__ bool allows(const Masks& masks, int group, int query, int token) {
    return !masks.given || masks.at[masks.head * group + masks.query * query + token];
}

// Whether query row `row` sees a token of a packed run.
struct Sight {
    Masks masks;
    const int* positions;
    int end;
    __device__ __forceinline__ bool exists(int token) const {
        return token < end && (!positions || positions[token] >= 0);
    }
};

__device__ __forceinline__ Sight sight_of(const Call& call, const Work& work) {
    Sight sight;
    sight.masks = masks_of(call, work, work.mask_number);
    sight.positions = nullptr;
    if (work.run[POSITIONS]) sight.positions = (const int*)work.run[POSITIONS] + (size_t)work.line * work.run[CAPACITY];
    sight.end = work.end;
    return sight;
}

// Raw score -> score in base 2; without a soft cap q carries log2(e) already.
__device__ __forceinline__ float capped(float score, float softcap) {
    return softcap > 0.0f ? tanhf(score / softcap) * softcap * LOG2E : score;
}

// -- queries ----------------------------------------------------------------------------------------------------------

// The block's query rows, `first` on, as this work's keys need them: rows[r * (HEAD_KEY | 1) + c], and in bias[r] what
// is added to every score. `other` is as large as `rows`, or not there without an odd part. A barrier has passed at the
// end. Returns where they are.
__device__ __forceinline__ float* prepare_queries(
        const Call& call, const Work& work, const scalar* query, float factor, int first, int count, const float* signs,
        const float* hartley, float* rows, float* other, float* bias) {
    const int stride = HEAD_KEY | 1;
    for (int i = threadIdx.x; i < ROWS * HEAD_KEY; i += THREADS) {
        int r = i / HEAD_KEY, c = i % HEAD_KEY, m = first + r;
        float x = 0.0f;
        if (r < count) {
            long long head = (long long)work.head * call.groups + m / call.queries;
            long long at = work.row_of_batch * call.table[QUERY_ROW] + head * call.table[QUERY_HEAD];
            x = to_float(query[at + m % call.queries * call.table[QUERY_TOKEN] + c]) * factor;
        }
        rows[r * stride + c] = x;
    }
    if (threadIdx.x < ROWS) bias[threadIdx.x] = 0.0f;
    __syncthreads();
    if (work.exact) return rows;
#if KEY_FAMILY == EQROT
    const bfloat* mean = (const bfloat*)work.run[KEY_MEAN] + (size_t)work.line * HEAD_KEY;
    const bfloat* spread = (const bfloat*)work.run[KEY_SPREAD] + (size_t)work.line * HEAD_KEY;
    for (int r = threadIdx.x / 32; r < ROWS; r += WARPS) {
        float sum = 0.0f;
        for (int c = threadIdx.x % 32; c < HEAD_KEY; c += 32) {
            float x = rows[r * stride + c];
            sum = fmaf(x, to_float(mean[c]), sum);
            rows[r * stride + c] = x * to_float(spread[c]);
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) bias[r] = sum;
    }
    __syncthreads();
#endif
#if KEY_ROTATED
    for (int i = threadIdx.x; i < ROWS * HEAD_KEY; i += THREADS) {
        rows[i / HEAD_KEY * stride + i % HEAD_KEY] *= signs[i % HEAD_KEY];
    }
    __syncthreads();
    rows = mix(rows, other, hartley, worker_of(ROWS, HEAD_KEY), HEAD_KEY);
#endif
    return rows;
}

// Where the logits of this work's line go, [M, line] with token 0 of the run first; null if none are wanted.
__device__ __forceinline__ float* logits_of(const Call& call, const Work& work, float* logits, int rows, int* line) {
    if (!logits) return nullptr;
    if (work.exact) {  // behind those of the packed runs
        *line = call.window + call.news;
        return logits + (size_t)work.run[LOGITS_AT] + (size_t)work.lane * rows * *line;
    }
    *line = (int)work.run[LOGITS_LINE];
    return logits + (size_t)work.run[LOGITS_AT] + (size_t)work.line * rows * *line;
}
