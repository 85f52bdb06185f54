// Mixed attention, forward, and what is linear alone by `Scan`: packs each KV group once and shares its tiles of rows out over the threads.
#include "branch.h"
#include "few.h"
#include "scan.h"

namespace attn {
namespace {

constexpr int64_t WAVE = 4 << 20;  // floats of packed keys held at once: what caches keep, but enough for all threads

struct Group {  // one sequence and KV group
    Which x;
    Packed near, extra;
    Sums far;
    int64_t t = -1;  // the row of the branch, -1 without
    bool has_extra = false, copied = false;  // copied: rows of floats are made for blocks of few pairs
    Plain plain;
    int64_t floats = 0, near_floats = 0, extra_floats = 0, plain_floats = 0;
};

struct Job {
    int64_t group, t0, t1, weight;
};

int64_t packed_floats(Packed& p, int64_t keys, int64_t d, int64_t per) {
    const int64_t n = up(keys, ALIGN);
    p.k = Panels{nullptr, n, d / per};
    p.v = Panels{nullptr, up(d, W), n / per};
    p.needed.assign(n / ALIGN, 1);
    return up(p.k.floats(), 16) + up(p.v.floats(), 16);
}

void lay(Packed& p, float* at) {
    p.k.data = at;
    p.v.data = at + up(p.k.floats(), 16);
}

// Rows of a tile: whole positions where one has no more heads than a tile has rows.
int64_t tile_rows(int64_t G) { return G <= TILE ? TILE / G * G : TILE; }

class Forward {
   public:
    explicit Forward(const Args& args, int64_t per) : a(args), per_(per) {
        const std::vector<Sequence> all = sequences(a);
        const int64_t heads = a.k.size[1];
        D = a.v.size[3];
        F = a.fq.data ? a.fq.size[3] : 0;
        few_ = few_patterns(a, per);
        for (const Sequence& s : all) {
            if (s.Q == 0 && !a.state_out.data) continue;
            for (int64_t g = 0; g < heads; g++) groups_.push_back(plan_group(s, g));
        }
    }

    template <class Op>
    void run() {
        const int64_t most = std::max(WAVE, a.threads << 20);
        for (size_t first = 0; first < groups_.size();) {
            size_t last = first;
            int64_t total = 0;
            while (last < groups_.size() && (last == first || total + groups_[last].floats <= most))
                total += groups_[last++].floats;
            wave<Op>(first, last, total);
            first = last;
        }
    }

   private:
    Group plan_group(const Sequence& s, int64_t g) {
        Group y;
        y.x = which(a, s, g);
        y.near.real = real_keys(a, s);
        y.near.clean = !a.valid.data;
        y.near_floats = packed_floats(y.near, s.K, D, per_);
        y.has_extra = a.extra_k.data && y.x.w >= 0;
        if (y.has_extra) {
            const int64_t n = a.extra_at.size[2];
            y.extra_floats = packed_floats(y.extra, n, D, per_);
            y.extra.clean = false;
            y.extra.real.assign(up(n, STEP) / 32 + 1, 0);
            for (int64_t j = 0; j < n; j++)
                if (a.extra_at.integer(s.b, g, j) != 1 << 30) y.extra.real[j / 32] |= 1u << (j % 32);
        }
        if (std::count(few_.begin(), few_.end(), 1)) plan_plain(y);
        y.floats = y.near_floats + y.extra_floats + y.plain_floats;
        if (a.index && a.index[g] >= 0) {
            const bool lists = y.x.lists;
            y.t = a.index[g];
            const bool both = !lists && !y.x.causal && y.x.w > 0;
            y.floats += y.far.plan(s.K, F, D, lists ? a.block_k : chunk_of(F, D), both, lists);
            const Rows fk = a.fk.rows(s.b, y.t, s.k0, s.K), v = a.v.rows(s.b, g, s.k0, s.K);
            y.far.features = [fk](int64_t j, float* to) { to_float(to, fk.at(j), fk.dtype, fk.d); };
            y.far.value = [v](int64_t j, float* to) { to_float(to, v.at(j), v.dtype, v.d); };
        }
        return y;
    }

