/* Linear layers and the grouped output projection. Weights lie column by column. */
#include "gemm.h"

#include "vector.h"

/* `num_rows` and `num_vectors` are constants where this is inlined: the sums are registers. */
#define DEFINE_TILE(NAME, TYPE)                                                                                       \
    INLINE void NAME(int num_rows, int num_vectors, const float *const *x, const float *w, long ldw, float *const *out, \
                     long column, long depth) {                                                                       \
        const int lanes = sizeof(TYPE) / sizeof(float);                                                               \
        TYPE sums[ROWS][LANES];                                                                                       \
        for (int row = 0; row < num_rows; row++)                                                                      \
            for (int v = 0; v < num_vectors; v++) sums[row][v] = (TYPE){0};                                           \
        for (long k = 0; k < depth; k++) {                                                                            \
            const float *weights = w + k * ldw + column;                                                              \
            for (int v = 0; v < num_vectors; v++) {                                                                   \
                TYPE weight = *(const TYPE *)(weights + v * lanes);                                                   \
                for (int row = 0; row < num_rows; row++) sums[row][v] += weight * x[row][k];                          \
            }                                                                                                         \
        }                                                                                                             \
        for (int row = 0; row < num_rows; row++)                                                                      \
            for (int v = 0; v < num_vectors; v++) *(TYPE *)(out[row] + column + v * lanes) = sums[row][v];            \
    }

DEFINE_TILE(tile, Vector)
DEFINE_TILE(half_tile, Half)

/* Columns first .. last of `num_rows` rows. */
INLINE void multiply_columns(int num_rows, int num_vectors, const float *const *x, const float *w, long ldw,
                             float *const *out, long column, long last, long depth) {
    for (; column + num_vectors * LANES <= last; column += num_vectors * LANES)
        tile(num_rows, num_vectors, x, w, ldw, out, column, depth);
    for (; column + LANES <= last; column += LANES) tile(num_rows, 1, x, w, ldw, out, column, depth);
    for (; column + LANES / 2 <= last; column += LANES / 2) half_tile(num_rows, 1, x, w, ldw, out, column, depth);
    for (; column < last; column++)
        for (int row = 0; row < num_rows; row++) {
            float sum = 0;
            for (long k = 0; k < depth; k++) sum += x[row][k] * w[k * ldw + column];
            out[row][column] = sum;
        }
}

/* The fewer rows, the more neighbouring columns are read at once. */
CLONES void dsv4_multiply_rows(long num_rows, const float *const *x, const float *w, long ldw, float *const *out,
                               long first, long last, long depth) {
    switch (num_rows) {
    case 1: multiply_columns(1, 16, x, w, ldw, out, first, last, depth); break;
    case 2: multiply_columns(2, 8, x, w, ldw, out, first, last, depth); break;
    case 3: multiply_columns(3, 4, x, w, ldw, out, first, last, depth); break;
    default: multiply_columns(4, 4, x, w, ldw, out, first, last, depth);
    }
}

/* Panels of columns stay in the cache while all rows pass. */
void dsv4_multiply(const float *x, long ldx, const float *w, long ldw, float *out, long ldout, long num_rows,
                     long num_columns, long depth) {
    const long panel = num_rows > ROWS ? 4 * LANES : num_columns;
    for (long first = 0; first < num_columns; first += panel) {
        long last = first + panel < num_columns ? first + panel : num_columns;
        for (long row = 0; row < num_rows; row += ROWS) {
            const float *inputs[ROWS] = {0};
            float *outputs[ROWS] = {0};
            long count = num_rows - row < ROWS ? num_rows - row : ROWS;
            for (long i = 0; i < count; i++) inputs[i] = x + (row + i) * ldx, outputs[i] = out + (row + i) * ldout;
            dsv4_multiply_rows(count, inputs, w, ldw, outputs, first, last, depth);
        }
    }
}

/* out [rows, columns] = x [rows, depth], rows `ldx` floats apart, times w. */
void dsv4_linear(const float *x, long ldx, const float *w, long ldw, float *out, long num_rows, long num_columns,
                 long depth) {
    dsv4_multiply(x, ldx, w, ldw, out, num_columns, num_rows, num_columns, depth);
}

/* Heads o [rows, groups * width] -> low [rows, groups * rank], group by group with wo_a [groups], each [rank, width],
 * then -> out [rows, columns] with wo_b. */
void dsv4_grouped_out_proj(const float *o, const float *wo_a, const float *wo_b, float *low, float *out,
                                  long num_rows, long num_groups, long width, long rank, long num_columns) {
    for (long group = 0; group < num_groups; group++)
        dsv4_multiply(o + group * width, num_groups * width, wo_a + group * rank * width, rank, low + group * rank,
                 num_groups * rank, num_rows, rank, width);
    dsv4_multiply(low, num_groups * rank, wo_b, num_columns, out, num_columns, num_rows, num_columns, num_groups * rank);
}
