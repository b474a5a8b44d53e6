/* Products with packed codes on the CPU: each code is unpacked in registers and first-level cache and never written out.
 *
 *   key_dot    out[n][m][u * tokens + t] = sum_d x[n][u][m][d] * number(code[n][u * tokens + t][d])
 *   value_dot  out[n][m][d]              = sum_t p[n][g(d)][m][t] * number(code[n][d][t])
 *   paged_value_dot                        the same, each page's sum times a scale of the page and channel
 *
 * Layout of the codes (ops/packing.py): in a plane of b bits, byte j of a group of `group` elements holds the elements
 * j, j + group / (8 / b), ... ; 3 bits are a 2-bit plane of the high bits and a 1-bit plane of the low bit. A group is a
 * token's channels (keys) or a page's tokens (values). `table` has the number of every code; 8 bits are int8 + offset,
 * and E4M3 stands for 8-bit floats, whose table has 256 numbers.
 * The torch code beside it in ops/native.py is the reference.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { TOKENS = 256, ROWS = 4, E4M3 = 9 };

typedef struct {
    int nbits;
    long group;          /* elements that were packed together, a multiple of 8 */
    const float *table;  /* 2^nbits numbers, padded to 16; unused for 8 bits */
    float offset;        /* of 8-bit codes */
} Format;

#define EVERY_BYTE(pattern) (0x0101010101010101ull * (pattern))

static uint64_t read8(const uint8_t *from) { uint64_t word; memcpy(&word, from, 8); return word; }
static void write8(uint8_t *to, uint64_t word) { memcpy(to, &word, 8); }

/* Codes of one group as bytes; eight at a time where the group allows it. */
static long plane_bits(int nbits) { return nbits == 3 ? 2 : nbits == E4M3 ? 8 : nbits; }

static void split(const Format *f, const uint8_t *high, const uint8_t *low, uint8_t *restrict codes) {
    const long n = f->group;
    if (f->nbits == 4) {
        long j = 0;
#if defined(__SSE2__)
        const __m128i mask = _mm_set1_epi8(15);
        for (; j + 16 <= n / 2; j += 16) {
            const __m128i both = _mm_loadu_si128((const __m128i *)(high + j));
            _mm_storeu_si128((__m128i *)(codes + j), _mm_and_si128(both, mask));
            _mm_storeu_si128((__m128i *)(codes + n / 2 + j), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
        }
#endif
        for (; j + 8 <= n / 2; j += 8) {
            const uint64_t word = read8(high + j);
            write8(codes + j, word & EVERY_BYTE(15));
            write8(codes + n / 2 + j, (word >> 4) & EVERY_BYTE(15));
        }
        for (; j < n / 2; j++) {
            codes[j] = high[j] & 15;
            codes[n / 2 + j] = high[j] >> 4;
        }
    } else if (f->nbits == 2 && n % 32 == 0) {
        for (long j = 0; j < n / 4; j += 8) {
            const uint64_t word = read8(high + j);
            for (int i = 0; i < 4; i++) write8(codes + i * (n / 4) + j, (word >> (2 * i)) & EVERY_BYTE(3));
        }
    } else if (f->nbits == 2) {
        for (int i = 0; i < 4; i++)
            for (long j = 0; j < n / 4; j++) codes[i * (n / 4) + j] = (high[j] >> (2 * i)) & 3;
    } else if (n % 64 == 0) {
        for (int h = 0; h < 2; h++)
            for (long j = 0; j < n / 8; j += 8) {
                const uint64_t top = read8(high + h * (n / 8) + j), bottom = read8(low + j) >> h;
                for (int i = 0; i < 4; i++)
                    write8(codes + i * (n / 4) + h * (n / 8) + j,
                           ((top >> (2 * i)) & EVERY_BYTE(3)) << 1 | ((bottom >> (2 * i)) & EVERY_BYTE(1)));
            }
    } else if (n == 32) {
        uint32_t four;
        memcpy(&four, low, 4);
        /* bytes 0-3: the bits of even runs, bytes 4-7: of odd ones; what leaks from byte to byte is masked away */
        const uint64_t top = read8(high), bottom = four | (uint64_t)(four >> 1) << 32;
        for (int i = 0; i < 4; i++)
            write8(codes + 8 * i, ((top >> (2 * i)) & EVERY_BYTE(3)) << 1 | ((bottom >> (2 * i)) & EVERY_BYTE(1)));
    } else {
        for (int i = 0; i < 4; i++)
            for (int h = 0; h < 2; h++)
                for (long j = 0; j < n / 8; j++)
                    codes[i * (n / 4) + h * (n / 8) + j] =
                        ((high[h * (n / 8) + j] >> (2 * i)) & 3) << 1 | ((low[j] >> (2 * i + h)) & 1);
    }
}

/* Codes of `groups` groups that lie one after the other in both planes; 8-bit codes are used where they are. */
static const uint8_t *codes_of(const Format *f, const uint8_t *high, const uint8_t *low, long groups, uint8_t *codes) {
    if (f->nbits >= 8) return high;
    const long high_bytes = f->group * plane_bits(f->nbits) / 8, low_bytes = f->nbits == 3 ? f->group / 8 : 0;
    for (long g = 0; g < groups; g++)
        split(f, high + g * high_bytes, low + g * low_bytes, codes + g * f->group);
    return codes;
}

static float number(const Format *f, uint8_t code) {
    return f->nbits == 8 ? (float)(int8_t)code + f->offset : f->table[code];
}

#if defined(__AVX512F__)
static inline __m512 numbers16(const Format *f, __m512 table, const uint8_t *codes) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
    if (f->nbits == E4M3) { /* the fields of a float16 once shifted; the exponents' biases differ by 8 */
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
        const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16((short)~0x4000));
        return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    }
    if (f->nbits == 8)
        return _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_set1_ps(f->offset));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytes), table);
}

