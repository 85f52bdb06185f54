// Blocks of which few pairs are read, as in a small disc: scores and values pair by pair, from rows as the user has them.
#pragma once
#include "softmax.h"

namespace attn {

constexpr int64_t FEW = 512;    // keys of a row taken at once
constexpr int64_t WORTH = 3;    // times as long as in a matrix product takes one pair alone; with bf16 twice that

// Keys and values of a group as rows of floats, `d` of them with zeros behind: the user's own where they are such.
struct Plain {
    const float *k = nullptr, *v = nullptr;
    int64_t k_stride = 0, v_stride = 0;  // floats
};

// Per pattern of `a`: whether its pairs are too few for a matrix product.
inline std::vector<char> few_patterns(const Args& a, int64_t per) {
    std::vector<char> few;
    if (!a.starts.data || !a.patterns.data) return few;
    for (int64_t n = 0; n < a.patterns.size[0]; n++) {
        int64_t pairs = 0;
        for (int64_t r = 0; r < a.block_q; r++)
            for (int64_t w = 0; w < a.block_k / 32; w++)
                pairs += __builtin_popcount(static_cast<uint32_t>(a.patterns.integer(n, r, w)));
        few.push_back(pairs * WORTH * per <= a.block_q * a.block_k);
    }
    return few;
}

INLINE bool is_few(const std::vector<char>& few, const Span& span) { return span.kind >= 0 && few[span.kind]; }

// s[j] = q · k[at[j]], four keys at a time: n is a multiple of 4, d of W.
INLINE void few_scores(const float* q, const Plain& p, const int32_t* at, int64_t n, int64_t d, float* s) {
    for (int64_t j = 0; j < n; j += 4) {
        const float* k[4];
        V x[4];
UNROLL
        for (int i = 0; i < 4; i++) k[i] = p.k + at[j + i] * p.k_stride, x[i] = zero();
        for (int64_t e = 0; e < d; e += W) {
            const V y = load(q + e);
UNROLL
            for (int i = 0; i < 4; i++) x[i] = fma(y, load(k[i] + e), x[i]);
        }
        _mm_storeu_ps(s + j, sums(x[0], x[1], x[2], x[3]));
    }
}

// o += sum of s[j] v[at[j]] over N vectors from number `from` on; n is even.
template <int N>
INLINE void few_values(const float* s, const Plain& p, const int32_t* at, int64_t n, int64_t from, float* o) {
    V even[N], odd[N];
UNROLL
    for (int i = 0; i < N; i++) even[i] = load(o + from + i * W), odd[i] = zero();
    for (int64_t j = 0; j < n; j += 2) {
        const float *v = p.v + at[j] * p.v_stride + from, *w = p.v + at[j + 1] * p.v_stride + from;
        const V x = set(s[j]), y = set(s[j + 1]);
UNROLL
        for (int i = 0; i < N; i++) {
            even[i] = fma(x, load(v + i * W), even[i]);
            odd[i] = fma(y, load(w + i * W), odd[i]);
        }
    }
UNROLL
    for (int i = 0; i < N; i++) store(o + from + i * W, add(even[i], odd[i]));
}

// The keys at[0 : n] join the softmax of one row. `at` and s have room for FEW + 16; d is a multiple of W.
INLINE void few_row(const Args& a, const float* q, const Plain& p, int32_t* at, int64_t n, int64_t d, float c, float* s,
                    float& m, float& l, float* o) {
    const int64_t whole = up(n, W);
    for (int64_t j = n; j < up(n, 4); j++) at[j] = at[n - 1];
    few_scores(q, p, at, up(n, 4), d, s);
    for (int64_t j = n; j < whole; j++) s[j] = 0.0f;
    if (a.softcap > 0)
        cap_rows(s, 1, whole, static_cast<float>(std::fabs(a.scale)), static_cast<float>(a.softcap));
    for (int64_t j = n; j < whole; j++) s[j] = LOWEST;
    online_row<Floats>(s, whole, c, m, l, o, d);
    int64_t from = 0;
    for (; from + 4 * W <= d; from += 4 * W) few_values<4>(s, p, at, up(n, 2), from, o);
    for (; from < d; from += W) few_values<1>(s, p, at, up(n, 2), from, o);
}

// Rows t0 : t0 + rows read what the spans of few pairs name; sums, maxima and outputs go on from where they are.
inline void few_tile(const Args& a, const Which& x, const Packed& p, const Plain& plain, const std::vector<char>& few,
                     const std::vector<Span>& todo, int64_t t0, int64_t rows, const Room& r) {
    const int64_t D = a.q.size[3], d = p.v.cols;
    const float c = score_factor(a);
    alignas(64) float q[256 + 16], s[FEW + 16];
    int32_t at[FEW + 16];
    for (int64_t i = 0; i < rows; i++) {
        const int64_t t = t0 + i;
        int64_t n = 0;
        bool read = false;
        const auto join = [&] {
            if (!read) {
                to_float(q, a.q.at(x.s.b, x.g * x.G + t % x.G, x.s.q0 + t / x.G), a.q.dtype, D);
                for (int64_t e = D; e < d; e++) q[e] = 0.0f;
                if (a.scale < 0)
                    for (int64_t e = 0; e < D; e++) q[e] = -q[e];
                read = true;
            }
            few_row(a, q, plain, at, n, d, c, s, r.m[i], r.l[i], r.o + i * d);
            n = 0;
        };
        for (const Span& span : todo) {
            if (!is_few(few, span)) continue;
            uint32_t bits[STEP / 32] = {};
            row_bits(a, x, p.real.data(), span, t, bits);
            for (int64_t w = 0; w * 32 < span.to - span.from; w++) {
                if (n + 32 > FEW) join();
                for (uint32_t word = bits[w]; word; word &= word - 1)
                    at[n++] = static_cast<int32_t>(span.from + w * 32 + __builtin_ctz(word));
            }
        }
        if (n) join();
    }
}

}  // namespace attn
