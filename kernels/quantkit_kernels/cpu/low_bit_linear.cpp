// Products of few or many rows of activations with a weight of up to 4 or of 8 bits in groups of columns, in two ways:
//
// - `int8`: activations are rounded to 8 bits with one scale for each run of columns and multiplied as integers, which is exact; runs are scaled and
//   added in float32, first to last.
// - `exact`: codes become float32 weights, (code - zero) * scale, and are multiplied and added in float32 in an order that is the same for every row.
//
// Either way a row's result is the same to the bit whatever other rows there are. Weights lie in tiles of 16 rows: for each block of 32 columns, 64
// bytes at a time hold 4 columns of 16 rows, row by row. In 4 bits a byte's low half is a column j of the block's first 16, its high half column
// j + 16.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { ROWS = 16, BLOCK = 32, TILES_AT_ONCE = 8 };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };

struct Call {
    const float *x;        // [m, k]
    float *y;              // [m, n]
    const uint8_t *codes;  // [tiles, k / 32, 256 or 512]
    const void *scales;    // [tiles, groups, 16]
    const uint8_t *zeros;  // [tiles, groups, 16], or NULL where every zero point is `middle`
    int64_t m, n, k, group, run;  // run: columns of one activation scale, a multiple of 32 that divides the group
    int32_t bits, middle, type, exact;
};

// ---- 16 floats, one for each row of a tile

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int8_t signed_bytes __attribute__((vector_size(16)));

static const float HALFWAY = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number

static inline floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline floats half_floats(const uint16_t *from) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
    floats value;
    __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + 1))};
    memcpy(&value, parts, sizeof value);
    return value;
#else
    floats value;
    for (int r = 0; r < ROWS; r++) {
        uint32_t h = from[r], sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
        if (exponent == 0) {
            float small = (float)mantissa * 5.9604644775390625e-8f;
            memcpy(&bits, &small, 4);
            bits |= sign;
        } else {
            bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
        }
        float one;
        memcpy(&one, &bits, 4);
        value[r] = one;
    }
    return value;
#endif
}

static inline floats load_scales(const Call &c, int64_t at) {
    if (c.type == FLOAT32) return load((const float *)c.scales + at * ROWS);
    const uint16_t *from = (const uint16_t *)c.scales + at * ROWS;
    if (c.type == FLOAT16) return half_floats(from);
    shorts narrow;
    memcpy(&narrow, from, sizeof narrow);
    return (floats)(__builtin_convertvector(narrow, ints) << 16);
}

static inline ints load_zeros(const Call &c, int64_t at) {
    if (!c.zeros) return ints{} + c.middle;
    bytes narrow;
    memcpy(&narrow, c.zeros + at * ROWS, sizeof narrow);
    return __builtin_convertvector(narrow, ints);
}

static inline void store(const Call &c, int64_t m, int64_t tile, floats value) {
    float *to = c.y + m * c.n + tile * ROWS;
    int64_t rest = c.n - tile * ROWS;
    memcpy(to, &value, (rest < ROWS ? rest : ROWS) * sizeof(float));
}

// ---- activations of 8 bits, in bands of up to MOST rows

#if defined(__AVX512VNNI__)
enum { MOST = 6, MOST_EXACT = 4, TILES = 2, SIGNED_8 = 0 };  // rows of activations and tiles of weights at once; what `sum_run` takes off each code of 8 bits
#elif defined(__AVX2__)
enum { MOST = 4, MOST_EXACT = 2, TILES = 1, SIGNED_8 = 128 };
#else
enum { MOST = 4, MOST_EXACT = 2, TILES = 1, SIGNED_8 = 0 };
#endif

// Rows first .. first + count - 1, as even as can be.
struct Band {
    int64_t first, count;
};

static inline Band band(int64_t m, int64_t bands, int64_t index) {
    int64_t each = m / bands, more = m % bands;
    return {index * each + (index < more ? index : more), each + (index < more)};
}

// Of each band, T rows: 4 columns of one, 4 of the next, and so on; scales and sums likewise.
struct Rounded {
    int8_t *codes;   // [bands, k / 4, T, 4]
    float *scale;    // [bands, k / run, T]
    int32_t *sum;    // [bands, k / run, T], of the codes; times the zero point where that is the same everywhere. What it takes off a sum of products
};