/* The sums of four vectors. */
static inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)),
                                     _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps(b, 1)));
    const __m256 cd = _mm256_hadd_ps(_mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1)),
                                     _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps(d, 1)));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* As dots, for up to ROWS rows; every call has a constant number of them, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void few_dots(const Format *f, __m512 table, const float *x, int rows,
                                                           const uint8_t *const codes[2], long n, float *out,
                                                           long row_step, long code_step) {
    __m512 sum[2][ROWS];
    for (int k = 0; k < 2; k++)
        for (int r = 0; r < ROWS; r++) sum[k][r] = _mm512_setzero_ps();
    for (long j = 0; j < n; j += 16) {
        const __m512 first = numbers16(f, table, codes[0] + j), second = numbers16(f, table, codes[1] + j);
        for (int r = 0; r < rows; r++) {
            const __m512 own = _mm512_loadu_ps(x + r * n + j);
            sum[0][r] = _mm512_fmadd_ps(own, first, sum[0][r]);
            sum[1][r] = _mm512_fmadd_ps(own, second, sum[1][r]);
        }
    }
    for (int k = 0; k < 2; k++) {
        float four[ROWS];
        _mm_storeu_ps(four, sums(sum[k][0], sum[k][1], sum[k][2], sum[k][3]));
        for (int r = 0; r < rows; r++) out[r * row_step + k * code_step] = four[r];
    }
}
#endif

/* out[i * row_step + k * code_step] = x[i * n ..] . numbers of codes k, for `rows` rows of x and two vectors of codes. */
static void dots(const Format *f, const float *x, long rows, const uint8_t *const codes[2], long n, float *out,
                 long row_step, long code_step) {
    long i = 0;
#if defined(__AVX512F__)
    const __m512 table = f->nbits >= 8 ? _mm512_setzero_ps() : _mm512_loadu_ps(f->table);
    for (; n % 16 == 0 && i < rows; i += ROWS) {
        float *to = out + i * row_step;
        const float *from = x + i * n;
        if (rows - i >= 4) few_dots(f, table, from, 4, codes, n, to, row_step, code_step);
        else if (rows - i == 3) few_dots(f, table, from, 3, codes, n, to, row_step, code_step);
        else if (rows - i == 2) few_dots(f, table, from, 2, codes, n, to, row_step, code_step);
        else few_dots(f, table, from, 1, codes, n, to, row_step, code_step);
    }
#endif
    for (; i < rows; i++)
        for (int k = 0; k < 2; k++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < n; j++) sum += x[i * n + j] * number(f, codes[k][j]);
            out[i * row_step + k * code_step] = sum;
        }
}

/* high, low: [n][units * tokens][group * bits / 8]; x [n][units][rows][group]; out [n][rows][units * tokens] */
void key_dot(const uint8_t *high, const uint8_t *low, const Format *f, const float *x, float *out, long n, long units,
             long tokens, long rows, int threads) {
    const long group = f->group, all = units * tokens;
    const long high_bytes = group * plane_bits(f->nbits) / 8, low_bytes = f->nbits == 3 ? group / 8 : 0;
    const long blocks = (all + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < n * blocks; task++) {
        const long i = task / blocks, first = task % blocks * TOKENS;
        const long last = first + TOKENS < all ? first + TOKENS : all;
        uint8_t *room = malloc(2 * group);
        for (long t = first; t < last; t += 2) {
            const long odd = t + 1 < last && (t + 1) / tokens == t / tokens; /* else the one token twice */
            const uint8_t *codes[2];
            for (int k = 0; k < 2; k++) {
                const long at = i * all + t + k * odd;
                codes[k] = codes_of(f, high + at * high_bytes, low + at * low_bytes, 1, room + k * group);
            }
            dots(f, x + (i * units + t / tokens) * rows * group, rows, codes, group, out + i * rows * all + t, all, odd);
            if (!odd) t--;
        }
        free(room);
    }
}

