/* Sums of tiles of products of both sides' coordinates of a sum of outer products, with nothing in between in memory.
 *
 * Eight tokens are in the lanes of a vector while a side is transformed, so that signs, shuffles and the Hadamard
 * transform are moves and additions of whole vectors. Tokens come in chunks whose coordinates stay in cache.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define SHARED (1 << 19) /* sums that threads share, beyond those of one example */
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4)));

/* One side of a matrix: entry e of a vector goes to place[e] with sign[e]; coordinate c is entry pick[c] of the
 * transform of length count. Where `adds`, several entries share a place. */
typedef struct {
    int64_t size, count, needed, adds;
    const int32_t *place, *pick;
    const float *sign;
} side_t;

/* A side of one-hot vectors, whose transform goes in two stages, across blocks of `length` entries and within them: that
 * of e has its one at place[e], with sign[e]. Column c of the other side meets `stack` blocks of coordinates; the second
 * stage gives the i-th of them flips[block of e][i][c]. Coordinate c of a block is entry within[c] of the first stage. */
typedef struct {
    int64_t length, stack;
    const int32_t *place, *within;
    const float *sign, *flips;
} rows_t;

/* One factor: the vector of token t of example e begins at data + e * example + t * token, or it is the one-hot vector
 * of index[e * example + t * token]. */
typedef struct {
    const float *data;
    const int64_t *index;
    int64_t example, token;
} factor_t;

/* Entries begin to end are added to the numbers of a sketch, the first to number `first`, each next one `step` on. */
typedef struct {
    int64_t first, begin, end;
} run_t;

/* How entries make up the numbers of a sketch. Entry k is product order[k] times sign[k], or product k, or without a
 * sign, where those are not given. */
typedef struct {
    const run_t *runs;
    int64_t count, step;
    const int32_t *order;
    const float *sign;
    float scale;
} sums_t;