    void plan_plain(Group& y) {
        const Sequence& s = y.x.s;
        const bool own = a.k.dtype == FLOAT32 && a.v.dtype == FLOAT32 && D % W == 0;
        y.copied = !own;
        y.plain_floats = own ? 0 : 2 * up(s.K * up(D, W), 16);
        if (own) {
            const auto* k = reinterpret_cast<const float*>(a.k.at(s.b, y.x.g, s.k0));
            const auto* v = reinterpret_cast<const float*>(a.v.at(s.b, y.x.g, s.k0));
            y.plain = Plain{k, v, a.k.stride[2], a.v.stride[2]};
        }
    }

    // Keys and values from `unit` · ALIGN on as rows of floats.
    void copy(const Group& y, int64_t unit) {
        const Sequence& s = y.x.s;
        const int64_t wide = up(D, W);
        for (int64_t j = unit * ALIGN; j < std::min((unit + 1) * ALIGN, s.K); j++)
            for (int64_t e = 0; e < 2; e++) {
                float* to = const_cast<float*>(e ? y.plain.v : y.plain.k) + j * wide;
                const Array& from = e ? a.v : a.k;
                to_float(to, from.at(s.b, y.x.g, s.k0 + j), from.dtype, D);
                std::fill(to + D, to + wide, 0.0f);
            }
    }

    std::vector<Job> jobs(size_t first, size_t last) {
        std::vector<Job> out;
        std::vector<Span> todo;
        for (size_t i = first; i < last; i++) {
            Group& y = groups_[i];
            const size_t begin = out.size();
            const int64_t rows = y.x.s.Q * y.x.G;
            const int64_t block = y.x.lists ? a.block_q * y.x.G : tile_rows(y.x.G);
            std::fill(y.near.needed.begin(), y.near.needed.end(), 0);
            for (int64_t t = 0; t < rows; t += block) {
                const int64_t end = std::min(t + block, rows);
                int64_t weight = F;
                spans(a, y.x, t, end, todo);
                for (const Span& s : todo) {
                    if (is_few(few_, s)) {
                        weight += (s.to - s.from) / WORTH;
                        continue;
                    }
                    weight += s.to - s.from;
                    for (int64_t c = s.from / ALIGN; c * ALIGN < up(s.to, W); c++) y.near.needed[c] = 1;
                }
                out.push_back({static_cast<int64_t>(i), t, end, weight * (end - t)});
            }
            std::stable_sort(out.begin() + begin, out.end(),
                             [](const Job& p, const Job& q) { return p.weight > q.weight; });
        }
        return out;
    }

    template <class Op>
    void pack(Packed& p, const Rows& k, const Rows& v, int64_t unit, float* work) {
        pack_columns<Op>(k, p.k, unit * ALIGN, (unit + 1) * ALIGN, work);
        pack_rows<Op>(v, p.v, unit * ALIGN, (unit + 1) * ALIGN, work);
    }

