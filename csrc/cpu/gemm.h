/* Products of rows with a matrix that lies column by column: out[r][n] = sum over k of x[r][k] * w[k * ldw + n].
 *
 * Weights are float32, or bfloat16 where that loses nothing: a few rows take as long as reading the weights does. A
 * bfloat16 is the upper half of a float32, so the products and sums are the same.
 * Every output is the sum of sums over 64 of k, in their order, however many rows and columns are computed side by side:
 * so a row's result does not depend on its batch, and one long chain of roundings does not add up.
 */
#ifndef DSV4_GEMM_H
#define DSV4_GEMM_H

#include <stdint.h>

#define ROWS 64 /* rows that share each read of the weights */

/* A matrix or a stack of them, of float32 or, if `half`, of bfloat16. */
typedef struct {
    const void *data;
    int half;
} Weights;

static inline Weights weights_from(Weights w, long element) {
    return (Weights){(const char *)w.data + element * (w.half ? 2 : 4), w.half};
}

/* One to ROWS rows, wherever each of them is. */
void dsv4_multiply_rows(long num_rows, const float *const *x, Weights w, long ldw, float *const *out, long num_columns,
                        long depth);

/* Any number of rows, `ldx` and `ldout` floats apart. */
void dsv4_multiply(const float *x, long ldx, Weights w, long ldw, float *out, long ldout, long num_rows,
                   long num_columns, long depth);

#endif
