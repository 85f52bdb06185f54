// Mixed and linear attention, backward. Rows are cut into units whose number depends on their sequence alone; each unit
// sums dK and dV by itself, and the sums are added in a fixed order, so that results are the same in every run.
#include "branch.h"
#include "softmax_backward.h"

namespace attn {
namespace {

constexpr int64_t WAVE = 48 << 20;        // floats held at once, unless a single group has more
constexpr int64_t UNIT = 1 << 20;         // row-key pairs that make a unit worth while
constexpr int64_t SINKS = 32 << 20;       // floats that the units of a group may take for their sums
constexpr int64_t UNITS = 16;

struct Tiles {  // neighbouring rows of a group: whole query blocks where there are lists
    int64_t t0, t1;
};

struct Unit {
    std::vector<Tiles> tiles;
    Sink sink, extra;
};

struct Group {
    Which x;
    int64_t t = -1, R = 0, floats = 0;  // the row of the branch; rows
    PackedBack near, extra;
    bool has_extra = false;
    int64_t near_floats = 0, extra_floats = 0, dq_floats = 0, dk_floats = 0;
    Sums dq, dk, dv;                        // of the branch: for φ(q); for φ(k); for v
    // per row: do·o; what scales do; and what stands beside it for the 1 behind v
    float *delta = nullptr, *factor = nullptr, *ones = nullptr;
    std::vector<Unit> units;
    std::vector<std::vector<int64_t>> listed;  // query blocks that name a key block
};

class Backward {
   public:
    explicit Backward(const Args& args) : a(args) {
        D = a.v.size[3];
        F = a.fq.data ? a.fq.size[3] : 0;
        M = std::max(F, D + 1);
        heads = a.softmax ? a.k.size[1] : a.fk.size[1];
        for (const Sequence& s : sequences(a))
            for (int64_t g = 0; g < heads; g++) groups.push_back(which(a, s, g));
    }

    void run() {
        for (size_t first = 0; first < groups.size();) {
            std::vector<Group> some;
            int64_t total = 0;
            while (first < groups.size()) {
                Group y = plan(groups[first]);
                if (!some.empty() && total + y.floats > WAVE) break;
                total += y.floats;
                some.push_back(std::move(y));
                first++;
            }
            wave(some, total);
        }
    }

   private:
    Group plan(const Which& x) {
        Group y;
        y.x = x;
        y.R = x.s.Q * x.G;
        if (a.softmax) {
            y.near.view.real = real_keys(a, x.s);
            y.near.view.clean = !a.valid.data;
            y.near_floats = y.near.plan(x.s.K, D);
            y.has_extra = a.extra_k.data && x.w >= 0;
        }
        if (y.has_extra) {
            const int64_t n = a.extra_at.size[2];
            y.extra_floats = y.extra.plan(n, D);
            y.extra.view.real.assign(up(n, STEP) / 32 + 1, 0);
            for (int64_t j = 0; j < n; j++)
                if (a.extra_at.integer(x.s.b, x.g, j) != 1 << 30) y.extra.view.real[j / 32] |= 1u << (j % 32);
        }
        y.floats = 3 * up(y.R, 16) + y.near_floats + y.extra_floats;
        cut(y);
        if (a.index && a.index[x.g] >= 0) y.t = a.index[x.g];
        if (y.t >= 0) {
            const bool lists = x.lists, both = !lists && !x.causal && x.w > 0;
            y.dq_floats = y.dq.plan(x.s.K, D + 1, F, lists ? a.block_k : chunk_of(F, D), both, lists);
            const int64_t step = lists ? a.block_q * x.G : up(std::max<int64_t>(64, 32 * x.G), 32);
            const bool right = !lists && (x.causal ? x.w >= 0 : x.w > 0);
            y.dk_floats = y.dk.plan(y.R, D + 1, F, step, right, lists);
            y.floats += y.dq_floats + y.dk_floats + y.dv.plan(y.R, F, D, step, right, lists);
        }
        for (const Unit& u : y.units)
            y.floats += Sink::floats(u.sink.to - u.sink.from, D) + (y.has_extra ? Sink::floats(u.extra.to, D) : 0);
        return y;
    }

