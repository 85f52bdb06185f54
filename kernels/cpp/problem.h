// The arguments of the attention kernels as Python fills them in, and which keys a row reads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <vector>

#include "panels.h"

namespace attn {

// A tensor: strides in numbers, missing axes have size 1; data is null where there is none.
struct Array {
    char* data;
    int64_t dtype;
    int64_t size[4];
    int64_t stride[4];
    INLINE char* at(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) const {
        return data + (a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]) * bytes_of(dtype);
    }
    INLINE float number(int64_t a, int64_t b = 0, int64_t c = 0) const {
        return *reinterpret_cast<const float*>(at(a, b, c));
    }
    INLINE int32_t integer(int64_t a, int64_t b = 0, int64_t c = 0) const {
        return *reinterpret_cast<const int32_t*>(at(a, b, c));
    }
    INLINE Rows rows(int64_t a, int64_t b, int64_t from, int64_t n) const {
        return Rows{at(a, b, from), stride[2] * bytes_of(dtype), dtype, n, size[3]};
    }
};

// `softmax` 0 leaves only the linear part; `shared` is 1 for one normaliser; `mode` says what a linear part divides
// by: 1 its denominator + EPS, 0 nothing. What the fields hold is said in problem.py.
struct Args {
    Array q, k, v, o, lse, valid, extra_k, extra_v, extra_at, sink;
    Array cu_q, cu_k, starts, counts, columns, kinds, patterns;
    Array fq, fk, weight, state, linear, den, state_out;
    Array d_o, d_linear, dq, dk, dv, d_extra_k, d_extra_v, dfq, dfk;
    double scale, softcap;
    const int64_t* window;  // per KV group
    const int64_t* index;   // per KV group; null where there is no linear part
    int64_t threads, causal, block_q, block_k, softmax, shared, normalize;
};

// One sequence, the n-th: rows and keys of batch entry b from q0 and k0.
struct Sequence {
    int64_t n, b, q0, k0, Q, K;
};

inline std::vector<Sequence> sequences(const Args& a) {
    const Array& q = a.softmax ? a.q : a.fq;
    const Array& k = a.softmax ? a.k : a.fk;
    std::vector<Sequence> all;
    if (a.cu_q.data) {
        for (int64_t n = 0; n + 1 < a.cu_q.size[0]; n++) {
            const int64_t i = a.cu_q.integer(n), j = a.cu_k.integer(n);
            all.push_back({n, 0, i, j, a.cu_q.integer(n + 1) - i, a.cu_k.integer(n + 1) - j});
        }
    } else {
        for (int64_t b = 0; b < q.size[0]; b++) all.push_back({b, b, 0, 0, q.size[2], k.size[2]});
    }
    return all;
}

// Bits of 32 keys from `at` on: those within low : high.
INLINE uint32_t range_bits(int64_t at, int64_t low, int64_t high) {
    const int64_t a = clamp(low - at, 0, 32), b = clamp(high - at, 0, 32);
    if (a >= b) return 0;
    return (b == 32 ? ~0u : (1u << b) - 1) & ~((1u << a) - 1);
}

// One sequence and KV group: its rows are numbered t = position · G + head, so heads of a group stand together.
struct Which {
    Sequence s;
    int64_t g, G, shift, w;  // shift: the key position of row 0; w: the window, -1 without
    bool causal, lists;
    int64_t t(int64_t position) const { return (position - shift) * G; }  // first row at a key position
    int64_t position(int64_t t) const { return shift + t / G; }
    INLINE int64_t low(int64_t i) const { return w < 0 ? 0 : std::max<int64_t>(0, i - w + 1); }
    INLINE int64_t high(int64_t i) const {  // may be below low: no key
        if (w == 0) return 0;
        return std::min(s.K, causal ? i + 1 : w < 0 ? s.K : i + w);
    }
};

inline Which which(const Args& a, const Sequence& s, int64_t g) {
    const Array& q = a.softmax ? a.q : a.fq;
    const Array& k = a.softmax ? a.k : a.fk;
    const bool lists = a.starts.data != nullptr;
    return Which{s, g, q.size[1] / k.size[1], s.K - s.Q, lists ? -1 : a.window[g], a.causal != 0, lists};
}

// Keys from : to of one step of the softmax; kind as in `Blocks`, `column` the first key of the pattern's block.
struct Span {
    int64_t from, to, kind, column;
};

constexpr int64_t STEP = 128;  // keys of a step
constexpr int64_t TILE = 96;   // rows of a step

// The keys that rows t0 : t1 can read, in steps that begin at a multiple of 32.
inline void spans(const Args& a, const Which& x, int64_t t0, int64_t t1, std::vector<Span>& out) {
    out.clear();
    const int64_t first = x.position(t0), last = x.position(t1 - 1);
    if (!x.lists) {
        const int64_t low = x.low(first) / 32 * 32, high = x.high(last);
        for (int64_t c = low; c < high; c += STEP) out.push_back({c, std::min(c + STEP, high), -1, c});
        return;
    }
    const int64_t n = t0 / (a.block_q * x.G);
    const int64_t b = a.starts.size[0] > 1 ? x.s.n : 0, g = a.starts.size[1] > 1 ? x.g : 0;
    const int64_t start = a.starts.integer(b, g, n), count = a.counts.integer(b, g, n), high = x.high(last);
    for (int64_t i = start; i < start + count; i++) {
        const int64_t kind = a.kinds.data ? a.kinds.integer(i) : -1, from = a.columns.integer(i) * a.block_k;
        const int64_t to = std::min(from + a.block_k, high);
        for (int64_t c = from; c < to; c += STEP) {
            const int64_t end = std::min(c + STEP, to);
            // neighbouring full blocks make one step
            if (kind < 0 && !out.empty() && out.back().kind < 0 && out.back().to == c && end - out.back().from <= STEP)
                out.back().to = end;
            else out.push_back({c, end, kind, from});
        }
    }
}

// Bits of the keys of a sequence that count: those before K, and valid where that is said.
inline std::vector<uint32_t> real_keys(const Args& a, const Sequence& s) {
    std::vector<uint32_t> bits(up(s.K, STEP) / 32 + STEP / 32, 0);
    for (int64_t w = 0; w * 32 < s.K; w++) bits[w] = range_bits(w * 32, 0, s.K);
    if (a.valid.data)
        for (int64_t j = 0; j < s.K; j++)
            if (!*a.valid.at(s.b, s.k0 + j)) bits[j / 32] &= ~(1u << (j % 32));
    return bits;
}

// Rows of a step that have a key in from : to, in whole register tiles of the tile that begins at t0.
INLINE void active(const Which& x, int64_t t0, int64_t rows, int64_t from, int64_t to, int64_t& a, int64_t& b) {
    int64_t first = 0, last = rows;
    if (x.causal) first = x.t(from) - t0;
    else if (x.w > 0) first = x.t(from - x.w + 1) - t0;
    if (x.w > 0) last = x.t(to - 1 + x.w) - t0;
    a = clamp(first, 0, rows) / MR * MR;
    b = up(clamp(last, 0, rows), MR);
}

// What scores are multiplied by inside exp2: never 0, so that a masked score stays -inf.
inline float score_factor(const Args& a) {
    const double c = a.softcap > 0 ? 1.0 : std::fabs(a.scale);
    return static_cast<float>(std::max(c * 1.4426950408889634, 1e-30));
}

// Calls run(job) for jobs 0 … n − 1 on all threads, each as it becomes free; run must not throw.
template <class F>
void parallel(int64_t threads, int64_t n, F run) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
    for (int64_t i = 0; i < n; i++) run(i);
}

}  // namespace attn
