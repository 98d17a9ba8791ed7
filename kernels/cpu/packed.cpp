// Products of packed matrices with a few vectors, in float32 (or in bfloat16 products summed in float32), on a CPU.
//
// Compiled on demand by kernels/cpu/build.py, once for each instruction set: -DSAGE_AVX512, -DSAGE_AVX512BF16, -DSAGE_AVX2,
// or plain C++. The forms are those of kernels/resident: one vector lane owns one row, so a word of 16 rows is one
// load, an input is one broadcast, and nothing is summed across lanes. A code is looked up in a table that stays in
// registers; the index of a permute is taken from the low bits, so a shift is all the unpacking there is.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(SAGE_AVX512) || defined(SAGE_AVX2)
#include <immintrin.h>
#endif

// The order of fields is that of the ctypes structures in kernels/cpu/library.py.
struct Segment {
    const uint32_t *words;  // [row blocks][tiles][width][64]
    const float *table;     // [32], repeated where the codes are narrower
    const void *scales;     // [row blocks][groups][64], or null for 1
    const int8_t *offsets;  // like scales, or null for 0
    int32_t width, tiles, group_tiles, half_scales;
};

struct Sparse {
    const uint16_t *entries;  // column | code << column_bits
    const int32_t *pointers;  // [slabs][rows + 1]
    const float *table;  // [32] or [2^code bits], null where the code is the value
    const float *scales, *zeros, *base;  // zeros [rows] and base [rows][base_groups] may be null
    int32_t slabs, slab, column_bits, base_group, base_groups, rows;
};

struct Matrix {
    int32_t rows, columns, padded, segments;
    const int32_t *order;    // [padded], `columns` for no input; null: as they are
    const Segment *segment;  // codes; null for planes
    const Sparse *sparse;    // or null
    const uint32_t *planes;  // [row blocks][words][plane_count][64]
    const void *constants;   // [row blocks][groups][2 or 7][64]
    const int32_t *salient;  // [groups] salient columns, which come first; null with one plane
    int32_t words, group_words, plane_count, half_constants;
};

static constexpr int ROWS = 64;     // rows of a block
static constexpr int COLUMNS = 32;  // columns of a tile, and of a word of planes

// ---- numbers of 16 bits ----------------------------------------------------------------------------------------------

static float from_bits(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static uint32_t to_bits(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }

static float half_to_float(uint16_t half) {
    uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    float value = from_bits((magnitude << 13) + 0x38000000u);  // right for normal numbers
    if (magnitude < 0x400u) value = magnitude * 5.9604644775390625e-8f;  // 2^-24
    return from_bits(to_bits(value) | sign);
}

static uint16_t float_to_half(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
    if (bits < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24, rounded by the addition
        return sign | static_cast<uint16_t>(to_bits(from_bits(bits) + 0.5f) - 0x3f000000u);
    }
    return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13);
}

