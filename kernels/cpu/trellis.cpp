// Products of trellis matrices with a few vectors, in float32, on a CPU.
//
// Compiled on demand by kernels/cpu/build.py; the form is that of kernels/resident/trellis.py. A vector lane owns a row:
// eight neighbouring weights of a column lie within 16 bytes of its stream, a byte shuffle brings each lane the bytes of
// its state, a shift and a mask the state, a gather the value. The table of a class, 16 kB, stays in the first-level
// cache while the columns of the class are read.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(SAGE_AVX512) || defined(SAGE_AVX2)
#define SAGE_VECTORS
#include <immintrin.h>
#endif

// The order of fields is that of the ctypes structures in kernels/cpu/trellis.py.
struct Piece {  // rows start .. start + a * b - 1 are rotated by first [a][a] x second [b][b]
    const float *first, *second;
    int32_t start, a, b, unused;
};

struct Trellis {
    const uint16_t *words;
    const int32_t *columns, *bounds, *begins;  // [live], [CLASSES + 1], [CLASSES]
    const float *factors;                      // [live]
    const int32_t *segment_words;              // [CLASSES][segments + 1], the last one the words of a column
    const int32_t *starts;                     // [segments + 1], first row of each segment
    const float *row_scales;                   // [rows]
    const Piece *pieces;                       // null: not rotated
    const float *tables;                       // [CLASSES][STATES]
    const int32_t *windows;                    // [CLASSES][SEGMENT], first bit of each state
    int32_t rows, inputs, live, segments, piece_count, unused;
};

static constexpr int CLASSES = 16, STATES = 4096, SEGMENT = 256;
static constexpr int MOST = 4;    // vectors that one decoded weight multiplies
static constexpr int SLAB = 256;  // columns of a task

#if defined(SAGE_VECTORS)

// For each eight weights of a segment: where their bytes begin, which of them each lane takes, and its shift.
struct Steps {
    int32_t byte[SEGMENT / 8];
    alignas(32) uint8_t shuffle[SEGMENT / 8][32];
    alignas(32) int32_t shift[SEGMENT / 8][8];
};

struct AllSteps {
    Steps of[CLASSES];
    explicit AllSteps(const int32_t *windows) {
        for (int c = 0; c < CLASSES; c++)
            for (int t = 0; t < SEGMENT; t++) {
                const int bit = windows[c * SEGMENT + t], group = t / 8, lane = t % 8;
                Steps &s = of[c];
                if (lane == 0) s.byte[group] = bit / 8;
                for (int i = 0; i < 4; i++)
                    s.shuffle[group][4 * lane + i] = static_cast<uint8_t>(bit / 8 - s.byte[group] + i);
                s.shift[group][lane] = bit % 8;
            }
    }
};

static const Steps *steps_of(const int32_t *windows, int rate_class) {
    static const AllSteps all(windows);  // constants of the format, the same in every call
    return &all.of[rate_class];
}

template <int M>
static void column(const Steps *s, const uint8_t *stream, const float *table, int length, const float (&x)[M],
                   float (*z)[SEGMENT]) {
    __m256 input[M];
    for (int m = 0; m < M; m++) input[m] = _mm256_set1_ps(x[m]);
    const __m256i mask = _mm256_set1_epi32(STATES - 1);
    for (int t = 0; t < length; t += 8) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(stream + s->byte[t / 8]));
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i *>(s->shuffle[t / 8]));
        const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i *>(s->shift[t / 8]));
        const __m256i window = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), order);
        const __m256i state = _mm256_and_si256(_mm256_srlv_epi32(window, shift), mask);
        const __m256 value = _mm256_i32gather_ps(table, state, 4);
        for (int m = 0; m < M; m++)
            _mm256_storeu_ps(z[m] + t, _mm256_fmadd_ps(value, input[m], _mm256_loadu_ps(z[m] + t)));
    }
}

#else

using Steps = int32_t;

static const Steps *steps_of(const int32_t *windows, int rate_class) { return windows + rate_class * SEGMENT; }

template <int M>
static void column(const Steps *windows, const uint8_t *stream, const float *table, int length, const float (&x)[M],
                   float (*z)[SEGMENT]) {
    for (int t = 0; t < length; t++) {
        const int32_t bit = windows[t];
        const uint8_t *at = stream + bit / 8;
        const uint32_t window = at[0] | at[1] << 8 | static_cast<uint32_t>(at[2]) << 16;
        const float value = table[window >> bit % 8 & (STATES - 1)];
        for (int m = 0; m < M; m++) z[m][t] += value * x[m];
    }
}

#endif

// z [M][SEGMENT]: one segment of rows times live columns first .. last - 1. x: [M][live], times the factors.
template <int M>
static void segment_slab(const Trellis &a, int segment, int first, int last, const float *x, float (*z)[SEGMENT]) {
    std::memset(z, 0, sizeof(float) * M * SEGMENT);
    const int length = a.starts[segment + 1] - a.starts[segment];
    for (int c = 1; c < CLASSES; c++) {
        const int from = a.bounds[c] > first ? a.bounds[c] : first, to = a.bounds[c + 1] < last ? a.bounds[c + 1] : last;
        const Steps *steps = steps_of(a.windows, c);
        const int32_t *sizes = a.segment_words + c * (a.segments + 1);
        const uint16_t *words = a.words + a.begins[c] + sizes[segment];
        for (int j = from; j < to; j++) {
            float inputs[M];
            for (int m = 0; m < M; m++) inputs[m] = x[static_cast<size_t>(m) * a.live + j];
            const uint8_t *stream = reinterpret_cast<const uint8_t *>(
                words + static_cast<size_t>(j - a.bounds[c]) * sizes[a.segments]);
            column<M>(steps, stream, a.tables + c * STATES, length, inputs, z);
        }
    }
}