    template <class Op>
    void wave(size_t first, size_t last, int64_t total) {
        const std::vector<Job> todo = jobs(first, last);
        Buffer keys(total);
        struct Unit {
            int64_t group, part, unit;
        };
        std::vector<Unit> packing;
        int64_t chunk = 0;
        float* at = keys.get();
        for (size_t i = first; i < last; i++) {
            Group& y = groups_[i];
            const auto group = static_cast<int64_t>(i);
            lay(y.near, at);
            for (size_t u = 0; u < y.near.needed.size(); u++)
                if (y.near.needed[u]) packing.push_back({group, 0, static_cast<int64_t>(u)});
            if (y.has_extra) {
                lay(y.extra, at + y.near_floats);
                for (size_t u = 0; u < y.extra.needed.size(); u++)
                    packing.push_back({group, 1, static_cast<int64_t>(u)});
            }
            if (y.t >= 0) {
                y.far.lay(at + y.near_floats + y.extra_floats);
                for (int64_t c = 0; c < y.far.count; c++) packing.push_back({group, 2, c});
                chunk = std::max(chunk, y.far.chunk);
            }
            if (y.copied) {
                float* to = at + y.floats - y.plain_floats;
                y.plain = Plain{to, to + y.plain_floats / 2, up(D, W), up(D, W)};
                for (int64_t u = 0; u * ALIGN < y.x.s.K; u++) packing.push_back({group, 3, u});
            }
            at += y.floats;
        }
        const int64_t near_room = up(Room::floats(D), 16), room = near_room + SumsRoom::floats(F, D, chunk);
        Buffer rooms(room * a.threads);
        parallel(a.threads, packing.size(), [&](int64_t i) {
            const Unit& u = packing[i];
            Group& y = groups_[u.group];
            float* work = rooms.get() + room * omp_get_thread_num();
            const Sequence& s = y.x.s;
            if (u.part == 2) {
                sum_chunk(y.far, u.unit, work);
                return;
            }
            if (u.part == 3) {
                copy(y, u.unit);
                return;
            }
            Packed& p = u.part == 1 ? y.extra : y.near;
            const int64_t n = u.part == 1 ? a.extra_at.size[2] : 0;
            Rows k = u.part == 1 ? a.extra_k.rows(s.b, y.x.g, 0, n) : a.k.rows(s.b, y.x.g, s.k0, s.K);
            Rows v = u.part == 1 ? a.extra_v.rows(s.b, y.x.g, 0, n) : a.v.rows(s.b, y.x.g, s.k0, s.K);
            k.real = v.real = p.real.data();
            pack<Op>(p, k, v, u.unit, work);
        });
        if (a.index)
            parallel(a.threads, last - first, [&](int64_t i) {
                Group& y = groups_[first + i];
                if (y.t < 0) return;
                incoming(a, y.x, y.t, y.far, false);
                sum_up(y.far);
                SumsRoom r;
                r.lay(rooms.get() + room * omp_get_thread_num() + near_room, F, D);
                if (a.state_out.data) outgoing(a, y.x, y.t, y.far, r);
            });
        std::vector<std::vector<Span>> lists(a.threads);
        parallel(a.threads, todo.size(), [&](int64_t i) {
            const int thread = omp_get_thread_num();
            Room r;
            SumsRoom l;
            r.lay(rooms.get() + room * thread, D);
            l.lay(rooms.get() + room * thread + near_room, F, D);
            rows<Op>(todo[i], r, l, lists[thread]);
        });
    }

    template <class Op>
    void rows(const Job& job, const Room& r, const SumsRoom& l, std::vector<Span>& todo) {
        Group& y = groups_[job.group];
        if (y.t >= 0 && y.x.lists) {
            std::vector<int64_t> named;
            const int64_t seen = unlisted(a, y.x, job.t0 / (a.block_q * y.x.G), named);
            rest(y.far, 0, seen, named, l);
        }
        const int64_t step = tile_rows(y.x.G);
        for (int64_t t = job.t0; t < job.t1; t += step) {
            const int64_t n = std::min(step, job.t1 - t);
            softmax_tile<Op>(a, y.x, y.near, y.has_extra ? &y.extra : nullptr, todo, t, n, r,
                             [&](const Span& span) { return is_few(few_, span); });
            if (!few_.empty()) few_tile(a, y.x, y.near, y.plain, few_, todo, t, n, r);
            if (y.t >= 0) far_tile(y, t, n, r.s, l);
            for (int64_t i = 0; i < n; i++) {
                finish_softmax(y, t + i, i, r, l);
                if (y.t >= 0 && !a.shared) finish_linear(y, t + i, i, l);
            }
        }
    }

