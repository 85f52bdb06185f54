// One new token per sequence: every cached key is read once for all query heads of its KV group. Long caches are cut
// into pieces of a fixed length, so that the result does not depend on what else is in the call.
#include "problem.h"

namespace attn {
namespace {

struct Part {
    Array k, v, mask, fq, state, weight, late, received;
    int64_t first, used;
};

struct DecodeArgs {
    Array q, o, sink;
    const Part* parts;
    double scale, softcap;
    int64_t threads, count, groups;
};

constexpr int64_t PIECE = 512;  // keys of a job
constexpr int64_t KEYS = 32;    // keys at a time

struct Piece {
    const Part* part;
    int64_t b, g, from, to;  // g within the part
    int64_t scores;          // where those of its keys are kept, (G, PIECE) floats; -1 where nobody asks
};

// The products of N heads with four keys at a time: a key is loaded once for them, and sums cross lanes together.
template <int N>
INLINE void dots(const float* q, const float* const* k, int64_t n, float* s, int64_t d) {
    for (int64_t j = 0; j < n; j += 4) {
        V acc[N][4];
        for (int h = 0; h < N; h++)
            for (int e = 0; e < 4; e++) acc[h][e] = zero();
        for (int64_t i = 0; i < d; i += W) {
            V x[N];
            for (int h = 0; h < N; h++) x[h] = load(q + h * d + i);
UNROLL
            for (int e = 0; e < 4; e++) {
                const V y = load(k[j + e] + i);
UNROLL
                for (int h = 0; h < N; h++) acc[h][e] = fma(x[h], y, acc[h][e]);
            }
        }
        for (int h = 0; h < N; h++)
            _mm_storeu_ps(s + h * KEYS + j, sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]));
    }
}

template <int N>
INLINE void weigh(const float* p, const float* const* v, int64_t n, int64_t at, float* o) {
    V acc[N];
    for (int e = 0; e < N; e++) acc[e] = load(o + at + e * W);
    for (int64_t j = 0; j < n; j++) {
        const V x = set(p[j]);
        for (int e = 0; e < N; e++) acc[e] = fma(x, load(v[j] + at + e * W), acc[e]);
    }
    for (int e = 0; e < N; e++) store(o + at + e * W, acc[e]);
}

class Decoder {
   public:
    explicit Decoder(const DecodeArgs& args) : a(args) {
        B = a.q.size[0];
        D = a.q.size[3];
        G = a.q.size[1] / a.groups;
        d = up(D, W);
        one = G * (d + 2);
        for (int64_t b = 0; b < B; b++)
            for (int64_t n = 0; n < a.count; n++)
                for (int64_t g = 0; g < a.parts[n].k.size[1]; g++) {
                    begins.push_back(pieces.size());
                    for (int64_t c = 0; c < a.parts[n].used; c += PIECE) {
                        const int64_t scores = a.parts[n].late.data ? kept : -1;
                        pieces.push_back({&a.parts[n], b, g, c, std::min(c + PIECE, a.parts[n].used), scores});
                        if (scores >= 0) kept += G * PIECE;
                    }
                    outputs.push_back({&a.parts[n], b, g, 0, 0, -1});
                }
        begins.push_back(pieces.size());
    }

    void run() {
        const int64_t room = G * (d + KEYS) + 2 * KEYS * d + 64;
        Buffer work(room * a.threads), partial(one * std::max<size_t>(1, pieces.size())), scores(kept);
        parallel(a.threads, pieces.size(), [&](int64_t i) {
            piece(pieces[i], partial.get() + i * one, work.get() + room * omp_get_thread_num(), scores.get());
        });
        const int64_t wide = (d + W) * 2 + up(G, W);
        Buffer rows(wide * a.threads);
        parallel(outputs.size() * G < 64 ? 1 : a.threads, outputs.size(), [&](int64_t i) {
            float *room = rows.get() + wide * omp_get_thread_num(), *total = room + (d + W) * 2;
            for (int64_t h = 0; h < G; h++)
                total[h] = merge(outputs[i], h, partial.get() + begins[i] * one, begins[i + 1] - begins[i], room);
            for (size_t n = begins[i]; outputs[i].part->late.data && n < begins[i + 1]; n++)
                receive(pieces[n], scores.get() + pieces[n].scores, total);
        });
    }

