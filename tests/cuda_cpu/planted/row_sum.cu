// Sum of each row: x [rows, n] float32 -> out [rows]. Grid rows, block 128, no dynamic shared memory.
// The correct twin of the bugs in test_machine.py.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128) row_sum(const float* x, float* out, int n) {
    __shared__ float parts[4];
    __shared__ float total;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += 128) sum += x[(size_t)blockIdx.x * n + i];
    sum = warp_sum(sum);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) total = parts[0] + parts[1] + parts[2] + parts[3];
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = total;
}
