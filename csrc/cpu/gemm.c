/* Linear layers and the grouped output projection. Weights lie column by column. */
#include "gemm.h"

#include <math.h>

#include "vector.h"

#define TILE 4            /* rows whose sums are in registers together */
#define PANEL_COLUMNS 256 /* weights that are copied, as float32, before more than TILE rows pass over them: */
#define PANEL_LEAST 64    /* columns for which the copy pays */
#define PANEL_DEPTH 64    /* the copy stays in the second-level cache; and every so many products are a sum of their own */

#define DEFINE_READ(NAME, TYPE, WORDS, BITS)                                                                    \
    INLINE TYPE NAME(const void *data, long element, int half) {                                                \
        if (!half) return *(const TYPE *)((const float *)data + element);                                       \
        return (TYPE)(__builtin_convertvector(*(const WORDS *)((const uint16_t *)data + element), BITS) << 16); \
    }

DEFINE_READ(read_vector, Vector, Words, Bits)
DEFINE_READ(read_half, Half, HalfWords, HalfBits)
DEFINE_READ(read_quarter, Quarter, QuarterWords, QuarterBits)

INLINE float read_single(const void *data, long element, int half) {
    if (!half) return ((const float *)data)[element];
    union {
        uint32_t bits;
        float value;
    } single = {(uint32_t)((const uint16_t *)data)[element] << 16};
    return single.value;
}

/* Sums are added to `out` if `more`. `num_rows`, `num_vectors` and `half` are constants where this is inlined: the sums
 * are registers. */
#define DEFINE_TILE(NAME, TYPE, READ)                                                                         \
    INLINE void NAME(int num_rows, int num_vectors, int half, const float *const *x, const void *w, long ldw, \
                     float *const *out, long column, long depth, int more) {                                  \
        const int lanes = sizeof(TYPE) / sizeof(float);                                                       \
        TYPE sums[TILE][LANES];                                                                               \
        for (int row = 0; row < num_rows; row++)                                                              \
            for (int v = 0; v < num_vectors; v++)                                                             \
                sums[row][v] = (TYPE){0};                                                                     \
        for (long k = 0; k < depth; k++)                                                                      \
            for (int v = 0; v < num_vectors; v++) {                                                           \
                TYPE weight = READ(w, k * ldw + column + v * lanes, half);                                    \
                for (int row = 0; row < num_rows; row++) sums[row][v] += weight * x[row][k];                  \
            }                                                                                                 \
        for (int row = 0; row < num_rows; row++)                                                              \
            for (int v = 0; v < num_vectors; v++) {                                                           \
                TYPE *to = (TYPE *)(out[row] + column + v * lanes);                                           \
                if (more) sums[row][v] += *to;                                                                \
                *to = sums[row][v];                                                                           \
            }                                                                                                 \
    }

DEFINE_TILE(tile, Vector, read_vector)
DEFINE_TILE(half_tile, Half, read_half)
DEFINE_TILE(quarter_tile, Quarter, read_quarter)

INLINE void multiply_columns(int num_rows, int num_vectors, int half, const float *const *x, const void *w, long ldw,
                             float *const *out, long num_columns, long depth, int more) {
    long column = 0;
    for (; column + num_vectors * LANES <= num_columns; column += num_vectors * LANES)
        tile(num_rows, num_vectors, half, x, w, ldw, out, column, depth, more);
    for (; column + LANES <= num_columns; column += LANES) tile(num_rows, 1, half, x, w, ldw, out, column, depth, more);
    for (; column + LANES / 2 <= num_columns; column += LANES / 2)
        half_tile(num_rows, 1, half, x, w, ldw, out, column, depth, more);
    for (; column + LANES / 4 <= num_columns; column += LANES / 4)
        quarter_tile(num_rows, 1, half, x, w, ldw, out, column, depth, more);
    for (; column < num_columns; column++) /* fmaf: whether a compiler fuses a * b + c depends on the loops around it */
        for (int row = 0; row < num_rows; row++) {
            float sum = 0.0f;
            for (long k = 0; k < depth; k++) sum = fmaf(x[row][k], read_single(w, k * ldw + column, half), sum);
            out[row][column] = more ? out[row][column] + sum : sum;
        }
}

/* One to TILE rows. The fewer they are, the more neighbouring columns are read at once. */
INLINE void multiply_few(long num_rows, int half, const float *const *x, const void *w, long ldw, float *const *out,
                         long num_columns, long depth, int more) {
    switch (num_rows) {
    case 1: multiply_columns(1, 16, half, x, w, ldw, out, num_columns, depth, more); break;
    case 2: multiply_columns(2, 8, half, x, w, ldw, out, num_columns, depth, more); break;
    case 3: multiply_columns(3, 4, half, x, w, ldw, out, num_columns, depth, more); break;
    default: multiply_columns(4, 4, half, x, w, ldw, out, num_columns, depth, more);
    }
}

/* Not inlined: compiling the sixteen tiles is most of the library's build. */
CLONES static void multiply_float(long num_rows, const float *const *x, const void *w, long ldw, float *const *out,
                                  long num_columns, long depth, int more) {
    multiply_few(num_rows, 0, x, w, ldw, out, num_columns, depth, more);
}

