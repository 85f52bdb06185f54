// Linear attention alone, forward: the keys of a sequence are cut into segments, whose sums Σ φ vᵀ become the states
// before each of them; then every segment is walked chunk by chunk, rows reading the state before their chunk and the
// keys inside it (the chunked form of Hua et al. 2022). Cuts depend on the sequence alone, never on the threads.
//
// With Pairs, the state and all sums are kept in fp32 and only rounded to bf16 as a factor of a product, as
// flash-linear-attention does.
#pragma once
#include "problem.h"

namespace attn {

constexpr int64_t CHUNK = 32;      // keys: rows read on average half of it too many, and a state is rounded for each
constexpr int64_t SEGMENT = 1024;  // keys or, where not causal, rows of a job

template <class Op>
class Scan {
   public:
    explicit Scan(const Args& args) : a(args) {
        D = a.v.size[3];
        d = up(D, W);
        F = a.fk.size[3];
        units = (F + Op::PER - 1) / Op::PER;
        U = up(units, W);
        step = up(U * Op::PER, 48);  // 48: whole vectors and whole register tiles
        size = d * step + up(U * Op::PER, W);
        int64_t slots = 0;
        for (const Sequence& s : sequences(a)) {
            if (s.Q == 0 && !a.state_out.data) continue;
            const int64_t keys = std::max<int64_t>(1, (s.K + SEGMENT - 1) / SEGMENT);
            for (int64_t g = 0; g < a.fk.size[1]; g++) {
                lines.push_back({which(a, s, g), slots, keys, 1});
                slots += (keys + 1) * size;
            }
        }
        all = slots;
        const auto count = static_cast<int64_t>(lines.size());
        int64_t parts = 1;  // as few as keep all threads busy to the end: the keys of all but the last are summed twice
        while (parts < 64 && up(parts * count, a.threads) * 8 > parts * count * 9) parts++;
        for (int64_t n = 0; n < count; n++) {
            Line& y = lines[n];
            y.parts = a.causal ? std::min(parts, y.segments) : std::max<int64_t>(1, (y.x.s.Q + SEGMENT - 1) / SEGMENT);
            y.known = a.causal ? y.begin(y.parts - 1) : y.segments;
            for (int64_t i = 0; i < y.known; i++) sums.push_back({n, i});
            for (int64_t i = 0; i < y.parts; i++) walks.push_back({n, i});
        }
    }

    void run() {
        const int64_t room = up(Room::floats(*this), 16);
        Buffer states(all), rooms(a.threads * room);
        const auto mine = [&] { return Room(*this, rooms.get() + room * omp_get_thread_num()); };
        parallel(a.threads, sums.size(), [&](int64_t i) {
            const Line& y = lines[sums[i].line];
            float* to = states.get() + y.slot + (sums[i].n + 1) * size;
            std::memset(to, 0, size * 4);
            const Room r = mine();
            const int64_t end = std::min((sums[i].n + 1) * SEGMENT, y.x.s.K);
            for (int64_t c = sums[i].n * SEGMENT; c < end; c += CHUNK) {
                take(y, c, std::min(CHUNK, end - c), r, false);
                sum(r, to);
            }
        });
        parallel(a.threads, lines.size(), [&](int64_t i) {
            float* first = states.get() + lines[i].slot;
            incoming(lines[i].x, first);
            for (int64_t n = 0; n < lines[i].known; n++) add_to(first + (n + 1) * size, first + n * size, size);
        });
        parallel(a.threads, walks.size(), [&](int64_t i) {
            const Line& y = lines[walks[i].line];
            const Room r = mine();
            if (a.causal) walk(y, walks[i].n, states.get() + y.slot, r);
            else whole(y, walks[i].n, states.get() + y.slot + y.segments * size, r);
        });
        if (a.state_out.data)
            parallel(a.threads, lines.size(), [&](int64_t i) {
                outgoing(lines[i].x, states.get() + lines[i].slot + lines[i].segments * size);
            });
    }

   private:
    struct Line {  // one sequence and KV group: its states from `slot` on, one before each segment and one behind all
        Which x;
        int64_t slot, segments, parts;  // parts: jobs of neighbouring segments
        int64_t known = 0;              // segments that are summed before rows are read
        int64_t begin(int64_t part) const { return segments * part / parts; }
    };
    struct Job {
        int64_t line, n;
    };

    // What a thread needs. `right` holds the state and below it the values of a chunk; rows of `q` their counterparts.
    struct Room {
        float *state, *keys, *phi, *q, *s, *o, *den, *tail, *work;
        Panels right, fk;
        static int64_t floats(const Scan& x) {
            return x.size + CHUNK * x.step * 2 + (x.d + TILE) * x.depth() + CHUNK * x.units + TILE * (CHUNK + x.d) +
                   up(TILE, 16) + 4 * x.U + PACK_SCRATCH + 64;
        }
        Room(const Scan& x, float* p) {
            state = p;
            keys = state + up(x.size, 16);
            phi = keys + CHUNK * x.step;
            right = Panels{phi + CHUNK * x.step, x.d, x.depth()};
            q = right.data + x.d * x.depth();
            fk = Panels{q + TILE * x.depth(), CHUNK, x.units};
            s = fk.data + CHUNK * x.units;
            o = s + TILE * CHUNK;
            den = o + TILE * x.d;
            tail = den + up(TILE, 16);
            work = tail + 4 * x.U;  // as it is narrowed, and before
        }
    };
    int64_t depth() const { return U + CHUNK / Op::PER; }
    Panels panels(float* state) const { return Panels{state, d, step}; }