INLINE void transpose(vec r[8]) {
    vec a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

INLINE void butterfly(vec *a, vec *b) {
    vec sum = *a + *b, difference = *a - *b;
    *a = sum;
    *b = difference;
}

/* One pass of the Hadamard transform over `radix` vectors that lie `step` apart. */
#define PASS(radix)                                                                                                    \
    for (int64_t i = 0; i < n; i += (radix) * step)                                                                    \
        for (int64_t j = i; j < i + step; j++) {                                                                       \
            vec r[radix];                                                                                              \
            for (int k = 0; k < (radix); k++) r[k] = y[j + k * step];                                                  \
            for (int h = 1; h < (radix); h *= 2)                                                                       \
                for (int k = 0; k < (radix); k++)                                                                      \
                    if (!(k & h)) butterfly(&r[k], &r[k + h]);                                                         \
            for (int k = 0; k < (radix); k++) y[j + k * step] = r[k];                                                  \
        }                                                                                                              \
    step *= (radix)

static void passes(vec *y, int64_t n, int64_t step) {
    while (8 * step <= n) { PASS(8); }
    if (4 * step <= n) { PASS(4); }
    if (2 * step <= n) { PASS(2); }
}

/* The transform of stretches that fit the first cache, and then across them. */
static void hadamard(vec *y, int64_t n) {
    const int64_t stretch = n < 512 ? n : 512;
    for (int64_t i = 0; i < n; i += stretch) passes(y + i, stretch, 1);
    passes(y, n, stretch);
}

/* Coordinates of up to eight tokens: out[t * stride + c]. */
static void coordinates(const side_t *side, const factor_t *factor, int64_t offset, int tokens, vec *y, float *out,
                        int64_t stride) {
    const int64_t token = factor->token;
    const float *x = factor->data + offset;
    const float *rows[LANES];
    for (int t = 0; t < LANES; t++) rows[t] = x + (t < tokens ? t : 0) * token;
    if (side->adds || side->size < side->count || side->size % 8) memset(y, 0, sizeof(vec) * side->count);
    int64_t e = 0;
    for (; e + 8 <= side->size; e += 8) {
        vec r[8];
        for (int t = 0; t < LANES; t++) r[t] = *(const loose *)(rows[t] + e);
        transpose(r);
        if (side->adds)
            for (int k = 0; k < 8; k++) y[side->place[e + k]] += side->sign[e + k] * r[k];
        else
            for (int k = 0; k < 8; k++) y[side->place[e + k]] = side->sign[e + k] * r[k];
    }
    for (; e < side->size; e++) {
        vec v;
        for (int t = 0; t < LANES; t++) v[t] = rows[t][e];
        y[side->place[e]] += side->sign[e] * v;
    }
    hadamard(y, side->count);
    int64_t c = 0;
    for (; c + 8 <= side->needed; c += 8) {
        vec r[8];
        for (int k = 0; k < 8; k++) r[k] = y[side->pick[c + k]];
        transpose(r);
        for (int t = 0; t < tokens; t++) *(loose *)(out + t * stride + c) = r[t];
    }
    for (; c < side->needed; c++)
        for (int t = 0; t < tokens; t++) out[t * stride + c] = y[side->pick[c]][t];
}

#define SPREAD(x) ((vec){x, x, x, x, x, x, x, x})

/* Keep a vector in a register: compilers would read it from memory again for every multiplication. */
#ifdef __AVX__
#define PIN(x) __asm__("" : "+x"(x))
#else
#define PIN(x) ((void)0)
#endif

/* Add products to r × c vectors of sums: that of i and j gets Σ_t U · V, expressions in i or j and in t. */
#define BLOCK(r, c, U, V)                                                                                              \
    do {                                                                                                               \
        vec s[r][c];                                                                                                   \
        for (int i = 0; i < (r); i++)                                                                                  \
            for (int j = 0; j < (c); j++) s[i][j] = *(loose *)(sums + i * sum_row + j * sum_column);                   \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            vec a[r], b[c];                                                                                            \
            for (int i = 0; i < (r); i++) a[i] = U;                                                                    \
            for (int j = 0; j < (c); j++) b[j] = V;                                                                    \
            for (int i = 0; i < (r); i++) PIN(a[i]);                                                                   \
            for (int j = 0; j < (c); j++) PIN(b[j]);                                                                   \
            for (int i = 0; i < (r); i++)                                                                              \
                for (int j = 0; j < (c); j++) s[i][j] += a[i] * b[j];                                                  \
        }                                                                                                              \
        for (int i = 0; i < (r); i++)                                                                                  \
            for (int j = 0; j < (c); j++) *(loose *)(sums + i * sum_row + j * sum_column) = s[i][j];                   \
    } while (0)

/* Products of a chunk of tokens with eight tiles in a vector: sums[i][j][tile]; coordinates lie [in tile][tile]. */
static void across_tiles(const float *u, const float *v, int64_t tokens, int64_t u_token, int64_t v_token,
                         int64_t rows, int64_t columns, int64_t tiles, float *all) {
    const int64_t sum_row = columns * tiles, sum_column = tiles;
    for (int64_t tile = 0; tile < tiles; tile += LANES)
        for (int64_t row = 0; row < rows; row += 4)
            for (int64_t column = 0; column < columns; column += 2) {
                const float *left = u + row * tiles + tile, *right = v + column * tiles + tile;
                float *sums = all + row * sum_row + column * sum_column + tile;
#define U (*(const loose *)(left + t * u_token + i * tiles))
#define V (*(const loose *)(right + t * v_token + j * tiles))
                if (row + 4 <= rows && column + 2 <= columns) BLOCK(4, 2, U, V);
                else
                    for (int64_t k = row; k < rows && k < row + 4; k++, left += tiles, sums += sum_row) {
                        if (column + 2 <= columns) BLOCK(1, 2, U, V);
                        else BLOCK(1, 1, U, V);
                    }
#undef U
#undef V
            }
}