static uint16_t float_to_bfloat(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// ---- vectors of 16 rows ----------------------------------------------------------------------------------------------

#if defined(SAGE_AVX512)

struct Vector {
    using F = __m512;
    using I = __m512i;
    static constexpr int BLOCKS = 4;  // vectors of rows worked on at once
    struct Table { F low, high; };
    static F zero() { return _mm512_setzero_ps(); }
    static F set(float value) { return _mm512_set1_ps(value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F load_floats(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F value) { _mm512_storeu_ps(p, value); }
    static I load(const uint32_t *p) { return _mm512_loadu_si512(p); }
    static I right(I value, int bits) { return _mm512_srli_epi32(value, bits); }
    static I left(I value, int bits) { return _mm512_slli_epi32(value, bits); }
    static I mask(I value, uint32_t bits) { return _mm512_and_si512(value, _mm512_set1_epi32(bits)); }
    static I either(I a, I b) { return _mm512_or_si512(a, b); }
    static I differ(I a, I b) { return _mm512_xor_si512(a, b); }
    static Table table(const float *p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
    template <int WIDTH> static F lookup(Table t, I index) {
        return WIDTH == 5 ? _mm512_permutex2var_ps(t.low, index, t.high) : _mm512_permutexvar_ps(index, t.low);
    }
    static F lookup16(F table, I index) { return _mm512_permutexvar_ps(index, table); }
    static F load_half(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static F load_int8(const int8_t *p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }
};

#elif defined(SAGE_AVX2)

struct Vector {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    static constexpr int BLOCKS = 1;  // 16 registers: one vector's sums, the table and the words
    struct Table { __m256 part[4]; };
    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static F load_floats(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float *p, F value) { _mm256_storeu_ps(p, value.a); _mm256_storeu_ps(p + 8, value.b); }
    static I load(const uint32_t *p) {
        auto q = reinterpret_cast<const __m256i *>(p);
        return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
    }
    static I right(I v, int bits) { return {_mm256_srli_epi32(v.a, bits), _mm256_srli_epi32(v.b, bits)}; }
    static I left(I v, int bits) { return {_mm256_slli_epi32(v.a, bits), _mm256_slli_epi32(v.b, bits)}; }
    static I mask(I v, uint32_t bits) {
        __m256i m = _mm256_set1_epi32(bits);
        return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
    }
    static I either(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
    static I differ(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
    static Table table(const float *p) {
        return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), _mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24)}};
    }
    // A blend goes by the sign bit: bit 3 of the index chooses between two permutes, bit 4 between two pairs of them.
    template <int WIDTH> static __m256 lookup(const Table &t, __m256i index) {
        __m256 low = _mm256_permutevar8x32_ps(t.part[0], index);
        if (WIDTH <= 3) return low;
        __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        low = _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(t.part[1], index), bit3);
        if (WIDTH == 4) return low;
        __m256 high = _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(t.part[2], index), _mm256_permutevar8x32_ps(t.part[3], index), bit3);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
    }
    template <int WIDTH> static F lookup(const Table &t, I index) {
        return {lookup<WIDTH>(t, index.a), lookup<WIDTH>(t, index.b)};
    }
    static F lookup16(F table, I index) {
        Table t{{table.a, table.b, table.a, table.b}};
        return lookup<4>(t, index);
    }
    static F load_half(const uint16_t *p) {
        auto q = reinterpret_cast<const __m128i *>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
    }
    static F load_int8(const int8_t *p) {
        __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
    }
};

#else

struct Vector {
    struct F { float v[16]; };
    struct I { uint32_t v[16]; };
    static constexpr int BLOCKS = 1;
    struct Table { const float *values; };
#define EACH(TYPE, EXPRESSION) TYPE out; for (int i = 0; i < 16; i++) out.v[i] = EXPRESSION; return out
    static F zero() { return set(0); }
    static F set(float value) { EACH(F, value); }
    static F add(F x, F y) { EACH(F, x.v[i] + y.v[i]); }
    static F fma(F x, F y, F z) { EACH(F, x.v[i] * y.v[i] + z.v[i]); }
    static F load_floats(const float *p) { EACH(F, p[i]); }
    static void store(float *p, F value) { for (int i = 0; i < 16; i++) p[i] = value.v[i]; }
    static I load(const uint32_t *p) { EACH(I, p[i]); }
    static I right(I x, int bits) { EACH(I, x.v[i] >> bits); }
    static I left(I x, int bits) { EACH(I, x.v[i] << bits); }
    static I mask(I x, uint32_t bits) { EACH(I, x.v[i] & bits); }
    static I either(I x, I y) { EACH(I, x.v[i] | y.v[i]); }
    static I differ(I x, I y) { EACH(I, x.v[i] ^ y.v[i]); }
    static Table table(const float *p) { return {p}; }
    template <int WIDTH> static F lookup(Table t, I x) { EACH(F, t.values[x.v[i] & 31]); }
    static F lookup16(F table, I x) { EACH(F, table.v[x.v[i] & 15]); }
    static F load_half(const uint16_t *p) { EACH(F, half_to_float(p[i])); }
    static F load_int8(const int8_t *p) { EACH(F, static_cast<float>(p[i])); }
};

#endif

static Vector::F load_constants(const void *p, size_t index, int half) {
    return half ? Vector::load_half(static_cast<const uint16_t *>(p) + index)
                : Vector::load_floats(static_cast<const float *>(p) + index);
}

// ---- codes: one field of 16 words at a time --------------------------------------------------------------------------

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

// ---- planes: sums of four signed inputs, looked up ---------------------------------------------------------------------

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

// ---- sparse entries --------------------------------------------------------------------------------------------------

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

// ---- the product -----------------------------------------------------------------------------------------------------

enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

static float load_number(const void *p, int kind, size_t i) {
    if (kind == FLOAT32) return static_cast<const float *>(p)[i];
    const uint16_t bits = static_cast<const uint16_t *>(p)[i];
    return kind == BFLOAT16 ? from_bits(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

static void store_number(void *p, int kind, size_t i, float value) {
    if (kind == FLOAT32) static_cast<float *>(p)[i] = value;
    else static_cast<uint16_t *>(p)[i] = kind == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

// Inputs of up to MOST vectors, made ready once for all rows.
struct Inputs {
    std::vector<float> plain, ordered, sums, salient, salient_sums, tables, salient_tables;
    std::vector<uint16_t> bfloat;
};

static constexpr int MOST = 4;

static void prepare(const Matrix &a, const void *x, int kind, size_t first, int count, int lanes, bool bfloat, Inputs &in) {
    const size_t columns = a.columns, padded = a.padded;
    in.plain.resize((columns + 1) * count);
    in.ordered.assign(padded * lanes, 0.0f);
    if (a.salient) in.salient.assign(padded * lanes, 0.0f);
    for (int m = 0; m < count; m++) {
        float *plain = in.plain.data() + (columns + 1) * m, *ordered = in.ordered.data() + padded * m;
        for (size_t i = 0; i < columns; i++) plain[i] = load_number(x, kind, (first + m) * columns + i);
        plain[columns] = 0;  // what a position without a column multiplies
        if (!a.order) std::memcpy(ordered, plain, columns * sizeof(float));
        else for (size_t i = 0; i < padded; i++) ordered[i] = plain[a.order[i]];
        if (!a.salient) continue;
        // The salient columns of a group come first: they move to inputs of their own.
        const size_t group = static_cast<size_t>(a.group_words) * COLUMNS;
        for (size_t g = 0; g * group < padded; g++)
            for (int i = 0; i < a.salient[g]; i++) {
                in.salient[padded * m + g * group + i] = ordered[g * group + i];
                ordered[g * group + i] = 0;
            }
    }
    if (bfloat) {
        in.bfloat.resize(padded * lanes);
        for (size_t i = 0; i < padded * lanes; i++) in.bfloat[i] = float_to_bfloat(in.ordered[i]);
    }
}

// Sums over groups of `group` values: [lanes][ceil(length / group)].
static void group_sums(const float *values, size_t stride, size_t length, size_t group, int lanes, std::vector<float> &sums) {
    const size_t groups = (length + group - 1) / group;
    const size_t start = sums.size();
    sums.resize(start + groups * lanes);
    for (int m = 0; m < lanes; m++)
        for (size_t g = 0; g < groups; g++) {
            double sum = 0;
            for (size_t i = g * group; i < length && i < (g + 1) * group; i++) sum += values[m * stride + i];
            sums[start + m * groups + g] = static_cast<float>(sum);
        }
}

// Whether products are those of bfloat16 numbers.
static bool takes_bfloat(const Matrix &a, int kind) {
#if defined(SAGE_AVX512BF16)
    return kind == BFLOAT16 && a.segment;
#else
    (void)a, (void)kind;
    return false;
#endif
}

template <int M> static void codes_block(const Matrix &a, const Inputs &in, bool bfloat, size_t block, float *out) {
    size_t start = 0, sums = 0;
    for (int i = 0; i < a.segments; i++) {
        const Segment &s = a.segment[i];
        const size_t groups = s.group_tiles ? (s.tiles + s.group_tiles - 1) / s.group_tiles : 0;
#if defined(SAGE_AVX512BF16)
        if (bfloat)
            segment_block<Bfloat, M>(s, block, in.bfloat.data() + start, a.padded, in.sums.data() + sums, groups, out);
        else
#endif
            segment_block<Exact, M>(s, block, in.ordered.data() + start, a.padded, in.sums.data() + sums, groups, out);
        start += static_cast<size_t>(s.tiles) * COLUMNS;
        sums += s.offsets ? groups * M : 0;
    }
}

static void group_tables(const Matrix &a, Inputs &in) {
    const size_t nibbles = static_cast<size_t>(a.words) * 8;
    in.tables.resize(nibbles * 16);
    sign_tables(in.ordered.data(), nibbles, in.tables.data());
    group_sums(in.ordered.data(), a.padded, a.padded, a.group_words * COLUMNS, 1, in.sums);
    if (!a.salient) return;
    in.salient_tables.resize(nibbles * 16);
    sign_tables(in.salient.data(), nibbles, in.salient_tables.data());
    group_sums(in.salient.data(), a.padded, a.padded, a.group_words * COLUMNS, 1, in.salient_sums);
}

static void segment_sums(const Matrix &a, int lanes, Inputs &in) {
    size_t start = 0;
    for (int i = 0; i < a.segments; i++) {
        const Segment &s = a.segment[i];
        const size_t length = static_cast<size_t>(s.tiles) * COLUMNS;
        if (s.offsets) group_sums(in.ordered.data() + start, a.padded, length, s.group_tiles * COLUMNS, lanes, in.sums);
        start += length;
    }
}

// Whether what was made ready for `a` serves `b` too.
static bool same_inputs(const Matrix &a, const Matrix &b) {
    if (a.order || b.order || a.columns != b.columns || a.padded != b.padded) return false;
    if (!a.segment || !b.segment) return !a.segment && !b.segment && a.group_words == b.group_words;
    return a.segments == 1 && b.segments == 1 && !a.segment->offsets && !b.segment->offsets;
}

// One to MOST vectors times matrices that share their input; y [count, the sum of their rows].
template <int M>
static void some_vectors(const Matrix *const *matrices, int number, const void *x, int kind, size_t first, int count,
                         void *y) {
    static thread_local std::vector<Inputs> own;
    if (own.size() < static_cast<size_t>(number)) own.resize(number);
    std::vector<const Inputs *> inputs(number);
    std::vector<long> blocks(number + 1, 0), starts(number + 1, 0);
    int64_t weights = 0;
    for (int i = 0; i < number; i++) {
        const Matrix &a = *matrices[i];
        blocks[i + 1] = blocks[i] + (a.rows + ROWS - 1) / ROWS;
        starts[i + 1] = starts[i] + a.rows;
        weights += static_cast<int64_t>(a.rows) * a.columns;
        if (i > 0 && same_inputs(*matrices[i - 1], a)) {
            inputs[i] = inputs[i - 1];
            continue;
        }
        Inputs &in = own[i];
        in.sums.clear();
        in.salient_sums.clear();
        prepare(a, x, kind, first, count, M, takes_bfloat(a, kind), in);
        if (a.segment) segment_sums(a, M, in);
        else group_tables(a, in);
        inputs[i] = &in;
    }
    // Below this a second thread costs more than it brings.
    const bool many = weights > 65536;
    (void)many;
#pragma omp parallel for schedule(static) if (many)
    for (long task = 0; task < blocks[number]; task++) {
        int i = 0;
        while (task >= blocks[i + 1]) i++;
        const Matrix &a = *matrices[i];
        const Inputs &in = *inputs[i];
        const size_t block = task - blocks[i], row = block * ROWS;
        const int rows = a.rows - row < ROWS ? static_cast<int>(a.rows - row) : ROWS;
        alignas(64) float out[M][ROWS] = {};
        if (a.segment) codes_block<M>(a, in, takes_bfloat(a, kind), block, out[0]);
        else {
            const PlaneInput planes{in.tables.data(), in.sums.data(), in.salient_tables.data(), in.salient_sums.data()};
            if (a.plane_count == 2) plane_block<true>(a, block, planes, out[0]);
            else plane_block<false>(a, block, planes, out[0]);
        }
        for (int m = 0; m < count; m++) {
            if (a.sparse) sparse_block(*a.sparse, in.plain.data() + (a.columns + 1) * m, row, rows, out[m]);
            const size_t to = (first + m) * starts[number] + starts[i] + row;
            for (int r = 0; r < rows; r++) store_number(y, kind, to + r, out[m][r]);
        }
    }
}

// y [count, rows of all matrices] = x [count, columns] times each transposed matrix; x and y contiguous, of `kind`.
extern "C" void sage_multiply(const Matrix *const *matrices, int number, const void *x, int kind, long count, void *y) {
    // Codes are decoded once for several vectors; planes gain nothing from it.
    bool codes = true;
    for (int i = 0; i < number; i++) codes = codes && matrices[i]->segment;
    for (long first = 0; first < count;) {
        if (codes && count - first > 1) {
            const int some = count - first < MOST ? static_cast<int>(count - first) : MOST;
            some_vectors<MOST>(matrices, number, x, kind, first, some, y);
            first += some;
        } else {
            some_vectors<1>(matrices, number, x, kind, first, 1, y);
            first += 1;
        }
    }
}
