// Products of few or many rows of activations with a weight of up to 4 or of 8 bits in groups of columns, in two ways:
//
// - `int8`: activations are rounded to 8 bits with one scale for each run of columns and multiplied as integers, which is exact; sums are scaled and
//   added in float32, first to last. 4-bit codes of a table stand for its levels rounded to 8 bits.
// - `exact`: codes become float32 weights, level * scale, and are multiplied and added in float32 in an order that is the same for every row. The
//   level of an integer is code - zero.
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

enum { ROWS = 16, BLOCK = 32, MOST_STRETCH = 128, MOST_DECODED = 192, TILES_AT_ONCE = 8 };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };
enum Kind { INT4, INT8, TABLE4, E4M3 };  // integers of up to 4 or 8 bits, 4-bit codes of 16 levels, 8-bit floats

static constexpr int bits_of(Kind kind) { return kind == INT4 || kind == TABLE4 ? 4 : 8; }

struct Call {
    const float *x;        // [m, k]
    float *y;              // [m, n]
    const uint8_t *codes;  // [tiles, k / 32, 256 or 512]
    const void *scales;    // [tiles, groups, 16]
    const uint8_t *zeros;  // [tiles, groups, 16], or NULL where every zero point is `middle`
    const float *levels;   // [16] of a table
    const uint8_t *whole;  // [16], the levels of a table as integers of 8 bits and 128 more, whose scale is `unit` times as large
    // Columns of a scale of weights, 16 or a multiple of 32; of one sum of products, 32, 64 or 128 that divide larger groups; and of a scale of
    // activations, as many sums.
    int64_t m, n, k, group, stretch, run;
    float unit;
    int32_t kind, middle, type, exact;
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

static inline floats from_half(shorts halves) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
    floats value;
    __m128i parts[2];
    memcpy(parts, &halves, sizeof parts);
    __m256 wide[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
    memcpy(&value, wide, sizeof value);
    return value;
#else
    floats value;
    for (int r = 0; r < ROWS; r++) {
        uint32_t h = halves[r], sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
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
    shorts narrow;
    memcpy(&narrow, (const uint16_t *)c.scales + at * ROWS, sizeof narrow);
    return c.type == FLOAT16 ? from_half(narrow) : (floats)(__builtin_convertvector(narrow, ints) << 16);
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

// MOST, MOST_EXACT: rows of activations at once; TILES: of weights. SIGNED_8: what `sum_stretch` takes off each integer of 8 bits.
#if defined(__AVX512VNNI__)
enum { MOST = 6, MOST_EXACT = 4, TILES = 2, SIGNED_8 = 0 };
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
    int32_t *less;   // [bands, k / stretch, T], the codes' sum, negative; times the zero point where that is the same everywhere: where sums begin
};

static void round_band(const Call &c, const Rounded &r, Band rows) {
    const int64_t runs = c.k / c.run, T = rows.count;
    const int32_t zero = c.zeros ? 1 : c.middle - (c.kind == INT4 ? 0 : SIGNED_8);
    for (int64_t t = 0; t < T; t++) {
        const float *x = c.x + (rows.first + t) * c.k;
        int8_t *to = r.codes + rows.first * c.k + t * 4;
        int32_t *less = r.less + rows.first * (c.k / c.stretch) + t;
        for (int64_t i = 0; i < runs; i++) {
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
            r.scale[rows.first * runs + i * T + t] = scale;
            for (const float *end = x + c.run; x < end; less += T) {
                ints sums = {};
                for (int64_t j = 0; j < c.stretch; j += ROWS, x += ROWS) {
                    ints codes = __builtin_convertvector(load(x) * inverse + HALFWAY - HALFWAY, ints);
                    signed_bytes narrow = __builtin_convertvector(codes, signed_bytes);
                    sums += codes;
                    for (int q = 0; q < 4; q++, to += 4 * T) memcpy(to, (int8_t *)&narrow + 4 * q, 4);
                }
                int32_t sum = 0;
                for (int lane = 0; lane < ROWS; lane++) sum += sums[lane];
                *less = -sum * zero;
            }
        }
    }
}

// ---- sums of integer products over one stretch of columns, for P tiles of weights, `apart` bytes from one to the next, and T rows of activations

static inline int32_t four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return word;
}

#if defined(__AVX512VNNI__)

template <int P, int T, Kind KIND>
static inline void sum_stretch(ints (*sums)[T], const uint8_t *w, int64_t apart, const int8_t *x, int64_t columns, const uint8_t *whole) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i table = KIND == TABLE4 ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)whole)) : low;
    __m512i acc[P][T];
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) acc[p][t] = (__m512i)sums[p][t];
    for (int64_t b = 0; b < columns; b += BLOCK, x += BLOCK * T)
        for (int j = 0; j < bits_of(KIND); j++, w += 64) {
            __m512i first[P], second[P];
            for (int p = 0; p < P; p++) {
                __m512i codes = _mm512_loadu_si512(w + p * apart);
                first[p] = KIND == INT8 ? codes : _mm512_and_si512(codes, low);
                second[p] = KIND == INT8 ? codes : _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
                if (KIND == TABLE4) first[p] = _mm512_shuffle_epi8(table, first[p]), second[p] = _mm512_shuffle_epi8(table, second[p]);
            }
            for (int t = 0; t < T; t++) {
                const __m512i columns_of_first = _mm512_set1_epi32(four(x + (j * T + t) * 4));
                for (int p = 0; p < P; p++) acc[p][t] = _mm512_dpbusd_epi32(acc[p][t], first[p], columns_of_first);
            }
            if (KIND != INT8)
                for (int t = 0; t < T; t++) {
                    const __m512i columns_of_second = _mm512_set1_epi32(four(x + ((j + 4) * T + t) * 4));
                    for (int p = 0; p < P; p++) acc[p][t] = _mm512_dpbusd_epi32(acc[p][t], second[p], columns_of_second);
                }
        }
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) sums[p][t] = (ints)acc[p][t];
}