   private:
    // A row as floats padded to whole vectors: in place where it is that already.
    const float* row(const Array& x, int64_t b, int64_t g, int64_t j, float* to) const {
        const char* p = x.at(b, g, j);
        if (x.dtype == FLOAT32 && D == d) return reinterpret_cast<const float*>(p);
        to_float(to, p, x.dtype, D);
        if (D < d) std::memset(to + D, 0, (d - D) * 4);
        return to;
    }

    void piece(const Piece& x, float* out, float* work, float* scores) const {
        float *q = work, *kt = q + G * d, *vt = kt + KEYS * d, *s = vt + KEYS * d;
        const Part& part = *x.part;
        for (int64_t h = 0; h < G; h++) {
            std::memset(q + h * d, 0, d * 4);
            to_float(q + h * d, a.q.at(x.b, (part.first + x.g) * G + h, 0), a.q.dtype, D);
            float* o = out + h * (d + 2);
            std::memset(o, 0, d * 4);
            o[d] = LOWEST;
            o[d + 1] = 0;
        }
        for (int64_t from = x.from; from < x.to;) {
            const float *k[KEYS], *v[KEYS];
            int64_t n = 0, slots[KEYS];
            for (; from < x.to && n < KEYS; from++) {
                if (part.mask.data && !*part.mask.at(x.b, from)) continue;
                k[n] = row(part.k, x.b, x.g, from, kt + n * d);
                v[n] = row(part.v, x.b, x.g, from, vt + n * d);
                slots[n++] = from - x.from;
            }
            if (n == 0) continue;
            for (int64_t j = n; j < up(n, 4); j++) k[j] = k[0];
            int64_t done = 0;
            for (; done + 3 <= G; done += 3) dots<3>(q + done * d, k, n, s + done * KEYS, d);
            if (done + 2 == G) dots<2>(q + done * d, k, n, s + done * KEYS, d);
            if (done + 1 == G) dots<1>(q + done * d, k, n, s + done * KEYS, d);
            for (int64_t h = 0; h < G; h++) {
                float* kept_here = x.scores < 0 ? nullptr : scores + x.scores + h * PIECE;
                head(v, n, s + h * KEYS, out + h * (d + 2), kept_here, slots);
            }
        }
    }

    // What late slots were given: Σ over the heads of 2^(score − total), 0 at the others.
    void receive(const Piece& x, const float* scores, const float* total) const {
        for (int64_t j = x.from; j < x.to; j++) {
            float sum = 0;
            const bool read = *x.part->late.at(x.b, j) && !(x.part->mask.data && !*x.part->mask.at(x.b, j));
            for (int64_t h = 0; read && h < G; h++) sum += std::exp2(scores[h * PIECE + j - x.from] - total[h]);
            *reinterpret_cast<float*>(x.part->received.at(x.b, x.g, j)) = sum;
        }
    }

    // The online softmax of one head over n keys; o (d), then the maximum in powers of 2 and the sum.
    void head(const float* const* v, int64_t n, float* s, float* o, float* kept_here, const int64_t* slots) const {
        for (int64_t j = n; j < KEYS; j++) s[j] = LOWEST;
        const float scale = static_cast<float>(a.scale), cap = static_cast<float>(a.softcap);
        V high = set(LOWEST);
        for (int64_t j = 0; j < KEYS; j += W) {
            V x = mul(load(s + j), set(a.softcap > 0 ? scale / cap : scale * LOG2E));
            if (a.softcap > 0) x = mul(set(cap * LOG2E), tanh(x));
            if (j + W > n) x = choose(j >= n ? 0 : (1u << (n - j)) - 1, set(LOWEST), x);
            store(s + j, x);
            high = max(high, x);
        }
        for (int64_t j = 0; kept_here && j < n; j++) kept_here[slots[j]] = s[j];
        float &m = o[d], &l = o[d + 1];
        const float best = highest(high), now = best > m || best != best ? best : m;
        if (now == LOWEST) return;
        if (now != m) {
            const float shrink = m == LOWEST ? 0.0f : std::exp2(m - now);
            l *= shrink;
            scale_by(o, shrink, d);
            m = now;
        }
        V total = zero();
        for (int64_t j = 0; j < KEYS; j += W) {
            const V p = exp2(sub(load(s + j), set(now)));
            total = add(total, p);
            store(s + j, p);
        }
        l += sum(total);
        int64_t at = 0;
        for (; at + 8 * W <= d; at += 8 * W) weigh<8>(s, v, n, at, o);
        for (; at + 4 * W <= d; at += 4 * W) weigh<4>(s, v, n, at, o);
        for (; at < d; at += W) weigh<1>(s, v, n, at, o);
    }

