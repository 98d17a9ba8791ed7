// Codes on AVX2: 32 weights at a time, looked up a byte of their float32 numbers at a time.
//
// A permute of floats knows eight of them, a shuffle of bytes sixteen, four times as many at once. So the codes of eight
// rows and four columns become the bytes of a vector, and every byte of the numbers that is not zero throughout the table
// is looked up by itself: three for levels in float16, two for bfloat16 and for whole numbers. The values are those of the
// table to the last bit. A vector then holds two columns of four rows: its inputs are one broadcast of two numbers, and
// sums are made across lanes only at the end of a group.

#pragma once

#include "matrix.h"
#include "vectors.h"

#if defined(SAGE_AVX2)

#define ALWAYS_INLINE __attribute__((always_inline))  // what a compiler leaves apart here passes vectors through memory

// Where the codes of a lane lie (see kernels/resident/lane16.py), and which two of them share a lookup. A vector of
// indices holds, a row, code `first` of the low lane, code `second` of it, and the same of the high lane.
template <int WIDTH> struct Places {
    static constexpr int PLAIN = 16 / WIDTH;        // codes that lie whole in 16 bits
    static constexpr bool WHOLE = 16 % WIDTH == 0;  // no bits are left over: codes 8 bits apart go together as they lie
    static constexpr int PAIRS = 8;                 // otherwise codes 2p and 2p + 1; code 15 is the last bits of all words
    static constexpr int first(int pair) {
        return WHOLE ? pair / (PLAIN / 2) * PLAIN + pair % (PLAIN / 2) : 2 * pair;
    }
    static constexpr int second(int pair) { return WHOLE ? first(pair) + PLAIN / 2 : 2 * pair + 1; }
    static constexpr int word(int code) { return code / PLAIN; }
    static constexpr int shift(int code) { return code % PLAIN * WIDTH; }
};