    void incoming(const Which& x, float* to) const {
        std::memset(to, 0, size * 4);
        if (!a.state.data) return;
        for (int64_t f = 0; f < F; f++) {
            const float* from = reinterpret_cast<const float*>(a.state.at(x.s.n, x.g, f));
            for (int64_t e = 0; e < D; e++) *panels(to).at(e, f) = from[e];
            to[d * step + f] = from[D];
        }
    }

    void outgoing(const Which& x, float* from) const {
        for (int64_t f = 0; f < F; f++) {
            float* to = reinterpret_cast<float*>(a.state_out.at(x.s.n, x.g, f));
            for (int64_t e = 0; e < D; e++) to[e] = *panels(from).at(e, f);
            to[D] = from[d * step + f];
        }
    }

    // Packs n keys from c on. A key whose features are all 0 counts as absent, whatever its value holds.
    void take(const Line& y, int64_t c, int64_t n, const Room& r, bool columns) const {
        const Sequence& s = y.x.s;
        const int64_t wide = step / Op::PER;  // units of a row of keys
        uint32_t real[CHUNK / 32] = {};
        for (int64_t j = 0; j < CHUNK; j++) {
            float* to = r.keys + j * wide;
            if (j < n) row(to, wide, a.fk.at(s.b, y.x.g, s.k0 + c + j), a.fk.dtype);
            else std::memset(to, 0, wide * 4);
            real[j / 32] |= static_cast<uint32_t>(some(to, wide)) << (j % 32);
        }
        Rows v = a.v.rows(s.b, y.x.g, s.k0 + c, n);
        v.real = real;
        const int64_t first = U * Op::PER;
        pack_rows<Op>(v, r.right, first, first + CHUNK, r.work, first);
        if (columns) {
            const int64_t dtype = Op::PER == 2 ? BFLOAT16 : FLOAT32;
            const Rows k{reinterpret_cast<char*>(r.keys), wide * 4, dtype, CHUNK, units * Op::PER};
            pack_columns<Op>(k, r.fk, 0, CHUNK, r.work);
        }
        if (Op::PER == 1) return;
        const auto* from = reinterpret_cast<const uint16_t*>(r.keys);
        for (int64_t j = 0; j < CHUNK; j += 2)
            interleave(from + j * step, from + (j + 1) * step, r.phi + j / 2 * step, step);
    }

