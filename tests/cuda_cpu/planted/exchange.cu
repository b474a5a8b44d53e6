// Warps: every collective and atomic once, against answers that test_machine.py works out in torch.
// x [32] int32, out [n, 32]; one warp. share adds up `parts` [2] over the blocks, the last block to come writes `sum`.
extern "C" __global__ void collectives(const int* x, int* out) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x, value = x[lane];
    int i = 0;
    out[32 * i++ + lane] = __shfl_sync(all, value, 5);
    out[32 * i++ + lane] = __shfl_sync(all, value, lane + 1, 8);
    out[32 * i++ + lane] = __shfl_xor_sync(all, value, 3);
    out[32 * i++ + lane] = __shfl_up_sync(all, value, 2);
    out[32 * i++ + lane] = __shfl_down_sync(all, value, 2, 16);
    out[32 * i++ + lane] = (int)__ballot_sync(all, value > 0);
    out[32 * i++ + lane] = __any_sync(all, value == 7);
    out[32 * i++ + lane] = __all_sync(all, value < 100);
    out[32 * i++ + lane] = __reduce_add_sync(all, value);
    out[32 * i++ + lane] = __reduce_max_sync(all, value);
    out[32 * i++ + lane] = (int)__match_any_sync(all, value & 1);
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;  // two groups, each at its own meeting
    out[32 * i++ + lane] = __reduce_min_sync(half, value);
    out[32 * i++ + lane] = __syncthreads_count(value > 0);
    out[32 * i++ + lane] = __syncthreads_or(value == 7) * 2 + __syncthreads_and(value < 100);
}

extern "C" __global__ void share(const int* x, int* parts, int* counter, int* sum) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = x[blockIdx.x];
        __threadfence();
        last = atomicAdd(counter, 1) == (int)gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        int total = 0;
        for (int i = 0; i < (int)gridDim.x; i++) total += parts[i];
        *sum = total;
    }
}
