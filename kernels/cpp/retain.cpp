// Retention: softmax over sinks, kept tokens and recent ones, block after block, with the scores that choose what to
// keep.
// All sequences and KV groups walk side by side; within a block the tiles of rows are shared out over the threads.
#include "softmax.h"

namespace attn {
namespace {

enum Field { RING_K, RING_V, RING_AT, RING_SCORE, KEPT_K, KEPT_V, KEPT_AT, KEPT_SCORE, SINK_K, SINK_V, FIELDS };

struct RetainArgs {
    Array q, k, v, at, o, sink;
    Array before[FIELDS], after[FIELDS];
    double scale, softcap;
    int64_t window, keep, sinks, block, threads;
};

struct Token {  // where its key and value stand
    const char *k = nullptr, *v = nullptr;
    int64_t at = -1;
    float score = 0;
};

constexpr int64_t SHARE = 48;  // rows of a tile

struct Walk {  // one sequence and KV group
    int64_t b, g;
    std::vector<Token> recent, kept, sinks;  // recent and sinks by position
    std::vector<int64_t> columns;            // of the new tokens that are real, in order
    int64_t seen = 0, done = 0, rows = 0;    // real tokens before the call; of it, done and in the step under way
    Panels k, v;
    int64_t count = 0, first_recent = 0;  // keys of the step
    float* received = nullptr;            // (tiles, keys) of the step
};

class Retention {
   public:
    explicit Retention(const RetainArgs& args) : a(args) {
        D = a.q.size[3];
        d = up(D, W);
        G = a.q.size[1] / a.k.size[1];
        most = up(a.sinks + a.keep + a.window, ALIGN);
        tiles = (a.block * G + SHARE - 1) / SHARE;
        for (int64_t b = 0; b < a.q.size[0]; b++)
            for (int64_t g = 0; g < a.k.size[1]; g++) walks.push_back(begin(b, g));
    }

    void run() {
        const int64_t one = most * (D + d) + tiles * most, room = SHARE * (D + most + d) + PACK_SCRATCH + 64;
        Buffer memory(walks.size() * up(one, 16)), rooms(a.threads * up(room, 16));
        for (size_t i = 0; i < walks.size(); i++) {
            Walk& w = walks[i];
            float* p = memory.get() + i * up(one, 16);
            w.k = Panels{p, most, D};
            w.v = Panels{p + w.k.floats(), d, most};
            w.received = w.v.data + w.v.floats();
        }
        const auto mine = [&] { return rooms.get() + up(room, 16) * omp_get_thread_num(); };
        for (bool more = true; more;) {
            parallel(a.threads, walks.size(), [&](int64_t i) { step(walks[i], mine()); });
            more = false;
            for (const Walk& w : walks) more |= w.rows > 0;
            if (!more) break;
            parallel(a.threads, walks.size() * tiles, [&](int64_t i) { tile(walks[i / tiles], i % tiles, mine()); });
        }
        parallel(a.threads, walks.size(), [&](int64_t i) { leave(walks[i]); });
    }

   private:
    const Array& before(Field f) const { return a.before[f]; }

    Walk begin(int64_t b, int64_t g) const {
        Walk w;
        w.b = b;
        w.g = g;
        for (int64_t j = 0; j < a.at.size[1]; j++)
            if (a.at.integer(b, j) >= 0) w.columns.push_back(j);
        for (int64_t j = 0; j < a.window; j++) read(w.recent, b, g, j, RING_K, RING_V, RING_AT, RING_SCORE);
        for (int64_t j = 0; j < a.keep; j++) read(w.kept, b, g, j, KEPT_K, KEPT_V, KEPT_AT, KEPT_SCORE);
        std::sort(w.recent.begin(), w.recent.end(), [](const Token& p, const Token& q) { return p.at < q.at; });
        w.seen = w.recent.empty() ? 0 : w.recent.back().at + 1;
        for (int64_t j = 0; j < std::min(a.sinks, w.seen); j++)
            w.sinks.push_back({before(SINK_K).at(b, g, j), before(SINK_V).at(b, g, j), j, 0});
        return w;
    }

    void read(std::vector<Token>& to, int64_t b, int64_t g, int64_t j, Field k, Field v, Field at, Field score) const {
        const int64_t position = before(at).integer(b, g, j);
        if (position >= 0)
            to.push_back({before(k).at(b, g, j), before(v).at(b, g, j), position, before(score).number(b, g, j)});
    }

