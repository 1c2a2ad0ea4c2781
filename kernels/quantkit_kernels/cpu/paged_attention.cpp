// Attention of query rows over keys and values in blocks, in float32 whatever the cache's type, reading every block in place.
//
// Keys lie as [block, kv_head, head_dim, block_size], so that 16 keys' scores are one vector; values as [block, kv_head, block_size, head_dim].
// What is summed for a row, and in which order, depends on that row's own keys alone: results are equal to the bit in any batch.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16x __attribute__((vector_size(64)));

enum { LANES = 16, MAX_ROWS = 16 };
enum Type { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8 };
static const float MASKED = -1e30f;
static const i16x counting = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Call {
    const float *q;            // [tokens, heads, head_dim]
    float *out;                // [tokens, heads, head_dim]
    const void *k, *v;         // [blocks, kv_heads, head_dim, block_size], [blocks, kv_heads, block_size, head_dim]
    const float *k_scale, *v_scale;  // [blocks, kv_heads, block_size] for 8-bit types
    const int32_t *tables;     // [sequences, max_blocks]
    const int32_t *sequence;   // [tokens]
    const int32_t *position;   // [tokens], the last key each one sees
    const float *sinks;        // [heads] or NULL
    int64_t tokens, heads, kv_heads, head_dim, block_size, max_blocks;
    int64_t window;            // keys seen, 0 for all
    float scale, softcap;      // softcap 0 for none
    int32_t type;
};

