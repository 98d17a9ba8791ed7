// Codes, a field of 16 words at a time: one vector lane owns one row, so a word of 16 rows is one load, an input is one
// broadcast, and nothing is summed across lanes. A code is looked up in a table that stays in registers; the index of a
// permute is taken from the low bits, so a shift is all the unpacking there is. (AVX2 goes by code_bytes.h.)

#pragma once

#include "matrix.h"
#include "vectors.h"

#if !defined(SAGE_AVX2)

// Inputs in float32; the two halves of a word are two columns.
template <int WIDTH> struct Exact {
    using V = Vector;
    using Input = float;
    V::Table table;
    explicit Exact(const float *values) : table(V::table(values)) {}
    template <int M, int B>
    void step(V::F (&sum)[M][B], const V::I (&words)[B], int shift, const float *x, size_t stride) const {
        V::F first[M], second[M];
        for (int m = 0; m < M; m++) {
            first[m] = V::set(x[m * stride]);
            second[m] = V::set(x[m * stride + 1]);
        }
        for (int b = 0; b < B; b++) {
            V::F low = V::template lookup<WIDTH>(table, V::right(words[b], shift));
            V::F high = V::template lookup<WIDTH>(table, V::right(words[b], shift + 16));
            for (int m = 0; m < M; m++) sum[m][b] = V::fma(high, second[m], V::fma(low, first[m], sum[m][b]));
        }
    }
};

#if defined(SAGE_AVX512BF16)
// Inputs and table in bfloat16, as a dense bfloat16 layer has them: one permute decodes 32 weights, and one instruction
// multiplies them and adds them up in float32.
template <int WIDTH> struct Bfloat {
    using V = Vector;
    using Input = uint16_t;
    __m512i table;
    explicit Bfloat(const float *values) {
        uint16_t rounded[32];
        for (int i = 0; i < 32; i++) rounded[i] = float_to_bfloat(values[i]);
        table = _mm512_loadu_si512(rounded);
    }
    template <int M, int B>
    void step(V::F (&sum)[M][B], const V::I (&words)[B], int shift, const uint16_t *x, size_t stride) const {
        __m512i pair[M];
        for (int m = 0; m < M; m++) {
            int32_t both;
            std::memcpy(&both, x + m * stride, 4);
            pair[m] = _mm512_set1_epi32(both);
        }
        for (int b = 0; b < B; b++) {
            __m512bh value = (__m512bh)_mm512_permutexvar_epi16(V::right(words[b], shift), table);
            for (int m = 0; m < M; m++) sum[m][b] = _mm512_dpbf16_ps(sum[m][b], value, (__m512bh)pair[m]);
        }
    }
};
#endif

// lane16 with one word a row and chunk (see kernels/resident/lane16.py); WIDTH is 1 to 5, so a unit is 1, 3 or 5 chunks.
template <template <int> class Arithmetic, int WIDTH, int M, int B>
static void segment_rows(const Segment &s, size_t block, int first, const typename Arithmetic<WIDTH>::Input *x,
                         size_t stride, const float *sums, size_t sums_stride, float *out, size_t out_stride) {
    using V = Vector;
    constexpr int UNIT = WIDTH == 3 || WIDTH == 5 ? WIDTH : 1;
    constexpr int PLAIN = 16 / WIDTH, LEFT = 16 - PLAIN * WIDTH, CODES = 16 * UNIT / WIDTH;
    constexpr uint32_t REST = ((1u << LEFT) - 1) * 0x00010001u;
    const Arithmetic<WIDTH> arithmetic(s.table);
    const uint32_t *words = s.words + block * s.tiles * WIDTH * ROWS + first;
    V::F sum[M][B], total[M][B];
    for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) sum[m][b] = total[m][b] = V::zero();
    const size_t groups = s.scales ? (s.tiles + s.group_tiles - 1) / s.group_tiles : 0;
    for (int t = 0; t < s.tiles; t++, words += WIDTH * ROWS, x += COLUMNS) {
        V::I rest[B];
#pragma GCC unroll 5
        for (int c = 0; c < WIDTH; c++) {
            V::I word[B];
            for (int b = 0; b < B; b++) word[b] = V::load(words + c * ROWS + b * 16);
            const int code = c / UNIT * CODES + c % UNIT * PLAIN;
#pragma GCC unroll 16
            for (int f = 0; f < PLAIN; f++) arithmetic.step(sum, word, f * WIDTH, x + 2 * (code + f), stride);
            if (LEFT == 0) continue;
            for (int b = 0; b < B; b++) {
                V::I part = V::mask(V::right(word[b], PLAIN * WIDTH), REST);
                rest[b] = c % UNIT == 0 ? part : V::either(rest[b], V::left(part, c % UNIT * LEFT));
            }
            if (c % UNIT == UNIT - 1) {
#pragma GCC unroll 2
                for (int j = 0; j < CODES - UNIT * PLAIN; j++)
                    arithmetic.step(sum, rest, j * WIDTH, x + 2 * (c / UNIT * CODES + UNIT * PLAIN + j), stride);
            }
        }
        if (s.scales && ((t + 1) % s.group_tiles == 0 || t + 1 == s.tiles)) {
            const size_t group = t / s.group_tiles, at = (block * groups + group) * ROWS + first;
            for (int b = 0; b < B; b++) {
                const V::F scale = load_constants(s.scales, at + b * 16, s.half_scales);
                for (int m = 0; m < M; m++) {
                    if (s.offsets) {
                        V::F offset = V::load_int8(s.offsets + at + b * 16);
                        sum[m][b] = V::fma(offset, V::set(-sums[m * sums_stride + group]), sum[m][b]);
                    }
                    total[m][b] = V::fma(scale, sum[m][b], total[m][b]);
                    sum[m][b] = V::zero();
                }
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) {
            float *to = out + m * out_stride + first + b * 16;
            V::store(to, V::add(V::load_floats(to), s.scales ? total[m][b] : sum[m][b]));
        }
}

template <template <int> class Arithmetic, int M, class Input>
static void segment_block(const Segment &s, size_t block, const Input *x, size_t stride, const float *sums,
                          size_t sums_stride, float *out) {
    constexpr int B = Vector::BLOCKS;
    for (int first = 0; first < ROWS; first += 16 * B) switch (s.width) {
        case 1: segment_rows<Arithmetic, 1, M, B>(s, block, first, x, stride, sums, sums_stride, out, ROWS); break;
        case 2: segment_rows<Arithmetic, 2, M, B>(s, block, first, x, stride, sums, sums_stride, out, ROWS); break;
        case 3: segment_rows<Arithmetic, 3, M, B>(s, block, first, x, stride, sums, sums_stride, out, ROWS); break;
        case 4: segment_rows<Arithmetic, 4, M, B>(s, block, first, x, stride, sums, sums_stride, out, ROWS); break;
        case 5: segment_rows<Arithmetic, 5, M, B>(s, block, first, x, stride, sums, sums_stride, out, ROWS); break;
    }
}

// out [M][ROWS] gets one block of rows times M vectors.
template <int M, class... Rest>
static void code_block(const Segment &s, bool, size_t block, const float *x, Rest... rest) {
    segment_block<Exact, M>(s, block, x, rest...);
}

static void order_inputs(const Segment &, float *) {}  // as they are

#endif
