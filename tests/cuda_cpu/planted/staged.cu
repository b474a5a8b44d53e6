// Reverses each tile of 128 floats by way of dynamic shared memory: x [tiles * 128] -> out. Grid tiles, block 32.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(32) staged(const float* x, float* out) {
    extern __shared__ __align__(16) unsigned char kvc_smem[];
    float4* tile = reinterpret_cast<float4*>(kvc_smem);
    const int lane = threadIdx.x;
    copy_async(tile + lane, x + blockIdx.x * 128 + lane * 4);
    copies_commit();
    copies_wait<0>();
    __syncwarp();
    float4 found = tile[31 - lane];
    reinterpret_cast<float4*>(out)[blockIdx.x * 32 + lane] = make_float4(found.w, found.z, found.y, found.x);
}
