// The loops of kernels.py for bfloat16 on a CPU with AVX512-BF16; matrix products in AMX tiles where
// the CPU has them. Values are rounded to bfloat16 where they are stored, sums are float32.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if !defined(__AVX512BF16__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "this CPU has no AVX512-BF16"
#endif

typedef uint16_t bf16;
typedef __m512 floats;  // 16 of them

enum { HEAD = 64, BLOCK = 32, KEYS = 256 };  // width of a head; rows of a product; keys at a time

static inline floats load(const bf16* x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

static inline void store(bf16* x, floats values) {
    _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh(values));
}

// 2^x to 4e-6 of itself: the whole part of x goes to the exponent, the rest through a polynomial.
static inline floats exp2_(floats x) {
    floats whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    floats y = _mm512_set1_ps(0.0096181291f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.0555041087f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.2402265070f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.6931471806f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// Layer norm of each row, then 1 + scale and shift, which each batch of `rows` rows has its own of.
int modulate(bf16* out, const bf16* x, const bf16* shift, const bf16* scale, long batch, long rows,
              long width, long stride, float eps) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < batch * rows; row++) {
        const bf16 *in = x + row * width, *add = shift + row / rows * stride,
                   *mul = scale + row / rows * stride;
        floats sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, load(in + i));
        floats mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (long i = 0; i < width; i += 16) {
            floats d = _mm512_sub_ps(load(in + i), mean);
            square = _mm512_fmadd_ps(d, d, square);
        }
        floats scaled = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(square) / width + eps));
        floats one = _mm512_set1_ps(1);
        for (long i = 0; i < width; i += 16) {
            floats normal = _mm512_mul_ps(_mm512_sub_ps(load(in + i), mean), scaled);
            floats factor = _mm512_add_ps(one, load(mul + i));
            store(out + row * width + i, _mm512_fmadd_ps(normal, factor, load(add + i)));
        }
    }
    return 0;
}

// tokens += gate * update
int add_gated(bf16* tokens, const bf16* gate, const bf16* update, long batch, long rows, long width,
               long stride) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < batch * rows; row++) {
        bf16* to = tokens + row * width;
        for (long i = 0; i < width; i += 16) {
            floats by = load(gate + row / rows * stride + i);
            store(to + i, _mm512_fmadd_ps(by, load(update + row * width + i), load(to + i)));
        }
    }
    return 0;
}

// x / (1 + exp(-2u)) with u = sqrt(2/pi) * (x + 0.044715 x^3): GELU by tanh
int gelu(bf16* x, long count) {
    const floats cubic = _mm512_set1_ps(-2 * 0.7978845608f * 1.44269504f * 0.044715f);
    const floats linear = _mm512_set1_ps(-2 * 0.7978845608f * 1.44269504f);
    const floats one = _mm512_set1_ps(1);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count; i += 16) {
        floats y = load(x + i);
        floats u = _mm512_mul_ps(y, _mm512_fmadd_ps(_mm512_mul_ps(y, y), cubic, linear));
        store(x + i, _mm512_div_ps(y, _mm512_add_ps(one, exp2_(u))));
    }
    return 0;
}

// SiLU of x * scale + shift, which each column has its own of
int activate(bf16* out, const bf16* x, const float* scale, const float* shift, long rows, long width) {
    const floats one = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1.44269504f);
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < width; i += 16) {
            floats y = _mm512_fmadd_ps(load(x + row * width + i), _mm512_loadu_ps(scale + i),
                                       _mm512_loadu_ps(shift + i));
            floats under = _mm512_add_ps(one, exp2_(_mm512_mul_ps(y, minus)));
            store(out + row * width + i, _mm512_div_ps(y, under));
        }
    return 0;
}