static void round_band(const Call &c, const Rounded &r, Band rows) {
    const int64_t runs = c.k / c.run, T = rows.count;
    for (int64_t t = 0; t < T; t++) {
        const float *x = c.x + (rows.first + t) * c.k;
        int8_t *to = r.codes + rows.first * c.k + t * 4;
        for (int64_t i = 0; i < runs; i++, x += c.run) {
            floats most = {}, nothing = {};  // which is no number where a value is none, or infinite: then the row's results are none either
            for (int64_t j = 0; j < c.run; j += ROWS) {
                floats value = load(x + j), size = value < 0 ? -value : value;
                most = size > most ? size : most;
                nothing += value * 0.0f;
            }
            float largest = 0, none = 0;
            for (int lane = 0; lane < ROWS; lane++) {
                largest = most[lane] > largest ? most[lane] : largest;
                none += nothing[lane];
            }
            const float scale = largest / 127.0f + none, inverse = largest > 0 ? 127.0f / largest : 0.0f;
            ints sums = {};
            for (int64_t j = 0; j < c.run; j += ROWS) {
                ints codes = __builtin_convertvector(load(x + j) * inverse + HALFWAY - HALFWAY, ints);
                signed_bytes narrow = __builtin_convertvector(codes, signed_bytes);
                sums += codes;
                for (int q = 0; q < 4; q++, to += 4 * T) memcpy(to, (int8_t *)&narrow + 4 * q, 4);
            }
            int32_t sum = 0;
            for (int lane = 0; lane < ROWS; lane++) sum += sums[lane];
            r.scale[rows.first * runs + i * T + t] = scale;
            r.sum[rows.first * runs + i * T + t] = c.zeros ? sum : sum * (c.middle - (c.bits == 8 ? SIGNED_8 : 0));
        }
    }
}

// ---- sums of integer products over one run of columns, for P tiles of weights, `apart` bytes from one to the next, and T rows of activations

static inline int32_t four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return word;
}

#if defined(__AVX512VNNI__)

template <int P, int T, int BITS>
static inline void sum_run(ints (*sums)[T], const uint8_t *w, int64_t apart, const int8_t *x, int64_t columns) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i acc[P][T];
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) acc[p][t] = (__m512i)sums[p][t];
    for (int64_t b = 0; b < columns; b += BLOCK, x += BLOCK * T)
        for (int j = 0; j < (BITS == 4 ? 4 : 8); j++, w += 64) {
            __m512i first[P], second[P];
            for (int p = 0; p < P; p++) {
                __m512i codes = _mm512_loadu_si512(w + p * apart);
                first[p] = BITS == 4 ? _mm512_and_si512(codes, low) : codes;
                second[p] = BITS == 4 ? _mm512_and_si512(_mm512_srli_epi16(codes, 4), low) : codes;
            }
            for (int t = 0; t < T; t++) {
                const __m512i columns_of_first = _mm512_set1_epi32(four(x + (j * T + t) * 4));
                for (int p = 0; p < P; p++) acc[p][t] = _mm512_dpbusd_epi32(acc[p][t], first[p], columns_of_first);
            }
            if (BITS == 4)
                for (int t = 0; t < T; t++) {
                    const __m512i columns_of_second = _mm512_set1_epi32(four(x + ((j + 4) * T + t) * 4));
                    for (int p = 0; p < P; p++) acc[p][t] = _mm512_dpbusd_epi32(acc[p][t], second[p], columns_of_second);
                }
        }
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) sums[p][t] = (ints)acc[p][t];
}

#elif defined(__AVX2__)