/* high, low: [n][channels][tokens * bits / 8]; p [n][parts][rows][tokens]; out [n][rows][channels] */
void value_dot(const uint8_t *high, const uint8_t *low, const Format *f, const float *p, float *out, long n, long parts,
               long tokens, long channels, long rows, int threads) {
    const long high_bytes = tokens * plane_bits(f->nbits) / 8, low_bytes = f->nbits == 3 ? tokens / 8 : 0;
    const long pairs = (channels / parts + 1) / 2; /* two channels of one part read the same p */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < n * parts * pairs; task++) {
        const long i = task / (parts * pairs), part = task / pairs % parts, inside = task % pairs * 2;
        const long d = part * (channels / parts) + inside, odd = inside + 1 < channels / parts;
        uint8_t *room = malloc(2 * tokens);
        const uint8_t *codes[2];
        for (int k = 0; k < 2; k++) {
            const long at = i * channels + d + k * odd;
            codes[k] = codes_of(f, high + at * high_bytes, low + at * low_bytes, tokens / f->group, room + k * tokens);
        }
        dots(f, p + (i * parts + part) * rows * tokens, rows, codes, tokens, out + i * rows * channels + d, channels, odd);
        free(room);
    }
}

/* Codes of channels with bits of their own, as numbers in bfloat16, out [tokens][channels]: codes [bytes][row], of which
 * `tokens` are read; the code of channel c is the sum of two parts (byte, shift, mask, lift), its number
 * levels[c][code]. */
void channel_numbers(const uint8_t *codes, const int32_t *parts, const uint16_t *levels, uint16_t *out, long row,
                     long tokens, long channels, long most, int threads) {
    enum { TILE = 64 };
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < tokens; first += TILE) {
        const long here = first + TILE < tokens ? TILE : tokens - first;
        uint8_t *room = malloc(channels * TILE);
        for (long c = 0; c < channels; c++) {
            const int32_t *p = parts + 8 * c;
            const uint8_t *a = codes + p[0] * row + first, *b = codes + p[4] * row + first;
            for (long t = 0; t < here; t++)
                room[c * TILE + t] = (uint8_t)(((a[t] >> p[1]) & p[2]) << p[3] | ((b[t] >> p[5]) & p[6]) << p[7]);
        }
        for (long t = 0; t < here; t++)
            for (long c = 0; c < channels; c++)
                out[(first + t) * channels + c] = levels[c * most + room[c * TILE + t]];
        free(room);
    }
}

/* As value_dot, each page's sum times its channel's scale: p [n][pages][rows][group], scale [n][pages][channels]. */
void paged_value_dot(const uint8_t *high, const uint8_t *low, const Format *f, const float *p, const float *scale,
                     float *out, long n, long pages, long channels, long rows, int threads) {
    const long page = f->group, pairs = (channels + 1) / 2;
    const long high_bytes = page * plane_bits(f->nbits) / 8, low_bytes = f->nbits == 3 ? page / 8 : 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < n * pairs; task++) {
        const long i = task / pairs, d = task % pairs * 2, odd = d + 1 < channels;
        uint8_t *room = malloc(2 * page);
        float *part = malloc(2 * rows * sizeof(float)), *sum = calloc(2 * rows, sizeof(float));
        for (long g = 0; g < pages; g++) {
            const uint8_t *codes[2];
            for (int k = 0; k < 2; k++) {
                const long at = (i * channels + d + k * odd) * pages + g;
                codes[k] = codes_of(f, high + at * high_bytes, low + at * low_bytes, 1, room + k * page);
            }
            dots(f, p + (i * pages + g) * rows * page, rows, codes, page, part, 1, rows);
            const float *own = scale + (i * pages + g) * channels + d;
            for (long r = 0; r < rows; r++) {
                sum[r] += own[0] * part[r];
                sum[rows + r] += own[odd] * part[rows + r];
            }
        }
        for (long r = 0; r < rows; r++)
            for (int k = 0; k <= odd; k++) out[(i * rows + r) * channels + d + k] = sum[k * rows + r];
        free(room);
        free(part);
        free(sum);
    }
}
