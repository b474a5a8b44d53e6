// Packed codes to pairs of halves that hold exact whole numbers, in registers.
//
// A word has four bytes of one plane (two planes for 3 bits), a byte 8 / plane codes that stand far apart. Pair 2 f + i
// has field f of the bytes i (low half) and i + 2 (high half). Codes are put into the mantissa of 1024, whose unit is
// 1, or 4^f where the field stands 2 f bits up; subtracting gives the number, exactly.
#pragma once

#define PLANE(bits) ((bits) == 3 ? 2 : (bits))
#define PAIRS(bits) (16 / PLANE(bits))  // that come out of a word

__device__ __forceinline__ unsigned less(unsigned x, unsigned y) { return bits_of(__hsub2(half2_of(x), half2_of(y))); }
__device__ __forceinline__ unsigned fused(unsigned x, unsigned y, unsigned z) {
    return bits_of(__hfma2(half2_of(x), half2_of(y), half2_of(z)));
}
// (a & b) ^ c
__device__ __forceinline__ unsigned and_xor(unsigned a, unsigned b, unsigned c) { return lop3<0x6a>(a, b, c); }

// The constants of field f: what a unit of the code is worth there, and the halves that take it away.
__device__ __forceinline__ unsigned inverse_unit(int f) {  // 1 / 4^f
    return f == 0 ? 0x3c003c00u : f == 1 ? 0x34003400u : f == 2 ? 0x2c002c00u : 0x24002400u;
}

template <int BITS>
__device__ __forceinline__ void unpack_uniform(unsigned word, unsigned low, unsigned (&out)[PAIRS(BITS)]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        unsigned w = i ? word >> 8 : word;
        if (BITS == 8) {
            out[i] = less(and_xor(w, 0x00ff00ffu, 0x64806480u), 0x64806480u);
        } else if (BITS == 4) {
            out[i] = less(and_xor(w, 0x000f000fu, 0x64086408u), 0x64086408u);
            out[2 + i] = fused(and_xor(w, 0x00f000f0u, 0x64806480u), 0x2c002c00u, 0xd480d480u);
        } else {
            unsigned l = i ? low >> 8 : low;
#pragma unroll
            for (int f = 0; f < 4; f++) {
                unsigned mask = 0x00030003u << 2 * f, x = and_xor(w, mask, 0x64006400u | 0x00020002u << 2 * f);
                if (BITS == 2) {  // minus 1024 / 4^f + 2
                    unsigned away = f == 0 ? 0xe402e402u : f == 1 ? 0xdc08dc08u : f == 2 ? 0xd420d420u : 0xcc80cc80u;
                    out[2 * f + i] = fused(x, inverse_unit(f), away);
                } else {  // twice the high bits and the low one, minus 3072 / 4^f + 4
                    unsigned away = f == 0 ? 0xea02ea02u : f == 1 ? 0xe208e208u : f == 2 ? 0xda20da20u : 0xd280d280u;
                    unsigned twice = f == 0 ? 0x40004000u : f == 1 ? 0x38003800u : f == 2 ? 0x30003000u : 0x28002800u;
                    unsigned y = (l & 0x00010001u << 2 * f) | 0x64006400u;
                    out[2 * f + i] = fused(y, inverse_unit(f), fused(x, twice, away));
                }
            }
        }
    }
}

// Magnitude numbers 0 .. 127 in the low bytes of both halves, with signs where `sign` has bits 15 and 31.
__device__ __forceinline__ unsigned signed_level(unsigned magnitudes, unsigned sign) {
    return and_xor(sign, 0x80008000u, less(magnitudes | 0x64006400u, 0x64006400u));
}