    static INLINE bool some(const float* x, int64_t n) {  // is any number of n units, a multiple of 8, not 0?
        const __m256i number = _mm256_set1_epi32(Op::PER == 2 ? 0x7fff7fff : 0x7fffffff);
        __m256i any = _mm256_setzero_si256();
        for (int64_t i = 0; i < n; i += 8)
            any = _mm256_or_si256(any, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
        return !_mm256_testz_si256(any, number);
    }

    // F numbers as n units, zeros behind them.
    INLINE void row(float* to, int64_t n, const char* from, int64_t dtype) const {
        if (Op::PER == 1) to_float(to, from, dtype, F);
        else std::memcpy(to, from, F * 2);
        std::memset(reinterpret_cast<char*>(to) + F * (4 / Op::PER), 0, n * 4 - F * (4 / Op::PER));
    }

    // state += Σ φ vᵀ and Σ φ of the keys that were taken.
    void sum(const Room& r, float* state) const {
        const Panels to = panels(state);
        const float* phi = Op::PER == 1 ? r.keys : r.phi;
        for (int64_t col = 0; col < d; col += NP)
            product<Op>(up(F, MR), phi, 1, step, r.right, col, col + r.right.width(col), U, CHUNK / Op::PER,
                        to.at(col, 0), to.width(col), true);
        float* tail = state + d * step;
        for (int64_t f = 0; f < U * Op::PER; f += W) {
            V total = load(tail + f);
            for (int64_t j = 0; j < CHUNK / Op::PER; j++) total = Op::step(Op::ones(), load(phi + j * step + f), total);
            store(tail + f, total);
        }
    }

    // The sum of two states as a factor.
    void narrow(const Room& r, const float* before, const float* state) const {
        for (int64_t col = 0; col < d; col += NP) {
            const int64_t width = r.right.width(col);
            const float *x = before + col * step, *y = state + col * step;
            float* to = r.right.at(col, 0);
            for (int64_t u = 0; u < U; u++, x += Op::PER * width, y += Op::PER * width, to += width)
                for (int64_t e = 0; e < width; e += W) {
                    const int64_t f = width * (Op::PER - 1) + e;
                    Op::narrow(to + e, add(load(x + e), load(y + e)), add(load(x + f), load(y + f)));
                }
        }
        float* tail = r.tail + 2 * U;
        for (int64_t e = 0; e < U * Op::PER; e += W) {
            const int64_t f = d * step + e;
            store(tail + e, add(load(before + f), load(state + f)));
        }
        Op::split(r.tail, tail, U);
    }

    // The segments of a part one after the other. The sum of each starts at 0, as if it had been taken beforehand, so
    // that results do not depend on the parts.
    void walk(const Line& y, int64_t part, float* states, const Room& r) const {
        const int64_t last = y.begin(part + 1), K = y.x.s.K, all = y.x.s.Q * y.x.G;
        for (int64_t n = y.begin(part); n < last; n++) {
            const int64_t from = n * SEGMENT, end = std::min(from + SEGMENT, K);
            float* before = states + n * size;
            std::memset(r.state, 0, size * 4);
            for (int64_t c = from; c == from || c < end; c += CHUNK) {
                const int64_t next = std::min(c + CHUNK, end);
                take(y, c, next - c, r, true);
                const int64_t t0 = c == 0 ? 0 : clamp(y.x.t(c), 0, all);
                const int64_t t1 = next == K ? all : clamp(y.x.t(next), 0, all);
                if (t0 < t1) narrow(r, before, r.state);
                for (int64_t t = t0; t < t1; t += TILE) tile(y, t, std::min(TILE, t1 - t), c, r);
                if (next < K || a.state_out.data) sum(r, r.state);
            }
            if (n + 1 == last && last < y.segments) return;  // another part has begun there
            for (int64_t e = 0; e < size; e += W) store(before + size + e, add(load(r.state + e), load(before + e)));
        }
    }

    void whole(const Line& y, int64_t n, const float* state, const Room& r) const {
        const int64_t from = n * SEGMENT * y.x.G, to = std::min(from + SEGMENT * y.x.G, y.x.s.Q * y.x.G);
        std::memset(r.state, 0, size * 4);
        narrow(r, state, r.state);
        for (int64_t t = from; t < to; t += TILE) tile(y, t, std::min(TILE, to - t), y.x.s.K, r);
    }

    // Rows t0 : t0 + rows read the state that was narrowed and the keys from c on up to their own position.
    void tile(const Line& y, int64_t t0, int64_t rows, int64_t c, const Room& r) const {
        const Which& x = y.x;
        const int64_t ld = depth(), padded = up(rows, MR);
        for (int64_t i = 0; i < padded; i++) {
            if (i >= rows) std::memset(r.q + i * ld, 0, U * 4);
            else row(r.q + i * ld, U, rows_at(a.fq, x, t0 + i), a.fq.dtype);
        }
        const int64_t keys = a.causal ? up(clamp(x.position(t0 + rows - 1) + 1 - c, 0, CHUNK), W) : 0;
        if (keys > 0) product<Op>(padded, r.q, ld, 1, r.fk, 0, keys, 0, units, r.s, CHUNK, false);
        for (int64_t i = 0; i < rows; i += 4) {
            V total[4];
            for (int64_t e = 0; e < 4; e++) total[e] = weigh(r, i + e, keys, x.position(t0 + i + e) + 1 - c);
            _mm_storeu_ps(r.den + i, attn::sums(total[0], total[1], total[2], total[3]));
        }
        product<Op>(padded, r.q, ld, 1, r.right, 0, d, 0, U + keys / Op::PER, r.o, d, false);
        for (int64_t i = 0; i < rows; i++) {
            float* o = r.o + i * d;
            if (a.normalize) scale_by(o, 1.0f / (r.den[i] + 1e-6f), d);
            from_float(rows_at(a.linear, x, t0 + i), o, a.linear.dtype, D);
            *reinterpret_cast<float*>(rows_at(a.den, x, t0 + i)) = r.den[i];
        }
    }

    INLINE char* rows_at(const Array& to, const Which& x, int64_t t) const {
        return to.at(x.s.b, x.g * x.G + t % x.G, x.s.q0 + t / x.G);
    }

    // Moves the scores of row i to its features, 0 where it does not read the key; what they sum to, by lanes.
    INLINE V weigh(const Room& r, int64_t i, int64_t keys, int64_t seen) const {
        float *q = r.q + i * depth(), *s = r.s + i * CHUNK;
        V total = Op::along(q, r.tail, U);
        for (int64_t j = 0; j < keys; j += W) {
            const V p = choose(range_bits(j, 0, seen), zero(), load(s + j));
            total = add(total, p);
            Op::put(q + U, j, p);
        }
        return total;
    }

    const Args& a;
    int64_t D, d, F, units, U, step, size, all;
    std::vector<Line> lines;
    std::vector<Job> sums, walks;
};

}  // namespace attn
