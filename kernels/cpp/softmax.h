// One tile of rows against steps of packed keys: scores, masks and the online softmax (Milakov and Gimelshein 2018).
#pragma once
#include "problem.h"

namespace attn {

// Keys and values of one sequence and KV group, packed where `needed` says so, in units of ALIGN keys.
struct Packed {
    Panels k, v;  // columns are keys, depth D; columns are D, depth keys
    std::vector<uint32_t> real;
    std::vector<char> needed;
    bool clean = true;  // every key before K is real
};

// What a thread needs for a tile.
struct Room {
    float *q, *s, *o, *m, *l;
    static int64_t floats(int64_t d) { return TILE * (d + up(d, W) + STEP + 2) + 64; }
    void lay(float* p, int64_t d) {
        s = p;
        o = s + TILE * STEP;
        m = o + TILE * up(d, W);
        l = m + TILE;
        q = l + TILE;
    }
};

INLINE void cap_rows(float* s, int64_t rows, int64_t n, float scale, float cap) {  // scores become cap · tanh(s / cap)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j += W) {
            float* p = s + i * STEP + j;
            store(p, mul(set(cap), tanh(mul(load(p), set(scale / cap)))));
        }
}

// The bits of keys span.from … of row t that count.
INLINE void row_bits(const Args& a, const Which& x, const uint32_t* real, const Span& span, int64_t t, uint32_t* bits) {
    const int64_t i = x.position(t), low = x.low(i), high = x.high(i);
    for (int64_t c = span.from, w = 0; c < span.to; c += 32, w++) {
        bits[w] = range_bits(c, low, high) & real[c / 32];
        if (span.kind >= 0) {
            const int64_t r = (t / x.G) % a.block_q, word = (c - span.column) / 32;
            bits[w] &= static_cast<uint32_t>(a.patterns.integer(span.kind, r, word));
        }
    }
}

// The same of further keys: those that the window does not reach.
INLINE void extra_bits(const Args& a, const Which& x, const uint32_t* real, const Span& span, int64_t t,
                       uint32_t* bits) {
    const auto* at = reinterpret_cast<const int32_t*>(a.extra_at.at(x.s.b, x.g));
    const int64_t i = x.position(t);
    for (int64_t j = span.from; j < span.to; j++) {
        const bool read = at[j] <= i - x.w || (!x.causal && at[j] >= i + x.w);
        bits[(j - span.from) / 32] |= static_cast<uint32_t>(read && real[j / 32] >> (j % 32) & 1) << (j % 32);
    }
}

INLINE void mask_row(float* s, int64_t n, const uint32_t* bits, float masked = LOWEST) {
    constexpr uint32_t all = W == 16 ? 0xffffu : 0xffu;
    for (int64_t j = 0; j < n; j += W) {
        const uint32_t lanes = bits[j / 32] >> (j % 32) & all;
        if (lanes != all) store(s + j, choose(lanes, set(masked), load(s + j)));
    }
}

// Does every row of a : b read every key of the span?
inline bool whole(const Which& x, const Packed& p, const Span& span, int64_t t0, int64_t a, int64_t b, int64_t rows) {
    if (span.kind >= 0 || span.to % W) return false;
    const int64_t i = x.position(t0 + a), j = x.position(t0 + std::min(b, rows) - 1);
    if (x.low(j) > span.from || x.high(i) < span.to) return false;
    if (p.clean) return true;
    for (int64_t c = span.from; c < span.to; c += 32)
        if (~p.real[c / 32] & range_bits(c, span.from, span.to)) return false;
    return true;
}

// Turns scores of one row into probabilities below the running maximum and scales what the row holds already.
template <class Op>
INLINE void online_row(float* s, int64_t n, float c, float& m, float& l, float* o, int64_t d) {
    V high = set(LOWEST);
    for (int64_t j = 0; j < n; j += W) high = max(high, load(s + j));
    const float best = highest(high) * c;
    const float now = best > m || best != best ? best : m;
    if (now == LOWEST) {
        for (int64_t j = 0; j < n; j += W) Op::put(s, j, zero());
        return;
    }
    if (now != m) {
        const float shrink = m == LOWEST ? 0.0f : std::exp2(m - now);
        l *= shrink;
        scale_by(o, shrink, d);
        m = now;
    }
    const V scale = set(c), shift = set(-now);
    V total = zero();
    for (int64_t j = 0; j < n; j += W) {
        const V p = Op::power(fma(load(s + j), scale, shift));
        total = add(total, p);
        Op::put(s, j, p);
    }
    l += sum(total);
}