    // Cuts the rows of a group into tiles, and these into units of about the same work.
    void cut(Group& y) {
        const Which& x = y.x;
        const int64_t G = x.G, block = x.lists ? a.block_q * G : (G <= TILE ? TILE / G * G : TILE);
        std::vector<Span> todo;
        std::vector<int64_t> weights, lows, highs;
        std::vector<Tiles> tiles;
        int64_t total = 0;
        if (x.lists) y.listed.resize((x.s.K + a.block_k - 1) / a.block_k);
        std::fill(y.near.view.needed.begin(), y.near.view.needed.end(), 0);
        for (int64_t t = 0; t < y.R; t += block) {
            const int64_t end = std::min(t + block, y.R);
            int64_t weight = 64, low = x.s.K, high = 0;
            todo.clear();
            if (a.softmax) spans(a, x, t, end, todo);
            for (const Span& s : todo) {
                weight += s.to - s.from;
                low = std::min(low, s.from);
                high = std::max(high, s.to);
                for (int64_t c = s.from / ALIGN; c * ALIGN < up(s.to, W); c++) y.near.view.needed[c] = 1;
            }
            if (x.lists) list(y, t / block);
            tiles.push_back({t, end});
            weights.push_back(weight * (end - t));
            lows.push_back(low);
            highs.push_back(high);
            total += weights.back();
        }
        int64_t count = clamp(total / UNIT, 1, UNITS);
        count = clamp(SINKS / (Sink::floats(x.s.K, D) + 1), 1, count);
        int64_t done = 0;
        for (size_t i = 0; i < tiles.size(); i++) {
            if (y.units.empty() || done * count >= total * static_cast<int64_t>(y.units.size())) {
                y.units.emplace_back();
                y.units.back().sink.from = x.s.K;
                y.units.back().extra.to = y.has_extra ? a.extra_at.size[2] : 0;
            }
            Unit& u = y.units.back();
            u.tiles.push_back(tiles[i]);
            u.sink.from = std::min(u.sink.from, lows[i]);
            u.sink.to = std::max(u.sink.to, highs[i]);
            done += weights[i];
        }
        for (Unit& u : y.units) u.sink.from = std::min(u.sink.from, u.sink.to);
    }

    void list(Group& y, int64_t n) {
        const int64_t b = a.starts.size[0] > 1 ? y.x.s.n : 0, g = a.starts.size[1] > 1 ? y.x.g : 0;
        const int64_t start = a.starts.integer(b, g, n), count = a.counts.integer(b, g, n);
        for (int64_t i = start; i < start + count; i++) {
            const int64_t j = a.columns.integer(i);
            if (j < static_cast<int64_t>(y.listed.size())) y.listed[j].push_back(n);
        }
    }

    float* lay(Group& y, float* p) {
        y.delta = p;
        y.factor = y.delta + up(y.R, 16);
        y.ones = y.factor + up(y.R, 16);
        p = y.ones + up(y.R, 16);
        if (a.softmax) y.near.lay(p);
        if (y.has_extra) y.extra.lay(p + y.near_floats);
        p += y.near_floats + y.extra_floats;
        if (y.t >= 0) {
            y.dq.lay(p);
            y.dk.lay(p + y.dq_floats);
            y.dv.lay(p + y.dq_floats + y.dk_floats);
            p = y.dv.slots + (y.dv.count + 1) * y.dv.size * (y.dv.both ? 2 : 1) +
                (y.dv.lists ? 2 * (y.dv.count / COARSE + 2) * y.dv.size : 0);
            sources(y);
        }
        for (Unit& u : y.units) {
            u.sink.lay(p, D);
            p += Sink::floats(u.sink.to - u.sink.from, D);
            if (!y.has_extra) continue;
            u.extra.lay(p, D);
            p += Sink::floats(u.extra.to, D);
        }
        return p;
    }

    // dφ(q_i) = Σ φ(k_j) ([v_j | 1] · ĝ_i), dφ(k_j) = Σ φ(q_i) ([v_j | 1] · ĝ_i) and dv_j = Σ (φ(q_i) · φ(k_j)) ĝ_i[:D]
    // with ĝ_i = [factor do | ones]: three linear attentions with other features and values.
    void sources(Group& y) {
        const Which x = y.x;
        const int64_t d = D, t = y.t;
        const Rows fk = a.fk.rows(x.s.b, t, x.s.k0, x.s.K), v = a.v.rows(x.s.b, x.g, x.s.k0, x.s.K);
        y.dq.features = [v, d](int64_t j, float* to) {
            to_float(to, v.at(j), v.dtype, d);
            to[d] = 1;
        };
        y.dq.value = [fk](int64_t j, float* to) { to_float(to, fk.at(j), fk.dtype, fk.d); };
        const auto query = [this, x, t](int64_t i, float* to) {
            to_float(to, a.fq.at(x.s.b, t * x.G + i % x.G, x.s.q0 + i / x.G), a.fq.dtype, F);
        };
        const Group* at = &y;
        y.dk.features = [this, at](int64_t i, float* to) { gradient(*at, i, to); };
        y.dk.value = query;
        y.dv.features = query;
        y.dv.value = [this, at](int64_t i, float* to) {
            float all[WIDEST];
            gradient(*at, i, all);
            std::memcpy(to, all, D * 4);
        };
    }