    // Ends the step under way, and prepares the next: up to the end of its block.
    void step(Walk& w, float* work) const {
        const int64_t used = (w.rows * G + SHARE - 1) / SHARE;
        const auto skip = static_cast<size_t>(skipped(w));
        for (int64_t n = 0; n < used; n++)
            for (size_t j = skip; j < w.recent.size(); j++)
                w.recent[j].score += w.received[n * most + w.first_recent + (j - skip)];
        w.done += w.rows;
        const int64_t left = static_cast<int64_t>(w.columns.size()) - w.done, at = w.seen + w.done;
        w.rows = std::min(left, a.block - at % a.block);
        if (w.rows <= 0) {
            w.rows = 0;
            return;
        }
        if (at % a.block == 0) compete(w, at - a.window + a.block);
        for (int64_t i = 0; i < w.rows; i++) {
            const int64_t column = w.columns[w.done + i];
            const Token t{a.k.at(w.b, w.g, column), a.v.at(w.b, w.g, column), at + i, 0};
            w.recent.push_back(t);
            if (t.at < a.sinks) w.sinks.push_back(t);
        }
        pack(w, work);
    }

    static int64_t below(const std::vector<Token>& x, int64_t at) {  // tokens before a position; x by position
        return std::lower_bound(x.begin(), x.end(), at, [](const Token& t, int64_t p) { return t.at < p; }) - x.begin();
    }
    int64_t skipped(const Walk& w) const { return below(w.recent, a.sinks); }  // recent tokens that are read as sinks

    // What is older than `oldest` leaves the recent ones; the best of it and of the kept are kept.
    void compete(Walk& w, int64_t oldest) const {
        const auto old = w.recent.begin() + below(w.recent, oldest);
        if (old == w.recent.begin()) return;
        for (auto t = w.recent.begin(); t != old; ++t)
            if (t->at >= a.sinks) w.kept.push_back(*t);
        w.recent.erase(w.recent.begin(), old);
        std::sort(w.kept.begin(), w.kept.end(), [](const Token& p, const Token& q) {
            return p.score > q.score || (p.score == q.score && p.at < q.at);
        });
        if (static_cast<int64_t>(w.kept.size()) > a.keep) w.kept.resize(a.keep);
    }

    // Keys in the order sinks, kept, recent.
    void pack(Walk& w, float* work) const {
        std::vector<const Token*> all;
        for (const Token& t : w.sinks) all.push_back(&t);
        for (const Token& t : w.kept) all.push_back(&t);
        w.first_recent = static_cast<int64_t>(all.size());
        for (size_t j = skipped(w); j < w.recent.size(); j++) all.push_back(&w.recent[j]);
        w.count = static_cast<int64_t>(all.size());
        const int64_t wide = up(D, 8), size = bytes_of(a.k.dtype);
        char* rows = reinterpret_cast<char*>(work + PACK_SCRATCH);
        for (int64_t j = 0; j < up(w.count, ALIGN); j += 8) {
            const int64_t n = clamp(w.count - j, 0, 8);
            for (int64_t part = 0; part < 2; part++) {
                for (int64_t i = 0; i < n; i++)
                    std::memcpy(rows + i * wide * size, part ? all[j + i]->v : all[j + i]->k, D * size);
                const Rows x{rows, wide * size, a.k.dtype, n, D};
                if (part) pack_rows<Floats>(x, w.v, j, j + 8, work, j);
                else pack_columns<Floats>(x, w.k, j, j + 8, work, j);
            }
        }
    }

    void tile(Walk& w, int64_t n, float* work) const {
        const int64_t from = n * SHARE, rows = std::min(SHARE, w.rows * G - from), keys = up(w.count, W);
        if (rows <= 0) return;
        float *q = work, *s = q + SHARE * D, *o = s + SHARE * most, *received = w.received + n * most;
        std::memset(q, 0, up(rows, MR) * D * 4);
        std::memset(received, 0, keys * 4);
        for (int64_t i = 0; i < rows; i++)
            to_float(q + i * D, a.q.at(w.b, w.g * G + (from + i) % G, column(w, from + i)), a.q.dtype, D);
        product<Floats>(up(rows, MR), q, D, 1, w.k, 0, keys, 0, D, s, most, false);
        for (int64_t i = 0; i < rows; i++) row(w, from + i, s + i * most, keys, received);
        product<Floats>(up(rows, MR), s, most, 1, w.v, 0, d, 0, keys, o, d, false);
        for (int64_t i = 0; i < rows; i++)
            from_float(a.o.at(w.b, w.g * G + (from + i) % G, column(w, from + i)), o + i * d, a.o.dtype, D);
    }

