/* Attention of one token at a time over gathered rows of keys, which are also the values (docs/model.md section 4). */
#include <math.h>

#include "vector.h"

#define BLOCK 4 /* heads and keys whose scores are computed side by side; vectors of a head that are summed so */

#ifdef __clang__
#define PERMUTE(value, ...) __builtin_shufflevector(value, value, __VA_ARGS__)
#else
#define PERMUTE(value, ...) __builtin_shuffle(value, (Mask){__VA_ARGS__})
#endif
/* Lane l and lane l ^ d change places. */
#define SWAP(value, d)                                                                                           \
    PERMUTE(value, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d, 8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, \
            13 ^ d, 14 ^ d, 15 ^ d)

/* Vectors i and i + d become one: lanes without bit d go on with the sums of the first, lanes with it of the second. */
#define FOLD(d)                                                          \
    for (int i = 0; i < d; i++) {                                        \
        Vector first = pick((lane & d) == 0, values[i], values[i + d]);  \
        Vector second = pick((lane & d) == 0, values[i + d], values[i]); \
        values[i] = first + SWAP(second, d);                             \
    }

/* Lane i of the result is the sum of all lanes of values[i]. */
INLINE Vector sum_each(Vector values[LANES]) {
    const Mask lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    FOLD(8)
    FOLD(4)
    FOLD(2)
    FOLD(1)
    return values[0];
}

/* scores[h * stride + key] of `num_heads` (at most BLOCK) heads, q [heads, length], and BLOCK keys. */
INLINE void score(int num_heads, const float *q, const float *const *keys, float *scores, long stride, long length,
                  float scale) {
    Vector sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = (Vector){0};
    for (long i = 0; i < length; i += LANES)
        for (int key = 0; key < BLOCK; key++) {
            Vector values = load(keys[key] + i);
            for (int head = 0; head < num_heads; head++)
                sums[head * BLOCK + key] += values * load(q + head * length + i);
        }
    Vector all = sum_each(sums) * scale;
    for (int head = 0; head < num_heads; head++)
        memcpy(scores + head * stride, (float *)&all + head * BLOCK, BLOCK * 4);
}

/* Scores [stride] of one head become probabilities relative to the largest; returns 1 / (their sum + the sink). Cells
 * from num_keys on are padding. */
INLINE float soften(float *scores, long num_keys, float sink) {
    Vector top = spread(sink), sum = {0};
    for (long i = num_keys; i % LANES; i++) scores[i] = -INFINITY;
    for (long i = 0; i < num_keys; i += LANES) top = at_least(load(scores + i), top);
    for (int lane = 1; lane < LANES; lane++)
        if (top[lane] > top[0]) top[0] = top[lane];
    for (long i = 0; i < num_keys; i += LANES) {
        Vector probs = exponential(load(scores + i) - top[0]);
        store(scores + i, probs);
        sum += probs;
    }
    return 1.0f / (sum_lanes(sum) + expf(sink - top[0]));
}

/* out [heads, length] = probs [heads, stride] times the keys, columns from `column`, times each head's inverse sum. */
INLINE void mix(int num_heads, int num_vectors, const float *probs, long stride, const float *const *keys,
                long num_keys, const float *inverse, float *out, long length, long column) {
    Vector sums[BLOCK][BLOCK];
    for (int head = 0; head < num_heads; head++)
        for (int v = 0; v < num_vectors; v++) sums[head][v] = (Vector){0};
    for (long key = 0; key < num_keys; key++)
        for (int v = 0; v < num_vectors; v++) {
            Vector values = load(keys[key] + column + v * LANES);
            for (int head = 0; head < num_heads; head++) sums[head][v] += values * probs[head * stride + key];
        }
    for (int head = 0; head < num_heads; head++)
        for (int v = 0; v < num_vectors; v++)
            store(out + head * length + column + v * LANES, sums[head][v] * inverse[head]);
}

/* Some heads (at most BLOCK) of one token. `num_keys` keys, padded to a multiple of BLOCK by repetition. */
INLINE void attend(int num_heads, const float *q, const float *const *keys, long num_keys, long stride, float *scores,
                   const float *sink, float *out, long length) {
    float inverse[BLOCK];
    for (long key = 0; key < num_keys; key += BLOCK)
        score(num_heads, q, keys + key, scores + key, stride, length, 1.0f / sqrtf((float)length));
    for (int head = 0; head < num_heads; head++) inverse[head] = soften(scores + head * stride, num_keys, sink[head]);
    long column = 0;
    for (; column + BLOCK * LANES <= length; column += BLOCK * LANES)
        mix(num_heads, BLOCK, scores, stride, keys, num_keys, inverse, out, length, column);
    for (; column < length; column += LANES)
        mix(num_heads, 1, scores, stride, keys, num_keys, inverse, out, length, column);
}

/* The last 2 * half values of each head turned back by rotations [half] of (cosine, sine). */
INLINE void turn_back(float *out, const float *rotations, long num_heads, long length, long half) {
    for (long head = 0; head < num_heads; head++) {
        float *pair = out + head * length + length - 2 * half;
        for (long i = 0; i < half; i++) {
            float real = pair[2 * i], imaginary = pair[2 * i + 1], cosine = rotations[2 * i],
                  sine = rotations[2 * i + 1];
            pair[2 * i] = real * cosine + imaginary * sine;
            pair[2 * i + 1] = imaginary * cosine - real * sine;
        }
    }
}

/* q [tokens, heads, length], tokens `ldq` floats apart; key rows [length] of two sources, each behind a table of row
 * numbers [tokens, width], -1 = masked and never read; the second may have width 0. length is a multiple of LANES.
 * `work` has room for (BLOCK floats + one pointer) * (width + width_2, rounded up to a multiple of LANES). */
CLONES void dsv4_sparse_attention(const float *q, long ldq, const float *rows, const int64_t *table, long width,
                                  const float *rows_2, const int64_t *table_2, long width_2, const float *sink,
                                  const float *rotations, float *out, void *work, long num_tokens, long num_heads,
                                  long length, long half) {
    const long stride = (width + width_2 + LANES - 1) / LANES * LANES;
    const float **keys = work;
    float *scores = (float *)(keys + stride);
    for (long token = 0; token < num_tokens; token++) {
        float *to = out + token * num_heads * length;
        long num_keys = 0, head = 0;
        for (long i = 0; i < width; i++) {
            int64_t row = table[token * width + i];
            if (row >= 0) keys[num_keys++] = rows + row * length;
        }
        for (long i = 0; i < width_2; i++) {
            int64_t row = table_2[token * width_2 + i];
            if (row >= 0) keys[num_keys++] = rows_2 + row * length;
        }
        for (long i = num_keys; i % BLOCK; i++) keys[i] = keys[num_keys - 1];
        for (; head + BLOCK <= num_heads; head += BLOCK)
            attend(BLOCK, q + token * ldq + head * length, keys, num_keys, stride, scores, sink + head,
                   to + head * length, length);
        for (; head < num_heads; head++)
            attend(1, q + token * ldq + head * length, keys, num_keys, stride, scores, sink + head, to + head * length,
                   length);
        turn_back(to, rotations + token * 2 * half, num_heads, length, half);
    }
}
