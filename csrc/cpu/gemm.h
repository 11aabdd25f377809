/* Products of rows with a matrix that lies column by column: out[r][n] = sum over k of x[r][k] * w[k * ldw + n].
 *
 * Every output is one sum in the order of k, however many rows and columns are computed side by side, so a row's result
 * does not depend on its batch.
 */
#ifndef DSV4_GEMM_H
#define DSV4_GEMM_H

#define ROWS 4 /* rows that share each read of the weights */

/* One to ROWS rows anywhere; columns first .. last - 1. */
void dsv4_multiply_rows(long num_rows, const float *const *x, const float *w, long ldw, float *const *out, long first,
                        long last, long depth);

/* Any number of rows, `ldx` and `ldout` floats apart. */
void dsv4_multiply(const float *x, long ldx, const float *w, long ldw, float *out, long ldout, long num_rows,
                   long num_columns, long depth);

#endif
