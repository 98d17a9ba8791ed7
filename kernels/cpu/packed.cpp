// Products of packed matrices with a few vectors, in float32 (or in bfloat16 products summed in float32), on a CPU.
//
// Compiled on demand by kernels/cpu/build.py, once for each instruction set: -DSAGE_AVX512, -DSAGE_AVX512BF16, -DSAGE_AVX2,
// or plain C++. The forms are those of kernels/resident. Here inputs are made ready and blocks of rows handed to threads.

#include <vector>

#include "code_bytes.h"
#include "codes.h"
#include "matrix.h"
#include "planes.h"
#include "sparse.h"
#include "vectors.h"

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
#if defined(SAGE_AVX512BF16)
    if (bfloat) {
        in.bfloat.resize(padded * lanes);
        for (size_t i = 0; i < padded * lanes; i++) in.bfloat[i] = float_to_bfloat(in.ordered[i]);
    }
#else
    (void)bfloat;
#endif
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

// Whether the levels of codes are rounded to bfloat16.
static bool takes_bfloat(const Matrix &a, int kind) {
#if defined(SAGE_AVX512BF16) || defined(SAGE_AVX2)
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
            code_block<M>(s, bfloat, block, in.ordered.data() + start, a.padded, in.sums.data() + sums, groups, out);
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

// Group sums of the inputs, and the inputs in the order that the codes want.
static void segment_inputs(const Matrix &a, int lanes, Inputs &in) {
    size_t start = 0;
    for (int i = 0; i < a.segments; i++) {
        const Segment &s = a.segment[i];
        const size_t length = static_cast<size_t>(s.tiles) * COLUMNS;
        if (s.offsets) group_sums(in.ordered.data() + start, a.padded, length, s.group_tiles * COLUMNS, lanes, in.sums);
        for (int m = 0; m < lanes; m++) order_inputs(s, in.ordered.data() + m * a.padded + start);
        start += length;
    }
}

// Whether what was made ready for `a` serves `b` too.
static bool same_inputs(const Matrix &a, const Matrix &b) {
    if (a.order || b.order || a.columns != b.columns || a.padded != b.padded) return false;
    if (!a.segment || !b.segment) return !a.segment && !b.segment && a.group_words == b.group_words;
    // Group sums are of one matrix, and so is the order of inputs.
    return a.segments == 1 && b.segments == 1 && !a.segment->offsets && !b.segment->offsets &&
           a.segment->width == b.segment->width;
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
        if (a.segment) segment_inputs(a, M, in);
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