#elif defined(__AVX2__)

// More by 4 products in each of 8 sums, of integers less 128, pairs of whose products 16 bits hold; the 128 is made up for in the zero point.
static inline __m256i add_four(__m256i sums, __m256i integers, int32_t four_columns) {
    const __m256i is_signed = _mm256_xor_si256(integers, _mm256_set1_epi8((char)128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(is_signed), _mm256_sign_epi8(_mm256_set1_epi32(four_columns), is_signed));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int P, int T, Kind KIND>
static inline void sum_stretch(ints (*sums)[T], const uint8_t *w, int64_t, const int8_t *x, int64_t columns, const uint8_t *whole) {
    static_assert(P == 1, "16 registers hold no more");
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i table = KIND == TABLE4 ? _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)whole)) : low;
    for (int half = 0; half < 2; half++) {  // 8 rows at a time
        const uint8_t *from = w + 32 * half;
        const int8_t *block = x;
        __m256i acc[T];
        for (int t = 0; t < T; t++) memcpy(&acc[t], (char *)&sums[0][t] + 32 * half, 32);
        for (int64_t b = 0; b < columns; b += BLOCK, block += BLOCK * T) {
            __m256i pairs[T];  // of codes of 4 bits, 8 products of at most 15 * 128, twice: 16 bits hold them
            for (int t = 0; t < T; t++) pairs[t] = _mm256_setzero_si256();
            for (int j = 0; j < bits_of(KIND); j++, from += 64) {
                const __m256i both = _mm256_loadu_si256((const __m256i *)from), first = _mm256_and_si256(both, low);
                const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                for (int t = 0; t < T; t++) {
                    const int32_t one = four(block + (j * T + t) * 4), other = KIND == INT8 ? 0 : four(block + ((j + 4) * T + t) * 4);
                    if (KIND == INT8) {
                        acc[t] = add_four(acc[t], both, one);
                    } else if (KIND == TABLE4) {
                        acc[t] = add_four(acc[t], _mm256_shuffle_epi8(table, first), one);
                        acc[t] = add_four(acc[t], _mm256_shuffle_epi8(table, second), other);
                    } else {
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(first, _mm256_set1_epi32(one)));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(second, _mm256_set1_epi32(other)));
                    }
                }
            }
            if (KIND == INT4)
                for (int t = 0; t < T; t++) acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(pairs[t], ones));
        }
        for (int t = 0; t < T; t++) memcpy((char *)&sums[0][t] + 32 * half, &acc[t], 32);
    }
}