// out [a][b] = first^T z second, in float32.
static void rotate_piece(const Piece &p, const float *z, float *out, std::vector<float> &scratch) {
    const int a = p.a, b = p.b;
    scratch.assign(static_cast<size_t>(a) * b, 0.0f);
    for (int i = 0; i < a; i++)
        for (int k = 0; k < b; k++) {
            const float value = z[i * b + k];
            for (int l = 0; l < b; l++) scratch[i * b + l] += value * p.second[k * b + l];
        }
    std::memset(out, 0, sizeof(float) * a * b);
    for (int i = 0; i < a; i++)
        for (int j = 0; j < a; j++) {
            const float sign = p.first[i * a + j];
            for (int l = 0; l < b; l++) out[j * b + l] += sign * scratch[i * b + l];
        }
}

// The slabs' sums added in order, rotated and scaled: one vector's outputs of one matrix.
static void finish(const Trellis &a, int slabs, int vectors, int m, const float *partial, float *y) {
    static thread_local std::vector<float> z, scratch;
    z.assign(a.rows, 0.0f);
    for (int slab = 0; slab < slabs; slab++)
        for (int s = 0; s < a.segments; s++) {
            const float *from = partial + ((static_cast<size_t>(slab) * a.segments + s) * vectors + m) * SEGMENT;
            for (int row = a.starts[s]; row < a.starts[s + 1]; row++) z[row] += from[row - a.starts[s]];
        }
    if (!a.pieces) std::memcpy(y, z.data(), sizeof(float) * a.rows);
    for (int i = 0; i < a.piece_count; i++) rotate_piece(a.pieces[i], z.data() + a.pieces[i].start, y + a.pieces[i].start, scratch);
    for (int row = 0; row < a.rows; row++) y[row] *= a.row_scales[row];
}

template <int M>
static void some_vectors(const Trellis *const *matrices, int number, const float *x, int count, float *y) {
    static thread_local std::vector<float> inputs, partial;
    std::vector<size_t> tasks(number + 1, 0), starts(number + 1, 0), prepared(number + 1, 0);
    int64_t weights = 0;
    for (int i = 0; i < number; i++) {
        const Trellis &a = *matrices[i];
        tasks[i + 1] = tasks[i] + static_cast<size_t>((a.live + SLAB - 1) / SLAB) * a.segments;
        starts[i + 1] = starts[i] + a.rows;
        prepared[i + 1] = prepared[i] + static_cast<size_t>(M) * a.live;
        weights += static_cast<int64_t>(a.rows) * a.live;
    }
    inputs.assign(prepared[number], 0.0f);
    partial.resize(tasks[number] * M * SEGMENT);
    for (int i = 0; i < number; i++) {
        const Trellis &a = *matrices[i];
        for (int m = 0; m < count; m++) {
            float *to = inputs.data() + prepared[i] + static_cast<size_t>(m) * a.live;
            const float *from = x + static_cast<size_t>(m) * a.inputs;
            for (int j = 0; j < a.live; j++) to[j] = from[a.columns[j]] * a.factors[j];
        }
    }
    // Threads see their own copies of thread_local vectors: hand them these.
    const float *ready = inputs.data();
    float *sums = partial.data();
    const bool many = weights > 16384;  // below this a second thread costs more than it brings
    (void)many;
#pragma omp parallel for schedule(dynamic) if (many)
    for (long task = 0; task < static_cast<long>(tasks[number]); task++) {
        int i = 0;
        while (static_cast<size_t>(task) >= tasks[i + 1]) i++;
        const Trellis &a = *matrices[i];
        const int own = static_cast<int>(task - tasks[i]), first = own / a.segments * SLAB;
        const int last = first + SLAB < a.live ? first + SLAB : a.live;
        float(*z)[SEGMENT] = reinterpret_cast<float(*)[SEGMENT]>(sums + static_cast<size_t>(task) * M * SEGMENT);
        segment_slab<M>(a, own % a.segments, first, last, ready + prepared[i], z);
    }
#pragma omp parallel for schedule(dynamic) if (many)
    for (int one = 0; one < number * count; one++) {
        const int i = one / count, m = one % count;
        const Trellis &a = *matrices[i];
        const int slabs = static_cast<int>((tasks[i + 1] - tasks[i]) / a.segments);
        finish(a, slabs, M, m, sums + tasks[i] * M * SEGMENT, y + m * starts[number] + starts[i]);
    }
}

// y [count, the sum of their rows] = x [count, inputs] times each transposed matrix; contiguous float32.
extern "C" void sage_trellis_multiply(const Trellis *const *matrices, int number, const float *x, long count, float *y) {
    size_t rows = 0;
    for (int i = 0; i < number; i++) rows += matrices[i]->rows;
    for (long first = 0; first < count;) {
        const float *from = x + first * matrices[0]->inputs;
        const int some = count - first < MOST ? static_cast<int>(count - first) : MOST;
        if (some == 1) some_vectors<1>(matrices, number, from, some, y + first * rows);
        else some_vectors<MOST>(matrices, number, from, some, y + first * rows);
        first += some;
    }
}
