// The linear branch of problem.py in terms of sums over entries.
#pragma once
#include "linear.h"

namespace attn {

// Chunks of a sum over ranges of keys: larger where a state is.
inline int64_t chunk_of(int64_t F, int64_t D) {
    return std::min<int64_t>(256, 64 * std::max<int64_t>(1, F * D / 16384));
}

// Which keys rows t0 : t0 + rows cover.
inline Reach reach_of(const Which& w, int64_t t0, int64_t rows) {
    Reach x;
    const int64_t K = w.s.K;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = w.position(t0 + i);
        const bool all = !w.causal && w.w == 0;
        x.before[i] = w.w < 0 ? 0 : all ? K : clamp(at - w.w + 1, 0, K);
        x.from[i] = w.w < 0 || all ? K : clamp(at + w.w, 0, K);
    }
    return x;
}

// Key blocks that query block n can read as a branch: 0 : seen, without those that its list names.
inline int64_t unlisted(const Args& a, const Which& w, int64_t n, std::vector<int64_t>& named) {
    const int64_t blocks = (w.s.K + a.block_k - 1) / a.block_k, begin = w.position(n * a.block_q * w.G);
    const int64_t seen = w.causal ? clamp(begin < 0 ? 0 : begin / a.block_k, 0, blocks) : blocks;
    const int64_t b = a.starts.size[0] > 1 ? w.s.n : 0, g = a.starts.size[1] > 1 ? w.g : 0;
    const int64_t start = a.starts.integer(b, g, n), count = a.counts.integer(b, g, n);
    named.clear();
    for (int64_t i = start; i < start + count && a.columns.integer(i) < seen; i++)
        named.push_back(a.columns.integer(i));
    return seen;
}

// The incoming state of row t → slot 0; `turned` where the features are [v | 1] and the values those of keys.
inline void incoming(const Args& a, const Which& w, int64_t t, const Sums& x, bool turned) {
    float* to = x.slot(0);
    std::memset(to, 0, x.size * 4);
    if (!a.state.data || x.lists) return;
    const Panels p = x.state(to);
    const int64_t F = turned ? x.D : x.F, D = turned ? x.F - 1 : x.D;
    for (int64_t f = 0; f < F; f++) {
        const float* from = reinterpret_cast<const float*>(a.state.at(w.s.n, t, f));
        for (int64_t d = 0; d < D + (turned ? 1 : 0); d++) *(turned ? p.at(f, d) : p.at(d, f)) = from[d];
        if (!turned) x.tail(to)[f] = from[D];
    }
}

// The state after the keys that the row behind the last one does not read as softmax: j < K - w.
inline void outgoing(const Args& a, const Which& w, int64_t t, const Sums& x, const SumsRoom& r) {
    const int64_t end = w.w < 0 ? 0 : std::max<int64_t>(0, w.s.K - w.w), c = end / x.chunk;
    std::memcpy(r.u, x.slot(c), x.size * 4);
    const Panels p = x.state(r.u);
    float* tail = x.tail(r.u);
    for (int64_t j = c * x.chunk; j < end; j++)
        for (int64_t f = 0; f < x.F; f++) {
            const float phi = *x.fk.at(j, f);
            tail[f] += phi;
            for (int64_t d = 0; d < p.cols; d += W)
                store(p.at(d, f), fma(set(phi), load(x.v.at(d, j)), load(p.at(d, f))));
        }
    for (int64_t f = 0; f < x.F; f++) {
        float* to = reinterpret_cast<float*>(a.state_out.at(w.s.n, t, f));
        for (int64_t d = 0; d < x.D; d++) to[d] = *p.at(d, f);
        to[x.D] = tail[f];
    }
}

}  // namespace attn