    void gradient(const Group& y, int64_t i, float* to) const {  // ĝ of row i
        const Array& g = a.shared ? a.d_o : a.d_linear;
        const int64_t head = (a.shared ? y.x.g : y.t) * y.x.G + i % y.x.G;
        if (y.factor[i] == 0) std::memset(to, 0, D * 4);
        else to_float(to, g.at(y.x.s.b, head, y.x.s.q0 + i / y.x.G), g.dtype, D);
        for (int64_t e = 0; e < D; e++) to[e] *= y.factor[i];
        to[D] = y.ones[i];
    }

    float inner(const Array& p, const Array& q, int64_t b, int64_t head, int64_t row) const {
        float x[WIDEST], y[WIDEST];
        std::memset(x + D, 0, W * 4);
        std::memset(y + D, 0, W * 4);
        to_float(x, p.at(b, head, row), p.dtype, D);
        to_float(y, q.at(b, head, row), q.dtype, D);
        return dot(x, y, up(D, W));
    }

    void prepare(Group& y, int64_t i) const {
        const int64_t b = y.x.s.b, head = y.x.g * y.x.G + i % y.x.G, row = y.x.s.q0 + i / y.x.G;
        if (a.softmax) y.delta[i] = inner(a.d_o, a.o, b, head, row);
        if (y.t < 0) return;
        const int64_t h = y.t * y.x.G + i % y.x.G;
        if (a.shared) {
            const float lse = a.lse.number(b, head, row);
            // beyond 2^100 only where no key has features, and then all that it multiplies is 0
            y.factor[i] = lse == LOWEST ? 0 : std::exp2(std::min(100.0f, (a.weight.number(h) - lse) * LOG2E));
            y.ones[i] = lse == LOWEST ? 0 : -y.factor[i] * y.delta[i];
        } else if (a.normalize) {
            y.factor[i] = 1.0f / (a.den.number(b, h, row) + 1e-6f);
            y.ones[i] = -y.factor[i] * inner(a.d_linear, a.linear, b, h, row);
        } else {
            y.factor[i] = 1;
            y.ones[i] = 0;
        }
    }

