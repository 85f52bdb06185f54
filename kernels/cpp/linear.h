// The linear branch: states of chunks of keys, their sums, and what a tile of rows reads of them.
//
// A state is Σ φ(k) vᵀ as panels (columns D, depth F) and behind them Σ φ(k). Where the keys are ranges, slot c holds
// what comes before chunk c, the incoming state included, and `after` what comes from chunk c on; where they are lists,
// slot j + 1 is block j alone, and a row's sum is over the blocks that its list does not name.
#pragma once
#include "softmax.h"

namespace attn {

constexpr int64_t COARSE = 8;  // blocks between the prefix sums in double that lists use

struct Linear {
    int64_t t = -1;  // row among the KV groups with a branch
    int64_t F, D, chunk, count, size;  // size: floats of a state
    bool both = false;                 // sums from the right as well
    Panels fk, v;                      // columns are keys, depth F; columns are D, depth keys
    std::vector<uint32_t> real;
    float *slots = nullptr, *after = nullptr;
    double* prefix = nullptr;
    Panels state(float* p) const { return Panels{p, v.cols, up(F, MR)}; }
    float* tail(float* p) const { return p + v.cols * up(F, MR); }  // Σ φ(k), up(F, W) numbers
    float* slot(int64_t c) const { return slots + c * size; }
};

// What a thread needs beside `Room`: rows' features, sums and denominators, one state, and packing.
struct LinearRoom {
    float *fq, *a, *den, *u, *work;
    double* wide;
    static int64_t state_floats(int64_t F, int64_t D) { return up(up(D, W) * up(F, MR) + up(F, W), 16); }
    static int64_t floats(int64_t F, int64_t D, int64_t chunk) {
        return TILE * (up(F, W) + up(D, W) + 1) + 3 * state_floats(F, D) + chunk * up(F, 48) + PACK_SCRATCH + 64;
    }
    void lay(float* p, int64_t F, int64_t D) {
        fq = p;
        a = fq + TILE * up(F, W);
        den = a + TILE * up(D, W);
        u = den + TILE;
        wide = reinterpret_cast<double*>(u + state_floats(F, D));
        work = u + 3 * state_floats(F, D);
    }
};

// How many floats `lay` will take for the keys of one sequence and group.
inline int64_t plan(Linear& x, const Args& a, const Which& w, int64_t F, int64_t D) {
    x.F = F;
    x.D = D;
    x.chunk = w.lists ? a.block_k : std::min<int64_t>(256, 64 * std::max<int64_t>(1, F * D / 16384));
    x.count = (w.s.K + x.chunk - 1) / x.chunk;
    x.size = LinearRoom::state_floats(F, D);
    x.both = !w.lists && !w.causal && w.w > 0;
    const int64_t keys = up(x.count * x.chunk, ALIGN), coarse = w.lists ? x.count / COARSE + 2 : 0;
    x.fk = Panels{nullptr, keys, F};
    x.v = Panels{nullptr, up(D, W), keys};
    x.real.assign(keys / 32, 0);
    return up(x.fk.floats(), 16) + up(x.v.floats(), 16) + (x.count + 1) * x.size * (x.both ? 2 : 1) + 2 * coarse * x.size;
}

inline void lay(Linear& x, float* p, bool lists) {
    x.fk.data = p;
    x.v.data = p + up(x.fk.floats(), 16);
    x.slots = x.v.data + up(x.v.floats(), 16);
    x.after = x.slots + (x.count + 1) * x.size;
    if (lists) x.prefix = reinterpret_cast<double*>(x.after);
}

// Packs chunk c and sums it up into slot c + 1. A key without features counts as absent, whatever its value holds.
inline void sum_chunk(const Args& a, const Which& w, Linear& x, int64_t c, float* work) {
    const int64_t from = c * x.chunk, to = std::min(from + x.chunk, w.s.K), F = x.F, wide = up(F, 48);
    Rows fk = a.fk.rows(w.s.b, x.t, w.s.k0, w.s.K), v = a.v.rows(w.s.b, w.g, w.s.k0, w.s.K);
    float* rows = work + PACK_SCRATCH;
    float* total = x.tail(x.slot(c + 1));
    std::memset(total, 0, up(F, W) * 4);
    for (int64_t j = from; j < to; j++) {
        float* row = rows + (j - from) * wide;
        std::memset(row + F, 0, (wide - F) * 4);
        to_float(row, fk.at(j), fk.dtype, F);
        float most = 0;
        for (int64_t f = 0; f < F; f++) most = row[f] == 0 ? most : 1;
        if (most > 0) x.real[j / 32] |= 1u << (j % 32);
        add_to(total, row, up(F, W));
    }
    v.real = x.real.data();
    const int64_t end = c + 1 == x.count ? x.fk.cols : from + x.chunk;
    pack_columns<Floats>(fk, x.fk, from, end, work);
    pack_rows<Floats>(v, x.v, from, end, work);
    product_into(up(F, MR), rows, 1, wide, x.v, from, to - from, x.state(x.slot(c + 1)), false);
}

inline void read_state(const Array& state, int64_t b, const Linear& x, float* to) {
    std::memset(to, 0, x.size * 4);
    const Panels p = x.state(to);
    for (int64_t f = 0; f < x.F; f++) {
        for (int64_t d = 0; d < x.D; d++) *p.at(d, f) = *reinterpret_cast<const float*>(state.at(b, x.t, f, d));
        x.tail(to)[f] = *reinterpret_cast<const float*>(state.at(b, x.t, f, x.D));
    }
}

inline void write_state(const Array& state, int64_t b, const Linear& x, float* from) {
    const Panels p = x.state(from);
    for (int64_t f = 0; f < x.F; f++) {
        for (int64_t d = 0; d < x.D; d++) *reinterpret_cast<float*>(state.at(b, x.t, f, d)) = *p.at(d, f);
        *reinterpret_cast<float*>(state.at(b, x.t, f, x.D)) = x.tail(from)[f];
    }
}

// Σ of the blocks before `seen` that the list of query block n does not name → u.
inline void rest(const Args& a, const Which& w, const Linear& x, int64_t n, const LinearRoom& r) {
    const int64_t b = a.starts.size[0] > 1 ? w.s.n : 0, g = a.starts.size[1] > 1 ? w.g : 0, size = x.size;
    const int64_t begin = w.position(n * a.block_q * w.G);
    const int64_t seen = w.causal ? clamp(begin < 0 ? 0 : begin / a.block_k, 0, x.count) : x.count;
    const int32_t* list = reinterpret_cast<const int32_t*>(a.columns.data) + a.starts.integer(b, g, n);
    int64_t named = 0;
    while (named < a.counts.integer(b, g, n) && list[named] < seen) named++;
    double* total = r.wide;
    const auto take = [&](int64_t j, double sign) {
        const float* one = x.slot(j + 1);
        for (int64_t e = 0; e < size; e++) total[e] += sign * one[e];
    };
    if (2 * named >= seen) {
        std::fill(total, total + size, 0.0);
        for (int64_t j = 0, i = 0; j < seen; j++) {
            if (i < named && list[i] == j) i++;
            else take(j, 1.0);
        }
    } else {  // in double, so that what is taken away again leaves no trace
        std::memcpy(total, x.prefix + seen / COARSE * size, size * sizeof(double));
        for (int64_t j = seen / COARSE * COARSE; j < seen; j++) take(j, 1.0);
        for (int64_t i = 0; i < named; i++) take(list[i], -1.0);
    }
    for (int64_t e = 0; e < size; e++) r.u[e] = static_cast<float>(total[e]);
}

// From the sums of single chunks to those of all before (and all after), or to the prefix sums of lists.
inline void sum_up(const Args& a, const Which& w, Linear& x) {
    if (w.lists) {
        std::fill(x.prefix, x.prefix + x.size, 0.0);
        for (int64_t j = 0; j < x.count; j++) {
            double* to = x.prefix + (j / COARSE + 1) * x.size;
            if (j % COARSE == 0) std::memcpy(to, to - x.size, x.size * sizeof(double));
            const float* one = x.slot(j + 1);
            for (int64_t e = 0; e < x.size; e++) to[e] += one[e];
        }
        return;
    }
    if (x.both) {
        std::memset(x.after + x.count * x.size, 0, x.size * 4);
        for (int64_t c = x.count - 1; c >= 0; c--)
            for (int64_t e = 0; e < x.size; e++) x.after[c * x.size + e] = x.after[(c + 1) * x.size + e] + x.slot(c + 1)[e];
    }
    if (a.state.data) read_state(a.state, w.s.n, x, x.slot(0));
    else std::memset(x.slot(0), 0, x.size * 4);
    for (int64_t c = 0; c < x.count; c++) add_to(x.slot(c + 1), x.slot(c), x.size);
}

// The state after the keys that the row behind the last one does not read as softmax: j < K - w.
inline void final_state(const Args& a, const Which& w, const Linear& x, const LinearRoom& r) {
    const int64_t end = w.w < 0 ? 0 : std::max<int64_t>(0, w.s.K - w.w), c = end / x.chunk;
    std::memcpy(r.u, x.slot(c), x.size * 4);
    const Panels state = x.state(r.u);
    const Rows fk = a.fk.rows(w.s.b, x.t, w.s.k0, w.s.K);
    for (int64_t j = c * x.chunk; j < end; j++) {
        to_float(r.work, fk.at(j), fk.dtype, x.F);
        for (int64_t f = 0; f < x.F; f++) {
            if (r.work[f] == 0) continue;
            x.tail(r.u)[f] += r.work[f];
            for (int64_t d = 0; d < state.cols; d += W)
                store(state.at(d, f), fma(set(r.work[f]), load(x.v.at(d, j)), load(state.at(d, f))));
        }
    }
    write_state(a.state_out, w.s.n, x, r.u);
}

// Products with the features of keys from : to that each row covers, to its left (j <= i - w) or right (j >= i + w).
inline void near(const Which& w, const Linear& x, int64_t from, int64_t to, bool left, int64_t t0, int64_t rows, float* s,
                 const LinearRoom& r) {
    const int64_t F = up(x.F, W), d = x.v.cols;
    for (int64_t c = from / 32 * 32; c < to; c += STEP) {
        const int64_t end = std::min(c + STEP, to), n = up(end - c, W);
        int64_t first = left ? w.t(c + w.w) - t0 : 0, last = left ? rows : w.t(end - w.w) - t0;
        first = clamp(first, 0, rows) / MR * MR;
        last = up(clamp(last, 0, rows), MR);
        if (first >= last) continue;
        float* p = s + first * STEP;
        product<Floats>(last - first, r.fq + first * F, F, 1, x.fk, c, c + n, 0, x.F, p, STEP, false);
        for (int64_t i = first; i < std::min(last, rows); i++) {
            const int64_t at = w.position(t0 + i);
            uint32_t bits[STEP / 32];
            for (int64_t j = c; j < c + n; j += 32)
                bits[(j - c) / 32] = left ? range_bits(j, from, at - w.w + 1) : range_bits(j, at + w.w, to);
            float* row = s + i * STEP;
            mask_row(row, n, bits, 0.0f);
            V total = zero();
            for (int64_t j = 0; j < n; j += W) total = add(total, load(row + j));
            r.den[i] += sum(total);
        }
        product<Floats>(last - first, p, STEP, 1, x.v, 0, d, c, n, r.a + first * d, d, true);
    }
}

// Numerators r.a (rows, D) and denominators r.den of rows t0 : t0 + rows. Lists: `rest` has filled r.u.
inline void linear_tile(const Args& a, const Which& w, const Linear& x, int64_t t0, int64_t rows, float* s,
                        const LinearRoom& r) {
    const int64_t F = up(x.F, W), d = x.v.cols, padded = up(rows, MR), K = w.s.K;
    std::memset(r.fq, 0, padded * F * 4);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t t = t0 + i;
        to_float(r.fq + i * F, a.fq.at(w.s.b, x.t * w.G + t % w.G, w.s.q0 + t / w.G), a.fq.dtype, x.F);
    }
    const float* u = r.u;
    int64_t left[2] = {0, 0}, right[2] = {0, 0};
    if (!w.lists && w.w < 0) u = x.slot(0);
    else if (!w.lists && !w.causal && w.w == 0) u = x.slot(x.count);
    else if (!w.lists) {
        const int64_t i = w.position(t0), j = w.position(t0 + rows - 1);
        const int64_t c = clamp(i - w.w + 1, 0, K) / x.chunk;
        u = x.slot(c);
        left[0] = c * x.chunk;
        left[1] = clamp(j - w.w + 1, 0, K);
        if (x.both) {
            const int64_t e = (clamp(j + w.w, 0, K) + x.chunk - 1) / x.chunk;
            const float* more = x.after + e * x.size;
            for (int64_t n = 0; n < x.size; n += W) store(r.u + n, add(load(u + n), load(more + n)));
            u = r.u;
            right[0] = clamp(i + w.w, 0, K);
            right[1] = std::min(e * x.chunk, K);
        }
    }
    const Panels state = x.state(const_cast<float*>(u));
    product<Floats>(padded, r.fq, F, 1, state, 0, d, 0, x.F, r.a, d, false);
    for (int64_t i = 0; i < rows; i++) r.den[i] = dot(r.fq + i * F, x.tail(const_cast<float*>(u)), F);
    near(w, x, left[0], left[1], true, t0, rows, s, r);
    near(w, x, right[0], right[1], false, t0, rows, s, r);
}

}  // namespace attn
