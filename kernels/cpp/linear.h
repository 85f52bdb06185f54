// Linear attention over ordered entries: chunks of them are summed into states, and a tile of rows reads a state and
// the entries around its own edge. Forward, rows are query rows and entries are keys; backward, each of them is either.
//
// A state is Σ φ vᵀ as panels (columns D, depth F) and behind them Σ φ. Where entries are summed by ranges, slot c
// holds what comes before chunk c, an incoming state included, and `after` what comes from chunk c on; where they are summed
// by lists, slot j + 1 is chunk j alone, and rows read the chunks that their list does not name.
#pragma once
#include <functional>

#include "softmax.h"

namespace attn {

constexpr int64_t COARSE = 8;  // chunks between the prefix sums in double that lists use
constexpr int64_t NEAR = 64;   // entries at a time around the edge of what rows read: few, so that rows skip more

struct Sums {
    int64_t n = 0, F = 0, D = 0;               // entries, features, numbers of a value
    int64_t chunk = 0, count = 0, size = 0;    // entries of a chunk, chunks, floats of a state
    bool both = false, lists = false;                             // sums from the end as well
    std::function<void(int64_t, float*)> features, value;         // of an entry
    Panels fk, v;  // columns are entries, depth F; columns are D, depth entries
    float *slots = nullptr, *after = nullptr;
    double* prefix = nullptr;

    static int64_t state_floats(int64_t F, int64_t D) { return up(up(D, W) * up(F, MR) + up(F, W), 16); }
    Panels state(float* p) const { return Panels{p, v.cols, up(F, MR)}; }
    float* tail(float* p) const { return p + v.cols * up(F, MR); }  // Σ φ, up(F, W) numbers
    float* slot(int64_t c) const { return slots + c * size; }