#else

template <int P, int T, Kind KIND>
static inline void sum_stretch(ints (*sums)[T], const uint8_t *w, int64_t, const int8_t *x, int64_t columns, const uint8_t *whole) {
    static_assert(P == 1, "one tile");
    for (int64_t b = 0; b < columns; b += BLOCK, w += bits_of(KIND) * 64, x += BLOCK * T)
        for (int t = 0; t < T; t++)
            for (int j = 0; j < BLOCK; j++)
                for (int r = 0; r < ROWS; r++) {
                    int code = KIND == INT8 ? w[j / 4 * 64 + r * 4 + j % 4] : (w[(j % 16) / 4 * 64 + r * 4 + j % 4] >> (j < 16 ? 0 : 4)) & 15;
                    sums[0][t][r] += (KIND == TABLE4 ? whole[code] : code) * x[(j / 4 * T + t) * 4 + j % 4];
                }
}

#endif

template <int P, int T, Kind KIND> static void tiles_int8(const Call &c, const Rounded &r, int64_t m, int64_t tile) {
    const int64_t groups = c.k / c.group, runs = c.k / c.run, bytes_of_stretch = c.stretch * ROWS * bits_of(KIND) / 8;
    const int64_t bytes_of_tile = c.k * ROWS * bits_of(KIND) / 8;
    const uint8_t *w = c.codes + tile * bytes_of_tile;
    const int8_t *x = r.codes + m * c.k;
    const float *x_scale = r.scale + m * runs;
    const int32_t *less = r.less + m * (c.k / c.stretch);
    floats total[P][T] = {}, scale[P] = {};
    ints zero[P] = {};
    int64_t group = 0, rest = 0;  // the next group, and columns that are left of the last one
    for (int64_t i = 0; i < runs; i++, x_scale += T) {
        floats part[P][T] = {};
        for (int64_t column = 0; column < c.run; column += c.stretch, rest -= c.stretch, w += bytes_of_stretch, x += c.stretch * T, less += T) {
            if (rest == 0) {
                for (int p = 0; p < P; p++) {
                    scale[p] = load_scales(c, (tile + p) * groups + group);
                    if (KIND == TABLE4) scale[p] *= c.unit;
                    if (c.zeros) zero[p] = load_zeros(c, (tile + p) * groups + group) - (KIND == INT4 ? 0 : SIGNED_8);
                }
                group++;
                rest = c.group;
            }
            ints sums[P][T];
            for (int p = 0; p < P; p++)
                for (int t = 0; t < T; t++) sums[p][t] = c.zeros ? zero[p] * less[t] : ints{} + less[t];
            sum_stretch<P, T, KIND>(sums, w, bytes_of_tile, x, c.stretch, c.whole);
            for (int p = 0; p < P; p++)
                for (int t = 0; t < T; t++) part[p][t] += __builtin_convertvector(sums[p][t], floats) * scale[p];
        }
        for (int p = 0; p < P; p++)
            for (int t = 0; t < T; t++) total[p][t] += part[p][t] * x_scale[t];
    }
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) store(c, m + t, tile + p, total[p][t]);
}

// ---- float32

static inline floats lookup(floats table, ints codes) {
#if defined(__AVX512F__)
    return (floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)table);