#ifndef __F16C__
static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 0) {
        float small = (float)mantissa * 5.9604644775390625e-8f;
        memcpy(&bits, &small, 4);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7f800000 | (mantissa << 13);
    } else {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
#endif

static v16 load(const float *from) {
    v16 value;
    memcpy(&value, from, sizeof(value));
    return value;
}

static float eighth[256];

__attribute__((constructor)) static void fill_eighth() {
    for (int code = 0; code < 256; code++) {  // e4m3: bias 7, no infinities
        int exponent = (code >> 3) & 15, mantissa = code & 7;
        float magnitude = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
        eighth[code] = (code & 128) ? -magnitude : magnitude;
    }
    eighth[127] = std::nanf("");
    eighth[255] = -std::nanf("");
}

// `count` stored values, a multiple of 16, as floats.
static void widen(float *to, const void *from, int64_t offset, int64_t count, int32_t type) {
    switch (type) {
    case FLOAT32:
        memcpy(to, (const float *)from + offset, count * sizeof(float));
        return;
    case BFLOAT16: {
        const uint16_t *source = (const uint16_t *)from + offset;
        uint32_t *bits = (uint32_t *)to;
        for (int64_t i = 0; i < count; i++) bits[i] = (uint32_t)source[i] << 16;
        return;
    }
    case FLOAT16: {
        const uint16_t *source = (const uint16_t *)from + offset;
#ifdef __F16C__
        const _Float16 *halves = (const _Float16 *)source;
        for (int64_t i = 0; i < count; i++) to[i] = (float)halves[i];
#else
        for (int64_t i = 0; i < count; i++) to[i] = half_to_float(source[i]);
#endif
        return;
    }
    case INT8: {
        const int8_t *source = (const int8_t *)from + offset;
        for (int64_t i = 0; i < count; i++) to[i] = (float)source[i];
        return;
    }
    default: {
        const uint8_t *source = (const uint8_t *)from + offset;
        for (int64_t i = 0; i < count; i++) to[i] = eighth[source[i]];
    }
    }
}

// e^x for x <= 0, to a few units in the last place; 0 below -87.
static v16 exponential(v16 x) {
    i16x lost = x < -87.0f;
    x = lost ? v16{} - 87.0f : x;
    v16 shifted = x * 1.44269504f + 12582912.0f;  // round to nearest by adding 1.5 * 2^23
    v16 n = shifted - 12582912.0f;
    v16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16x whole = __builtin_convertvector(n, i16x);
    v16 power = (v16)((whole + 127) << 23);
    return lost ? v16{} : p * power;
}

static float largest(v16 x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

static float total(v16 x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// Rows of one kv head: `count` tokens from `first` on, of one sequence, times the query heads of that kv head.
static void attend(const Call *c, int64_t first, int64_t count, int64_t kv_head, float *scratch) {
    int64_t group = c->heads / c->kv_heads, dim = c->head_dim, vectors = dim / LANES, rows = count * group;
    int64_t last = c->position[first + count - 1];
    int64_t lowest = c->window ? c->position[first] - c->window + 1 : 0;
    int64_t start = lowest > 0 ? lowest / LANES * LANES : 0, steps = (last - start) / LANES + 1;
    const int32_t *table = c->tables + (int64_t)c->sequence[first] * c->max_blocks;
    float *scores = scratch;                                     // [MAX_ROWS, steps, LANES]
    v16 *tile = (v16 *)(scratch + MAX_ROWS * steps * LANES);     // [dim] or [LANES, vectors]
    float query[MAX_ROWS][dim];
    memset(query, 0, sizeof(query));
    for (int64_t r = 0; r < rows; r++)
        memcpy(query[r], c->q + ((first + r / group) * c->heads + kv_head * group + r % group) * dim, dim * sizeof(float));

    for (int64_t s = 0; s < steps; s++) {
        int64_t key = start + s * LANES, block = table[key / c->block_size], at = key % c->block_size;
        int64_t base = (block * c->kv_heads + kv_head) * dim * c->block_size;
        if (c->block_size == LANES)
            widen((float *)tile, c->k, base, dim * LANES, c->type);
        else
            for (int64_t d = 0; d < dim; d++) widen((float *)(tile + d), c->k, base + d * c->block_size + at, LANES, c->type);
        v16 factor = v16{} + c->scale;
        if (c->k_scale) factor *= load(c->k_scale + (block * c->kv_heads + kv_head) * c->block_size + at);
        for (int64_t r = 0; r < rows; r += 4) {
            v16 a = {}, b = {}, e = {}, f = {};
            for (int64_t d = 0; d < dim; d++) {
                a += query[r][d] * tile[d];
                b += query[r + 1][d] * tile[d];
                e += query[r + 2][d] * tile[d];
                f += query[r + 3][d] * tile[d];
            }
            v16 four[4] = {a * factor, b * factor, e * factor, f * factor};
            for (int64_t i = 0; i < 4 && r + i < rows; i++) {
                int64_t position = c->position[first + (r + i) / group];
                if (c->softcap > 0)
                    for (int j = 0; j < LANES; j++) four[i][j] = c->softcap * std::tanh(four[i][j] / c->softcap);
                int64_t from = c->window ? position - c->window + 1 - key : 0;  // the lanes it sees
                if (from > 0 || position - key < LANES - 1)
                    four[i] = (counting < (int32_t)from) | (counting > (int32_t)(position - key)) ? v16{} + MASKED : four[i];
                memcpy(scores + ((r + i) * steps + s) * LANES, four + i, sizeof(v16));
            }
        }
    }

    float norm[MAX_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        v16 *row = (v16 *)(scores + r * steps * LANES), most = row[0], sum = {};
        for (int64_t s = 1; s < steps; s++) most = row[s] > most ? row[s] : most;
        float high = largest(most);
        if (c->sinks && c->sinks[kv_head * group + r % group] > high) high = c->sinks[kv_head * group + r % group];
        for (int64_t s = 0; s < steps; s++) {
            row[s] = exponential(row[s] - high);
            sum += row[s];
        }
        norm[r] = total(sum);
        if (c->sinks) norm[r] += std::exp(c->sinks[kv_head * group + r % group] - high);
    }

    v16 gathered[MAX_ROWS][vectors];
    memset(gathered, 0, sizeof(gathered));
    for (int64_t s = 0; s < steps; s++) {
        int64_t key = start + s * LANES, block = table[key / c->block_size], at = key % c->block_size;
        int64_t base = ((block * c->kv_heads + kv_head) * c->block_size + at) * dim;
        int64_t seen = last - key + 1 < LANES ? last - key + 1 : LANES;  // what lies behind the last key may be anything
        widen((float *)tile, c->v, base, seen * dim, c->type);
        if (c->v_scale)
            for (int64_t j = 0; j < seen; j++) {
                float factor = c->v_scale[(block * c->kv_heads + kv_head) * c->block_size + at + j];
                for (int64_t d = 0; d < vectors; d++) tile[j * vectors + d] *= factor;
            }
        for (int64_t r = 0; r < rows; r++) {
            const float *weight = scores + (r * steps + s) * LANES;
            for (int64_t j = 0; j < seen; j++) {
                if (weight[j] == 0) continue;
                for (int64_t d = 0; d < vectors; d++) gathered[r][d] += weight[j] * tile[j * vectors + d];
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        v16 share = v16{} + 1.0f / norm[r];
        float *to = c->out + ((first + r / group) * c->heads + kv_head * group + r % group) * dim;
        for (int64_t d = 0; d < vectors; d++) {
            v16 value = gathered[r][d] * share;
            memcpy(to + d * LANES, &value, sizeof(v16));
        }
    }
}

// 0, or 1 where memory is short.
extern "C" int paged_attention(const Call *c) {
    int64_t group = c->heads / c->kv_heads, most = group >= MAX_ROWS ? 1 : MAX_ROWS / group, longest = 0, tiles = 0;
    int64_t *firsts = (int64_t *)malloc((c->tokens + 1) * sizeof(int64_t));
    if (!firsts) return 1;
    for (int64_t t = 0; t < c->tokens; t++) {
        if (c->position[t] > longest) longest = c->position[t];
        if (t == 0 || c->sequence[t] != c->sequence[t - 1] || t - firsts[tiles - 1] >= most) firsts[tiles++] = t;
    }
    firsts[tiles] = c->tokens;
    int64_t floats = MAX_ROWS * (longest / LANES + 2) * LANES + c->head_dim * LANES;
    int failed = 0;
#pragma omp parallel
    {
        float *scratch = (float *)aligned_alloc(64, floats * sizeof(float));
        if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tiles * c->kv_heads; i++) {
            int64_t tile = i / c->kv_heads;
            if (scratch) attend(c, firsts[tile], firsts[tile + 1] - firsts[tile], i % c->kv_heads, scratch);
        }
        free(scratch);
    }
    free(firsts);
    return failed;
}