// RMS norms of the queries and the keys of each head, in place
int normalise_heads(bf16* qkv, const bf16* q_weight, const bf16* k_weight, long rows, long heads,
                     float eps) {
#pragma omp parallel for schedule(static)
    for (long part = 0; part < rows * 2 * heads; part++) {
        bf16* x = qkv + part / (2 * heads) * 3 * heads * HEAD + part % (2 * heads) * HEAD;
        const bf16* weight = part % (2 * heads) < heads ? q_weight : k_weight;
        floats square = _mm512_setzero_ps();
        for (int i = 0; i < HEAD; i += 16) square = _mm512_fmadd_ps(load(x + i), load(x + i), square);
        floats by = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(square) / HEAD + eps));
        for (int i = 0; i < HEAD; i += 16)
            store(x + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), by), load(weight + i)));
    }
    return 0;
}

// float16 to bfloat16, in the thread that asks: it works beside those that compute.
int shorten(bf16* out, const uint16_t* halves, long count) {
    for (long i = 0; i < count; i += 16)
        store(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(halves + i))));
    return 0;
}

// ---- Rows of 8 bits ------------------------------------------------------------------------------

// Every value minus, or plus, the one `step` places away: a stage of the Hadamard transform in 16.
static inline floats stage(floats x, __m512i away, __mmask16 minus) {
    return _mm512_add_ps(_mm512_permutexvar_ps(away, x),
                         _mm512_mask_sub_ps(x, minus, _mm512_setzero_ps(), x));
}

// The orthogonal Hadamard transform of 64 values: it spreads a large one over all.
static inline void rotate(floats x[4]) {
    const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 minus[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};
    for (int bit = 0; bit < 4; bit++) {
        __m512i away = _mm512_xor_si512(places, _mm512_set1_epi32(1 << bit));
        for (int i = 0; i < 4; i++) x[i] = stage(x[i], away, minus[bit]);
    }
    floats a = _mm512_add_ps(x[0], x[1]), b = _mm512_sub_ps(x[0], x[1]);
    floats c = _mm512_add_ps(x[2], x[3]), d = _mm512_sub_ps(x[2], x[3]);
    const floats eighth = _mm512_set1_ps(0.125f);
    x[0] = _mm512_mul_ps(_mm512_add_ps(a, c), eighth), x[1] = _mm512_mul_ps(_mm512_add_ps(b, d), eighth);
    x[2] = _mm512_mul_ps(_mm512_sub_ps(a, c), eighth), x[3] = _mm512_mul_ps(_mm512_sub_ps(b, d), eighth);
}

// Each row, rotated in pieces of 64, as whole numbers of a 127th of its largest value.
int quantise(int8_t* out, float* scales, const bf16* x, long rows, long width) {
    int failed = 0;
#pragma omp parallel
    {
        float* row = aligned_alloc(64, width * sizeof(float));
        if (!row) failed = 1;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            if (!row) continue;
            floats most = _mm512_set1_ps(1e-30f);
            __mmask16 odd = 0;  // is no number
            for (long i = 0; i < width; i += 64) {
                floats piece[4];
                for (int k = 0; k < 4; k++) piece[k] = load(x + r * width + i + 16 * k);
                rotate(piece);
                for (int k = 0; k < 4; k++) {
                    most = _mm512_max_ps(most, _mm512_abs_ps(piece[k]));
                    odd |= _mm512_cmp_ps_mask(piece[k], piece[k], _CMP_UNORD_Q);
                    _mm512_store_ps(row + i + 16 * k, piece[k]);
                }
            }
            scales[r] = odd ? NAN : _mm512_reduce_max_ps(most) / 127;
            floats by = _mm512_set1_ps(1 / scales[r]);
            for (long i = 0; i < width; i += 16) {
                __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(row + i), by));
                _mm_storeu_si128((__m128i*)(out + r * width + i), _mm512_cvtsepi32_epi8(whole));
            }
        }
        free(row);
    }
    return failed;
}

// Each row by its scale, plus the bias
int rescale(bf16* y, const float* scales, const bf16* bias, long rows, long width) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        floats by = _mm512_set1_ps(scales[r]);
        for (long i = 0; i < width; i += 16) {
            bf16* at = y + r * width + i;
            store(at, _mm512_fmadd_ps(load(at), by, load(bias + i)));
        }
    }
    return 0;
}

// ---- Products of 32 rows with 32 columns ---------------------------------------------------------
//
// c [32 x 32 of a row length] (+)= a [32 x 32*tiles] * b, where b lies in tiles of 32 x 16 values: tile
// t of column half h at b + t*down + h*right, as 16 rows of 16 pairs, a pair being two values of a
// column, one below the other.

