/* Expert routing, and the experts of one layer: two products with SwiGLU between. */
#include <math.h>

#include "gemm.h"
#include "vector.h"

/* gate_up [2 * width] (gate first) -> hidden [width]. The gate has no lower clamp. */
INLINE void activate(const float *gate_up, float *hidden, long width, float limit, float weight) {
    for (long i = 0; i < width; i += LANES) {
        long count = width - i;
        Vector gate = at_most(load_some(gate_up + i, count), spread(limit));
        Vector up = at_least(at_most(load_some(gate_up + width + i, count), spread(limit)), spread(-limit));
        store_some(hidden + i, gate / (1.0f + exponential(-gate)) * up * weight, count);
    }
}

/* One to ROWS rows through one expert: down [rows, hidden_size] = w2(weight * swiglu(w13 x)). `work` holds `rows` times
 * 3 * width floats. */
CLONES static void feed_forward(long num_rows, const float *const *x, Weights w13, Weights w2, const float *weights,
                                float *work, float *const *down, long hidden_size, long width, float limit) {
    float *gate_up[ROWS] = {0};
    const float *hidden[ROWS] = {0};
    for (long row = 0; row < num_rows; row++) gate_up[row] = work + row * 3 * width;
    dsv4_multiply_rows(num_rows, x, w13, 2 * width, gate_up, 2 * width, hidden_size);
    for (long row = 0; row < num_rows; row++) {
        activate(gate_up[row], gate_up[row] + 2 * width, width, limit, weights[row]);
        hidden[row] = gate_up[row] + 2 * width;
    }
    dsv4_multiply_rows(num_rows, hidden, w2, hidden_size, down, hidden_size, width);
}

INLINE void add_rows(long num_rows, float *const *to, float *const *values, long length) {
    for (long row = 0; row < num_rows; row++)
        for (long i = 0; i < length; i++) to[row][i] += values[row][i];
}

/* out [tokens, hidden_size] = sum over each token's experts in the order of their ids, then the shared expert.
 * x [tokens, hidden_size]; expert_ids and weights [tokens, top_k]; w13 [experts] each [2 * width, hidden_size], w2
 * [experts] each [hidden_size, width], matrices column by column. `work` holds ROWS * (3 * width + hidden_size) floats.
 */
CLONES void dsv4_mega_moe(const float *x, const int64_t *expert_ids, const float *weights, const void *w13,
                          const void *w2, const void *shared_w13, const void *shared_w2, long half, float *out,
                          float *work, long num_tokens, long top_k, long num_experts, long hidden_size, long width,
                          float limit) {
    float *sums[ROWS] = {0}, *down[ROWS];
    const float *rows[ROWS] = {0};
    float scales[ROWS] = {0};
    for (long row = 0; row < ROWS; row++) down[row] = work + ROWS * 3 * width + row * hidden_size;
    memset(out, 0, (size_t)(num_tokens * hidden_size) * sizeof(float));
    for (long expert = 0; expert < num_experts; expert++) {
        Weights up = weights_from((Weights){w13, half}, expert * 2 * width * hidden_size);
        Weights back = weights_from((Weights){w2, half}, expert * width * hidden_size);
        long count = 0;
        for (long pair = 0; pair < num_tokens * top_k; pair++) {
            if (expert_ids[pair] != expert) continue;
            long token = pair / top_k;
            rows[count] = x + token * hidden_size;
            sums[count] = out + token * hidden_size;
            scales[count++] = weights[pair];
            if (count < ROWS) continue;
            feed_forward(count, rows, up, back, scales, work, down, hidden_size, width, limit);
            add_rows(count, sums, down, hidden_size);
            count = 0;
        }
        if (!count) continue;
        feed_forward(count, rows, up, back, scales, work, down, hidden_size, width, limit);
        add_rows(count, sums, down, hidden_size);
    }
    for (long row = 0; row < ROWS; row++) scales[row] = 1.0f;
    for (long token = 0; token < num_tokens; token += ROWS) {
        long count = num_tokens - token < ROWS ? num_tokens - token : ROWS;
        for (long row = 0; row < count; row++) {
            rows[row] = x + (token + row) * hidden_size;
            sums[row] = out + (token + row) * hidden_size;
        }
        feed_forward(count, rows, (Weights){shared_w13, half}, (Weights){shared_w2, half}, scales, work, down,
                     hidden_size, width, limit);
        add_rows(count, sums, down, hidden_size);
    }
}

INLINE float score_of(float logit) {
    return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit))); /* softplus is linear above 20, as torch has it */
}

/* Experts and weights [tokens, top_k] from x [tokens, hidden_size] and gate [experts, hidden_size], column by column.
 * With `table` [vocab, top_k] the token chooses, else score + bias (bias may be null). Equal scores: the lower id.
 * `scores` [tokens, experts] is scratch. */
CLONES void dsv4_route(const float *x, const float *gate, const float *bias, const int64_t *table,
                       const int64_t *token_ids, float *scores, float *weights, int64_t *expert_ids, long num_tokens,
                       long num_experts, long hidden_size, long top_k, float scale) {
    dsv4_multiply(x, hidden_size, (Weights){gate, 0}, num_experts, scores, num_experts, num_tokens, num_experts,
                  hidden_size);
    for (long token = 0; token < num_tokens; token++) {
        float *score = scores + token * num_experts;
        int64_t *chosen = expert_ids + token * top_k;
        float sum = 0;
        for (long expert = 0; expert < num_experts; expert++) score[expert] = score_of(score[expert]);
        for (long k = 0; k < top_k; k++) {
            long best = -1;
            float best_score = 0;
            for (long expert = 0; !table && expert < num_experts; expert++) {
                float candidate = score[expert] + (bias ? bias[expert] : 0.0f);
                int taken = 0;
                for (long earlier = 0; earlier < k; earlier++) taken |= chosen[earlier] == expert;
                /* NaN counts as the largest, as in torch's sort. */
                if (!taken &&
                    (best < 0 || candidate > best_score || (candidate != candidate && best_score == best_score)))
                    best = expert, best_score = candidate;
            }
            chosen[k] = table ? table[token_ids[token] * top_k + k] : best;
            weights[token * top_k + k] = score[chosen[k]];
            sum += score[chosen[k]];
        }
        for (long k = 0; k < top_k; k++) weights[token * top_k + k] *= scale / sum;
    }
}