    int64_t column(const Walk& w, int64_t row) const { return w.columns[w.done + row / G]; }

    // Scores of a row → its probabilities; what late keys get of them is added to `received`.
    void row(const Walk& w, int64_t r, float* s, int64_t keys, float* received) const {
        const int64_t at = w.seen + w.done + r / G, head = w.g * G + r % G, skip = skipped(w);
        const int64_t sinks = std::min<int64_t>(w.sinks.size(), at + 1), all = w.sinks.size();
        const int64_t recent = w.first_recent + std::max<int64_t>(0, below(w.recent, at + 1) - skip);
        const int64_t late = w.first_recent + std::max<int64_t>(0, below(w.recent, at - a.window / 2 + 1) - skip);
        const float scale = static_cast<float>(a.scale), cap = static_cast<float>(a.softcap);
        const float sink = a.sink.data ? a.sink.number(head) * LOG2E : LOWEST;
        V high = set(sink);
        for (int64_t j = 0; j < keys; j += W) {
            V x = mul(load(s + j), set(cap > 0 ? scale / cap : scale * LOG2E));
            if (cap > 0) x = mul(set(cap * LOG2E), tanh(x));
            const uint32_t bits = (range_bits(j, 0, sinks) | range_bits(j, all, recent)) & (W == 16 ? 0xffffu : 0xffu);
            x = choose(bits, set(LOWEST), x);
            store(s + j, x);
            high = max(high, x);
        }
        const float top = highest(high);
        V total = zero();
        for (int64_t j = 0; j < keys; j += W) {
            const V p = exp2(sub(load(s + j), set(top)));
            store(s + j, p);
            total = add(total, p);
        }
        const V share = set(1.0f / (sum(total) + std::exp2(sink - top)));
        for (int64_t j = 0; j < keys; j += W) {
            const V p = mul(load(s + j), share);
            store(s + j, p);
            if (j < late && j + W > w.first_recent)
                store(received + j, add(load(received + j), choose(range_bits(j, w.first_recent, late), zero(), p)));
        }
    }

    void leave(const Walk& w) const {
        for (int64_t f = 0; f < FIELDS; f++) {
            const Array& x = a.after[f];
            const bool flat = f == RING_AT || f == RING_SCORE || f == KEPT_AT || f == KEPT_SCORE;
            for (int64_t j = 0; j < x.size[2]; j++) {
                if (!flat) std::memset(x.at(w.b, w.g, j), 0, D * bytes_of(x.dtype));
                else *reinterpret_cast<int32_t*>(x.at(w.b, w.g, j)) = f == RING_AT || f == KEPT_AT ? -1 : 0;
            }
        }
        for (const Token& t : w.recent) write(w, t, t.at % a.window, RING_K, RING_V, RING_AT, RING_SCORE);
        int64_t slot = 0;
        for (const Token& t : w.kept) write(w, t, slot++, KEPT_K, KEPT_V, KEPT_AT, KEPT_SCORE);
        for (const Token& t : w.sinks) write(w, t, t.at, SINK_K, SINK_V, FIELDS, FIELDS);
    }

    void write(const Walk& w, const Token& t, int64_t slot, Field k, Field v, Field at, Field score) const {
        const int64_t size = bytes_of(a.k.dtype);
        std::memcpy(a.after[k].at(w.b, w.g, slot), t.k, D * size);
        std::memcpy(a.after[v].at(w.b, w.g, slot), t.v, D * size);
        if (at == FIELDS) return;
        *reinterpret_cast<int32_t*>(a.after[at].at(w.b, w.g, slot)) = static_cast<int32_t>(t.at);
        *reinterpret_cast<float*>(a.after[score].at(w.b, w.g, slot)) = t.score;
    }

    const RetainArgs& a;
    int64_t D, d, G, most, tiles;
    std::vector<Walk> walks;
};

}  // namespace
}  // namespace attn

EXPORT int attnconvert_retain(const attn::RetainArgs* a, int64_t size) try {
    if (size != sizeof *a) return 2;
    attn::Retention(*a).run();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