enum { TILE = 512 };  // values of a tile

#ifdef __AMX_BF16__
static void configure(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; }
        tiles __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
}

static void release(void) { _tile_release(); }

static inline void product(float* c, long length, int add, const bf16* a, long a_length,
                           const bf16* b, long down, long right, int tiles) {
    if (add) {
        _tile_loadd(0, c, length * 4); _tile_loadd(1, c + 16, length * 4);
        _tile_loadd(2, c + 16 * length, length * 4); _tile_loadd(3, c + 16 * length + 16, length * 4);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (int t = 0; t < tiles; t++, a += 32, b += down) {
        _tile_loadd(4, a, a_length * 2);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + 16 * a_length, a_length * 2);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, length * 4); _tile_stored(1, c + 16, length * 4);
    _tile_stored(2, c + 16 * length, length * 4); _tile_stored(3, c + 16 * length + 16, length * 4);
}
#else
static void configure(void) {}
static void release(void) {}

static inline void product(float* c, long length, int add, const bf16* a, long a_length,
                           const bf16* b, long down, long right, int tiles) {
    for (int row = 0; row < 32; row += 8) {
        floats sums[8][2];
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 2; h++)
                sums[i][h] = add ? _mm512_loadu_ps(c + (row + i) * length + 16 * h) : _mm512_setzero_ps();
        for (int t = 0; t < tiles; t++)
            for (int pair = 0; pair < 16; pair++) {
                __m512bh left = (__m512bh)_mm512_loadu_si512(b + t * down + 32 * pair);
                __m512bh right_ = (__m512bh)_mm512_loadu_si512(b + t * down + right + 32 * pair);
                for (int i = 0; i < 8; i++) {
                    int two;
                    memcpy(&two, a + (row + i) * a_length + 32 * t + 2 * pair, 4);
                    __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, left);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, right_);
                }
            }
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 2; h++) _mm512_storeu_ps(c + (row + i) * length + 16 * h, sums[i][h]);
    }
}
#endif

// ---- A linear layer of weights that lie as in a file ----------------------------------------------

enum { PANEL = 384 * 1024, AHEAD = 256 };  // values of a panel; how far on is fetched

// Rows and columns of 32-bit values change places.
static inline void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            x[i + 2 * half] = _mm512_unpacklo_epi64(y[i + half], y[i + 2 + half]);
            x[i + 2 * half + 1] = _mm512_unpackhi_epi64(y[i + half], y[i + 2 + half]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = i; j < i + 4; j++) {
            y[j] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88);
            y[j + 4] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xDD);
    }
}

// A tile of 16 outputs' weights for 32 inputs, of bfloat16 or of float16.
static inline void pack_weights(bf16* tile, const uint16_t* weights, long inputs, int halves) {
    __m512i rows[16];
    for (int i = 0; i < 16; i++, weights += inputs) {
        _mm_prefetch(weights + AHEAD, _MM_HINT_T0);
        rows[i] = _mm512_loadu_si512(weights);
        if (!halves) continue;
        floats low = _mm512_cvtph_ps(_mm512_castsi512_si256(rows[i]));
        floats high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(rows[i], 1));
        rows[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    transpose(rows);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, rows[i]);
}

