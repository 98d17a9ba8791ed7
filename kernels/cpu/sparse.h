// Sparse entries, on top of codes or planes.

#pragma once

#include "matrix.h"
#include "vectors.h"

#if defined(SAGE_AVX2)

static float lane_sum(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

// A slab of all rows at a time: its entries lie one after another, and its inputs stay in the first-level cache.
static void sparse_block(const Sparse &s, const float *x, size_t first, int rows, float *out) {
    const __m256i mask = _mm256_set1_epi32((1 << s.column_bits) - 1);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i code_shift = _mm_cvtsi32_si128(s.column_bits);
    const __m256 none = _mm256_setzero_ps();
    const bool short_table = s.table && s.column_bits >= 12;  // 16 entries, repeated where there are fewer
    const Vector::F table = short_table ? Vector::load_floats(s.table) : Vector::zero();
    __m256 codes[ROWS] = {}, inputs[ROWS], base[ROWS];
    if (s.zeros) std::memset(inputs, 0, sizeof inputs);
    if (s.base) std::memset(base, 0, sizeof base);
    for (int slab = 0; slab < s.slabs; slab++) {
        const int32_t *bounds = s.pointers + static_cast<size_t>(slab) * (s.rows + 1) + first;
        const float *from = x + static_cast<size_t>(slab) * s.slab;
        const float *given = s.base ? s.base + first * s.base_groups + slab * s.slab / s.base_group : nullptr;
        for (int r = 0; r < rows; r++) {
            __m256 scaled = codes[r], plain = none;
            for (int32_t at = bounds[r], left = bounds[r + 1] - at; left > 0; at += 8, left -= 8) {
                const auto entries = reinterpret_cast<const __m128i *>(s.entries + at);
                const __m256i entry = _mm256_cvtepu16_epi32(_mm_loadu_si128(entries));
                const __m256i code = _mm256_srl_epi32(entry, code_shift);
                const __m256 wanted = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(left), lanes));
                const __m256 value = _mm256_mask_i32gather_ps(none, from, _mm256_and_si256(entry, mask), wanted, 4);
                const __m256 weight = short_table ? Vector::lookup(table, code)
                                    : s.table     ? _mm256_mask_i32gather_ps(none, s.table, code, wanted, 4)
                                                  : _mm256_cvtepi32_ps(code);
                scaled = _mm256_fmadd_ps(weight, value, scaled);
                plain = _mm256_add_ps(plain, value);
            }
            codes[r] = scaled;
            if (s.zeros) inputs[r] = _mm256_add_ps(inputs[r], plain);
            if (given) base[r] = _mm256_fmadd_ps(_mm256_set1_ps(given[r * s.base_groups]), plain, base[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        float sum = lane_sum(codes[r]);
        if (s.zeros) sum -= s.zeros[first + r] * lane_sum(inputs[r]);
        out[r] += s.scales[first + r] * sum;
        if (s.base) out[r] -= lane_sum(base[r]);
    }
}

#else

// One row: out gets the scaled sum of codes times inputs, inputs the plain sum, base the sum weighted by the dense part.
struct RowSums { float codes, inputs, base; };

#if defined(SAGE_AVX512)
static RowSums sparse_row(const Sparse &s, const float *x, size_t row) {
    const __m512i mask = _mm512_set1_epi32((1 << s.column_bits) - 1);
    const int code_bits = 16 - s.column_bits;
    __m512 low = _mm512_setzero_ps(), high = low, codes = low, inputs = low, base = low;
    if (s.table && code_bits <= 5) {  // 32 entries, repeated where there are fewer
        low = _mm512_loadu_ps(s.table);
        high = _mm512_loadu_ps(s.table + 16);
    }
    for (int slab = 0; slab < s.slabs; slab++) {
        const int32_t *bounds = s.pointers + static_cast<size_t>(slab) * (s.rows + 1) + row;
        const float *from = x + static_cast<size_t>(slab) * s.slab;
        __m512 plain = _mm512_setzero_ps();
        for (int32_t at = bounds[0], left = bounds[1] - at; left > 0; at += 16, left -= 16) {
            const __mmask16 some = left >= 16 ? 0xffff : (1u << left) - 1;
            const __m512i entry = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, s.entries + at));
            const __m512i code = _mm512_srli_epi32(entry, s.column_bits);
            const __m512 value = _mm512_mask_i32gather_ps(
                _mm512_setzero_ps(), some, _mm512_and_si512(entry, mask), from, 4);
            const __m512 weight = !s.table ? _mm512_cvtepi32_ps(code)
                                : code_bits <= 5 ? _mm512_permutex2var_ps(low, code, high)
                                : _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, code, s.table, 4);
            codes = _mm512_fmadd_ps(weight, value, codes);
            plain = _mm512_add_ps(plain, value);
        }
        if (s.zeros) inputs = _mm512_add_ps(inputs, plain);
        if (s.base) {
            const float given = s.base[row * s.base_groups + slab * s.slab / s.base_group];
            base = _mm512_fmadd_ps(_mm512_set1_ps(given), plain, base);
        }
    }
    return {_mm512_reduce_add_ps(codes), _mm512_reduce_add_ps(inputs), _mm512_reduce_add_ps(base)};
}
#else
static RowSums sparse_row(const Sparse &s, const float *x, size_t row) {
    const uint32_t mask = (1u << s.column_bits) - 1;
    float codes[4] = {0, 0, 0, 0}, inputs = 0, base = 0;
    for (int slab = 0; slab < s.slabs; slab++) {
        const int32_t *bounds = s.pointers + static_cast<size_t>(slab) * (s.rows + 1) + row;
        const uint16_t *e = s.entries + bounds[0], *end = s.entries + bounds[1];
        const float *from = x + static_cast<size_t>(slab) * s.slab;
        float plain[4] = {0, 0, 0, 0};
        auto add = [&](int lane, uint32_t entry) {
            const float value = from[entry & mask];
            const uint32_t code = entry >> s.column_bits;
            codes[lane] += (s.table ? s.table[code] : static_cast<float>(code)) * value;
            plain[lane] += value;
        };
        for (; e + 4 <= end; e += 4) {
            add(0, e[0]);
            add(1, e[1]);
            add(2, e[2]);
            add(3, e[3]);
        }
        for (; e < end; e++) add(0, *e);
        const float sum = (plain[0] + plain[1]) + (plain[2] + plain[3]);
        inputs += sum;
        if (s.base) base += s.base[row * s.base_groups + slab * s.slab / s.base_group] * sum;
    }
    return {(codes[0] + codes[1]) + (codes[2] + codes[3]), inputs, base};
}
#endif

static void sparse_block(const Sparse &s, const float *x, size_t first, int rows, float *out) {
    for (int r = 0; r < rows; r++) {
        const size_t row = first + r;
        const RowSums sums = sparse_row(s, x, row);
        out[r] += s.scales[row] * (s.zeros ? sums.codes - s.zeros[row] * sums.inputs : sums.codes) - sums.base;
    }
}

#endif