// One to four bytes of each number of a table of 32; those below are zero.
template <int WIDTH, int BYTES> struct ByteTable {
    __m256i low[BYTES], high[BYTES];  // entries 0 to 15 and 16 to 31, the lowest byte first

    explicit ByteTable(const float *table) {
        for (int byte = 0; byte < BYTES; byte++) {
            uint8_t values[32];
            for (int i = 0; i < 32; i++) values[i] = to_bits(table[i]) >> 8 * (4 - BYTES + byte);
            low[byte] = twice(values);
            high[byte] = twice(values + 16);
        }
    }

    // The numbers of 32 codes as four vectors: the first and the second columns of rows 0, 1, 4, 5, and the same of rows
    // 2, 3, 6, 7. signs: bit 7 of a byte turns the number around.
    inline ALWAYS_INLINE void lookup(__m256i index, __m256i signs, __m256 (&numbers)[4]) const {
        __m256i bytes[BYTES];
        if constexpr (WIDTH == 5) {  // a shuffle gives zero where bit 7 of an index is set
            const __m256i lower = _mm256_add_epi8(index, _mm256_set1_epi8(0x70));
            const __m256i upper = _mm256_sub_epi8(index, _mm256_set1_epi8(0x10));
            for (int i = 0; i < BYTES; i++)
                bytes[i] = _mm256_or_si256(_mm256_shuffle_epi8(low[i], lower), _mm256_shuffle_epi8(high[i], upper));
        } else {
            for (int i = 0; i < BYTES; i++) bytes[i] = _mm256_shuffle_epi8(low[i], index);
        }
        const __m256i third = bytes[BYTES - 2], fourth = _mm256_xor_si256(bytes[BYTES - 1], signs);
        const __m256i upper[2] = {_mm256_unpacklo_epi8(third, fourth), _mm256_unpackhi_epi8(third, fourth)};
        for (int i = 0; i < 2; i++) {  // 16 bits a number, the second above the first
            __m256i first = _mm256_slli_epi32(upper[i], 16), second;
            if constexpr (BYTES == 2) {
                second = _mm256_and_si256(upper[i], _mm256_set1_epi32(0xffff0000));
            } else {
                const __m256i b = bytes[BYTES - 3], a = BYTES == 4 ? bytes[0] : _mm256_setzero_si256();
                const __m256i lower = i == 0 ? _mm256_unpacklo_epi8(a, b) : _mm256_unpackhi_epi8(a, b);
                first = _mm256_blend_epi16(first, lower, 0x55);
                second = _mm256_blend_epi16(_mm256_srli_epi32(lower, 16), upper[i], 0xaa);
            }
            numbers[2 * i] = _mm256_castsi256_ps(first);
            numbers[2 * i + 1] = _mm256_castsi256_ps(second);
        }
    }

  private:
    static __m256i twice(const uint8_t *p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
};

template <int BY> static __m256i shifted(__m256i value) {
    if constexpr (BY > 0) return _mm256_srli_epi32(value, BY);
    else if constexpr (BY < 0) return _mm256_slli_epi32(value, -BY);
    else return value;
}

// The indices of one pair of codes, and those of the pairs after it; USE gets each with the number of its pair.
template <int WIDTH, int PAIR, class Use>
static inline ALWAYS_INLINE void each_pair(const __m256i *words, __m256i rest, const Use &use) {
    using P = Places<WIDTH>;
    constexpr int FIRST = P::first(PAIR), SECOND = P::second(PAIR);
    __m256i index;
    if constexpr (P::WHOLE) {  // bits above the width do not matter: the table is repeated
        index = _mm256_and_si256(shifted<P::shift(FIRST)>(words[P::word(FIRST)]), _mm256_set1_epi8(0x0f));
    } else {
        constexpr int MASK = (1 << WIDTH) - 1;
        index = _mm256_and_si256(shifted<P::shift(FIRST)>(words[P::word(FIRST)]), _mm256_set1_epi32(MASK * 0x00010001));
        if constexpr (SECOND == 15) {
            index = _mm256_or_si256(index, rest);
        } else {
            const __m256i second = shifted<P::shift(SECOND) - 8>(words[P::word(SECOND)]);
            index = _mm256_or_si256(index, _mm256_and_si256(second, _mm256_set1_epi32(MASK * 0x01000100)));
        }
    }
    use(PAIR, index);
    if constexpr (PAIR + 1 < P::PAIRS) each_pair<WIDTH, PAIR + 1>(words, rest, use);
}

// Code 15, made up of bit 15 of each half of 3 or 5 words, in bits 8 and up of each half.
template <int WIDTH, int WORD = 0> static __m256i last_code(const __m256i *words) {
    const __m256i bit = _mm256_and_si256(shifted<7 - WORD>(words[WORD]), _mm256_set1_epi32(0x01000100 << WORD));
    if constexpr (WORD + 1 < WIDTH) return _mm256_or_si256(bit, last_code<WIDTH, WORD + 1>(words));
    else return bit;
}

// The inputs of a tile, 32 columns, in the order in which `multiply_tile` takes them: both columns of a code, then both of
// the code that shares its lookup.
template <int WIDTH> static void order_tile(float *x) {
    float before[COLUMNS];
    std::memcpy(before, x, sizeof before);
    for (int pair = 0; pair < 8; pair++)
        for (int half = 0; half < 2; half++) {
            x[4 * pair + half] = before[2 * Places<WIDTH>::first(pair) + half];
            x[4 * pair + 2 + half] = before[2 * Places<WIDTH>::second(pair) + half];
        }
}

static void order_inputs(const Segment &s, float *x) {
    for (int t = 0; t < s.tiles; t++, x += COLUMNS) switch (s.width) {
        case 1: order_tile<1>(x); break;
        case 2: order_tile<2>(x); break;
        case 3: order_tile<3>(x); break;
        case 4: order_tile<4>(x); break;
        case 5: order_tile<5>(x); break;
    }
}

// A tile of eight rows and 32 columns times M vectors. sum: as `lookup` gives the numbers. signs: bit p of a byte is that
// of pair p.
template <int WIDTH, int BYTES, int M, bool SIGNS>
static inline ALWAYS_INLINE void multiply_tile(const ByteTable<WIDTH, BYTES> &table, const uint32_t *from, const uint32_t *signs,
                                 const float *x, size_t stride, __m256 (&sum)[M][4]) {
    __m256i words[WIDTH], rest = _mm256_setzero_si256();
    for (int c = 0; c < WIDTH; c++) words[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + c * ROWS));
    if constexpr (!Places<WIDTH>::WHOLE) rest = last_code<WIDTH>(words);
    __m256i sign = _mm256_setzero_si256();
    if constexpr (SIGNS) sign = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(signs));
    auto signs_of = [&](int pair) ALWAYS_INLINE {
        return SIGNS ? _mm256_and_si256(_mm256_slli_epi32(sign, 7 - pair), _mm256_set1_epi8(-128)) : sign;
    };
    auto add = [&](const __m256 (&numbers)[4], int m, int pair, __m256 (&s)[4]) ALWAYS_INLINE {
        long long two[2];
        std::memcpy(two, x + m * stride + 4 * pair, sizeof two);
        const __m256 first = _mm256_castsi256_ps(_mm256_set1_epi64x(two[0]));
        const __m256 second = _mm256_castsi256_ps(_mm256_set1_epi64x(two[1]));
        s[0] = _mm256_fmadd_ps(numbers[0], first, s[0]);
        s[1] = _mm256_fmadd_ps(numbers[1], second, s[1]);
        s[2] = _mm256_fmadd_ps(numbers[2], first, s[2]);
        s[3] = _mm256_fmadd_ps(numbers[3], second, s[3]);
    };
    if constexpr (M == 1) {
        __m256 s[4] = {sum[0][0], sum[0][1], sum[0][2], sum[0][3]};
        each_pair<WIDTH, 0>(words, rest, [&](int pair, __m256i index) ALWAYS_INLINE {
            __m256 numbers[4];
            table.lookup(index, signs_of(pair), numbers);
            add(numbers, 0, pair, s);
        });
        for (int i = 0; i < 4; i++) sum[0][i] = s[i];
    } else {  // decoded once to the first-level cache: the sums of one vector at a time fit into registers
        __m256 numbers[8][4];
        each_pair<WIDTH, 0>(words, rest, [&](int pair, __m256i index) ALWAYS_INLINE {
            table.lookup(index, signs_of(pair), numbers[pair]);
        });
        for (int m = 0; m < M; m++) {
            __m256 s[4] = {sum[m][0], sum[m][1], sum[m][2], sum[m][3]};
            for (int pair = 0; pair < 8; pair++) add(numbers[pair], m, pair, s);
            for (int i = 0; i < 4; i++) sum[m][i] = s[i];
        }
    }
}

