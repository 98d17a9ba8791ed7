// The Viterbi search of methods/sage_x/viterbi.py, which says what it computes; both give the same codes bit for bit.
//
// States are numbered here with the newest bit lowest (the reverse of the stored order): state s is followed by
// s' = ((s << k) mod 2^L) | c, so that the predecessors of a run of 2^k states lie 2^(L-k) apart, in whole vectors.
// Plain vector extensions of GCC and Clang; the compiler turns them into whatever the machine has.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int W = 16;  // lanes
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

constexpr int MOST_STATES = 1 << 12;
constexpr float FAR = 1e30f;  // the cost of a state that the path must not be in

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Lane i holds from[i >> K].
template <int K>
inline Floats spread(const float* from) {
    if constexpr (K >= 4) return Floats{} + from[0];
    Floats v = load(from);
    if constexpr (K == 1) return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    if constexpr (K == 2) return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
}

// One step: for each h = s' >> K the best predecessor p * 2^(L-K) + h, the smallest p on a tie, then the costs of s'.
template <int K>
void step(int states, const float* cost, float* next, uint8_t* arg, float x, const float* table) {
    const int heads = states >> K;
    float best[MOST_STATES / 2 + W];
    for (int h = 0; h < heads; h += W) {
        Floats low = load(cost + h);
        Ints from = {};
        for (int p = 1; p < (1 << K); ++p) {
            Floats v = load(cost + p * heads + h);
            Ints less = v < low;
            low = less ? v : low;
            from = less ? from * 0 + p : from;
        }
        store(best + h, low);
        Bytes narrow = __builtin_convertvector(from, Bytes);
        std::memcpy(arg + h, &narrow, sizeof narrow);
    }
    for (int s = 0; s < states; s += W) {
        Floats d = x - load(table + s);
        store(next + s, spread<K>(best + (s >> K)) + d * d);
    }
}

void step_of(int k, int states, const float* cost, float* next, uint8_t* arg, float x, const float* table) {
    switch (k) {
        case 1: return step<1>(states, cost, next, arg, x, table);
        case 2: return step<2>(states, cost, next, arg, x, table);
        case 3: return step<3>(states, cost, next, arg, x, table);
        case 4: return step<4>(states, cost, next, arg, x, table);
        case 5: return step<5>(states, cost, next, arg, x, table);
        case 6: return step<6>(states, cost, next, arg, x, table);
        default: return step<7>(states, cost, next, arg, x, table);
    }
}

int smallest(const float* cost, int first, int count, int stride) {
    int best = first;
    for (int i = 1; i < count; ++i)
        if (cost[first + i * stride] < cost[best]) best = first + i * stride;
    return best;
}

struct Scratch {
    std::vector<float> a, b;
    std::vector<uint8_t> args;
};

// Runs steps first .. first + count - 1 (modulo length) of a segment and leaves costs in scratch.a.
void forward(const float* x, int length, int first, int count, const uint8_t* widths, int period, int L,
             const float* table, Scratch& scratch) {
    const int states = 1 << L;
    for (int i = 0; i < count; ++i) {
        const int t = (first + i) % length;
        step_of(widths[t % period], states, scratch.a.data(), scratch.b.data(), &scratch.args[size_t(i) * states / 2],
                x[t], table);
        scratch.a.swap(scratch.b);
    }
}

void encode(const float* x, int length, int warmup, const uint8_t* widths, int period, int L, const float* table,
            uint8_t* codes, float* values, Scratch& scratch) {
    const int states = 1 << L;
    // First an unconstrained search around the seam: which state does a good path have there?
    const int before = warmup < length / 2 ? warmup : length / 2;
    scratch.a.assign(states, 0.0f);
    forward(x, length, length - before, 2 * before, widths, period, L, table, scratch);
    int state = smallest(scratch.a.data(), 0, states, 1);
    for (int i = 2 * before - 1; i >= before; --i) {
        const int k = widths[(i - before) % period];
        const int head = state >> k;
        state = (scratch.args[size_t(i) * states / 2 + head] << (L - k)) | head;
    }
    const int k0 = widths[0];
    const int overlap = state & ((states >> k0) - 1);
    // Then the whole segment, beginning and ending with that overlap.
    scratch.a.assign(states, FAR);
    for (int p = 0; p < (1 << k0); ++p) scratch.a[(p << (L - k0)) | overlap] = 0.0f;
    forward(x, length, 0, length, widths, period, L, table, scratch);
    state = smallest(scratch.a.data(), overlap, 1 << k0, states >> k0);
    for (int t = length - 1; t >= 0; --t) {
        const int k = widths[t % period];
        values[t] = table[state];
        codes[t] = uint8_t(state & ((1 << k) - 1));
        const int head = state >> k;
        state = (scratch.args[size_t(t) * states / 2 + head] << (L - k)) | head;
    }
}

}  // namespace

extern "C" void encode_segments(const float* x, const int64_t* starts, int64_t segments, int64_t warmup,
                                const uint8_t* widths, int64_t period, int64_t L, const float* table, uint8_t* codes,
                                float* values, int64_t threads) {
    int64_t longest = 2 * warmup;
    for (int64_t i = 0; i < segments; ++i) {
        const int64_t length = starts[i + 1] - starts[i];
        if (length > longest) longest = length;
    }
#pragma omp parallel num_threads(int(threads < segments ? threads : segments))
    {
        static thread_local Scratch scratch;
        scratch.b.resize(size_t(1) << L);
        if (scratch.args.size() < (size_t(longest) << L) / 2) scratch.args.resize((size_t(longest) << L) / 2);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < segments; ++i)
            encode(x + starts[i], int(starts[i + 1] - starts[i]), int(warmup), widths, int(period), int(L), table,
                   codes + starts[i], values + starts[i], scratch);
    }
}
