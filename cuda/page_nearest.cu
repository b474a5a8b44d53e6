// For every query the k most similar rows of a pool, tile by tile: all pairs are looked at, none are stored.
//
// queries, pool    [Q, F], [P, F] float32, similarity is their inner product; with -DHAMMING=1 [Q, F], [P, F] words of
//                  packed signs, similarity is minus the number of bits that differ
// values, indices  [Q, k] float32 and int32, the most similar first, of equal ones the lower row; -inf and -1 behind
//
// own >= 0: query i is row own + i of the pool and no match of itself; `earlier`: only rows before it are looked at.
// variants: HAMMING=0,1
// Grid: ceil(Q / 64). Block: (16, 16), each thread 4 x 4 pairs of a tile of 64 x 64.

#ifndef HAMMING
#define HAMMING 0
#endif
#if HAMMING
typedef unsigned Entry;
typedef int Sum;
#else
typedef float Entry;
typedef float Sum;
#endif

#define TILE 64
#define DEPTH 16
#define MOST 16
#define SIDE 4  // pairs of a thread along each side of the tile, 16 apart

extern "C" __global__ void __launch_bounds__(256) page_nearest(
    const Entry* __restrict__ queries, const Entry* __restrict__ pool, float* __restrict__ values,
    int* __restrict__ indices, int query_count, int pool_count, int length, int k, int own, int earlier) {
    __shared__ Entry left[TILE][DEPTH + 1], right[TILE][DEPTH + 1];
    __shared__ float scores[TILE][TILE + 1];
    __shared__ float best[TILE][MOST + 1];
    __shared__ int best_row[TILE][MOST + 1];

    const int x = threadIdx.x, y = threadIdx.y, thread = y * 16 + x;
    const int first = blockIdx.x * TILE;
    const float nothing = __int_as_float(0xff800000);
    if (thread < TILE) {
        for (int j = 0; j < k; j++) {
            best[thread][j] = nothing;
            best_row[thread][j] = -1;
        }
    }
    const int end = earlier && own + first + TILE < pool_count ? own + first + TILE : pool_count;
    for (int tile = 0; tile < end; tile += TILE) {
        Sum sums[SIDE][SIDE];
#pragma unroll
        for (int i = 0; i < SIDE; i++)
#pragma unroll
            for (int j = 0; j < SIDE; j++) sums[i][j] = 0;
        for (int depth = 0; depth < length; depth += DEPTH) {
            for (int i = thread; i < TILE * DEPTH; i += 256) {
                const int row = i / DEPTH, at = i % DEPTH;
                const bool inside = depth + at < length;
                left[row][at] = inside && first + row < query_count
                    ? queries[(size_t)(first + row) * length + depth + at] : (Entry)0;
                right[row][at] = inside && tile + row < pool_count
                    ? pool[(size_t)(tile + row) * length + depth + at] : (Entry)0;
            }
            __syncthreads();
            for (int at = 0; at < DEPTH; at++) {
                Entry a[SIDE], b[SIDE];
#pragma unroll
                for (int i = 0; i < SIDE; i++) {
                    a[i] = left[y + 16 * i][at];
                    b[i] = right[x + 16 * i][at];
                }
#pragma unroll
                for (int i = 0; i < SIDE; i++)
#pragma unroll
                    for (int j = 0; j < SIDE; j++) {
#if HAMMING
                        sums[i][j] -= __popc(a[i] ^ b[j]);
#else
                        sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
#endif
                    }
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < SIDE; i++)
#pragma unroll
            for (int j = 0; j < SIDE; j++) scores[y + 16 * i][x + 16 * j] = (float)sums[i][j];
        __syncthreads();
        if (thread < TILE && first + thread < query_count) {
            const int self = own < 0 ? -1 : own + first + thread;
            for (int j = 0; j < TILE && tile + j < pool_count; j++) {
                const int row = tile + j;
                const float score = scores[thread][j];
                if (row == self || (earlier && row > self) || !(score > best[thread][k - 1])) continue;
                int place = k - 1;
                for (; place > 0 && score > best[thread][place - 1]; place--) {
                    best[thread][place] = best[thread][place - 1];
                    best_row[thread][place] = best_row[thread][place - 1];
                }
                best[thread][place] = score;
                best_row[thread][place] = row;
            }
        }
        __syncthreads();
    }
    if (thread < TILE && first + thread < query_count) {
        for (int j = 0; j < k; j++) {
            values[(size_t)(first + thread) * k + j] = best[thread][j];
            indices[(size_t)(first + thread) * k + j] = best_row[thread][j];
        }
    }
}