// The sums of eight rows, in their order.
static __m256 row_sums(const __m256 (&sum)[4]) {
    return _mm256_hadd_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
}

// The words are read in the order in which they lie; the sums of all rows of the block are kept beside them.
template <int WIDTH, int BYTES, int M, bool SIGNS>
static void segment_block(const Segment &s, const float *table_of, size_t block, const float *x, size_t stride, const float *sums,
                          size_t sums_stride, float *out) {
    constexpr int EIGHTS = ROWS / 8;
    const ByteTable<WIDTH, BYTES> table(table_of);
    const uint32_t *words = s.words + block * s.tiles * WIDTH * ROWS;
    const uint32_t *signs = SIGNS ? s.signs + block * s.tiles * ROWS : words;
    const size_t groups = (s.tiles + s.group_tiles - 1) / s.group_tiles;
    for (size_t group = 0; group < groups; group++) {
        __m256 sum[EIGHTS][M][4] = {};
        const int last = (group + 1) * s.group_tiles < static_cast<size_t>(s.tiles) ? (group + 1) * s.group_tiles : s.tiles;
        for (int t = group * s.group_tiles; t < last; t++, words += WIDTH * ROWS, signs += ROWS, x += COLUMNS)
            for (int r = 0; r < EIGHTS; r++)
                multiply_tile<WIDTH, BYTES, M, SIGNS>(table, words + 8 * r, signs + 8 * r, x, stride, sum[r]);
        for (int r = 0; r < EIGHTS; r++) {
            const size_t at = (block * groups + group) * ROWS + 8 * r;
            __m256 scale = _mm256_set1_ps(1.0f), offset = _mm256_setzero_ps();
            if (s.scales)
                scale = s.half_scales ? load_eight(static_cast<const uint16_t *>(s.scales) + at)
                                      : _mm256_loadu_ps(static_cast<const float *>(s.scales) + at);
            if (s.offsets) offset = load_eight(s.offsets + at);
            for (int m = 0; m < M; m++) {
                __m256 found = row_sums(sum[r][m]);
                if (s.offsets) found = _mm256_fnmadd_ps(offset, _mm256_set1_ps(sums[m * sums_stride + group]), found);
                float *to = out + m * ROWS + 8 * r;
                _mm256_storeu_ps(to, _mm256_fmadd_ps(scale, found, _mm256_loadu_ps(to)));
            }
        }
    }
}

template <int WIDTH, int M, bool SIGNS, class... Rest>
static void segment_width(const Segment &s, bool bfloat, Rest... rest) {
    float table[32];
    uint32_t used = 0;  // bits that any number of the table has
    for (int i = 0; i < 32; i++) {
        table[i] = bfloat ? from_bits(static_cast<uint32_t>(float_to_bfloat(s.table[i])) << 16) : s.table[i];
        used |= to_bits(table[i]);
    }
    if (used & 0xff) segment_block<WIDTH, 4, M, SIGNS>(s, table, rest...);
    else if (used & 0xffff) segment_block<WIDTH, 3, M, SIGNS>(s, table, rest...);
    else segment_block<WIDTH, 2, M, SIGNS>(s, table, rest...);
}

// out [M][ROWS] gets one block of rows times M vectors; the inputs are in the order of `order_inputs`. bfloat: the table is
// rounded to bfloat16, as a dense bfloat16 layer has its weights.
template <int M, class... Rest> static void code_block(const Segment &s, bool bfloat, Rest... rest) {
    switch (s.width) {
        case 1: segment_width<1, M, false>(s, bfloat, rest...); break;
        case 2: segment_width<2, M, false>(s, bfloat, rest...); break;
        case 3: segment_width<3, M, false>(s, bfloat, rest...); break;
        case 4:
            if (s.signs) segment_width<4, M, true>(s, bfloat, rest...);
            else segment_width<4, M, false>(s, bfloat, rest...);
            break;
        case 5: segment_width<5, M, false>(s, bfloat, rest...); break;
    }
}

#endif
