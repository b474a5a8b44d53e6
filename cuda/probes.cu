// One kernel for each wrapper of ptx.cuh, so that it can be compared with a known answer on the GPU that is there
// (hf_kvcompress/ops/probes.py). Every kernel: grid 1, block 32, a lane an element or two; mma is in probes_mma.cu.
#include "ptx.cuh"

// words [64] -> out [3, 64]: each width of load_once.
extern "C" __global__ void probe_load_once(const unsigned* words, unsigned* out) {
    const int lane = threadIdx.x;
    prefetch(words);
    if (lane < 16) reinterpret_cast<uint4*>(out)[lane] = load_once(reinterpret_cast<const uint4*>(words) + lane);
    reinterpret_cast<uint2*>(out + 64)[lane] = load_once(reinterpret_cast<const uint2*>(words) + lane);
    for (int i = lane; i < 64; i += 32) out[128 + i] = load_once(words + i);
}

// a, b, c [32] -> out [4, 32]: lop3 with the tables of (a & b) | c, a ^ b ^ c, a ? b : c and (a & b) ^ c.
extern "C" __global__ void probe_lop3(const unsigned* a, const unsigned* b, const unsigned* c, unsigned* out) {
    const int lane = threadIdx.x;
    const unsigned x = a[lane], y = b[lane], z = c[lane];
    out[lane] = lop3<0xea>(x, y, z);
    out[32 + lane] = lop3<0x96>(x, y, z);
    out[64 + lane] = lop3<0xca>(x, y, z);
    out[96 + lane] = lop3<0x6a>(x, y, z);
}

// x [n] -> out [n]: 2^x.
extern "C" __global__ void probe_exp2(const float* x, float* out, int n) {
    for (int i = threadIdx.x; i < n; i += 32) out[i] = fast_exp2(x[i]);
}

// x [2 n] -> pairs [n]; the numbers of all 256 bytes -> numbers [256].
extern "C" __global__ void probe_e4m3(const float* x, unsigned short* pairs, float* numbers, int n) {
    for (int i = threadIdx.x; i < n; i += 32) pairs[i] = e4m3_pair(x[2 * i], x[2 * i + 1]);
    for (int i = threadIdx.x; i < 128; i += 32) {
        __half2 both = halves_of_e4m3((unsigned short)(2 * i | (2 * i + 1) << 8));
        numbers[2 * i] = __low2float(both);
        numbers[2 * i + 1] = __high2float(both);
    }
}

// dp4a: a, b [32] int8 x 4, c [32] -> out [32].
extern "C" __global__ void probe_dp4a(const int* a, const int* b, const int* c, int* out) {
    const int lane = threadIdx.x;
    out[lane] = __dp4a(a[lane], b[lane], c[lane]);
}
