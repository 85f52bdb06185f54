// One tile of rows backward: with p = exp(s - lse) recomputed, dS = p ∘ (dO·V − δ), and from it the products into dQ,
// dK and dV (Dao et al. 2022).
#pragma once
#include "softmax.h"

namespace attn {

constexpr int64_t WIDE = STEP + 16;  // floats of a row of scores: STEP, and zeros up to whole register tiles

// Keys and values of one sequence and KV group in the layouts that the backward reads.
struct PackedBack {
    Panels kc, kr, vc;  // keys as columns, keys as rows, values as columns
    Packed view;        // for what asks which keys are real
    int64_t plan(int64_t keys, int64_t d) {
        const int64_t n = up(keys, ALIGN);
        kc = vc = Panels{nullptr, n, d};
        kr = Panels{nullptr, up(d, W), n};
        view.needed.assign(n / ALIGN, 1);
        return 2 * up(kc.floats(), 16) + up(kr.floats(), 16);
    }
    void lay(float* p) {
        kc.data = p;
        vc.data = kc.data + up(kc.floats(), 16);
        kr.data = vc.data + up(vc.floats(), 16);
    }
    void pack(const Rows& k, const Rows& v, int64_t from, int64_t to, float* work) const {
        pack_columns<Floats>(k, kc, from, to, work);
        pack_rows<Floats>(k, kr, from, to, work);
        pack_columns<Floats>(v, vc, from, to, work);
    }
};

// Sums of dK and dV over the tiles of a unit, for keys from : to.
struct Sink {
    int64_t from = 0, to = 0;
    float *dk = nullptr, *dv = nullptr;
    static int64_t floats(int64_t keys, int64_t d) { return 2 * up((keys + W + MR) * up(d, W), 16); }
    void lay(float* p, int64_t d) {
        dk = p;
        dv = p + floats(to - from, d) / 2;
        std::memset(p, 0, floats(to - from, d) * 4);
    }
};

struct BackRoom {
    float *q, *g, *s, *t, *dq, *lse, *delta;  // rows, their output gradients, two tiles of scores
    Panels qr, gr;                            // the rows of q and g as rows of a right-hand factor
    static int64_t floats(int64_t d) { return TILE * (2 * d + 3 * up(d, W) + 2 * WIDE) + 2 * up(TILE, 16) + 64; }
    void lay(float* p, int64_t d) {
        const int64_t wide = up(d, W);
        s = p;
        t = s + TILE * WIDE;
        dq = t + TILE * WIDE;
        qr = Panels{dq + TILE * wide, wide, TILE};
        gr = Panels{qr.data + TILE * wide, wide, TILE};
        lse = gr.data + TILE * wide;
        delta = lse + up(TILE, 16);
        q = delta + up(TILE, 16);
        g = q + TILE * d;
    }
};

// Fills the room with rows t0 : t0 + rows, zeros behind them. A row without keys has lse = +inf here: all p are 0.
inline void load_tile(const Args& a, const Which& x, const float* delta, int64_t t0, int64_t rows, const BackRoom& r,
                      float* work) {
    const int64_t D = a.q.size[3], padded = up(rows, MR);
    for (int64_t i = 0; i < padded; i++) {
        const int64_t t = t0 + i, head = x.g * x.G + t % x.G, at = x.s.q0 + t / x.G;
        const float lse = i < rows ? a.lse.number(x.s.b, head, at) : LOWEST;
        r.lse[i] = lse == LOWEST ? INFINITY : lse * LOG2E;
        if (lse == LOWEST) {
            std::memset(r.q + i * D, 0, D * 4);
            std::memset(r.g + i * D, 0, D * 4);
            r.delta[i] = 0;
            continue;
        }
        to_float(r.q + i * D, a.q.at(x.s.b, head, at), a.q.dtype, D);
        to_float(r.g + i * D, a.d_o.at(x.s.b, head, at), a.d_o.dtype, D);
        r.delta[i] = delta[t];
        if (a.scale < 0)
            for (int64_t e = 0; e < D; e++) r.q[i * D + e] = -r.q[i * D + e];
    }
    pack_rows<Floats>(Rows{reinterpret_cast<char*>(r.q), D * 4, FLOAT32, padded, D}, r.qr, 0, padded, work);
    pack_rows<Floats>(Rows{reinterpret_cast<char*>(r.g), D * 4, FLOAT32, padded, D}, r.gr, 0, padded, work);
    std::memset(r.dq, 0, padded * up(D, W) * 4);
}

// s: scores → p; t: dO·V → dS. Zeros behind column n.
INLINE void row_gradient(const Args& a, float* s, float* t, int64_t n, float c, float lse, float delta) {
    const V scale = set(c), shift = set(-lse), less = set(delta), factor = set(static_cast<float>(std::fabs(a.scale)));
    const float cap = static_cast<float>(a.softcap);
    for (int64_t j = 0; j < n; j += W) {
        const V score = load(s + j), p = exp2(fma(score, scale, shift));
        V ds = mul(mul(p, sub(load(t + j), less)), factor);
        if (cap > 0) {
            const V y = mul(max(score, set(-cap)), set(1.0f / cap));
            ds = mul(ds, fma(sub(zero(), y), y, set(1.0f)));
        }
        store(s + j, p);
        store(t + j, ds);
    }
    store(s + n, zero());
    store(t + n, zero());
}

template <class Bits>
void step_back(const Args& a, const PackedBack& p, const Span& span, int64_t t0, int64_t first, int64_t last, bool edge,
               const BackRoom& r, const Sink& sink, float c, Bits bits_of) {
    const int64_t D = a.q.size[3], d = up(D, W), n = up(span.to - span.from, W), rows = last - first;
    float *s = r.s + first * WIDE, *t = r.t + first * WIDE;
    product<Floats>(rows, r.q + first * D, D, 1, p.kc, span.from, span.from + n, 0, D, s, WIDE, false);
    product<Floats>(rows, r.g + first * D, D, 1, p.vc, span.from, span.from + n, 0, D, t, WIDE, false);
    if (a.softcap > 0)
        for (int64_t i = 0; i < rows; i++)
            cap_rows(s + i * WIDE, 1, n, static_cast<float>(std::fabs(a.scale)), static_cast<float>(a.softcap));
    for (int64_t i = first; i < last; i++) {
        if (edge) {
            uint32_t bits[STEP / 32] = {};
            if (r.lse[i] != INFINITY) bits_of(t0 + i, bits);
            mask_row(r.s + i * WIDE, n, bits);
        }
        row_gradient(a, r.s + i * WIDE, r.t + i * WIDE, n, c, r.lse[i], r.delta[i]);
    }
    const int64_t at = (span.from - sink.from) * d;
    product<Floats>(rows, t, WIDE, 1, p.kr, 0, d, span.from, n, r.dq + first * d, d, true);
    product<Floats>(up(n, MR), t, 1, WIDE, r.qr, 0, d, first, rows, sink.dk + at, d, true);
    product<Floats>(up(n, MR), s, 1, WIDE, r.gr, 0, d, first, rows, sink.dv + at, d, true);
}

// dQ of rows t0 : t0 + rows into the tensor, their part of dK and dV into the sinks.
inline void softmax_tile_back(const Args& a, const Which& x, const PackedBack& p, const PackedBack* extra,
                              const float* delta, std::vector<Span>& todo, int64_t t0, int64_t rows, const BackRoom& r,
                              const Sink& sink, const Sink& extra_sink, float* work) {
    const int64_t D = a.q.size[3], d = up(D, W), padded = up(rows, MR);
    load_tile(a, x, delta, t0, rows, r, work);
    const float c = score_factor(a);
    spans(a, x, t0, t0 + rows, todo);
    for (const Span& span : todo) {
        int64_t first, last;
        active(x, t0, rows, span.from, span.to, first, last);
        if (first >= last) continue;
        const bool edge = !whole(x, p.view, span, t0, first, last, rows);
        step_back(a, p, span, t0, first, last, edge, r, sink, c,
                  [&](int64_t t, uint32_t* bits) { row_bits(a, x, p.view.real.data(), span, t, bits); });
    }
    if (extra && x.w >= 0) {
        const int64_t count = a.extra_at.size[2];
        for (int64_t c0 = 0; c0 < count; c0 += STEP) {
            const Span span{c0, std::min(c0 + STEP, count), -1, c0};
            step_back(a, *extra, span, t0, 0, padded, true, r, extra_sink, c,
                      [&](int64_t t, uint32_t* bits) { extra_bits(a, x, extra->view.real.data(), span, t, bits); });
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        const int64_t t = t0 + i;
        if (a.scale < 0) scale_by(r.dq + i * d, -1.0f, d);
        from_float(a.dq.at(x.s.b, x.g * x.G + t % x.G, x.s.q0 + t / x.G), r.dq + i * d, a.dq.dtype, D);
    }
}

}  // namespace attn