template <int P, int T, int BITS>
static inline void sum_run(ints (*sums)[T], const uint8_t *w, int64_t, const int8_t *x, int64_t columns) {
    static_assert(P == 1, "16 registers hold no more");
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8((char)128);
    for (int half = 0; half < 2; half++) {  // 8 rows at a time
        const uint8_t *from = w + 32 * half;
        const int8_t *block = x;
        __m256i acc[T];
        for (int t = 0; t < T; t++) memcpy(&acc[t], (char *)&sums[0][t] + 32 * half, 32);
        for (int64_t b = 0; b < columns; b += BLOCK, block += BLOCK * T)
            if (BITS == 4) {
                __m256i pairs[T];  // 8 products of at most 15 * 128, twice: 16 bits hold them
                for (int t = 0; t < T; t++) pairs[t] = _mm256_setzero_si256();
                for (int j = 0; j < 4; j++, from += 64) {
                    __m256i both = _mm256_loadu_si256((const __m256i *)from), first = _mm256_and_si256(both, low);
                    __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                    for (int t = 0; t < T; t++) {
                        __m256i one = _mm256_set1_epi32(four(block + (j * T + t) * 4)), other = _mm256_set1_epi32(four(block + ((j + 4) * T + t) * 4));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(first, one));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(second, other));
                    }
                }
                for (int t = 0; t < T; t++) acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(pairs[t], ones));
            } else {
                for (int j = 0; j < 8; j++, from += 64) {
                    __m256i codes = _mm256_loadu_si256((const __m256i *)from);
                    __m256i is_signed = _mm256_xor_si256(codes, flip), size = _mm256_abs_epi8(is_signed);
                    for (int t = 0; t < T; t++) {  // of code - 128, pairs of whose products 16 bits hold; the 128 is made up for in the zero point
                        __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(four(block + (j * T + t) * 4)), is_signed);
                        acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(_mm256_maddubs_epi16(size, signs), ones));
                    }
                }
            }
        for (int t = 0; t < T; t++) memcpy((char *)&sums[0][t] + 32 * half, &acc[t], 32);
    }
}

#else

template <int P, int T, int BITS>
static inline void sum_run(ints (*sums)[T], const uint8_t *w, int64_t, const int8_t *x, int64_t columns) {
    static_assert(P == 1, "one tile");
    for (int64_t b = 0; b < columns; b += BLOCK, w += BITS == 4 ? 256 : 512, x += BLOCK * T)
        for (int t = 0; t < T; t++)
            for (int j = 0; j < BLOCK; j++)
                for (int r = 0; r < ROWS; r++) {
                    int code = BITS == 4 ? (w[(j % 16) / 4 * 64 + r * 4 + j % 4] >> (j < 16 ? 0 : 4)) & 15 : w[j / 4 * 64 + r * 4 + j % 4];
                    sums[0][t][r] += code * x[(j / 4 * T + t) * 4 + j % 4];
                }
}

#endif

template <int P, int T, int BITS> static void tiles_int8(const Call &c, const Rounded &r, int64_t m, int64_t tile) {
    const int64_t groups = c.k / c.group, runs = c.k / c.run, bytes_of_run = c.run * ROWS * BITS / 8, bytes_of_tile = runs * bytes_of_run;
    const uint8_t *w = c.codes + tile * bytes_of_tile;
    const int8_t *x = r.codes + m * c.k;
    const float *x_scale = r.scale + m * runs;
    const int32_t *x_sum = r.sum + m * runs;
    floats total[P][T];
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) total[p][t] = floats{};
    for (int64_t g = 0; g < groups; g++) {
        floats scale[P];
        ints zero[P];
        for (int p = 0; p < P; p++) {
            scale[p] = load_scales(c, (tile + p) * groups + g);
            if (c.zeros) zero[p] = load_zeros(c, (tile + p) * groups + g) - (BITS == 8 ? SIGNED_8 : 0);
        }
        for (int64_t i = 0; i < c.group / c.run; i++, w += bytes_of_run, x += c.run * T, x_scale += T, x_sum += T) {
            ints sums[P][T];
            for (int p = 0; p < P; p++)
                for (int t = 0; t < T; t++) sums[p][t] = c.zeros ? zero[p] * -x_sum[t] : ints{} - x_sum[t];
            sum_run<P, T, BITS>(sums, w, bytes_of_tile, x, c.run);
            for (int p = 0; p < P; p++)
                for (int t = 0; t < T; t++) total[p][t] += __builtin_convertvector(sums[p][t], floats) * (scale[p] * x_scale[t]);
        }
    }
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) store(c, m + t, tile + p, total[p][t]);
}

