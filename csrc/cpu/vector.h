/* Sixteen floats at a time in GNU C vector types, which gcc and clang lower to AVX-512, AVX2, SSE2 or NEON.
 *
 * On x86-64 Linux CLONES compiles a function once per instruction set and the dynamic linker picks one when the library
 * is loaded. Helpers are always inlined, so that they take the instruction set of the clone that uses them.
 *
 * No -ffast-math: sums have the order that is written, so a row's result does not depend on its batch, and NaN stays
 * NaN.
 */
#ifndef DSV4_VECTOR_H
#define DSV4_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

#define LANES 16

/* The alignment of a float: loads and stores through these types may be unaligned. */
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Words __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t HalfWords __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t QuarterWords __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint32_t HalfBits __attribute__((vector_size(32)));
typedef uint32_t QuarterBits __attribute__((vector_size(16)));

INLINE Vector load(const float *from) { return *(const Vector *)from; }
INLINE void store(float *to, Vector value) { *(Vector *)to = value; }
INLINE Vector spread(float value) { return value - (Vector){0}; }

/* The first `count` of at most 16 floats, the rest zero. */
INLINE Vector load_some(const float *from, long count) {
    if (count >= LANES) return load(from);
    Vector value = {0};
    memcpy(&value, from, (size_t)count * sizeof(float));
    return value;
}

INLINE void store_some(float *to, Vector value, long count) {
    if (count >= LANES) store(to, value);
    else memcpy(to, &value, (size_t)count * sizeof(float));
}

/* Lanes of `yes` where the mask is set, else of `no`. */
INLINE Vector pick(Mask mask, Vector yes, Vector no) { return (Vector)(((Mask)yes & mask) | ((Mask)no & ~mask)); }

INLINE Vector at_most(Vector value, Vector limit) { return pick(value > limit, limit, value); }
INLINE Vector at_least(Vector value, Vector limit) { return pick(value < limit, limit, value); }

INLINE float sum_lanes(Vector value) {
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) value[lane] += value[lane + width];
    return value[0];
}

/* e^x to 2 units in the last place: range reduction by ln 2 in two parts, then the polynomial of Cephes' expf. Below
 * -87.3 it is 0, above 88.3 it stays there, NaN stays NaN. */
INLINE Vector exponential(Vector x) {
    const Vector rounder = spread(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    Mask vanishes = x < -87.3f;
    x = at_least(at_most(x, spread(88.3f)), spread(-87.3f));
    Vector n = (x * 1.44269504f + rounder) - rounder;
    Vector r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vector y = spread(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    Mask power = (__builtin_convertvector(n, Mask) + 127) << 23;
    return pick(vanishes, (Vector){0}, y * (Vector)power);
}

#endif
