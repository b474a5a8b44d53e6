// The plain way through a range of tokens: TILE of them as floats in shared memory, a lane of a warp has a token's
// score, a thread a channel's sum. Serves the exact tokens everywhere, and packed ones of any codec and head size.
//
// A warp has the rows warp and warp + WARPS. Bound by arithmetic: about 4 * ROWS multiply-adds a number read.
#pragma once

#define TILE 32
#define LINE (HEAD_MOST | 1)
#define OWN_CHANNELS ((HEAD_VALUE + THREADS - 1) / THREADS)
#define OWN_ROWS ((ROWS + WARPS - 1) / WARPS)

struct PlainRoom {  // shared memory
    float tile[TILE * LINE];
    float weights[ROWS * TILE];
    float shrink[ROWS];
};

// Numbers of exact token t, which is in the window or among the new ones.
__device__ __forceinline__ float exact_key(const Call& call, const Work& work, int t, int c) {
    if (t < call.window) {
        size_t at = (size_t)work.row_of_batch * work.run[KEY_ROW] + (size_t)work.head * work.run[KEY_HEAD];
        return to_float(((const scalar*)work.run[EXACT_KEYS])[at + (size_t)t * work.run[KEY_TOKEN] + c]);
    }
    size_t at = (size_t)work.row_of_batch * call.table[NEW_KEY_ROW] + (size_t)work.head * call.table[NEW_KEY_HEAD];
    return to_float(((const scalar*)call.new_keys)[at + (size_t)(t - call.window) * call.table[NEW_KEY_TOKEN] + c]);
}

__device__ __forceinline__ float exact_value(const Call& call, const Work& work, int t, int c) {
    if (t < call.window) {
        size_t at = (size_t)work.row_of_batch * work.run[VALUE_ROW] + (size_t)work.head * work.run[VALUE_HEAD];
        return to_float(((const scalar*)work.run[EXACT_VALUES])[at + (size_t)t * work.run[VALUE_TOKEN] + c]);
    }
    size_t at = (size_t)work.row_of_batch * call.table[NEW_VALUE_ROW] + (size_t)work.head * call.table[NEW_VALUE_HEAD];
    return to_float(((const scalar*)call.new_values)[at + (size_t)(t - call.window) * call.table[NEW_VALUE_TOKEN] + c]);
}

// Attend to the work's tokens. `rows` and `bias` are what prepare_queries left; results go to sums [M, HEAD_VALUE] and
// top [M, 2] of the slot, logits to [M, line] if wanted.
__device__ __forceinline__ void attend_plainly(
        const Call& call, const Work& work, const float* rows, const float* bias, int first_row, int count,
        float softcap, PlainRoom* room, float* sums, float* top, float* logits, int logits_line) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float highest[OWN_ROWS], total[OWN_ROWS], acc[ROWS][OWN_CHANNELS];
    for (int i = 0; i < OWN_ROWS; i++) highest[i] = NO_SCORE, total[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < OWN_CHANNELS; k++) acc[r][k] = 0.0f;
    Sight sight = {};
    Masks window_masks = {}, new_masks = {};
    if (work.exact) {
        window_masks = masks_of(call, work, call.runs);
        new_masks = masks_of(call, work, call.runs + 1);
    } else {
        sight = sight_of(call, work);
    }
    for (int start = work.first; start < work.end; start += TILE) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * HEAD_KEY; i += THREADS) {
            int t = start + i / HEAD_KEY, c = i % HEAD_KEY;
            float x = 0.0f;
            if (t < work.end) x = work.exact ? exact_key(call, work, t, c) : key_number(work, t, c);
            room->tile[i / HEAD_KEY * LINE + c] = x;
        }
        __syncthreads();
        for (int i = 0; i < OWN_ROWS; i++) {
            int r = warp + i * WARPS, t = start + lane, m = first_row + r;
            if (r >= count) continue;
            float score = 0.0f;
            const float* row = rows + r * (HEAD_KEY | 1);
            for (int c = 0; c < HEAD_KEY; c++) score = fmaf(row[c], room->tile[lane * LINE + c], score);
            score = capped(score + bias[r], softcap);
            int group = m / call.queries, query = m % call.queries;
            bool seen = t < work.end;
            if (seen && work.exact) {
                int own = t - call.window;
                seen = own < 0 ? allows(window_masks, group, query, t)
                                              : allows(new_masks, group, query, own) && (!call.causal || own <= query);
            } else if (seen) {
                seen = sight.exists(t) && allows(sight.masks, group, query, t);
            }
            score = seen ? score : NO_SCORE;
            if (logits && t < work.end) logits[(size_t)m * logits_line + t] = score * LN2;
            float most = score;
            most = warp_max(most);
            most = fmaxf(most, highest[i]);
            float weight = seen ? exp2f(score - most) : 0.0f, sum = weight;
            sum = warp_sum(sum);
            float shrink = highest[i] == NO_SCORE ? 0.0f : exp2f(highest[i] - most);
            total[i] = fmaf(total[i], shrink, sum);
            highest[i] = most;
            room->weights[r * TILE + lane] = weight;
            if (lane == 0) room->shrink[r] = shrink;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * HEAD_VALUE; i += THREADS) {
            int l, c;  // neighbours read neighbouring bytes: packed codes have the tokens of a channel side by side
            if (!work.exact && !ALONG_CHANNELS(VALUE_CODEC)) {
                l = i % TILE, c = i / TILE;
            } else {
                l = i / HEAD_VALUE, c = i % HEAD_VALUE;
            }
            int t = start + l;
            float x = 0.0f;
            if (t < work.end) x = work.exact ? exact_value(call, work, t, c) : value_number(work, t, c);
            room->tile[l * LINE + c] = x;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < OWN_CHANNELS; k++) {
            int c = threadIdx.x + k * THREADS;
            if (c >= HEAD_VALUE) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (r < count) acc[r][k] *= room->shrink[r];
            for (int l = 0; l < TILE; l++) {
                float x = room->tile[l * LINE + c];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    if (r < count) acc[r][k] = fmaf(room->weights[r * TILE + l], x, acc[r][k]);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < OWN_CHANNELS; k++) {
        int c = threadIdx.x + k * THREADS;
        if (c >= HEAD_VALUE) break;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < count) sums[(size_t)(first_row + r) * HEAD_VALUE + c] = acc[r][k];
    }
    for (int i = 0; i < OWN_ROWS; i++) {
        int r = warp + i * WARPS;
        if (lane == 0 && r < count) {
            top[2 * (first_row + r)] = highest[i];
            top[2 * (first_row + r) + 1] = total[i];
        }
    }
}