CLONES static void multiply_half(long num_rows, const float *const *x, const void *w, long ldw, float *const *out,
                                 long num_columns, long depth, int more) {
    multiply_few(num_rows, 1, x, w, ldw, out, num_columns, depth, more);
}

/* panel [depth, num_columns] = that part of w. */
INLINE void copy_panel(int half, const void *w, long ldw, long column, long num_columns, long first, long depth,
                       float *panel) {
    for (long k = 0; k < depth; k++) {
        long element = (first + k) * ldw + column, i = 0;
        float *to = panel + k * num_columns;
        for (; i + LANES <= num_columns; i += LANES) store(to + i, read_vector(w, element + i, half));
        for (; i < num_columns; i++) to[i] = read_single(w, element + i, half);
    }
}

INLINE void multiply_panels(long num_rows, int half, const float *const *x, const void *w, long ldw, float *const *out,
                            long num_columns, long depth) {
    float panel[PANEL_DEPTH * PANEL_COLUMNS];
    for (long column = 0; column < num_columns; column += PANEL_COLUMNS) {
        long width = num_columns - column < PANEL_COLUMNS ? num_columns - column : PANEL_COLUMNS;
        for (long first = 0; first < depth; first += PANEL_DEPTH) {
            long height = depth - first < PANEL_DEPTH ? depth - first : PANEL_DEPTH;
            copy_panel(half, w, ldw, column, width, first, height, panel);
            for (long row = 0; row < num_rows; row += TILE) {
                const float *inputs[TILE] = {0};
                float *outputs[TILE] = {0};
                long count = num_rows - row < TILE ? num_rows - row : TILE;
                for (long i = 0; i < count; i++) inputs[i] = x[row + i] + first, outputs[i] = out[row + i] + column;
                multiply_float(count, inputs, panel, width, outputs, width, height, first > 0);
            }
        }
    }
}

INLINE void multiply_some(long num_rows, int half, const float *const *x, const void *w, long ldw, float *const *out,
                          long num_columns, long depth) {
    if (num_rows > TILE && num_columns >= PANEL_LEAST) {
        multiply_panels(num_rows, half, x, w, ldw, out, num_columns, depth);
        return;
    }
    for (long row = 0; row < num_rows; row += TILE) {
        long count = num_rows - row < TILE ? num_rows - row : TILE;
        for (long first = 0; first < depth; first += PANEL_DEPTH) {
            const float *inputs[TILE] = {0};
            for (long i = 0; i < count; i++) inputs[i] = x[row + i] + first;
            long height = depth - first < PANEL_DEPTH ? depth - first : PANEL_DEPTH;
            const void *part = weights_from((Weights){w, half}, first * ldw).data;
            if (half) multiply_half(count, inputs, part, ldw, out + row, num_columns, height, first > 0);
            else multiply_float(count, inputs, part, ldw, out + row, num_columns, height, first > 0);
        }
    }
}

CLONES void dsv4_multiply_rows(long num_rows, const float *const *x, Weights w, long ldw, float *const *out,
                               long num_columns, long depth) {
    if (w.half) multiply_some(num_rows, 1, x, w.data, ldw, out, num_columns, depth);
    else multiply_some(num_rows, 0, x, w.data, ldw, out, num_columns, depth);
}

void dsv4_multiply(const float *x, long ldx, Weights w, long ldw, float *out, long ldout, long num_rows,
                   long num_columns, long depth) {
    for (long row = 0; row < num_rows; row += ROWS) {
        const float *inputs[ROWS];
        float *outputs[ROWS];
        long count = num_rows - row < ROWS ? num_rows - row : ROWS;
        for (long i = 0; i < count; i++) inputs[i] = x + (row + i) * ldx, outputs[i] = out + (row + i) * ldout;
        dsv4_multiply_rows(count, inputs, w, ldw, outputs, num_columns, depth);
    }
}

/* out [rows, columns] = x [rows, depth], rows `ldx` floats apart, times w. */
void dsv4_linear(const float *x, long ldx, const void *w, long half, long ldw, float *out, long num_rows,
                 long num_columns, long depth) {
    dsv4_multiply(x, ldx, (Weights){w, half}, ldw, out, num_columns, num_rows, num_columns, depth);
}

/* Heads o [rows, groups * width] -> low [rows, groups * rank], group by group with wo_a [groups], each [rank, width],
 * then -> out [rows, columns] with wo_b. */
void dsv4_grouped_out_proj(const float *o, const void *wo_a, const void *wo_b, long half, float *low, float *out,
                           long num_rows, long num_groups, long width, long rank, long num_columns) {
    for (long group = 0; group < num_groups; group++) {
        Weights weights = weights_from((Weights){wo_a, half}, group * rank * width);
        dsv4_multiply(o + group * width, num_groups * width, weights, rank, low + group * rank, num_groups * rank,
                      num_rows, rank, width);
    }
    dsv4_multiply(low, num_groups * rank, (Weights){wo_b, half}, num_columns, out, num_columns, num_rows, num_columns,
                  num_groups * rank);
}