    void wave(std::vector<Group>& some, int64_t total) {
        Buffer memory(total);
        float* p = memory.get();
        struct Job {
            int64_t group, part, n, m;
        };
        std::vector<Job> first, second, third;
        int64_t chunk = 0;
        for (size_t i = 0; i < some.size(); i++) {
            Group& y = some[i];
            const auto g = static_cast<int64_t>(i);
            p = lay(y, p);
            if (a.softmax)
                for (size_t u = 0; u < y.near.view.needed.size(); u++)
                    if (y.near.view.needed[u]) first.push_back({g, 0, static_cast<int64_t>(u), 0});
            for (size_t u = 0; y.has_extra && u < y.extra.view.needed.size(); u++)
                first.push_back({g, 1, static_cast<int64_t>(u), 0});
            for (size_t u = 0; u < y.units.size(); u++) second.push_back({g, 0, static_cast<int64_t>(u), 0});
            keys(y, [&](int64_t from, int64_t to) { third.push_back({g, 0, from, to}); });
            if (y.has_extra) third.push_back({g, 1, 0, 0});
            if (y.t < 0) continue;
            for (int64_t c = 0; c < y.dq.count; c++) first.push_back({g, 2, c, 0});
            for (int64_t c = 0; c < y.dk.count; c++) first.push_back({g, 3, c, 0});
            for (int64_t c = 0; c < y.dv.count; c++) first.push_back({g, 4, c, 0});
            chunk = std::max(chunk, std::max(y.dq.chunk, y.dk.chunk));
        }
        const int64_t near_room = up(BackRoom::floats(D), 16) + PACK_SCRATCH;
        const int64_t room = near_room + SumsRoom::floats(M, M, chunk);
        Buffer rooms(room * a.threads);
        const auto mine = [&] { return rooms.get() + room * omp_get_thread_num(); };
        parallel(a.threads, some.size(), [&](int64_t i) {
            for (int64_t r = 0; r < some[i].R; r++) prepare(some[i], r);
        });
        parallel(a.threads, first.size(), [&](int64_t i) {
            pack(some[first[i].group], first[i].part, first[i].n, mine());
        });
        if (a.index)
            parallel(a.threads, 3 * some.size(), [&](int64_t i) {
                Group& y = some[i / 3];
                if (y.t < 0) return;
                Sums& x = i % 3 == 0 ? y.dq : i % 3 == 1 ? y.dk : y.dv;
                if (i % 3 == 0) incoming(a, y.x, y.t, x, true);
                else std::memset(x.slot(0), 0, x.size * 4);
                sum_up(x);
            });
        parallel(a.threads, second.size(), [&](int64_t i) {
            float* work = mine();
            SumsRoom l;
            l.lay(work + near_room, M, M);
            rows(some[second[i].group], second[i].n, work, l);
        });
        parallel(a.threads, third.size(), [&](int64_t i) {
            float* work = mine();
            SumsRoom l;
            l.lay(work + near_room, M, M);
            Group& y = some[third[i].group];
            if (third[i].part == 1) extras(y, work);
            else keys_back(y, third[i].n, third[i].m, work, l);
        });
    }

    void pack(Group& y, int64_t part, int64_t n, float* work) const {
        const Sequence& s = y.x.s;
        if (part >= 2) return sum_chunk(part == 2 ? y.dq : part == 3 ? y.dk : y.dv, n, work);
        PackedBack& p = part == 1 ? y.extra : y.near;
        const int64_t count = part == 1 ? a.extra_at.size[2] : 0;
        Rows k = part == 1 ? a.extra_k.rows(s.b, y.x.g, 0, count) : a.k.rows(s.b, y.x.g, s.k0, s.K);
        Rows v = part == 1 ? a.extra_v.rows(s.b, y.x.g, 0, count) : a.v.rows(s.b, y.x.g, s.k0, s.K);
        k.real = v.real = p.view.real.data();
        p.pack(k, v, n * ALIGN, (n + 1) * ALIGN, work);
    }

    void rows(Group& y, int64_t n, float* work, const SumsRoom& l) const {
        const Unit& u = y.units[n];
        const int64_t G = y.x.G, step = G <= TILE ? TILE / G * G : TILE;
        std::vector<Span> todo;
        std::vector<int64_t> named;
        BackRoom r;
        r.lay(work + PACK_SCRATCH, D);
        for (const Tiles& tile : u.tiles) {
            if (y.t >= 0 && y.x.lists) {
                const int64_t seen = unlisted(a, y.x, tile.t0 / (a.block_q * G), named);
                rest(y.dq, 0, seen, named, l);
            }
            for (int64_t t = tile.t0; t < tile.t1; t += step) {
                const int64_t count = std::min(step, tile.t1 - t);
                if (a.softmax)
                    softmax_tile_back(a, y.x, y.near, y.has_extra ? &y.extra : nullptr, y.delta, todo, t, count, r,
                                      u.sink, u.extra, work);
                if (y.t >= 0) features_back(y, t, count, r.s, l);
            }
        }
    }

    void features_back(const Group& y, int64_t t0, int64_t rows, float* s, const SumsRoom& l) const {
        const int64_t wide = up(D + 1, W), f = up(F, W), G = y.x.G;
        std::memset(l.fq, 0, up(rows, MR) * wide * 4);
        for (int64_t i = 0; i < rows; i++) gradient(y, t0 + i, l.fq + i * wide);
        const Reach reach = reach_of(y.x, t0, rows);
        linear_tile(y.dq, &reach, rows, s, l);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t t = t0 + i;
            from_float(a.dfq.at(y.x.s.b, y.t * G + t % G, y.x.s.q0 + t / G), l.a + i * f, a.dfq.dtype, F);
        }
    }

    template <class Each>
    void keys(const Group& y, Each each) const {  // tiles of keys: within key blocks where there are lists
        const int64_t step = clamp(TILE / y.x.G, 24, TILE), block = y.x.lists ? a.block_k : step;
        for (int64_t c = 0; c < y.x.s.K; c += block) each(c, std::min(c + block, y.x.s.K));
    }

