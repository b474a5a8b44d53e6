// One number of a packed key or value in the basis it is coded in, read where it stands. For the plain kernel.
#pragma once

// Stored code of element j of n packed together; `bytes` is where they begin. Planes as in ops/packing.py.
__device__ __forceinline__ int code_at(const unsigned char* bytes, const unsigned char* low, int j, int n, int bits) {
    int plane = bits == 3 ? 2 : bits, step = n * plane / 8;
    int code = bytes[j % step] >> (j / step * plane) & ((1 << plane) - 1);
    if (bits == 3) code = code << 1 | (low[j % (n / 8)] >> (j / (n / 8)) & 1);
    return code;
}

__device__ __forceinline__ float uniform_number(int code, int bits, int half_step) {
    int half = 1 << (bits - 1);
    return (float)((code ^ half) - half) + (half_step ? 0.5f : 0.0f);
}

// Codes 0, 1, ... are the magnitudes rising; the negative ones follow, rising as well.
__device__ __forceinline__ float level_number(int code, int bits, unsigned low, unsigned high) {
    int half = 1 << (bits - 1), number = code < half ? code : 2 * half - 1 - code;
    float level = (float)((number < 4 ? low : high) >> 8 * (number % 4) & 255u) * LEVEL_UNIT(bits);
    return code < half ? level : -level;
}

__device__ __forceinline__ float float8_number(int code) {
    return __low2float(halves_of_e4m3((unsigned short)code));
}

__device__ __forceinline__ float bfloat16_at(long long pointer, size_t i) {
    return to_float(((const bfloat*)pointer)[i]);
}

// Number of token t, channel c of the line.
__device__ __forceinline__ float key_number(const Work& work, int t, int c) {
    const long long* run = work.run;
    size_t capacity = (size_t)run[CAPACITY], token = work.line * capacity + t;
    float number;
#if KEY_FAMILY == IDENTITY
    return to_float(((const scalar*)run[KEY_CODES])[token * HEAD_KEY + c]);
#elif KEY_FAMILY == FP8
    number = float8_number(((const unsigned char*)run[KEY_CODES])[token * HEAD_KEY + c]);
#else
    const int n = (HEAD_KEY + 7) / 8 * 8;
    const int line = n * (KEY_BITS == 3 ? 2 : KEY_BITS) / 8;
    const unsigned char* bytes = (const unsigned char*)run[KEY_CODES] + token * line;
    const unsigned char* low = (const unsigned char*)run[KEY_LOW] + token * (n / 8);
    int code = code_at(bytes, low, c, n, KEY_BITS);
#if KEY_FAMILY != TURBO
    number = uniform_number(code, KEY_BITS, HALF_STEP(KEY_CODEC));
#else
    number = level_number(code, KEY_BITS, LEVELS_LOW(KEY_BITS), LEVELS_HIGH(KEY_BITS));
#endif
#endif
#if KEY_FAMILY == CHANNELS
    size_t meta = (work.line * (capacity / KEY_GROUP) + t / KEY_GROUP) * HEAD_KEY + c;
#elif KEY_FAMILY == TOKENS
    size_t meta = ((size_t)work.line * KEY_GROUPS + c / KEY_GROUP) * capacity + t;
#else
    size_t meta = token;
#endif
    number *= bfloat16_at(run[KEY_SCALE], meta);
#if CENTRED(KEY_CODEC)
    number += bfloat16_at(run[KEY_CENTRE], meta);
#endif
    return number;
}

__device__ __forceinline__ float value_number(const Work& work, int t, int c) {
    const long long* run = work.run;
    size_t capacity = (size_t)run[CAPACITY], token = work.line * capacity + t;
    float number;
#if VALUE_FAMILY == IDENTITY
    return to_float(((const scalar*)run[VALUE_CODES])[token * HEAD_VALUE + c]);
#elif VALUE_FAMILY == FP8
    number = float8_number(((const unsigned char*)run[VALUE_CODES])[token * HEAD_VALUE + c]);
#else
    const int plane = VALUE_BITS == 3 ? 2 : VALUE_BITS;
    size_t channel = (size_t)work.line * HEAD_VALUE + c;
    const unsigned char* bytes = (const unsigned char*)run[VALUE_CODES] + channel * (capacity * plane / 8);
    const unsigned char* low = (const unsigned char*)run[VALUE_LOW] + channel * (capacity / 8);
    int page = t / PAGE;
    int code = code_at(bytes + page * (PAGE * plane / 8), low + page * (PAGE / 8), t % PAGE, PAGE, VALUE_BITS);
#if VALUE_FAMILY != TURBO
    number = uniform_number(code, VALUE_BITS, HALF_STEP(VALUE_CODEC));
#else
    number = level_number(code, VALUE_BITS, LEVELS_LOW(VALUE_BITS), LEVELS_HIGH(VALUE_BITS));
#endif
#endif
#if VALUE_FAMILY == CHANNELS
    size_t meta = (work.line * (capacity / VALUE_GROUP) + t / VALUE_GROUP) * HEAD_VALUE + c;
#elif VALUE_FAMILY == TOKENS
    size_t meta = ((size_t)work.line * VALUE_GROUPS + c / VALUE_GROUP) * capacity + t;
#else
    size_t meta = token;
#endif
    number *= bfloat16_at(run[VALUE_SCALE], meta);
#if CENTRED(VALUE_CODEC)
    number += bfloat16_at(run[VALUE_CENTRE], meta);
#endif
    return number;
}