// ---- float32

// Sums of 4 times at most 32 products each, then of runs: the fewer a sum has, the less is lost to rounding.
template <int T, int BITS> static void tile_exact(const Call &c, int64_t m, int64_t tile) {
    const int64_t groups = c.k / c.group;
    const uint8_t *w = c.codes + tile * (c.k * ROWS * BITS / 8);
    const float *x = c.x + m * c.k;
    floats total[T];
    for (int t = 0; t < T; t++) total[t] = floats{};
    for (int64_t g = 0; g < groups; g++) {
        const floats scale = load_scales(c, tile * groups + g);
        const ints zero = load_zeros(c, tile * groups + g);
        for (int64_t i = 0; i < c.group / c.run; i++) {
            floats part[T][4];
            for (int t = 0; t < T; t++)
                for (int q = 0; q < 4; q++) part[t][q] = floats{};
            for (int64_t b = 0; b < c.run; b += BLOCK, x += BLOCK)
                for (int j = 0; j < (BITS == 4 ? 4 : 8); j++, w += 64) {
                    ints four_columns;
                    memcpy(&four_columns, w, sizeof four_columns);
                    for (int q = 0; q < 4; q++)
                        for (int half = 0; half < (BITS == 4 ? 2 : 1); half++) {
                            const ints code = (four_columns >> (8 * q + 4 * half)) & (BITS == 4 ? 15 : 255);
                            const floats weight = __builtin_convertvector(code - zero, floats) * scale;
                            for (int t = 0; t < T; t++) part[t][q] += weight * x[t * c.k + 4 * j + 16 * half + q];
                        }
                }
            for (int t = 0; t < T; t++) total[t] += (part[t][0] + part[t][1]) + (part[t][2] + part[t][3]);
        }
    }
    for (int t = 0; t < T; t++) store(c, m + t, tile, total[t]);
}

// ---- all rows of activations by some tiles

template <int T, int BITS> static void by_tiles(const Call &c, const Rounded &r, int64_t m, int64_t first, int64_t last) {
    const int AT_ONCE = T == 1 ? 1 : TILES;  // memory is read in one stream where it is all that counts
    for (int64_t tile = first; tile < last;) {
        if (c.exact) {
            tile_exact<T, BITS>(c, m, tile++);
        } else if (tile + AT_ONCE <= last) {
            tiles_int8<AT_ONCE, T, BITS>(c, r, m, tile);
            tile += AT_ONCE;
        } else {
            tiles_int8<1, T, BITS>(c, r, m, tile++);
        }
    }
}

template <int T> static void multiply(const Call &c, const Rounded &r, Band rows, int64_t first, int64_t last) {
    if (T < MOST && rows.count > T) return multiply<(T < MOST ? T + 1 : T)>(c, r, rows, first, last);
    return c.bits == 4 ? by_tiles<T, 4>(c, r, rows.first, first, last) : by_tiles<T, 8>(c, r, rows.first, first, last);
}

extern "C" int low_bit_linear(const Call *call) {
    const Call &c = *call;
    Rounded r = {};
    const int64_t runs = c.k / c.run, tiles = (c.n + ROWS - 1) / ROWS, most = c.exact ? MOST_EXACT : MOST, bands = (c.m + most - 1) / most;
    if (!c.exact) {
        r.scale = (float *)malloc(c.m * (runs * 8 + c.k));
        if (!r.scale) return 1;
        r.sum = (int32_t *)(r.scale + c.m * runs);
        r.codes = (int8_t *)(r.sum + c.m * runs);
#pragma omp parallel for schedule(static) if (bands > 1)
        for (int64_t b = 0; b < bands; b++) round_band(c, r, band(c.m, bands, b));
    }
    const int64_t parts = (tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t first = p * TILES_AT_ONCE, last = first + TILES_AT_ONCE < tiles ? first + TILES_AT_ONCE : tiles;
        for (int64_t b = 0; b < bands; b++) multiply<1>(c, r, band(c.m, bands, b), first, last);
    }
    free(r.scale);
    return 0;
}
