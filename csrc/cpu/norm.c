/* RMSNorm and rotary embedding of rows of float32. */
#include <math.h>

#include "vector.h"

/* Rows of x are `ldx` floats apart, those of out `length`; weight may be null. */
CLONES void dsv4_rms_norm(const float *x, long ldx, const float *weight, float *out, long num_rows, long length,
                          float eps) {
    for (long row = 0; row < num_rows; row++) {
        const float *from = x + row * ldx;
        float *to = out + row * length;
        Vector sum = {0};
        for (long i = 0; i < length; i += LANES) {
            Vector value = load_some(from + i, length - i);
            sum += value * value;
        }
        float inverse_rms = 1.0f / sqrtf(sum_lanes(sum) / (float)length + eps);
        for (long i = 0; i < length; i += LANES) {
            Vector value = load_some(from + i, length - i) * inverse_rms;
            if (weight) value *= load_some(weight + i, length - i);
            store_some(to + i, value, length - i);
        }
    }
}

/* Rotate the last 2 * half of `length` values by rotations [tokens, half] of (cosine, sine), conjugated if `inverse`.
 * x [tokens, heads, length], tokens `ldx` floats apart; out is dense. */
CLONES void dsv4_apply_rope(const float *x, long ldx, const float *rotations, float *out, long num_tokens,
                            long num_heads, long length, long half, long inverse) {
    const float sign = inverse ? -1.0f : 1.0f;
    for (long token = 0; token < num_tokens; token++)
        for (long head = 0; head < num_heads; head++) {
            const float *from = x + token * ldx + head * length, *turn = rotations + token * 2 * half;
            float *to = out + (token * num_heads + head) * length;
            memcpy(to, from, (size_t)(length - 2 * half) * sizeof(float));
            from += length - 2 * half, to += length - 2 * half;
            for (long i = 0; i < half; i++) {
                float real = from[2 * i], imaginary = from[2 * i + 1], cosine = turn[2 * i],
                      sine = sign * turn[2 * i + 1];
                to[2 * i] = real * cosine - imaginary * sine;
                to[2 * i + 1] = real * sine + imaginary * cosine;
            }
        }
}
