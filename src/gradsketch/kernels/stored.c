/* Products of a few vectors with rows of stored numbers, which become float32 in registers and nowhere else.
 *
 * Two rows meet four vectors at a time. A product is summed in eight lanes, always in the same order, so that it does
 * not depend on which rows and vectors are asked for together, nor on the number of threads.
 */
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define LANES 8
#define ROWS 64 /* of a block, which stays in the second cache while the vectors pass */
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4)));
typedef int32_t ints __attribute__((vector_size(32)));

/* Eight numbers of a row, from number k on. */
INLINE vec load_float32(const uint8_t *row, int64_t k) { return *(const loose *)(row + 4 * k); }

/* Eight integers as 32 bits each: compilers take bytes one by one where they are not told. */
#ifdef __AVX2__
#define WIDENED(type, instruction, bytes)                                                                              \
    INLINE ints widened_##type(const uint8_t *from) {                                                                  \
        __m128i eight = _mm_setzero_si128();                                                                           \
        memcpy(&eight, from, bytes);                                                                                   \
        return (ints)instruction(eight);                                                                               \
    }
#else
#define WIDENED(type, instruction, bytes)                                                                              \
    INLINE ints widened_##type(const uint8_t *from) {                                                                  \
        type##_t eight __attribute__((vector_size(bytes)));                                                            \
        memcpy(&eight, from, bytes);                                                                                   \
        return __builtin_convertvector(eight, ints);                                                                   \
    }
#endif
WIDENED(int8, _mm256_cvtepi8_epi32, 8)
WIDENED(uint8, _mm256_cvtepu8_epi32, 8)
WIDENED(uint16, _mm256_cvtepu16_epi32, 16)

INLINE vec load_int8(const uint8_t *row, int64_t k) { return __builtin_convertvector(widened_int8(row + k), vec); }

INLINE vec load_bfloat16(const uint8_t *row, int64_t k) { return (vec)(widened_uint16(row + 2 * k) << 16); }

INLINE vec load_float16(const uint8_t *row, int64_t k) {
#ifdef __F16C__
    __m128i eight;
    memcpy(&eight, row + 2 * k, sizeof eight);
    return (vec)_mm256_cvtph_ps(eight);
#else
    /* The exponent moves by a product, which subnormal numbers survive. */
    const ints bits = widened_uint16(row + 2 * k);
    return (vec)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
#endif
}

/* Of every 64 numbers the first half stands in the low halves of 32 bytes, and 7 stands for zero. */
INLINE vec load_int4(const uint8_t *row, int64_t k) {
    const ints bytes = widened_uint8(row + k / 64 * 32 + k % 32);
    return __builtin_convertvector((bytes >> (k & 32 ? 4 : 0) & 15) - 7, vec);
}

/* A set bit is a one, a clear one a minus one. */
INLINE vec load_sign(const uint8_t *row, int64_t k) {
    const ints bit = {1, 2, 4, 8, 16, 32, 64, 128};
    const int32_t byte = row[k / 8];
    const ints clear = ((ints){byte, byte, byte, byte, byte, byte, byte, byte} & bit) == 0;
    return (vec)((clear & (int32_t)0x80000000) | 0x3f800000);
}

/* Rounded once wherever it stands: compilers are free to round twice in one place and once in another. */
INLINE vec plus_product(vec s, vec a, vec b) {
#ifdef __FMA__
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)s);
#else
    return s + a * b;
#endif
}

INLINE float sum(vec s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }

/* Products of r rows with c vectors; what is left beyond the last eight numbers is filled up with zeros. */
#define TILE(load, r, c)                                                                                               \
    do {                                                                                                               \
        vec s[r][c] = {{{0}}};                                                                                         \
        for (int64_t k = 0; k < whole; k += LANES) {                                                                   \
            vec a[r];                                                                                                  \
            for (int i = 0; i < (r); i++) a[i] = load(row + i * row_bytes, k);                                         \
            for (int j = 0; j < (c); j++) {                                                                            \
                const vec b = *(const loose *)(x + j * count + k);                                                     \
                for (int i = 0; i < (r); i++) s[i][j] = plus_product(s[i][j], a[i], b);                                \
            }                                                                                                          \
        }                                                                                                              \
        if (whole < count)                                                                                             \
            for (int i = 0; i < (r); i++) {                                                                            \
                uint8_t end[4 * LANES] = {0};                                                                          \
                memcpy(end, row + i * row_bytes + whole * number_bytes, (count - whole) * number_bytes);               \
                const vec a = load(end, 0);                                                                            \
                for (int j = 0; j < (c); j++) {                                                                        \
                    vec b = {0};                                                                                       \
                    memcpy(&b, x + j * count + whole, (count - whole) * sizeof(float));                                \
                    s[i][j] = plus_product(s[i][j], a, b);                                                             \
                }                                                                                                      \
            }                                                                                                          \
        for (int i = 0; i < (r); i++)                                                                                  \
            for (int j = 0; j < (c); j++) to[j * rows + i] = sum(s[i][j]);                                             \
    } while (0)

/* The products of `vectors` vectors of `count` numbers with the first numbers of `rows` rows: out[vector][row]. */
#define PRODUCTS(name, number_bytes_)                                                                                  \
    void products_##name(const uint8_t *stored, int64_t rows, int64_t row_bytes, const float *directions,              \
                         int64_t vectors, int64_t count, float *out, int threads) {                                    \
        const int64_t whole = count / LANES * LANES, number_bytes = number_bytes_;                                     \
        (void)threads; /* a compiler without OpenMP has one */                                                         \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic)")                                             \
        for (int64_t block = 0; block < rows; block += ROWS) {                                                         \
            const int64_t end = block + ROWS < rows ? block + ROWS : rows;                                             \
            for (int64_t v = 0; v < vectors; v += 4)                                                                   \
                for (int64_t r = block; r < end; r += 2) {                                                             \
                    const uint8_t *row = stored + r * row_bytes;                                                       \
                    const float *x = directions + v * count;                                                           \
                    float *to = out + v * rows + r;                                                                    \
                    if (r + 2 <= end && v + 4 <= vectors) TILE(load_##name, 2, 4);                                     \
                    else                                                                                               \
                        for (int64_t i = r; i < end && i < r + 2; i++, row += row_bytes, to++)                         \
                            if (v + 4 <= vectors) TILE(load_##name, 1, 4);                                             \
                            else {                                                                                     \
                                const float *first = x;                                                                \
                                float *start = to;                                                                     \
                                for (int64_t j = v; j < vectors; j++, x += count, to += rows)                          \
                                    TILE(load_##name, 1, 1);                                                           \
                                x = first, to = start;                                                                 \
                            }                                                                                          \
                }                                                                                                      \
        }                                                                                                              \
    }

PRODUCTS(float32, 4)
PRODUCTS(bfloat16, 2)
PRODUCTS(float16, 2)
PRODUCTS(int8, 1)
PRODUCTS(int4, 0) /* whole blocks of 64 numbers */
PRODUCTS(sign, 0)