#elif defined(__AVX2__)
    __m256 halves[2], found[2];
    __m256i eight[2];
    memcpy(halves, &table, sizeof table);
    memcpy(eight, &codes, sizeof codes);
    for (int i = 0; i < 2; i++) {
        const __m256 low = _mm256_permutevar8x32_ps(halves[0], eight[i]), high = _mm256_permutevar8x32_ps(halves[1], eight[i]);
        found[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(eight[i], 28)));
    }
    floats levels;
    memcpy(&levels, found, sizeof levels);
    return levels;
#else
    floats levels;
    for (int r = 0; r < ROWS; r++) levels[r] = table[codes[r]];
    return levels;
#endif
}

// 16 weights over their scale; of 8-bit floats a 256th of them, which half precision holds.
template <Kind KIND> static inline floats level_of(ints codes, ints zero, floats table) {
    if (KIND == TABLE4) return lookup(table, codes);
    if (KIND == E4M3) return from_half(__builtin_convertvector((codes & 128) << 8 | (codes & 127) << 7, shorts));
    return __builtin_convertvector(codes - zero, floats);
}

// Scales and zero points of a block's first 16 columns and of its others.
struct Halves {
    floats scale[2];
    ints zero[2];
};

template <Kind KIND> static inline Halves load_halves(const Call &c, int64_t at) {
    Halves halves;
    for (int half = 0; half < 2; half++, at += c.group < BLOCK) {
        halves.scale[half] = load_scales(c, at) * (KIND == E4M3 ? 256.0f : 1.0f);
        halves.zero[half] = KIND == INT4 || KIND == INT8 ? load_zeros(c, at) : ints{};
    }
    return halves;
}

// Calls `take` with the weights of each of the block's columns, in the order in which they are multiplied.
template <Kind KIND, typename Take> static inline void each_column(const uint8_t *w, const Halves &halves, floats table, Take take) {
    for (int j = 0; j < bits_of(KIND); j++, w += 64) {
        ints four_columns;
        memcpy(&four_columns, w, sizeof four_columns);
        for (int nibble = 0; nibble < 8 / bits_of(KIND); nibble++)
            for (int q = 0; q < 4; q++) {
                const ints codes = (four_columns >> (8 * q + 4 * nibble)) & (bits_of(KIND) == 4 ? 15 : 255);
                const int half = bits_of(KIND) == 4 ? nibble : j / 4;
                take(q, 4 * j + 16 * nibble + q, level_of<KIND>(codes, halves.zero[half], table) * halves.scale[half]);
            }
    }
}

// Sums of 4 times at most 32 products each, then of stretches: the fewer a sum has, the less is lost to rounding.
template <int T> struct Sums {
    floats part[T][4] = {};

    inline void add(int q, floats weight, const float *x, int64_t k) {
        for (int t = 0; t < T; t++) part[t][q] += weight * x[t * k];
    }
    inline floats of(int t) const { return (part[t][0] + part[t][1]) + (part[t][2] + part[t][3]); }
};

// Few rows: each weight is used as it is decoded.
template <int T, Kind KIND> static void tile_exact(const Call &c, int64_t m, int64_t tile) {
    const int64_t groups = c.k / c.group, blocks = c.stretch / BLOCK, step = c.group < BLOCK ? 2 : 1, sums_of_scale = c.group < c.stretch ? 1 : c.group / c.stretch;
    const uint8_t *w = c.codes + tile * (c.k * ROWS * bits_of(KIND) / 8);
    const float *x = c.x + m * c.k;
    const floats table = KIND == TABLE4 ? load(c.levels) : floats{};
    floats total[T] = {};
    for (int64_t g = 0; g < groups; g += step) {
        const Halves halves = load_halves<KIND>(c, tile * groups + g);
        for (int64_t i = 0; i < sums_of_scale; i++) {
            Sums<T> sums;
            for (int64_t b = 0; b < blocks; b++, x += BLOCK, w += 64 * bits_of(KIND))
                each_column<KIND>(w, halves, table, [&](int q, int column, floats weight) { sums.add(q, weight, x + column, c.k); });
            for (int t = 0; t < T; t++) total[t] += sums.of(t);
        }
    }
    for (int t = 0; t < T; t++) store(c, m + t, tile, total[t]);
}