// x times the weights' transpose, plus the bias, to rows of `length`. A panel of weights, as large as
// suits a core's cache, is packed and then meets all of x, so that nothing is packed twice.
int linear(bf16* out, const bf16* x, const uint16_t* weights, const bf16* bias, long rows, long inputs,
           long outputs, long length, long halves) {
    long tiles = inputs / 32, columns = PANEL / inputs / 32 * 32, size = BLOCK * inputs;
    int failed = 0;
    if (columns < 32) columns = 32;
#pragma omp parallel
    {
        bf16* panel = aligned_alloc(64, (columns * inputs + size) * sizeof(bf16));
        bf16* last = panel + columns * inputs;  // rows that are fewer than a block
        float sums[BLOCK * 32] __attribute__((aligned(64)));
        if (panel) memset(last, 0, size * sizeof(bf16));
        else failed = 1;
        configure();
#pragma omp for schedule(dynamic)
        for (long from = 0; from < outputs; from += columns) {
            if (!panel) continue;
            long some = outputs - from < columns ? outputs - from : columns;
            for (long j = 0; j < some; j += 16)
                for (long t = 0; t < tiles; t++)
                    pack_weights(panel + j / 32 * size + (2 * t + j / 16 % 2) * TILE,
                                 weights + (from + j) * inputs + 32 * t, inputs, halves);
            for (long r = 0; r < rows; r += BLOCK) {
                long count = rows - r < BLOCK ? rows - r : BLOCK;
                const bf16* block = x + r * inputs;
                if (count < BLOCK) block = memcpy(last, block, count * inputs * sizeof(bf16));
                for (long j = 0; j < some; j += 32) {
                    product(sums, 32, 0, block, inputs, panel + j / 32 * size, 2 * TILE, TILE, tiles);
                    floats left = load(bias + from + j), right = load(bias + from + j + 16);
                    for (long i = 0; i < count; i++) {
                        bf16* to = out + (r + i) * length + from + j;
                        store(to, _mm512_add_ps(_mm512_load_ps(sums + 32 * i), left));
                        store(to + 16, _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), right));
                    }
                }
            }
        }
        release();
        free(panel);
    }
    return failed;
}

// ---- Attention -----------------------------------------------------------------------------------

// 16 keys for the product with queries, where a key is a column: their pairs, transposed.
static void pack_keys(bf16* tiles, const bf16* keys) {
    const __m512i steps = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(HEAD / 2));
    for (int pair = 0; pair < HEAD / 2; pair++)
        _mm512_storeu_si512(tiles + 32 * pair, _mm512_i32gather_epi32(steps, (int*)keys + pair, 4));
}

// Two values for the product with probabilities, where a value is a row.
static void pack_values(bf16* tiles, const bf16* values) {
    for (int e = 0; e < HEAD; e += 16) {
        __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(values + e)));
        __m512i lower = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(values + HEAD + e)));
        _mm512_storeu_si512(tiles + e / 16 * TILE, _mm512_or_si512(upper, _mm512_slli_epi32(lower, 16)));
    }
}

// One block of queries among all keys: the softmax is carried on from keys to keys, with the largest
// score so far, and the sums so far, of each query.
static void attend(float* out, const bf16* queries, const bf16* keys, const bf16* values, long count,
                   float scale, float last) {
    float scores[BLOCK * KEYS] __attribute__((aligned(64)));
    bf16 weights[BLOCK * KEYS] __attribute__((aligned(64)));
    float largest[BLOCK], now[BLOCK], fade[BLOCK], sums[BLOCK * 16] __attribute__((aligned(64))) = {0};
    const floats by = _mm512_set1_ps(scale);
    for (int i = 0; i < BLOCK; i++) largest[i] = -INFINITY;
    for (long from = 0; from < count; from += KEYS) {
        long some = count - from < KEYS ? count - from : KEYS, padded = (some + 31) / 32 * 32;
        for (long j = 0; j < padded; j += 32)
            product(scores + j, KEYS, 0, queries, HEAD, keys + (from + j) * HEAD, TILE, 2 * TILE, 2);
        for (int i = 0; i < BLOCK; i++) {
            float* row = scores + i * KEYS;
            for (long j = some; j < padded; j++) row[j] = -INFINITY;
            if (from + some == count) row[some - 1] += last;
            floats even = _mm512_load_ps(row), odd = _mm512_load_ps(row + 16);
            for (long j = 32; j < padded; j += 32) {
                even = _mm512_max_ps(even, _mm512_load_ps(row + j));
                odd = _mm512_max_ps(odd, _mm512_load_ps(row + j + 16));
            }
            now[i] = fmaxf(largest[i], _mm512_reduce_max_ps(_mm512_max_ps(even, odd)));
        }
        for (int i = 0; i < BLOCK; i += 16) {
            floats less = _mm512_sub_ps(_mm512_loadu_ps(largest + i), _mm512_loadu_ps(now + i));
            _mm512_storeu_ps(fade + i, exp2_(_mm512_mul_ps(less, by)));
            _mm512_storeu_ps(largest + i, _mm512_loadu_ps(now + i));
        }
        for (int i = 0; i < BLOCK; i++) {
            floats less = _mm512_set1_ps(-now[i] * scale), faded = _mm512_set1_ps(fade[i]);
            floats sum = _mm512_mul_ps(_mm512_load_ps(sums + 16 * i), faded);
            for (long j = 0; j < padded; j += 16) {
                floats p = exp2_(_mm512_fmadd_ps(_mm512_load_ps(scores + i * KEYS + j), by, less));
                sum = _mm512_add_ps(sum, p);
                store(weights + i * KEYS + j, p);
            }
            _mm512_store_ps(sums + 16 * i, sum);
            for (int e = 0; from && fade[i] != 1 && e < HEAD; e += 16)
                _mm512_store_ps(out + i * HEAD + e, _mm512_mul_ps(_mm512_load_ps(out + i * HEAD + e), faded));
        }
        for (int e = 0; e < HEAD; e += 32)
            product(out + e, HEAD, from > 0, weights, KEYS, values + from * HEAD + e / 16 * TILE, 4 * TILE,
                    TILE, padded / 32);
    }
    for (int i = 0; i < BLOCK; i++) {
        floats whole = _mm512_set1_ps(1 / _mm512_reduce_add_ps(_mm512_load_ps(sums + 16 * i)));
        for (int e = 0; e < HEAD; e += 16)
            _mm512_store_ps(out + i * HEAD + e, _mm512_mul_ps(_mm512_load_ps(out + i * HEAD + e), whole));
    }
}

