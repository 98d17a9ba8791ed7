// The Viterbi search of methods/sage_x/viterbi.py, which says what it computes; both give the same codes bit for bit.
//
// States are numbered here with the newest bit lowest (the reverse of the stored order): state s is followed by
// s' = ((s << k) mod 2^L) | c, so that the predecessors of a run of 2^k states lie 2^(L-k) apart, in whole vectors, and
// all that tells these successors apart is their own distance. So only the costs before that distance are kept, one for
// each head s' >> k: what a state costs is put together where the next step looks at it.
// Plain vector extensions of GCC and Clang. Those wider than the machine's are taken apart badly: hence two widths.

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // lanes
#else
constexpr int W = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

constexpr int MOST_STATES = 1 << 12;
constexpr int MOST_BITS = 7;  // a step brings
constexpr float FAR = 1e30f;  // the cost of a state that the path must not be in

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(int32_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }

template <int J, int... I>
inline Floats repeated(Floats v, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(v, v, (I >> J)...);
#else
    return __builtin_shuffle(v, Ints{(I >> J)...});
#endif
}

// Lane i holds from[i >> J].
template <int J>
inline Floats spread(const float* from) {
    if constexpr ((1 << J) >= W) return Floats{} + from[0];
    else return repeated<J>(load(from), std::make_integer_sequence<int, W>());
}

// The costs of states s .. s + W - 1 after a step of J bits to the value x; best: of their heads before that value.
template <int J>
inline Floats costs(const float* best, int s, float x, const float* table) {
    const Floats d = x - load(table + s);
    return spread<J>(best + (s >> J)) + d * d;
}

// From heads after a step of J bits to heads h after one of K: the best predecessor p * 2^(L-K) + h of each, the smallest
// p on a tie.
template <int J, int K>
void step(int states, const float* best, float* next, uint8_t* arg, float x, const float* table) {
    const int heads = states >> K;
    int32_t choice[MOST_STATES / 2];
    for (int h = 0; h < heads; h += W) {
        Floats low = costs<J>(best, h, x, table);
        Ints from = {};
        for (int p = 1; p < (1 << K); ++p) {
            const Floats v = costs<J>(best, p * heads + h, x, table);
            const Ints less = v < low;
            low = less ? v : low;
            from = less ? Ints{} + p : from;
        }
        store(next + h, low);
        store(choice + h, from);
    }
    // In a loop of its own, which compilers narrow in whole vectors.
    for (int h = 0; h < heads; ++h) arg[h] = uint8_t(choice[h]);
}

// step<j, k> for j and k known when it runs.
using Step = void (*)(int, const float*, float*, uint8_t*, float, const float*);

template <int J, int... K>
Step step_to(int k, std::integer_sequence<int, K...>) {
    static constexpr Step steps[] = {step<J, K + 1>...};
    return steps[k - 1];
}

template <int... J>
Step step_between(int j, int k, std::integer_sequence<int, J...> widths) {
    static constexpr Step (*rows[])(int, std::integer_sequence<int, J...>) = {step_to<J + 1>...};
    return rows[j - 1](k, widths);
}

struct Scratch {
    std::vector<float> best, next;  // by head, and W more: `spread` loads whole vectors
    std::vector<uint8_t> args;      // of each step, by head
};

struct Segment {
    const float* x;
    int length;
    const uint8_t* widths;
    int period;
    int states;
    const float* table;

    int width(int t) const { return widths[t % period]; }

    // Runs steps first .. first + count - 1 (modulo length); the costs of the first one's heads are in scratch.best.
    void forward(int first, int count, Scratch& scratch) const {
        std::memset(scratch.args.data(), 0, states / 2);
        for (int i = 1; i < count; ++i) {
            const int before = (first + i - 1) % length, now = (first + i) % length;
            const Step step =
                step_between(width(before), width(now), std::make_integer_sequence<int, MOST_BITS>());
            step(states, scratch.best.data(), scratch.next.data(), &scratch.args[size_t(i) * states / 2], x[before],
                 table);
            scratch.best.swap(scratch.next);
        }
    }

    // Of states first, first + stride, ... the one with the least cost after step t, where `forward` ended.
    int cheapest(int t, int first, int count, int stride, const Scratch& scratch) const {
        int best = first;
        float low = 0;
        for (int i = 0; i < count; ++i) {
            const int s = first + i * stride;
            const float d = x[t] - table[s], cost = scratch.best[s >> width(t)] + d * d;
            if (i == 0 || cost < low) {
                low = cost;
                best = s;
            }
        }
        return best;
    }

    // The state before `state`, which step t with the i-th choices led to.
    int previous(int state, int t, int i, const Scratch& scratch) const {
        const int heads = states >> width(t), head = state >> width(t);
        return scratch.args[size_t(i) * states / 2 + head] * heads + head;
    }

    void encode(int warmup, uint8_t* codes, float* values, Scratch& scratch) const {
        if (length == 0) return;
        const int seam_heads = states >> width(0);
        // First an unconstrained search around the seam: which state does a good path have there?
        const int before = warmup < length / 2 ? warmup : length / 2;
        scratch.best.assign(states / 2 + W, 0.0f);
        forward(length - before, 2 * before, scratch);
        int state = before > 0 ? cheapest(before - 1, 0, states, 1, scratch) : 0;
        for (int t = before - 1; t >= 0; --t) state = previous(state, t, before + t, scratch);
        const int overlap = state & (seam_heads - 1);
        // Then the whole segment, beginning and ending with that overlap.
        scratch.best.assign(states / 2 + W, FAR);
        scratch.best[overlap] = 0.0f;
        forward(0, length, scratch);
        state = cheapest(length - 1, overlap, 1 << width(0), seam_heads, scratch);
        for (int t = length - 1; t >= 0; --t) {
            values[t] = table[state];
            codes[t] = uint8_t(state & ((1 << width(t)) - 1));
            state = previous(state, t, t, scratch);
        }
    }
};

}  // namespace

extern "C" void encode_segments(const float* x, const int64_t* starts, int64_t segments, int64_t warmup,
                                const uint8_t* widths, int64_t period, int64_t L, const float* table, uint8_t* codes,
                                float* values, int64_t threads) {
    const int states = 1 << L;
    int64_t longest = 2 * warmup;
    for (int64_t i = 0; i < segments; ++i) {
        const int64_t length = starts[i + 1] - starts[i];
        if (length > longest) longest = length;
    }
#pragma omp parallel num_threads(int(threads < segments ? threads : segments))
    {
        static thread_local Scratch scratch;
        scratch.next.resize(states / 2 + W);
        if (scratch.args.size() < size_t(longest) * states / 2) scratch.args.resize(size_t(longest) * states / 2);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < segments; ++i) {
            const Segment segment{x + starts[i], int(starts[i + 1] - starts[i]), widths, int(period), states, table};
            segment.encode(int(warmup), codes + starts[i], values + starts[i], scratch);
        }
    }
}