    // How many floats `lay` takes.
    int64_t plan(int64_t entries, int64_t f, int64_t d, int64_t step, bool from_both, bool by_lists) {
        n = entries, F = f, D = d, chunk = step, both = from_both, lists = by_lists;
        count = (n + chunk - 1) / chunk;
        size = state_floats(F, D);
        const int64_t padded = up(count * chunk, ALIGN);
        fk = Panels{nullptr, padded, F};
        v = Panels{nullptr, up(D, W), padded};
        const int64_t coarse = lists ? count / COARSE + 2 : 0;
        return up(fk.floats(), 16) + up(v.floats(), 16) + (count + 1) * size * (both ? 2 : 1) + 2 * coarse * size;
    }
    void lay(float* p) {
        fk.data = p;
        v.data = p + up(fk.floats(), 16);
        slots = v.data + up(v.floats(), 16);
        after = slots + (count + 1) * size;
        if (lists) prefix = reinterpret_cast<double*>(after);
    }
};

// What a thread needs: rows' features, sums and denominators, a state in float and in double, and packing.
struct SumsRoom {
    float *fq, *a, *den, *u, *work;
    double* wide;
    static int64_t floats(int64_t F, int64_t D, int64_t chunk) {
        return TILE * (up(F, W) + up(D, W)) + up(TILE, 16) + 3 * Sums::state_floats(F, D) +
               chunk * (up(F, 48) + up(D, 48)) + PACK_SCRATCH + 64;
    }
    void lay(float* p, int64_t F, int64_t D) {
        fq = p;
        a = fq + TILE * up(F, W);
        den = a + TILE * up(D, W);
        u = den + up(TILE, 16);
        wide = reinterpret_cast<double*>(u + Sums::state_floats(F, D));
        work = u + 3 * Sums::state_floats(F, D);
    }
};

INLINE bool nothing(const float* x, int64_t n) {
    bool some = false;
    for (int64_t i = 0; i < n; i++) some |= x[i] != 0;
    return !some;
}

INLINE bool finite(const float* x, int64_t n) {
    float zeros = 0;
    for (int64_t i = 0; i < n; i++) zeros += x[i] * 0.0f;
    return zeros == 0;
}

// Packs chunk c and sums it up into slot c + 1. Keys of padding have features 0 and may have any value; rows that
// nothing comes back from have values 0 and may have any features. A key whose value is 0 still counts in Σ φ.
inline void sum_chunk(const Sums& x, int64_t c, float* work) {
    const int64_t from = c * x.chunk, to = std::min(from + x.chunk, x.n), F = up(x.F, 48), D = up(x.D, 48);
    float *phi = work + PACK_SCRATCH, *value = phi + x.chunk * F, *total = x.tail(x.slot(c + 1));
    std::memset(total, 0, up(x.F, W) * 4);
    std::memset(phi, 0, (to - from) * F * 4);
    for (int64_t j = from; j < to; j++) {
        float *f = phi + (j - from) * F, *v = value + (j - from) * D;
        x.features(j, f);
        x.value(j, v);
        if (nothing(f, x.F)) std::memset(v, 0, x.D * 4);
        else if (nothing(v, x.D) && !finite(f, x.F)) std::memset(f, 0, x.F * 4);
        add_to(total, f, up(x.F, W));
    }
    const int64_t end = c + 1 == x.count ? x.fk.cols : from + x.chunk;
    const Rows f{reinterpret_cast<char*>(phi), F * 4, FLOAT32, to - from, x.F};
    const Rows v{reinterpret_cast<char*>(value), D * 4, FLOAT32, to - from, x.D};
    pack_columns<Floats>(f, x.fk, from, end, work, from);
    pack_rows<Floats>(v, x.v, from, end, work, from);
    product_into(up(x.F, MR), phi, 1, F, x.v, from, to - from, x.state(x.slot(c + 1)), false);
}

// From the sums of single chunks to those of all before (and all after), or to the prefix sums of lists. The incoming
// state stands in slot 0 already.
inline void sum_up(const Sums& x) {
    if (x.lists) {
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
        float* last = x.after + x.count * x.size;
        std::memset(last, 0, x.size * 4);
        for (int64_t c = x.count; c-- > 0; last -= x.size) {
            std::memcpy(last - x.size, last, x.size * 4);
            add_to(last - x.size, x.slot(c + 1), x.size);
        }
    }
    for (int64_t c = 0; c < x.count; c++) add_to(x.slot(c + 1), x.slot(c), x.size);
}

// The sum of chunks from : to without those that are named (ascending, all within) → r.u.
inline void rest(const Sums& x, int64_t from, int64_t to, const std::vector<int64_t>& named, const SumsRoom& r) {
    double* total = r.wide;
    const auto take = [&](int64_t j, double sign) {
        const float* one = x.slot(j + 1);
        for (int64_t e = 0; e < x.size; e++) total[e] += sign * one[e];
    };
    const auto count = static_cast<int64_t>(named.size());
    if (to - from <= 2 * (count + COARSE)) {
        std::fill(total, total + x.size, 0.0);
        for (int64_t j = from, i = 0; j < to; j++) {
            if (i < count && named[i] == j) i++;
            else take(j, 1.0);
        }
    } else {  // in double, so that what is taken away again leaves no trace
        const double *high = x.prefix + to / COARSE * x.size, *low = x.prefix + from / COARSE * x.size;
        for (int64_t e = 0; e < x.size; e++) total[e] = high[e] - low[e];
        for (int64_t j = to / COARSE * COARSE; j < to; j++) take(j, 1.0);
        for (int64_t j = from / COARSE * COARSE; j < from; j++) take(j, -1.0);
        for (int64_t j : named) take(j, -1.0);
    }
    for (int64_t e = 0; e < x.size; e++) r.u[e] = static_cast<float>(total[e]);
}

// Adds what rows read of entries from : to one by one: row i those below edge[i] (left) or from edge[i] on (right).
inline void near(const Sums& x, int64_t from, int64_t to, bool left, const int64_t* edge, int64_t rows, float* s,
                 const SumsRoom& r) {
    const int64_t F = up(x.F, W), d = x.v.cols;
    for (int64_t c = from / 32 * 32; c < to; c += NEAR) {
        const int64_t end = std::min(c + NEAR, to), n = up(end - c, W);
        int64_t first = 0, last = rows;
        if (left)
            while (first < rows && edge[first] <= c) first++;
        else
            while (last > 0 && edge[last - 1] >= end) last--;
        first = first / MR * MR;
        last = up(last, MR);
        if (first >= last) continue;
        float* p = s + first * STEP;
        product<Floats>(last - first, r.fq + first * F, F, 1, x.fk, c, c + n, 0, x.F, p, STEP, false);
        for (int64_t i = first; i < std::min(last, rows); i++) {
            uint32_t bits[STEP / 32];
            const int64_t low = left ? from : std::max(edge[i], from), high = left ? std::min(edge[i], to) : to;
            for (int64_t j = c; j < c + n; j += 32) bits[(j - c) / 32] = range_bits(j, low, high);
            float* row = s + i * STEP;
            mask_row(row, n, bits, 0.0f);
            V total = zero();
            for (int64_t j = 0; j < n; j += W) total = add(total, load(row + j));
            r.den[i] += sum(total);
        }
        product<Floats>(last - first, p, STEP, 1, x.v, 0, d, c, n, r.a + first * d, d, true);
    }
}

// What the rows of a tile read: entries below before[i] and, where sums go both ways, those from from[i] on. Both rise.
struct Reach {
    int64_t before[TILE], from[TILE];
};

// r.a (rows, D) and r.den of rows whose features r.fq holds (padded with zero rows). Lists: `rest` has filled r.u.
inline void linear_tile(const Sums& x, const Reach* reach, int64_t rows, float* s, const SumsRoom& r) {
    const int64_t F = up(x.F, W), d = x.v.cols;
    const float* u = r.u;
    int64_t left[2] = {0, 0}, right[2] = {0, 0};
    if (!x.lists) {
        const int64_t c = reach->before[0] == x.n ? x.count : reach->before[0] / x.chunk;
        left[0] = c * x.chunk;
        left[1] = reach->before[rows - 1];
        u = x.slot(c);
        if (x.both) {
            const int64_t e = (reach->from[rows - 1] + x.chunk - 1) / x.chunk;
            const float* more = x.after + e * x.size;
            for (int64_t n = 0; n < x.size; n += W) store(r.u + n, add(load(u + n), load(more + n)));
            u = r.u;
            right[0] = reach->from[0];
            right[1] = std::min(e * x.chunk, x.n);
        }
    }
    const Panels state = x.state(const_cast<float*>(u));
    product<Floats>(up(rows, MR), r.fq, F, 1, state, 0, d, 0, x.F, r.a, d, false);
    for (int64_t i = 0; i < rows; i++) r.den[i] = dot(r.fq + i * F, x.tail(const_cast<float*>(u)), F);
    near(x, left[0], left[1], true, reach->before, rows, s, r);
    near(x, right[0], right[1], false, reach->from, rows, s, r);
}

}  // namespace attn
