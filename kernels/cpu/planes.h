// Sign planes: sums of four signed inputs, looked up.

#pragma once

#include "matrix.h"
#include "vectors.h"

// tables[n][v]: the sum of the four inputs of nibble n, negative where v has a bit.
static void sign_tables(const float *x, size_t nibbles, float *tables) {
    using V = Vector;
    alignas(64) float signs[4][16];
    for (int bit = 0; bit < 4; bit++)
        for (int v = 0; v < 16; v++) signs[bit][v] = v >> bit & 1 ? -1.0f : 1.0f;
    for (size_t n = 0; n < nibbles; n++) {
        V::F sum = V::zero();
        for (int bit = 0; bit < 4; bit++) sum = V::fma(V::load_floats(signs[bit]), V::set(x[4 * n + bit]), sum);
        V::store(tables + 16 * n, sum);
    }
}

struct PlaneInput {
    const float *tables, *sums;                  // of all columns, or of those that are not salient; by group
    const float *salient_tables, *salient_sums;  // of the salient columns alone
};

template <bool TWO> static void plane_block(const Matrix &a, size_t block, const PlaneInput &in, float *out) {
    using V = Vector;
    constexpr int B = V::BLOCKS, CONSTANTS = TWO ? 7 : 2, PLANES = TWO ? 2 : 1;
    const int groups = (a.words + a.group_words - 1) / a.group_words;
    for (int first = 0; first < ROWS; first += 16 * B) {
        V::F total[B];
        for (int b = 0; b < B; b++) total[b] = V::zero();
        for (int g = 0; g < groups; g++) {
            // Signed sums: by the first sign, by plane 1, by their product; of salient inputs by either plane.
            V::F by_sign[B], by_second[B], by_both[B], salient_first[B], salient_second[B];
            for (int b = 0; b < B; b++)
                by_sign[b] = by_second[b] = by_both[b] = salient_first[b] = salient_second[b] = V::zero();
            const int last = (g + 1) * a.group_words < a.words ? (g + 1) * a.group_words : a.words;
            int salient = TWO ? (a.salient[g] + 3) / 4 : 0;  // nibbles with salient columns that are still to come
            for (int w = g * a.group_words; w < last; w++) {
                const uint32_t *p = a.planes + ((block * a.words + w) * PLANES) * ROWS + first;
                V::I one[B], two[B], both[B];
                for (int b = 0; b < B; b++) {
                    one[b] = V::load(p + b * 16);
                    if (TWO) {
                        two[b] = V::load(p + ROWS + b * 16);
                        both[b] = V::differ(one[b], two[b]);
                    }
                }
#pragma GCC unroll 8
                for (int n = 0; n < 8; n++) {
                    const V::F table = V::load_floats(in.tables + (8 * static_cast<size_t>(w) + n) * 16);
                    for (int b = 0; b < B; b++) {
                        by_sign[b] = V::add(by_sign[b], V::lookup16(table, V::right(one[b], 4 * n)));
                        if (TWO) {
                            by_second[b] = V::add(by_second[b], V::lookup16(table, V::right(two[b], 4 * n)));
                            by_both[b] = V::add(by_both[b], V::lookup16(table, V::right(both[b], 4 * n)));
                        }
                    }
                }
                for (int n = 0; n < 8 && salient > 0; n++, salient--) {
                    const V::F table = V::load_floats(in.salient_tables + (8 * static_cast<size_t>(w) + n) * 16);
                    for (int b = 0; b < B; b++) {
                        salient_first[b] = V::add(salient_first[b], V::lookup16(table, V::right(one[b], 4 * n)));
                        salient_second[b] = V::add(salient_second[b], V::lookup16(table, V::right(two[b], 4 * n)));
                    }
                }
            }
            for (int b = 0; b < B; b++) {
                const size_t at = (block * groups + g) * CONSTANTS * ROWS + first + b * 16;
                auto constant = [&](int c) { return load_constants(a.constants, at + c * ROWS, a.half_constants); };
                const V::F sum = V::set(in.sums[g]);
                if (!TWO) {
                    total[b] = V::fma(constant(0), sum, V::fma(constant(1), by_sign[b], total[b]));
                    continue;
                }
                // mean_k + sign * scale_k for k = 0 or 1, as a sum of its mean over k and its half difference.
                const V::F half = V::set(0.5f), minus = V::set(-1.0f);
                auto middle = [&](int c) { return V::fma(half, constant(c), V::fma(half, constant(c + 1), V::zero())); };
                auto apart = [&](V::F m, int c) { return V::fma(minus, constant(c + 1), m); };
                const V::F mean = middle(0), scale = middle(3);
                total[b] = V::fma(mean, sum, V::fma(apart(mean, 0), by_second[b], total[b]));
                total[b] = V::fma(scale, by_sign[b], V::fma(apart(scale, 3), by_both[b], total[b]));
                total[b] = V::fma(constant(2), V::set(in.salient_sums[g]), total[b]);
                total[b] = V::fma(constant(5), salient_first[b], V::fma(constant(6), salient_second[b], total[b]));
            }
        }
        for (int b = 0; b < B; b++) V::store(out + first + b * 16, V::add(V::load_floats(out + first + b * 16), total[b]));
    }
}
