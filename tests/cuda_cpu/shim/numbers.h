// fp16, bf16 and e4m3. Operations are done in float and rounded, which is right for +, -, * and / of both 16-bit
// formats (a float has more than twice their bits); fused ones are done in double.
#pragma once
#include "language.h"

namespace kvc {

// Round `x` to a format with `mantissa` stored bits and exponents from `lowest` (of the subnormals' place) on.
inline double rounded(double x, int mantissa, int lowest) {
    if (x == 0 || !(fabs(x) < HUGE_VAL)) return x;
    int exponent;
    frexp(x, &exponent);  // x = m * 2^exponent, 0.5 <= |m| < 1
    int unit = (exponent - 1 < lowest ? lowest : exponent - 1) - mantissa;
    return ldexp(nearbyint(ldexp(x, -unit)), unit);
}

inline unsigned short half_bits(float x) { return kvc_bits<unsigned short>(static_cast<_Float16>(x)); }
inline unsigned short half_bits(double x) { return kvc_bits<unsigned short>(static_cast<_Float16>(x)); }
inline float half_value(unsigned short bits) { return static_cast<float>(kvc_bits<_Float16>(bits)); }

inline unsigned short bfloat_bits(float x) {
    unsigned bits = kvc_bits<unsigned>(x);
    if (x != x) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
// Through a float that is rounded to odd, so that the second rounding sees what the first one cut off.
inline unsigned short bfloat_bits(double x) {
    float value = static_cast<float>(x);
    if (fabs(static_cast<double>(value)) > fabs(x)) value = nextafterf(value, 0.0f);
    unsigned odd = value == x || x != x ? 0u : 1u;
    return bfloat_bits(kvc_bits<float>(kvc_bits<unsigned>(value) | odd));
}
inline float bfloat_value(unsigned short bits) { return kvc_bits<float>(static_cast<unsigned>(bits) << 16); }

// e4m3 without infinities: 448 is the largest number (results saturate), 0x7f is NaN.
inline unsigned char e4m3_bits(float x) {
    unsigned char sign = kvc_bits<unsigned>(x) >> 31 << 7;
    if (x != x) return sign | 0x7f;
    double size = rounded(fabs(static_cast<double>(x)), 3, -6);
    if (size >= 448) return sign | 0x7e;
    if (size < 0.015625) return static_cast<unsigned char>(sign | static_cast<int>(size * 512));
    int exponent;
    double fraction = frexp(size, &exponent) * 16 - 8;
    return static_cast<unsigned char>(sign | (exponent + 6) << 3 | static_cast<int>(fraction));
}
inline float e4m3_value(unsigned char bits) {
    int exponent = bits >> 3 & 15, fraction = bits & 7;
    if ((bits & 0x7f) == 0x7f) return kvc_bits<float>(0x7fffffffu);
    float size = exponent ? ldexpf(8.0f + fraction, exponent - 10) : ldexpf(fraction, -9);
    return bits & 0x80 ? -size : size;
}

}  // namespace kvc

#define KVC_NUMBER(type, raw, pair, to_bits, to_value)                                                   \
    struct raw { unsigned short x; };                                                                    \
    struct alignas(2) type {                                                                             \
        unsigned short bits;                                                                             \
        type() = default;                                                                                \
        type(float value) : bits(kvc::to_bits(value)) {}                                                 \
        type(raw value) : bits(value.x) {}                                                               \
        operator float() const { return kvc::to_value(bits); }                                           \
        operator raw() const { return {bits}; }                                                          \
    };                                                                                                   \
    struct alignas(4) pair {                                                                             \
        type x, y;                                                                                       \
        pair() = default;                                                                                \
        pair(type a, type b) : x(a), y(b) {}                                                             \
    };                                                                                                   \
    inline type __hadd(type a, type b) { return type(float(a) + float(b)); }                             \
    inline type __hsub(type a, type b) { return type(float(a) - float(b)); }                             \
    inline type __hmul(type a, type b) { return type(float(a) * float(b)); }                             \
    inline type __hdiv(type a, type b) { return type(float(a) / float(b)); }                             \
    inline type operator+(type a, type b) { return __hadd(a, b); }                                       \
    inline type operator-(type a, type b) { return __hsub(a, b); }                                       \
    inline type operator*(type a, type b) { return __hmul(a, b); }                                       \
    inline type operator/(type a, type b) { return __hdiv(a, b); }                                       \
    inline type __hneg(type a) { return type(-float(a)); }                                               \
    inline type __habs(type a) { return type(fabsf(a)); }                                                \
    inline type __hmax(type a, type b) { return type(fmaxf(a, b)); }                                     \
    inline type __hmin(type a, type b) { return type(fminf(a, b)); }                                     \
    inline type __hfma(type a, type b, type c) {                                                         \
        type result;                                                                                     \
        result.bits = kvc::to_bits(double(float(a)) * double(float(b)) + double(float(c)));              \
        return result;                                                                                   \
    }                                                                                                    \
    inline pair __hadd2(pair a, pair b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }                 \
    inline pair __hsub2(pair a, pair b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }                 \
    inline pair __hmul2(pair a, pair b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }                 \
    inline pair __hmax2(pair a, pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                 \
    inline pair __hmin2(pair a, pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                 \
    inline pair __habs2(pair a) { return {__habs(a.x), __habs(a.y)}; }                                   \
    inline pair __hneg2(pair a) { return {__hneg(a.x), __hneg(a.y)}; }                                   \
    inline pair __hfma2(pair a, pair b, pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

KVC_NUMBER(__half, __half_raw, __half2, half_bits, half_value)
KVC_NUMBER(__nv_bfloat16, __nv_bfloat16_raw, __nv_bfloat162, bfloat_bits, bfloat_value)
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline float __low2float(__half2 x) { return x.x; }
inline float __high2float(__half2 x) { return x.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return __half(__half_raw{x}); }

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__nv_bfloat16(x.x), __nv_bfloat16(x.y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 x) { return x.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 x) { return x.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16(__nv_bfloat16_raw{x}); }
