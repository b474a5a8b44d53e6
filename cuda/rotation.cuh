// Sums and rotations of a tile's vectors, in shared memory, in the order of ops/numeric.py and ops/hadamard.py: the
// same adds give the same bits.
//
// A tile has N vectors of D floats: number c of vector t at tile[t * (D | 1) + c]. Neighbouring threads take
// neighbouring vectors, so with an odd stride no two of them meet in a bank. Every function is called by all threads of
// the block, expects a complete tile (a barrier has passed) and leaves one behind.
#pragma once

// Which vector a thread works on, and which of its numbers: first, first + steps, ... A thread too many has none.
struct Worker {
    int vector, first, steps, stride;
    __device__ __forceinline__ float* of(float* tile) const { return tile + vector * stride; }
};

__device__ __forceinline__ Worker worker_of(int vectors, int dim) {
    Worker me;
    me.vector = threadIdx.x % vectors;
    me.first = threadIdx.x / vectors;
    me.steps = blockDim.x / vectors;
    me.stride = dim | 1;
    if (me.first >= me.steps) me.first = 1 << 30;
    return me;
}

// Sum of each vector of `tile`, which is overwritten, by halving; every thread gets its own vector's.
__device__ __forceinline__ float tree_sum(float* tile, Worker me, int dim) {
    float* x = me.of(tile);
    int n = dim;
    while (n > 1) {
        int half = n / 2;
        for (int i = me.first; i < half; i += me.steps) {
            float sum = x[i] + x[i + half];
            if (i == 0 && n % 2) sum += x[n - 1];
            x[i] = sum;
        }
        n = half;
        __syncthreads();
    }
    float sum = x[0];
    __syncthreads();
    return sum;
}

// The largest of each vector's `own`, one a thread and none below 0; `room` has a float for every thread and may not be
// written again before the next barrier.
__device__ __forceinline__ float largest(float own, float* room, Worker me, int vectors) {
    room[threadIdx.x] = own;
    __syncthreads();
    float most = 0.0f;
    for (int i = 0; i < me.steps; i++) most = fmaxf(most, room[i * vectors + me.vector]);
    return most;
}

// Hadamard (not normalised) times Hartley: D = power * rest. Returns where the result is, `tile` or `other`; `other`
// and the matrix `[rest, rest]` are only used where rest > 1.
__device__ __forceinline__ float* mix(float* tile, float* other, const float* hartley, Worker me, int dim) {
    int power = dim & -dim, rest = dim / power;
    float* x = me.of(tile);
    for (int half = power / 2; half > 0; half /= 2) {
        for (int pair = me.first; pair < dim / 2; pair += me.steps) {
            int i = (pair & ~(half - 1)) * 2 + (pair & (half - 1));
            float a = x[i], b = x[i + half];
            x[i] = a + b;
            x[i + half] = a - b;
        }
        __syncthreads();
    }
    if (rest == 1) return tile;
    float* y = me.of(other);
    for (int c = me.first; c < dim; c += me.steps) {
        const float* row = hartley + c / power * rest;
        float sum = x[c % power] * row[0];
        for (int j = 1; j < rest; j++) sum += x[j * power + c % power] * row[j];
        y[c] = sum;
    }
    __syncthreads();
    return other;
}