    // dK, dV and dφ(K) of keys from : to.
    void keys_back(const Group& y, int64_t from, int64_t to, float* work, const SumsRoom& l) const {
        const int64_t d = up(D, W), f = up(F, W), b = y.x.s.b;
        float *s = work, *dv = s + TILE * WIDE, *dk = dv + TILE * d;
        for (int64_t c = from; c < to; c += TILE) {
            const int64_t n = std::min(TILE, to - c);
            std::memset(dv, 0, n * d * 4);
            if (y.t >= 0) {
                key_sums(y, y.dv, c, n, s, l);
                std::memcpy(dv, l.a, n * d * 4);
                key_sums(y, y.dk, c, n, s, l);
                for (int64_t i = 0; i < n; i++) {
                    char* out = a.dfk.at(b, y.t, y.x.s.k0 + c + i);
                    if (a.valid.data && !*a.valid.at(b, y.x.s.k0 + c + i)) std::memset(l.a + i * f, 0, F * 4);
                    from_float(out, l.a + i * f, a.dfk.dtype, F);
                }
            }
            std::memset(dk, 0, n * d * 4);
            for (const Unit& u : y.units)
                for (int64_t j = std::max(c, u.sink.from); j < std::min(c + n, u.sink.to); j++) {
                    add_to(dk + (j - c) * d, u.sink.dk + (j - u.sink.from) * d, d);
                    add_to(dv + (j - c) * d, u.sink.dv + (j - u.sink.from) * d, d);
                }
            for (int64_t i = 0; i < n; i++) {
                const int64_t j = y.x.s.k0 + c + i;
                if (a.softmax) from_float(a.dk.at(b, y.x.g, j), dk + i * d, a.dk.dtype, D);
                from_float(a.dv.at(b, y.x.g, j), dv + i * d, a.dv.dtype, D);
            }
        }
    }

    // l.a: what keys c : c + n get from the rows that cover them.
    void key_sums(const Group& y, const Sums& x, int64_t c, int64_t n, float* s, const SumsRoom& l) const {
        const Which& w = y.x;
        const int64_t wide = up(x.F, W);
        std::memset(l.fq, 0, up(n, MR) * wide * 4);
        Reach reach;
        for (int64_t i = 0; i < n; i++) {
            const int64_t j = c + i;
            (&x == &y.dk ? y.dq.features : y.dq.value)(j, l.fq + i * wide);
            const bool all = !w.causal && w.w == 0;
            reach.before[i] = all ? y.R : w.causal || w.w < 0 ? 0 : clamp(w.t(j - w.w + 1), 0, y.R);
            reach.from[i] = all || w.w < 0 ? y.R : clamp(w.t(j + w.w), 0, y.R);
        }
        if (w.lists) {
            const int64_t block = c / a.block_k, count = (w.s.Q + a.block_q - 1) / a.block_q;
            const int64_t least = (block + 1) * a.block_k - w.shift;  // the first row that may cover it where causal
            const int64_t low = w.causal ? clamp((least + a.block_q - 1) / a.block_q, 0, count) : 0;
            std::vector<int64_t> named;
            for (int64_t q : y.listed[block])
                if (q >= low) named.push_back(q);
            rest(x, low, count, named, l);
        }
        linear_tile(x, &reach, n, s, l);
    }

    void extras(const Group& y, float* work) const {
        const int64_t d = up(D, W);
        for (int64_t j = 0; j < a.extra_at.size[2]; j++) {
            std::memset(work, 0, 2 * d * 4);
            for (const Unit& u : y.units) {
                add_to(work, u.extra.dk + j * d, d);
                add_to(work + d, u.extra.dv + j * d, d);
            }
            from_float(a.d_extra_k.at(y.x.s.b, y.x.g, j), work, a.d_extra_k.dtype, D);
            from_float(a.d_extra_v.at(y.x.s.b, y.x.g, j), work + d, a.d_extra_v.dtype, D);
        }
    }

    const Args& a;
    int64_t D, F, M, heads;
    std::vector<Which> groups;
};

}  // namespace
}  // namespace attn

EXPORT int attnconvert_backward(const attn::Args* a, int64_t size) try {
    if (size != sizeof *a) return 2;
    attn::Backward(*a).run();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
