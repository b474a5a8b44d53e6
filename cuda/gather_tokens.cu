// Tokens of packed runs ("parts") copied into new lines, not a code changed: all fields of a layer in one launch.
//
// index      [n, T] int64: tokens of all parts numbered one behind the other; below 0: no token
// directory  int64: first token of every part and the end (parts + 1), capacity of a line of every part (parts), then
//            for each field SLOTS numbers (below) and the address of the field in every part
//
// A field lies as [lines, T, count] units of `unit` bytes (PLAIN), as [lines, count, T] units (LAST), or as
// [lines, count, T * bits / 8] bytes: byte j of a page holds tokens j + i * page * bits / 8 in bits i * bits (BITS).
// Where the index has no token, fields with `fills` (units of 4 bytes) get `value`; the others copy token 0.
// Grid: (n, pages of a new line). Block: any multiple of 32. Dynamic shared memory: 3 * page ints.

#define PLAIN 0
#define LAST 1
#define BITS 2

#define FIELD_KIND 0
#define FIELD_COUNT 1
#define FIELD_UNIT 2  // bytes, or bits of a code
#define FIELD_FILLS 3
#define FIELD_VALUE 4
#define FIELD_OUT 5
#define SLOTS 6

extern __shared__ __align__(16) unsigned char kvc_smem[];

// Where the tokens of this page come from; line -1: no token.
struct Sources {
    const int *part, *line, *place;
};

struct Field {
    const long long* slots;
    const long long* capacities;
    int count;
};

template <class Unit>
__device__ void copy_units(const Field& field, const Sources& from, bool last, int page, int first, int tokens) {
    const long long* addresses = field.slots + SLOTS;
    Unit* out = (Unit*)field.slots[FIELD_OUT];
    const bool fills = field.slots[FIELD_FILLS] != 0;
    const int count = field.count;
    const size_t row = blockIdx.x;
    for (int x = threadIdx.x; x < page * count; x += blockDim.x) {
        int t = last ? x % page : x / count, c = last ? x / page : x % count;
        const size_t line = from.line[t] < 0 ? 0 : from.line[t];
        const size_t capacity = field.capacities[from.part[t]], place = from.place[t];
        const Unit* in = (const Unit*)addresses[from.part[t]];
        Unit unit = in[last ? (line * count + c) * capacity + place : (line * capacity + place) * count + c];
        if (sizeof(Unit) == 4 && fills && from.line[t] < 0) *(unsigned*)&unit = (unsigned)field.slots[FIELD_VALUE];
        out[last ? (row * count + c) * tokens + first + t : (row * tokens + first + t) * count + c] = unit;
    }
}

__device__ void copy_bits(const Field& field, const Sources& from, int page, int first, int tokens) {
    const long long* addresses = field.slots + SLOTS;
    unsigned char* out = (unsigned char*)field.slots[FIELD_OUT];
    const int count = field.count, bits = (int)field.slots[FIELD_UNIT], step = page * bits / 8;
    const unsigned code = (1u << bits) - 1;
    const size_t row = blockIdx.x;
    for (int x = threadIdx.x; x < count * step; x += blockDim.x) {
        int c = x / step, j = x % step;
        unsigned byte = 0;
        for (int i = 0; i < 8 / bits; i++) {
            int t = j + i * step;
            const size_t line = from.line[t] < 0 ? 0 : from.line[t];
            const size_t in_line = field.capacities[from.part[t]] * bits / 8;
            int in_page = from.place[t] % page, old = in_page / step;
            const unsigned char* in = (const unsigned char*)addresses[from.part[t]];
            size_t at = (line * count + c) * in_line + from.place[t] / page * step + (in_page - old * step);
            byte |= (in[at] >> (old * bits) & code) << (i * bits);
        }
        out[(row * count + c) * ((size_t)tokens * bits / 8) + first / page * step + j] = (unsigned char)byte;
    }
}

extern "C" __global__ void __launch_bounds__(256) gather_tokens(
    const long long* __restrict__ index, const long long* __restrict__ directory, int parts, int fields, int tokens,
    int page) {
    int* part = (int*)kvc_smem;
    int* line = part + page;
    int* place = line + page;
    const long long *starts = directory, *capacities = directory + parts + 1;
    const int first = blockIdx.y * page;

    for (int t = threadIdx.x; t < page; t += blockDim.x) {
        long long token = index[(size_t)blockIdx.x * tokens + first + t];
        const bool absent = token < 0;
        if (absent) token = 0;
        int low = 0, high = parts;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (token < starts[middle])
                high = middle;
            else
                low = middle;
        }
        token -= starts[low];
        part[t] = low;
        line[t] = absent ? -1 : (int)(token / capacities[low]);
        place[t] = (int)(token % capacities[low]);
    }
    __syncthreads();

    Sources from = {part, line, place};
    for (int f = 0; f < fields; f++) {
        Field field;
        field.slots = capacities + parts + (size_t)f * (SLOTS + parts);
        field.capacities = capacities;
        field.count = (int)field.slots[FIELD_COUNT];
        const int kind = (int)field.slots[FIELD_KIND], unit = (int)field.slots[FIELD_UNIT];
        const bool last = kind == LAST;
        if (kind == BITS)
            copy_bits(field, from, page, first, tokens);
        else if (unit == 1)
            copy_units<unsigned char>(field, from, last, page, first, tokens);
        else if (unit == 2)
            copy_units<unsigned short>(field, from, last, page, first, tokens);
        else if (unit == 4)
            copy_units<unsigned>(field, from, last, page, first, tokens);
        else
            copy_units<uint4>(field, from, last, page, first, tokens);
    }
}