/* The same with eight columns in a vector: sums[tile][i][j]; coordinates lie [tile][in tile]. */
static void across_columns(const float *u, const float *v, int64_t tokens, int64_t u_token, int64_t v_token,
                           int64_t rows, int64_t columns, int64_t tiles, float *all) {
    const int64_t sum_row = columns, sum_column = LANES;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t row = 0; row < rows; row += 4)
            for (int64_t column = 0; column < columns; column += 2 * LANES) {
                const float *left = u + tile * rows + row, *right = v + tile * columns + column;
                float *sums = all + (tile * rows + row) * columns + column;
#define U SPREAD(left[t * u_token + i])
#define V (*(const loose *)(right + t * v_token + j * LANES))
                if (row + 4 <= rows && column + 2 * LANES <= columns) BLOCK(4, 2, U, V);
                else
                    for (int64_t k = row; k < rows && k < row + 4; k++, left++, sums += sum_row) {
                        if (column + 2 * LANES <= columns) BLOCK(1, 2, U, V);
                        else BLOCK(1, 1, U, V);
                    }
#undef U
#undef V
            }
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* What is the same for all pieces. A piece is `length` tokens of one example, or what is left of it. The sums of its
 * tile products, [tile][row][column], make up a row of `out`; `turned` says that rows and columns changed places. */
typedef struct {
    const side_t *left, *right;
    const rows_t *one_hot; /* in the place of left */
    const factor_t *l, *r;
    const sums_t *sums;
    int64_t tokens, length, chunk, rows, columns, tiles, in_lanes, turned;
    float *out;
    int64_t row;
} work_t;

static int64_t entries(const work_t *w) { return w->tiles * w->rows * w->columns; }

/* Columns of the sums of one-hot vectors, in whole vectors. */
static int64_t padded(const work_t *w) { return larger(w->right->needed, LANES); }

/* Numbers of memory that a piece takes. */
static int64_t scratch(const work_t *w) {
    const int64_t v = w->chunk * (w->right->needed + LANES);
    if (w->one_hot) return w->right->count * LANES + v + w->one_hot->stack * w->one_hot->length * padded(w);
    return larger(w->left->count, w->right->count) * LANES + w->chunk * (w->left->needed + LANES) + v;
}

/* Add vectors of one-hot rows to place[row] of a block, as the second stage's signs have it: all[stack][length][c]. */
static void scatter(const work_t *w, const int64_t *index, const float *v, int64_t tokens, int64_t v_stride, vec *all) {
    const rows_t *rows = w->one_hot;
    const int64_t width = padded(w) / LANES;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t row = index[t * w->l->token];
        const int64_t block = rows->place[row] / rows->length, entry = rows->place[row] % rows->length;
        const vec sign = SPREAD(rows->sign[row]);
        const loose *from = (const loose *)(v + t * v_stride);
        for (int64_t i = 0; i < rows->stack; i++) {
            const loose *flips = (const loose *)rows->flips + (block * rows->stack + i) * width;
            vec *to = all + (i * rows->length + entry) * width;
            for (int64_t c = 0; c < width; c++) to[c] += sign * flips[c] * from[c];
        }
    }
}

/* Take the products out of the transformed sums, `columns` of a tile at a time. */
INLINE void gather(const work_t *w, const float *all, float *sums, const int64_t columns) {
    const rows_t *rows = w->one_hot;
    for (int64_t tile = 0; tile < w->tiles; tile++)
        for (int64_t row = 0; row < w->rows; row++, sums += columns) {
            const int64_t c = rows->stack > 1 ? row : tile * w->rows + row;
            const int64_t block = rows->stack > 1 ? c / rows->length : 0;
            const float *from = all + (block * rows->length + rows->within[c % rows->length]) * padded(w);
            for (int64_t k = 0; k < columns; k++) sums[k] = from[tile * columns + k];
        }
}

