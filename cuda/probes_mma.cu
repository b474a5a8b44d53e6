// Probes of what came with sm_80: the matrix instructions and asynchronous copies of ptx.cuh. Grid 1, block 32.
// needs: sm_80
#include "ptx.cuh"

// Bits of two 16-bit numbers that stand side by side in memory, or one below the other.
__device__ __forceinline__ unsigned beside(const unsigned short* x) { return x[0] | (unsigned)x[1] << 16; }
__device__ __forceinline__ unsigned below(const unsigned short* x, int stride) { return x[0] | (unsigned)x[stride] << 16; }

// c [16, 8] float32 += a [16, 16] b [16, 8], all row-major, a and b bits of halves (or of bfloat16).
template <bool BFLOAT>
__device__ __forceinline__ void multiply(const unsigned short* a, const unsigned short* b, float* c) {
    const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
    unsigned left[4], right[2];
    float sum[4];
    for (int i = 0; i < 4; i++) left[i] = beside(a + (group + i % 2 * 8) * 16 + pair * 2 + i / 2 * 8);
    for (int i = 0; i < 2; i++) right[i] = below(b + (pair * 2 + i * 8) * 8 + group, 8);
    for (int i = 0; i < 4; i++) sum[i] = c[(group + i / 2 * 8) * 8 + pair * 2 + i % 2];
    if (BFLOAT) {
        mma_bf16(sum, left, right);
    } else {
        mma_f16(sum, left, right);
    }
    for (int i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + pair * 2 + i % 2] = sum[i];
}

extern "C" __global__ void probe_mma_f16(const unsigned short* a, const unsigned short* b, float* c) {
    multiply<false>(a, b, c);
}

extern "C" __global__ void probe_mma_bf16(const unsigned short* a, const unsigned short* b, float* c) {
    multiply<true>(a, b, c);
}

// x [3, 128] float32 -> out [3, 128]: three groups of copies; lanes read what other lanes copied.
extern "C" __global__ void probe_copies(const float* x, float* out) {
    __shared__ __align__(16) float tile[3][128];
    const int lane = threadIdx.x;
    for (int i = 0; i < 3; i++) {
        copy_async(&tile[i][lane * 4], x + i * 128 + lane * 4);
        copies_commit();
    }
    copies_wait<2>();
    __syncthreads();
    for (int i = lane; i < 128; i += 32) out[i] = tile[0][127 - i];
    copies_wait<0>();
    __syncthreads();
    for (int i = lane; i < 256; i += 32) out[128 + i] = tile[1 + i / 128][127 - i % 128];
}