// Many rows: the weights of a stretch are decoded once for up to MOST_DECODED of them. Of a band's activations those of a column lie together, and columns
// in the order in which weights are decoded.

#if defined(__AVX512F__)
typedef floats lanes;
enum { MOST_WIDE = 6 };  // rows whose 4 sums of `lanes` registers hold
#elif defined(__AVX2__)
typedef float lanes __attribute__((vector_size(32)));
enum { MOST_WIDE = 3 };
#else
typedef float lanes __attribute__((vector_size(16)));
enum { MOST_WIDE = 3 };
#endif

static void gather_band(const Call &c, Band rows, float *to) {
    const int nibbles = c.kind == INT4 || c.kind == TABLE4 ? 2 : 1;
    const float *x = c.x + rows.first * c.k;
    to += rows.first * c.k;
    for (const float *end = x + c.k; x < end; x += BLOCK)
        for (int j = 0; j < 8 / nibbles; j++)
            for (int nibble = 0; nibble < nibbles; nibble++)
                for (int q = 0; q < 4; q++)
                    for (int64_t t = 0; t < rows.count; t++) *to++ = x[t * c.k + 4 * j + 16 * nibble + q];
}

template <int T> static void add_stretch(const floats *weights, const float *x, int64_t columns, floats *total) {
    for (int first = 0; first < ROWS; first += sizeof(lanes) / sizeof(float)) {
        const float *w = (const float *)weights + first, *from = x;
        lanes part[T][4] = {};
        for (int64_t column = 0; column < columns; column += 4)
            for (int q = 0; q < 4; q++, w += ROWS, from += T) {
                lanes weight;
                memcpy(&weight, w, sizeof weight);
                for (int t = 0; t < T; t++) part[t][q] += weight * from[t];
            }
        for (int t = 0; t < T; t++) {
            lanes sum;
            memcpy(&sum, (float *)&total[t] + first, sizeof sum);
            sum += (part[t][0] + part[t][1]) + (part[t][2] + part[t][3]);
            memcpy((float *)&total[t] + first, &sum, sizeof sum);
        }
    }
}

template <int T> static void add_band(const floats *weights, const float *x, int64_t columns, floats *total, int64_t rows) {
    if (T < MOST_WIDE && rows > T) return add_band<(T < MOST_WIDE ? T + 1 : T)>(weights, x, columns, total, rows);
    add_stretch<T>(weights, x, columns, total);
}

// Bands first .. last - 1 of `bands`; x as `gather_band` lays it out.
template <Kind KIND> static void tile_decoded(const Call &c, const float *x, int64_t bands, int64_t first, int64_t last, int64_t tile) {
    const int64_t groups = c.k / c.group, blocks = c.stretch / BLOCK, step = c.group < BLOCK ? 2 : 1, sums_of_scale = c.group < c.stretch ? 1 : c.group / c.stretch;
    const int64_t first_row = band(c.m, bands, first).first, last_row = band(c.m, bands, last).first;
    const uint8_t *w = c.codes + tile * (c.k * ROWS * bits_of(KIND) / 8);
    const floats table = KIND == TABLE4 ? load(c.levels) : floats{};
    floats total[MOST_DECODED] = {}, weights[MOST_STRETCH];
    int64_t column = 0;
    for (int64_t g = 0; g < groups; g += step) {
        const Halves halves = load_halves<KIND>(c, tile * groups + g);
        for (int64_t i = 0; i < sums_of_scale; i++, column += c.stretch) {
            floats *to = weights;
            for (int64_t b = 0; b < blocks; b++, w += 64 * bits_of(KIND))
                each_column<KIND>(w, halves, table, [&](int, int, floats weight) { *to++ = weight; });
            for (int64_t b = first; b < last; b++) {
                const Band some = band(c.m, bands, b);
                add_band<1>(weights, x + some.first * c.k + column * some.count, c.stretch, total + some.first - first_row, some.count);
            }
        }
    }
    for (int64_t t = first_row; t < last_row; t++) store(c, t, tile, total[t - first_row]);
}