/* Sum up the products of a piece of one-hot rows, as [tile][row][column]: one transform for all tokens. */
static void piece_of_rows(const work_t *w, int64_t example, int64_t begin, int64_t end, float *sums, float *memory) {
    const int64_t stride = w->right->needed + LANES, width = padded(w) / LANES, length = w->one_hot->length;
    vec *all = (vec *)memory + w->right->count;
    float *v = (float *)(all + w->one_hot->stack * length * width);
    memset(all, 0, sizeof(vec) * w->one_hot->stack * length * width);
    for (int64_t at = begin; at < end; at += w->chunk) {
        const int64_t some = smaller(w->chunk, end - at);
        for (int64_t t = 0; t < some; t += LANES)
            coordinates(w->right, w->r, example * w->r->example + (at + t) * w->r->token,
                        (int)smaller(some - t, LANES), (vec *)memory, v + t * stride, stride);
        scatter(w, w->l->index + example * w->l->example + at * w->l->token, v, some, stride, all);
    }
    for (int64_t i = 0; i < w->one_hot->stack; i++) passes(all + i * length * width, length * width, width);
    /* The commonest width by itself: a loop of unknown length costs more than the four numbers that it copies. */
    if (w->columns == 4) gather(w, (const float *)all, sums, 4);
    else gather(w, (const float *)all, sums, w->columns);
}

/* Sum up the products of a piece, as [tile][row][column], or [row][column][tile] with tiles in the lanes. */
static void piece(const work_t *w, int64_t example, int64_t number, float *sums, float *memory) {
    const int64_t begin = number * w->length, end = smaller(begin + w->length, w->tokens);
    if (w->one_hot) {
        piece_of_rows(w, example, begin, end, sums, memory);
        return;
    }
    const int64_t u_stride = w->left->needed + LANES, v_stride = w->right->needed + LANES;
    float *u = memory + larger(w->left->count, w->right->count) * LANES, *v = u + w->chunk * u_stride;
    memset(sums, 0, sizeof(float) * entries(w));
    for (int64_t at = begin; at < end; at += w->chunk) {
        const int64_t some = smaller(w->chunk, end - at);
        for (int64_t t = 0; t < some; t += LANES) {
            const int lanes = (int)smaller(some - t, LANES);
            const int64_t l = example * w->l->example + (at + t) * w->l->token;
            const int64_t r = example * w->r->example + (at + t) * w->r->token;
            coordinates(w->left, w->l, l, lanes, (vec *)memory, u + t * u_stride, u_stride);
            coordinates(w->right, w->r, r, lanes, (vec *)memory, v + t * v_stride, v_stride);
        }
        (w->in_lanes ? across_tiles : across_columns)(u, v, some, u_stride, v_stride, w->rows, w->columns, w->tiles,
                                                      sums);
    }
}

/* Bring sums into the order [tile][row][column] of the matrix that is sketched. Returns where they are then. */
static const float *in_order(const work_t *w, const float *sums, float *other) {
    const int64_t r = w->rows, c = w->columns, n = w->tiles;
    if (!w->in_lanes && (!w->turned || r == 1)) return sums;
    const int64_t tile_step = w->in_lanes ? 1 : r * c, entry_step = w->in_lanes ? n : 1;
    for (int64_t i = 0; i < r; i++)
        for (int64_t j = 0; j < c; j++) {
            const float *from = sums + (i * c + j) * entry_step;
            float *to = other + (w->turned ? j * r + i : i * c + j);
            for (int64_t tile = 0; tile < n; tile++) to[tile * r * c] = from[tile * tile_step];
        }
    return other;
}

static void add(const sums_t *s, const float *products, float *out) {
    for (int64_t i = 0; i < s->count; i++) {
        float *to = out + s->runs[i].first;
        for (int64_t k = s->runs[i].begin; k < s->runs[i].end; k++, to += s->step)
            *to += s->scale * ((s->sign ? s->sign[k] : 1) * products[s->order ? s->order[k] : k]);
    }
}