    void far_tile(const Group& y, int64_t t0, int64_t rows, float* s, const SumsRoom& l) {
        const int64_t wide = up(F, W), G = y.x.G;
        std::memset(l.fq, 0, up(rows, MR) * wide * 4);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t t = t0 + i;
            to_float(l.fq + i * wide, a.fq.at(y.x.s.b, y.t * G + t % G, y.x.s.q0 + t / G), a.fq.dtype, F);
        }
        const Reach reach = reach_of(y.x, t0, rows);
        linear_tile(y.far, &reach, rows, s, l);
    }

    void finish_softmax(const Group& y, int64_t t, int64_t i, const Room& r, const SumsRoom& l) {
        const int64_t head = y.x.g * y.x.G + t % y.x.G, row = y.x.s.q0 + t / y.x.G, d = up(D, W);
        const bool tail = y.t >= 0 && a.shared && l.den[i] > 0;
        const float sink = a.sink.data ? a.sink.number(head) * LOG2E : LOWEST;
        const float far = tail ? a.weight.number(y.t * y.x.G + t % y.x.G) * LOG2E : LOWEST;
        const float top = std::max(std::max(sink, far), r.m[i]);
        float* o = r.o + i * d;
        float* lse = reinterpret_cast<float*>(a.lse.at(y.x.s.b, head, row));
        if (top == LOWEST && r.l[i] == 0) {
            std::memset(o, 0, D * 4);
            *lse = LOWEST;
        } else {
            const float near_scale = r.m[i] == LOWEST ? 0.0f : std::exp2(r.m[i] - top);
            const float far_scale = tail ? std::exp2(far - top) : 0.0f;
            const float total = near_scale * r.l[i] + std::exp2(sink - top) + (tail ? far_scale * l.den[i] : 0.0f);
            const V p = set(near_scale / total), q = set(far_scale / total);
            for (int64_t e = 0; e < d; e += W) {
                const V x = mul(p, load(o + e));
                store(o + e, tail ? fma(q, load(l.a + i * d + e), x) : x);
            }
            *lse = LN2 * (top + std::log2(total));
        }
        from_float(a.o.at(y.x.s.b, head, row), o, a.o.dtype, D);
    }

    void finish_linear(const Group& y, int64_t t, int64_t i, const SumsRoom& l) {
        const int64_t head = y.t * y.x.G + t % y.x.G, row = y.x.s.q0 + t / y.x.G, d = up(D, W);
        if (a.normalize) scale_by(l.a + i * d, 1.0f / (l.den[i] + 1e-6f), d);
        from_float(a.linear.at(y.x.s.b, head, row), l.a + i * d, a.linear.dtype, D);
        *reinterpret_cast<float*>(a.den.at(y.x.s.b, head, row)) = l.den[i];
    }

    const Args& a;
    int64_t per_, D, F;
    std::vector<char> few_;  // per pattern
    std::vector<Group> groups_;
};

}  // namespace
}  // namespace attn

EXPORT int attnconvert_forward(const attn::Args* a, int64_t size) try {
    if (size != sizeof *a) return 2;
    if (!a->softmax) {
#if defined(ATTNCONVERT_AVX512)
        if (a->fq.dtype == attn::BFLOAT16 && a->fk.dtype == attn::BFLOAT16 && a->v.dtype == attn::BFLOAT16) {
            attn::Scan<attn::Pairs>(*a).run();
            return 0;
        }
#endif
        attn::Scan<attn::Floats>(*a).run();
        return 0;
    }
#if defined(ATTNCONVERT_AVX512)
    if (a->q.dtype == attn::BFLOAT16) {
        attn::Forward(*a, 2).run<attn::Pairs>();
        return 0;
    }
#endif
    attn::Forward(*a, 1).run<attn::Floats>();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
