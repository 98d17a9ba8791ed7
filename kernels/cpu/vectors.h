// Numbers of 16 bits, and vectors of 16 rows, in each instruction set.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(SAGE_AVX512) || defined(SAGE_AVX2)
#include <immintrin.h>
#endif

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

static __m256 load_eight(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static __m256 load_eight(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}

struct Vector {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    static constexpr int BLOCKS = 1;  // 16 registers: one vector's sums, the table and the words
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
    // A blend goes by the sign bit: bit 3 of the index chooses between two permutes.
    static F lookup16(F table, I index) { return {lookup(table, index.a), lookup(table, index.b)}; }
    static __m256 lookup(const F &table, __m256i index) {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, index), _mm256_permutevar8x32_ps(table.b, index),
                                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
    static F load_half(const uint16_t *p) { return {load_eight(p), load_eight(p + 8)}; }
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