    // φ(q) · state: D numbers and the denominator behind them, in `to`.
    float far(const Piece& x, int64_t h, float* to) const {
        const Part& part = *x.part;
        const int64_t F = part.fq.size[2];
        std::memset(to, 0, d * 4);
        float den = 0;
        for (int64_t f = 0; f < F; f++) {
            float phi;
            to_float(&phi, part.fq.at(x.b, x.g * G + h, f), part.fq.dtype, 1);
            const float* s = reinterpret_cast<const float*>(part.state.at(x.b, x.g, f));
            int64_t e = 0;
            for (; e + W <= D; e += W) store(to + e, fma(set(phi), load(s + e), load(to + e)));
            for (; e < D; e++) to[e] += phi * s[e];
            den += phi * s[D];
        }
        return den;
    }

    // The output of one head; the logarithm of its denominator to base 2.
    float merge(const Piece& x, int64_t h, const float* partial, int64_t n, float* work) const {
        const Part& part = *x.part;
        const int64_t head = (part.first + x.g) * G + h;
        float *o = work, *tail = work + d + W;
        const bool has = part.state.data != nullptr;
        const float den = has ? far(x, h, tail) : 0;
        if (has && !part.weight.data) {  // linear attention
            scale_by(tail, 1.0f / (den + 1e-6f), d);
            from_float(a.o.at(x.b, head, 0), tail, a.o.dtype, D);
            return 0;
        }
        const float sink = a.sink.data ? a.sink.number(head) * LOG2E : LOWEST;
        const float c = has && den > 0 ? part.weight.number(x.g * G + h) * LOG2E : LOWEST;
        float top = std::max(sink, c);
        for (int64_t i = 0; i < n; i++) {
            const float m = partial[i * one + h * (d + 2) + d];
            top = m > top || m != m ? m : top;
        }
        std::memset(o, 0, d * 4);
        float total = 1;
        if (top != LOWEST) {
            total = std::exp2(sink - top) + (c == LOWEST ? 0 : std::exp2(c - top) * den);
            if (c != LOWEST) mix(o, tail, std::exp2(c - top));
            for (int64_t i = 0; i < n; i++) {
                const float* p = partial + i * one + h * (d + 2);
                if (p[d] == LOWEST) continue;
                const float f = std::exp2(p[d] - top);
                total += f * p[d + 1];
                mix(o, p, f);
            }
            scale_by(o, 1.0f / total, d);
        }
        from_float(a.o.at(x.b, head, 0), o, a.o.dtype, D);
        return top == LOWEST ? INFINITY : top + std::log2(total);
    }

    void mix(float* o, const float* x, float f) const {
        for (int64_t e = 0; e < d; e += W) store(o + e, fma(set(f), load(x + e), load(o + e)));
    }

    const DecodeArgs& a;
    int64_t B, D, G, d, one, kept = 0;
    std::vector<Piece> pieces, outputs;
    std::vector<size_t> begins;
};

}  // namespace
}  // namespace attn

EXPORT int attnconvert_decode(const attn::DecodeArgs* a, int64_t size) try {
    if (size != sizeof *a) return 2;
    attn::Decoder(*a).run();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