/* The commonest case by itself, for compilers to take eight at a time. */
static void add_signed(const sums_t *s, const float *products, float *out) {
    if (s->order || !s->sign || s->step != 1) {
        add(s, products, out);
        return;
    }
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t begin = s->runs[i].begin, number = s->runs[i].end - begin;
        float *restrict to = out + s->runs[i].first;
        const float *restrict from = products + begin, *restrict sign = s->sign + begin;
        for (int64_t k = 0; k < number; k++) to[k] += s->scale * (sign[k] * from[k]);
    }
}

/* Add the sums of `parts` pieces of an example, in their order, to its sketch. */
static void finish(const work_t *w, int64_t example, float *parts, int64_t number, float *other) {
    for (int64_t part = 1; part < number; part++)
        for (int64_t k = 0; k < entries(w); k++) parts[k] += parts[part * entries(w) + k];
    add_signed(w->sums, in_order(w, parts, other), w->out + example * w->row);
}

static float *room(int64_t numbers) { return aligned_alloc(64, sizeof(float) * ((numbers + 15) / 16 * 16)); }

/* Add the sketches of all examples. Returns 0, or 1 where there is no memory. */
int add_tiles(const work_t *w, int64_t examples, int threads) {
    const int64_t pieces = (w->tokens + w->length - 1) / w->length, size = entries(w);
    const int64_t working = scratch(w);
    /* Examples of several pieces are shared by threads, some examples at a time. */
    const int64_t together = pieces == 1 ? examples : larger(1, smaller(examples, SHARED / (pieces * size)));
    float *shared = pieces == 1 ? 0 : room(together * pieces * size);
    int failed = pieces > 1 && !shared;
    (void)threads; /* a compiler without OpenMP has one */
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = room(working + 2 * size), *own = memory + working, *other = own + size;
        failed |= !memory;
        if (pieces == 1) {
#pragma omp for schedule(dynamic)
            for (int64_t example = 0; example < examples; example++)
                if (memory) {
                    piece(w, example, 0, own, memory);
                    finish(w, example, own, 1, other);
                }
        } else
            for (int64_t first = 0; first < examples && shared; first += together) {
                const int64_t some = smaller(together, examples - first);
#pragma omp for schedule(dynamic)
                for (int64_t part = 0; part < some * pieces; part++)
                    if (memory) piece(w, first + part / pieces, part % pieces, shared + part * size, memory);
#pragma omp for schedule(dynamic)
                for (int64_t e = 0; e < some; e++)
                    if (memory) finish(w, first + e, shared + e * pieces * size, pieces, other);
            }
        free(memory);
    }
    free(shared);
    return failed;
}

/* One vector of each example: its coordinates are the entries. */
typedef struct {
    const side_t *side;
    const sums_t *sums;
    factor_t factor; /* examples take the place of tokens */
} vector_t;

/* Add the sketches of `number` vectors of each example, where the longest side has `longest` coordinates. */
int add_vectors(const vector_t *v, int64_t number, int64_t longest, int64_t examples, float *out, int64_t row,
                int threads) {
    const int64_t each = smaller(LANES, larger(1, (examples + threads - 1) / threads)), stride = longest + LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = room((longest + stride) * LANES), *found = memory + longest * LANES;
        failed |= !memory;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < examples; first += each) {
            const int lanes = (int)smaller(each, examples - first);
            for (int64_t i = 0; i < number && memory; i++) {
                coordinates(v[i].side, &v[i].factor, first * v[i].factor.token, lanes, (vec *)memory, found, stride);
                for (int e = 0; e < lanes; e++) add(v[i].sums, found + e * stride, out + (first + e) * row);
            }
        }
        free(memory);
    }
    return failed;
}