template <int BITS>
__device__ __forceinline__ void unpack_levels(unsigned word, unsigned low, unsigned (&out)[PAIRS(BITS)]) {
    if (BITS == 4) {  // three bits of every nibble choose a byte of the table; negative codes count down
        unsigned sign = word & 0x88888888u, index = (word ^ (sign - (sign >> 3))) & 0x77777777u;
        unsigned first = __byte_perm(LEVELS_LOW(4), LEVELS_HIGH(4), index);  // bytes 0, 1: low, high, low, high
        unsigned second = __byte_perm(LEVELS_LOW(4), LEVELS_HIGH(4), index >> 16);  // bytes 2 and 3
        unsigned even = __byte_perm(first, second, 0x5410), odd = __byte_perm(first, second, 0x7632);
        out[0] = signed_level(even & 0x00ff00ffu, sign << 12);
        out[1] = signed_level(odd & 0x00ff00ffu, sign << 4);
        out[2] = signed_level(even >> 8 & 0x00ff00ffu, sign << 8);
        out[3] = signed_level(odd >> 8 & 0x00ff00ffu, sign);
        return;
    }
    unsigned sign = word & 0xaaaaaaaau, high = word ^ sign >> 1;  // the bit below the sign, turned where it is negative
    low ^= sign >> 1;
    const int l0 = LEVELS_LOW(BITS) & 255, l1 = LEVELS_LOW(BITS) >> 8 & 255;
    const int l2 = LEVELS_LOW(BITS) >> 16 & 255, l3 = LEVELS_LOW(BITS) >> 24;
#pragma unroll
    for (int f = 0; f < 4; f++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int down = 8 * i + 2 * f;
            unsigned a = high >> down & 0x00010001u, size;
            if (BITS == 2) {
                size = a * (unsigned)(l1 - l0) + (unsigned)l0 * 0x00010001u;
            } else {  // the levels as a polynomial of two bits
                unsigned b = low >> down & 0x00010001u;
                size = a * (unsigned)(l2 - l0) + b * (unsigned)(l1 - l0) + (a & b) * (unsigned)(l3 - l2 - l1 + l0);
                size += (unsigned)l0 * 0x00010001u;
            }
            out[2 * f + i] = signed_level(size, sign << (14 - down));
        }
    }
}

__device__ __forceinline__ void unpack_float8(unsigned word, unsigned (&out)[2]) {
    out[0] = bits_of(halves_of_e4m3((unsigned short)__byte_perm(word, 0, 0x4420)));
    out[1] = bits_of(halves_of_e4m3((unsigned short)__byte_perm(word, 0, 0x4431)));
}

// A word of codes of `CODEC` to pairs; `low` has the low plane's bits where the high plane's fields stand.
template <int CODEC>
__device__ __forceinline__ void unpack(unsigned word, unsigned low, unsigned (&out)[PAIRS(CODEC % 10)]) {
    if constexpr (CODEC / 10 == FP8) {
        unpack_float8(word, out);
    } else if constexpr (CODEC / 10 == TURBO) {
        unpack_levels<CODEC % 10>(word, low, out);
    } else {
        unpack_uniform<CODEC % 10>(word, low, out);
    }
}

// COUNT words, 4, 2 or 1 of them at once as VECTOR says.
template <int COUNT, int VECTOR>
__device__ __forceinline__ void load_words(const unsigned char* from, unsigned (&words)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i += VECTOR) {
        if constexpr (VECTOR == 4) {
            uint4 x = __ldg((const uint4*)from + i / 4);
            words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
        } else if constexpr (VECTOR == 2) {
            uint2 x = __ldg((const uint2*)from + i / 2);
            words[i] = x.x, words[i + 1] = x.y;
        } else {
            words[i] = __ldg((const unsigned*)from + i);
        }
    }
}

// x as the sum of two halves, for two numbers at once.
__device__ __forceinline__ void split_pair(float x, float y, unsigned* high, unsigned* low) {
    __half2 top = __floats2half2_rn(x, y);
    *high = bits_of(top);
    *low = bits_of(__floats2half2_rn(x - __low2float(top), y - __high2float(top)));
}

__device__ __forceinline__ float bfloat_low(unsigned pair) { return __int_as_float((int)(pair << 16)); }
__device__ __forceinline__ float bfloat_high(unsigned pair) { return __int_as_float((int)(pair & 0xffff0000u)); }
