// Attention mass: what every stored token receives from the queries of a pass, added to what it has.
//
// scores  [L, G, q, n] float32: logits, or weights where lse is null. A line belongs to one lane (a row's key-value
//         head); G query heads share it.
// lse     [lanes, G, q] float32 or null: weight = exp(score - lse), 0 where lse is -inf
// real    [rows, q] float32 or null: what a query counts, 0 for padding
// lanes   [L] int64 or null (line i is lane i); a lane's row is lane / heads
// starts  [S + 1] int32 or null (S = 1): slot s gets queries starts[s] .. starts[s + 1]
// mass    [L, S, stride] float32, the first n of each row are added to
//
// The order of the adds is fixed: 8 threads share a token's queries, query by query and head by head.
// Grid: (ceil(n / 32), L, S). Block: (32, 8).

#define SHARES 8

extern "C" __global__ void __launch_bounds__(256) attention_mass(
    const float* __restrict__ scores, const float* __restrict__ lse, const float* __restrict__ real,
    const long long* __restrict__ lanes, const int* __restrict__ starts, float* __restrict__ mass, int groups,
    int queries, int tokens, int heads, int stride) {
    __shared__ float sums[SHARES][32];

    const int column = blockIdx.x * 32 + threadIdx.x, share = threadIdx.y;
    const size_t line = blockIdx.y, lane = lanes ? (size_t)lanes[line] : line;
    const int first = starts ? starts[blockIdx.z] : 0, last = starts ? starts[blockIdx.z + 1] : queries;
    const int rows = (last - first) * groups;
    const float* own = scores + line * groups * queries * tokens;

    float sum = 0.0f;
    if (column < tokens) {
        for (int i = share; i < rows; i += SHARES) {
            const int query = first + i / groups, group = i % groups;
            const size_t row = (size_t)group * queries + query;
            float weight = own[row * tokens + column];
            if (lse) {
                const float total = lse[lane * groups * queries + row];
                weight = total < -3.0e38f ? 0.0f : expf(weight - total);
            }
            if (real) weight *= real[lane / heads * queries + query];
            sum += weight;
        }
    }
    sums[share][threadIdx.x] = sum;
    __syncthreads();
    if (share == 0 && column < tokens) {
        for (int i = 1; i < SHARES; i++) sum += sums[i][threadIdx.x];
        mass[(line * gridDim.z + blockIdx.z) * stride + column] += sum;
    }
}