// ---- all rows of activations by some tiles

template <int T, Kind KIND> static void by_tiles(const Call &c, const Rounded &r, int64_t m, int64_t first, int64_t last) {
    const int AT_ONCE = T == 1 ? 1 : TILES;  // memory is read in one stream where it is all that counts
    int64_t tile = first;
    if constexpr (KIND != E4M3) {
        for (; !c.exact && tile + AT_ONCE <= last; tile += AT_ONCE) tiles_int8<AT_ONCE, T, KIND>(c, r, m, tile);
        for (; !c.exact && tile < last; tile++) tiles_int8<1, T, KIND>(c, r, m, tile);
    }
    for (; tile < last; tile++) tile_exact<T, KIND>(c, m, tile);
}

template <Kind KIND> static void by_decoded_tiles(const Call &c, const float *x, int64_t bands, int64_t first, int64_t last) {
    const int64_t at_once = MOST_DECODED / MOST_WIDE;
    for (int64_t tile = first; tile < last; tile++)
        for (int64_t b = 0; b < bands; b += at_once) tile_decoded<KIND>(c, x, bands, b, b + at_once < bands ? b + at_once : bands, tile);
}

static void multiply_decoded(const Call &c, const float *x, int64_t bands, int64_t first, int64_t last) {
    switch (c.kind) {
    case INT4: return by_decoded_tiles<INT4>(c, x, bands, first, last);
    case INT8: return by_decoded_tiles<INT8>(c, x, bands, first, last);
    case TABLE4: return by_decoded_tiles<TABLE4>(c, x, bands, first, last);
    default: return by_decoded_tiles<E4M3>(c, x, bands, first, last);
    }
}

template <int T> static void multiply(const Call &c, const Rounded &r, Band rows, int64_t first, int64_t last) {
    if (T < MOST && rows.count > T) return multiply<(T < MOST ? T + 1 : T)>(c, r, rows, first, last);
    switch (c.kind) {
    case INT4: return by_tiles<T, INT4>(c, r, rows.first, first, last);
    case INT8: return by_tiles<T, INT8>(c, r, rows.first, first, last);
    case TABLE4: return by_tiles<T, TABLE4>(c, r, rows.first, first, last);
    default: return by_tiles<T, E4M3>(c, r, rows.first, first, last);
    }
}

extern "C" int low_bit_linear(const Call *call) {
    const Call &c = *call;
    const bool is_decoded = c.exact && c.m > MOST_EXACT;
    const int64_t most = is_decoded ? MOST_WIDE : c.exact ? MOST_EXACT : MOST, bands = (c.m + most - 1) / most;
    const int64_t runs = c.k / c.run, stretches = c.k / c.stretch, tiles = (c.n + ROWS - 1) / ROWS, parts = (tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
    Rounded r = {};
    float *x = NULL;
    if (!c.exact || is_decoded) {
        x = (float *)malloc(c.m * (is_decoded ? c.k * 4 : (runs + stretches) * 4 + c.k));
        if (!x) return 1;
        r = {(int8_t *)(x + c.m * (runs + stretches)), x, (int32_t *)(x + c.m * runs)};
#pragma omp parallel for schedule(static) if (bands > 1)
        for (int64_t b = 0; b < bands; b++)
            if (is_decoded)
                gather_band(c, band(c.m, bands, b), x);
            else
                round_band(c, r, band(c.m, bands, b));
    }
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t first = p * TILES_AT_ONCE, last = first + TILES_AT_ONCE < tiles ? first + TILES_AT_ONCE : tiles;
        if (is_decoded)
            multiply_decoded(c, x, bands, first, last);
        else
            for (int64_t b = 0; b < bands; b++) multiply<1>(c, r, band(c.m, bands, b), first, last);
    }
    free(x);
    return 0;
}