// One step of the softmax over `span` for rows t0 : t0 + rows. c is what scores are multiplied by inside exp2.
template <class Op, class Bits>
void step(const Args& a, const Packed& p, const Span& span, int64_t t0, int64_t rows, int64_t first,
          int64_t last, bool edge, const Room& r, float c, Bits bits_of) {
    const int64_t d = p.v.cols, units = p.k.depth, n = up(span.to - span.from, W);
    float* s = r.s + first * STEP;
    product<Op>(last - first, r.q + first * units, units, 1, p.k, span.from, span.from + n, 0, units, s, STEP, false);
    if (a.softcap > 0)
        cap_rows(s, last - first, n, static_cast<float>(std::fabs(a.scale)), static_cast<float>(a.softcap));
    for (int64_t i = first; i < std::min(last, rows); i++) {
        float* row = r.s + i * STEP;
        if (edge) {
            uint32_t bits[STEP / 32] = {};
            bits_of(t0 + i, bits);
            mask_row(row, n, bits);
        }
        online_row<Op>(row, n, c, r.m[i], r.l[i], r.o + i * d, d);
    }
    product<Op>(last - first, s, STEP, 1, p.v, 0, d, span.from / Op::PER, n / Op::PER, r.o + first * d, d, true);
}

// The softmax of rows t0 : t0 + rows over their keys: unnormalised r.o (rows, d), sums r.l, maxima r.m in powers of 2.
// Spans that `skip` names are left to the caller.
template <class Op, class Skip>
void softmax_tile(const Args& a, const Which& x, const Packed& p, const Packed* extra, std::vector<Span>& todo,
                  int64_t t0, int64_t rows, const Room& r, Skip skip) {
    const int64_t units = p.k.depth, d = p.v.cols, D = a.q.size[3], padded = up(rows, MR);
    const int64_t size = bytes_of(a.q.dtype);
    for (int64_t i = 0; i < padded; i++) {
        float* row = r.q + i * units;
        if (i >= rows) {
            std::memset(row, 0, units * 4);
            continue;
        }
        const int64_t t = t0 + i;
        const char* from = a.q.at(x.s.b, x.g * x.G + t % x.G, x.s.q0 + t / x.G);
        if (Op::PER == 2) std::memcpy(row, from, D * size);
        else to_float(row, from, a.q.dtype, D);
        if (a.scale < 0 && Op::PER == 1)
            for (int64_t e = 0; e < D; e++) row[e] = -row[e];
        else if (a.scale < 0)
            for (int64_t e = 0; e < D; e++) reinterpret_cast<uint16_t*>(row)[e] ^= 0x8000;
    }
    std::memset(r.o, 0, padded * d * 4);
    std::fill(r.m, r.m + padded, LOWEST);
    std::fill(r.l, r.l + padded, 0.0f);
    const float c = score_factor(a);

    spans(a, x, t0, t0 + rows, todo);
    for (const Span& span : todo) {
        if (skip(span)) continue;
        int64_t first, last;
        active(x, t0, rows, span.from, span.to, first, last);
        if (first >= last) continue;
        const bool edge = !whole(x, p, span, t0, first, last, rows);
        step<Op>(a, p, span, t0, rows, first, last, edge, r, c,
                 [&](int64_t t, uint32_t* bits) { row_bits(a, x, p.real.data(), span, t, bits); });
    }
    if (!extra || x.w < 0) return;
    const int64_t count = a.extra_at.size[2];
    for (int64_t c0 = 0; c0 < count; c0 += STEP) {
        const Span span{c0, std::min(c0 + STEP, count), -1, c0};
        // where causal, later rows read what earlier ones do; so rows between two that read the same read just that
        uint32_t all[2][STEP / 32] = {};
        extra_bits(a, x, extra->real.data(), span, t0, all[0]);
        extra_bits(a, x, extra->real.data(), span, t0 + rows - 1, all[1]);
        const bool same = x.causal && !std::memcmp(all[0], all[1], sizeof all[0]);
        if (same && std::all_of(all[0], all[0] + STEP / 32, [](uint32_t word) { return word == 0; })) continue;
        step<Op>(a, *extra, span, t0, rows, 0, padded, true, r, c, [&](int64_t t, uint32_t* bits) {
            if (same) std::memcpy(bits, all[0], sizeof all[0]);
            else extra_bits(a, x, extra->real.data(), span, t, bits);
        });
    }
}

}  // namespace attn