// Attention of two streams of rows [q k v] among both. The first stream's last row counts as if its
// score were higher by `last`, in the units of the scores before their scale.
int attention(bf16* first_out, bf16* second_out, const bf16* first, const bf16* second, long batch,
              long l, long n, long heads, float last) {
    long count = l + n, padded = (count + 31) / 32 * 32, width = heads * HEAD;
    int failed = 0;
#pragma omp parallel
    {
        long size = padded * HEAD;
        bf16* room = aligned_alloc(64, 4 * size * sizeof(bf16));  // rows beyond `count` stay zeros
        if (room) memset(room, 0, 4 * size * sizeof(bf16));
        else failed = 1;
        configure();
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * heads; unit++) {
            if (!room) continue;
            long b = unit / heads, head = unit % heads;
            bf16 *queries = room, *keys = queries + size, *values = keys + size, *rows = values + size;
            for (int part = 0; part < 3; part++) {  // the second stream first: its last row is `last`
                bf16* to = part ? rows : queries;
                for (long j = 0; j < count; j++) {
                    const bf16* row = j < n ? second + (b * n + j) * 3 * width
                                            : first + (b * l + j - n) * 3 * width;
                    memcpy(to + j * HEAD, row + part * width + head * HEAD, HEAD * sizeof(bf16));
                }
                for (long j = 0; part == 1 && j < padded; j += 16) pack_keys(keys + j * HEAD, rows + j * HEAD);
                for (long j = 0; part == 2 && j < padded; j += 2)
                    pack_values(values + j / 32 * 4 * TILE + j % 32 * 16, rows + j * HEAD);
            }
            for (long i = 0; i < count; i += BLOCK) {
                float out[BLOCK * HEAD] __attribute__((aligned(64)));
                attend(out, queries + i * HEAD, keys, values, count, 0.125f * 1.44269504f, last);
                for (long j = i; j < count && j < i + BLOCK; j++) {
                    bf16* to = j < n ? second_out + (b * n + j) * width : first_out + (b * l + j - n) * width;
                    for (int e = 0; e < HEAD; e += 16)
                        store(to + head * HEAD + e, _mm512_loadu_ps(out + (j - i) * HEAD + e));
                }
            }
        }
        release();
        free(room);
    }
    return failed;
}

// Ask the kernel for the tiles' registers; 0 where it gives them, or where none are needed.
int begin(void) {
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0;
#else
    return 0;
#endif
}
