// What the keys of a segment share: mean and equalising spread of every channel, and the history behind them.
//
// Grid: one block a row (a key-value head of a sequence). Block: a multiple of D threads; thread i takes channel i % D
// and every (threads / D)th token from i / D on. Dynamic shared memory: two doubles a thread. Sums are float64, so
// squares of any float32 fit; their order depends on nothing but the number of tokens.
// fmad: off
#include "codes.cuh"

extern __shared__ __align__(16) unsigned char kvc_smem[];

// A thread's part of a row.
struct Part {
    int channel, slot, slots;
    size_t from, token;  // where number (0, channel) is, and how far apart tokens are
    double *sums, *squares;
};

__device__ __forceinline__ Part part_of(int inner, long long x_outer, long long x_inner, int x_token, int dim) {
    Part part;
    int row = blockIdx.x;
    part.channel = threadIdx.x % dim;
    part.slot = threadIdx.x / dim;
    part.slots = blockDim.x / dim;
    part.from = (size_t)(row / inner) * x_outer + (size_t)(row % inner) * x_inner + part.channel;
    part.token = x_token;
    part.sums = (double*)kvc_smem;
    part.squares = part.sums + blockDim.x;
    return part;
}

// The sum over a channel's slots of `sums` or `squares`.
__device__ __forceinline__ double over_slots(const double* sums, Part me, int dim) {
    double sum = sums[me.channel];
    for (int slot = 1; slot < me.slots; slot++) sum += sums[slot * dim + me.channel];
    return sum;
}

// x: number (row, token, channel) at row / inner * x_outer + row % inner * x_inner + token * x_token + channel.
// queries: [rows, D] mean squares, or null. first, second [rows, D], weight [rows]: what segment_learn made of the
// tokens before, or null. mean, spread: [rows, D] bfloat16. memory: tokens after which history has faded to 1 / e.
// floor: the smallest spread, relative to all channels.
extern "C" __global__ void __launch_bounds__(1024, 1) segment_begin(
        const void* x, int dtype, int inner, long long x_outer, long long x_inner, int x_token, const float* queries,
        const double* first, const double* second, const double* weight, unsigned short* mean, unsigned short* spread,
        int dim, int tokens, float memory, float floor) {
    Part me = part_of(inner, x_outer, x_inner, x_token, dim);
    size_t own = (size_t)blockIdx.x * dim + me.channel;
    // Sums are of differences to the first token: constant channels have no variance then, however large they are.
    double shift = clean(number_at(x, me.from, dtype));
    double sum = 0.0, square = 0.0;
    for (int t = me.slot; t < tokens; t += me.slots) {
        double number = clean(number_at(x, me.from + t * me.token, dtype)) - shift;
        sum += number;
        square += number * number;
    }
    me.sums[threadIdx.x] = sum;
    me.squares[threadIdx.x] = square;
    __syncthreads();
    double offset = over_slots(me.sums, me, dim) / tokens;
    double centre = shift + offset;
    double variance = fmax(over_slots(me.squares, me, dim) / tokens - offset * offset, 0.0);
    if (first) {  // the history counts for less the more tokens are known
        double known = fmax(weight[blockIdx.x], 1e-37);  // 0: a row that has learned nothing yet, beside one that has
        double before = first[own] / known;
        double variance_before = fmax(second[own] / known - before * before, 0.0);
        double part = known * exp(-tokens / (double)memory);
        part /= part + tokens;
        double apart = before - centre;
        variance += (variance_before - variance) * part + apart * apart * part * (1.0 - part);
        centre += apart * part;
    }
    __syncthreads();
    if (me.slot == 0) {
        me.sums[me.channel] = variance;
        me.squares[me.channel] = fabs(centre);
    }
    __syncthreads();

    double total = 0.0, reach = 0.0;
    float largest = 0.0f, query_total = 0.0f, query = 0.0f;
    for (int c = 0; c < dim; c++) {
        total += me.sums[c];
        reach = fmax(reach, me.squares[c]);
        if (queries) largest = fmaxf(largest, clean(queries[(size_t)blockIdx.x * dim + c]));
    }
    double size = sqrt(total / dim);
    double relative = fmax(size > 0.0 ? sqrt(variance) / fmax(size, (double)KVC_TINY) : 1.0, (double)floor);
    if (queries) {
        float shrink = 1.0f / fmaxf(largest, KVC_TINY);
        for (int c = 0; c < dim; c++) query_total += fmaxf(clean(queries[(size_t)blockIdx.x * dim + c]), 0.0f) * shrink;
        query_total /= dim;
        query = fmaxf(clean(queries[own]), 0.0f) * shrink;
        query = query_total > 0.0f ? query / fmaxf(query_total, KVC_TINY) : 1.0f;
        relative /= fmaxf(sqrtf(query), floor);
    }
    // Tokens that come later should fit a segment that began with equal or zero tokens.
    size = fmax(size, reach * 1e-6);
    if (size <= KVC_TINY) size = reach > KVC_TINY ? reach : 1.0;
    double result = fmin(fmax(sqrt(relative) * size, (double)KVC_TINY), (double)KVC_LIMIT);
    if (me.slot == 0) {
        mean[own] = bfloat16_nearest((float)centre);
        spread[own] = bfloat16_nearest((float)result);
    }
}

// Adds `tokens` more to a history of sums of numbers and of their squares, or begins one (old ones null).
extern "C" __global__ void __launch_bounds__(1024, 1) segment_learn(
        const void* x, int dtype, int inner, long long x_outer, long long x_inner, int x_token,
        const double* old_first, const double* old_second, const double* old_weight,
        double* first, double* second, double* weight, int dim, int tokens, float memory) {
    Part me = part_of(inner, x_outer, x_inner, x_token, dim);
    double sum = 0.0, square = 0.0, fade = exp(-me.slots / (double)memory);
    int newest = me.slot;
    for (int t = me.slot; t < tokens; t += me.slots) {
        double number = clean(number_at(x, me.from + t * me.token, dtype));
        sum = sum * fade + number;
        square = square * fade + number * number;
        newest = t;
    }
    double age = exp((newest - (tokens - 1)) / (double)memory);
    me.sums[threadIdx.x] = sum * age;
    me.squares[threadIdx.x] = square * age;
    __syncthreads();
    if (me.slot != 0) return;
    size_t own = (size_t)blockIdx.x * dim + me.channel;
    sum = over_slots(me.sums, me, dim);
    square = over_slots(me.squares, me, dim);
    fade = exp(-tokens / (double)memory);
    first[own] = old_first ? sum + old_first[own] * fade : sum;
    second[own] = old_second ? square + old_second[own] * fade : square;
    if (me.channel == 0) {
        double known = (1.0 - fade) / (1.0 - exp(-1.0 / memory));
        weight[blockIdx.x] = old_weight ? known + old_weight[blockIdx.x] * fade : known;
    }
}
