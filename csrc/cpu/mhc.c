/* Hyper-connections (docs/model.md section 3) for at most STREAMS streams of float32. */
#include <math.h>

#include "gemm.h"
#include "vector.h"

#define STREAMS 4
#define MIXES (2 * STREAMS + STREAMS * STREAMS)

/* out [length] = sum over streams of weights[s] * streams[s]. */
INLINE void weighted_sum(long num_streams, const float *streams, const float *weights, float *out, long length) {
    for (long i = 0; i < length; i += LANES) {
        Vector sum = {0};
        for (long s = 0; s < num_streams; s++) sum += load_some(streams + s * length + i, length - i) * weights[s];
        store_some(out + i, sum, length - i);
    }
}

INLINE float mean_square(const float *values, long length) {
    Vector sums[4] = {{0}};
    for (long i = 0, turn = 0; i < length; i += LANES, turn = (turn + 1) & 3) {
        Vector value = load_some(values + i, length - i);
        sums[turn] += value * value;
    }
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)length;
}

/* Mix logits of one token: its row of products, normalised, scaled and shifted. One scale is for all if `step` is 0. */
INLINE void finish_mixes(float *mixes, const float *streams, const float *base, const float *scale, long step,
                         long num_mixes, long length, float norm_eps) {
    float inverse_rms = 1.0f / sqrtf(mean_square(streams, length) + norm_eps);
    for (long i = 0; i < num_mixes; i++) mixes[i] = base[i] + mixes[i] * inverse_rms * scale[i * step];
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Sixteen matrices at a time, one in each lane: logits in, doubly-stochastic matrices out. See reference.py for why
 * only the reciprocals of the scalings are iterated. */
INLINE void sinkhorn(int num, Vector matrix[STREAMS][STREAMS], long iters, float eps) {
    Vector row_inv[STREAMS], column_inv[STREAMS];
    for (int i = 0; i < num; i++) {
        Vector top = matrix[i][0], sum = {0};
        for (int j = 1; j < num; j++) top = at_least(matrix[i][j], top);
        for (int j = 0; j < num; j++) sum += matrix[i][j] = exponential(matrix[i][j] - top);
        for (int j = 0; j < num; j++) matrix[i][j] = matrix[i][j] / sum + eps;
        row_inv[i] = spread(1.0f);
    }
    for (int j = 0; j < num; j++) {
        column_inv[j] = spread(eps);
        for (int i = 0; i < num; i++) column_inv[j] += matrix[i][j];
    }
    for (long iter = 1; iter < iters; iter++) {
        Vector scaling[STREAMS];
        for (int j = 0; j < num; j++) scaling[j] = 1.0f / column_inv[j];
        for (int i = 0; i < num; i++) {
            row_inv[i] *= eps;
            for (int j = 0; j < num; j++) row_inv[i] += matrix[i][j] * scaling[j];
        }
        for (int i = 0; i < num; i++) scaling[i] = 1.0f / row_inv[i];
        for (int j = 0; j < num; j++) {
            column_inv[j] *= eps;
            for (int i = 0; i < num; i++) column_inv[j] += matrix[i][j] * scaling[i];
        }
    }
    for (int i = 0; i < num; i++)
        for (int j = 0; j < num; j++) matrix[i][j] /= row_inv[i] * column_inv[j];
}

/* Up to sixteen tokens: gates, the mixing matrices, and the collapsed input. */
INLINE void enter(int num, const float *streams, float *mixes, const float *base, const float *scale, float *merged,
                  float *post, float *comb, long num_tokens, long hidden_size, long iters, float hc_eps,
                  float norm_eps) {
    const long num_mixes = 2 * num + num * num;
    Vector matrix[STREAMS][STREAMS];
    for (int i = 0; i < num; i++)
        for (int j = 0; j < num; j++) matrix[i][j] = (Vector){0};
    for (long token = 0; token < num_tokens; token++) {
        const float *token_streams = streams + token * num * hidden_size;
        float *logits = mixes + token * num_mixes, pre[STREAMS];
        finish_mixes(logits, token_streams, base, scale, 1, num_mixes, num * hidden_size, norm_eps);
        for (int s = 0; s < num; s++) {
            pre[s] = sigmoid(logits[s]) + hc_eps;
            post[token * num + s] = 2.0f * sigmoid(logits[num + s]);
        }
        weighted_sum(num, token_streams, pre, merged + token * hidden_size, hidden_size);
        for (int i = 0; i < num; i++)
            for (int j = 0; j < num; j++) matrix[i][j][token] = logits[2 * num + i * num + j];
    }
    sinkhorn(num, matrix, iters, hc_eps);
    for (long token = 0; token < num_tokens; token++)
        for (int i = 0; i < num; i++)
            for (int j = 0; j < num; j++) comb[(token * num + i) * num + j] = matrix[i][j][token];
}

/* streams [tokens, num_streams, hidden_size], fn [mixes, num_streams * hidden_size] column by column, base and scale
 * [mixes] -> merged [tokens, hidden_size], post [tokens, num_streams], comb [tokens, num_streams, num_streams]. */
CLONES void dsv4_mhc_pre(const float *streams, const float *fn, const float *base, const float *scale, float *merged,
                         float *post, float *comb, long num_tokens, long num_streams, long hidden_size, long iters,
                         float hc_eps, float norm_eps) {
    const long num_mixes = 2 * num_streams + num_streams * num_streams, length = num_streams * hidden_size;
    float mixes[LANES * MIXES];
    for (long token = 0; token < num_tokens; token += LANES) {
        long count = num_tokens - token < LANES ? num_tokens - token : LANES;
        const float *some = streams + token * length;
        dsv4_multiply(some, length, (Weights){fn, 0}, num_mixes, mixes, num_mixes, count, num_mixes, length);
        float *x = merged + token * hidden_size, *back = post + token * num_streams;
        float *matrix = comb + token * num_streams * num_streams;
        if (num_streams == STREAMS) /* a constant here, so that the matrices are registers */
            enter(STREAMS, some, mixes, base, scale, x, back, matrix, count, hidden_size, iters, hc_eps, norm_eps);
        else
            enter((int)num_streams, some, mixes, base, scale, x, back, matrix, count, hidden_size, iters, hc_eps,
                  norm_eps);
    }
}

/* out [tokens, num_streams, hidden_size]: post_j * output + sum over i of comb[i, j] * streams_i. */
CLONES void dsv4_mhc_post(const float *output, const float *streams, const float *post, const float *comb, float *out,
                          long num_tokens, long num_streams, long hidden_size) {
    for (long token = 0; token < num_tokens; token++) {
        const float *from = streams + token * num_streams * hidden_size, *added = output + token * hidden_size;
        const float *mix = comb + token * num_streams * num_streams, *gate = post + token * num_streams;
        float *to = out + token * num_streams * hidden_size;
        for (long i = 0; i < hidden_size; i += LANES)
            for (long j = 0; j < num_streams; j++) {
                Vector sum = load_some(added + i, hidden_size - i) * gate[j];
                for (long s = 0; s < num_streams; s++)
                    sum += load_some(from + s * hidden_size + i, hidden_size - i) * mix[s * num_streams + j];
                store_some(to + j * hidden_size + i, sum, hidden_size - i);
            }
    }
}

/* streams -> merged [tokens, hidden_size] with sigmoid weights: fn [num_streams, num_streams * hidden_size] column by
 * column, base [num_streams], scale [1]. */
CLONES void dsv4_mhc_head(const float *streams, const float *fn, const float *base, const float *scale, float *merged,
                          long num_tokens, long num_streams, long hidden_size, float hc_eps, float norm_eps) {
    const long length = num_streams * hidden_size;
    for (long token = 0; token < num_tokens; token++) {
        const float *some = streams + token * length;
        float mixes[STREAMS];
        dsv4_multiply(some, length, (Weights){fn, 0}, num_streams, mixes, num_streams, 1, num_streams, length);
        finish_mixes(mixes, some, base, scale, 0, num_streams, length, norm_eps);
        for (long s = 0; s < num_streams; s++) mixes[s] = sigmoid(mixes[s]) + hc_eps;
        weighted_sum(num_streams, some, mixes, merged + token * hidden_size, hidden_size);
    }
}
