// Feature maps of linear attention in one pass, and their gradients.
#include "problem.h"

namespace attn {
namespace {

enum Kind : int64_t { HEDGEHOG = 0, ELU1 = 1, RELU = 2, SOFTMAX = 3 };

constexpr float FLOOR = 1e-12f;
constexpr int64_t BLOCK = 12;   // of it, for softmaxes; divides ROWS
constexpr float LARGE = 1e17f;  // sums of e^±y below it need no shift by the largest y
constexpr int64_t ROWS = 96;  // rows of a job
constexpr int64_t PARTS = 8;    // sums of dW per head, added in a fixed order

struct FeatureArgs {
    Array x, out, weight, d_out, dx, d_weight;  // weight (H, D, D) fp32
    int64_t kind, threads;
};

INLINE uint32_t lanes(int64_t j, int64_t n) { return n - j >= W ? (W == 16 ? 0xffffu : 0xffu) : (1u << (n - j)) - 1; }

// softmax(sign · y) of d numbers into `to` (whole vectors, zeros behind d).
INLINE void softmax_row(const float* y, float sign, int64_t d, float* to) {
    const int64_t n = up(d, W);
    V high = set(LOWEST);
    for (int64_t j = 0; j < n; j += W) {
        const V x = choose(lanes(j, d), set(LOWEST), mul(load(y + j), set(sign)));
        store(to + j, x);
        high = max(high, x);
    }
    const V top = set(highest(high));
    V total = zero();
    for (int64_t j = 0; j < n; j += W) {
        const V e = exp(sub(load(to + j), top));
        store(to + j, e);
        total = add(total, e);
    }
    scale_by(to, 1.0f / sum(total), n);
}

// e^y and e^-y of d numbers into `up` and `down`, whole vectors, and what they sum to, lane by lane.
INLINE void exponentials(const float* y, int64_t d, float* up, float* down, V& total_up, V& total_down) {
    total_up = total_down = zero();
UNROLL
    for (int64_t j = 0; j < d; j += W) {
        V p, q;
        exp_both(load(y + j), p, q);
        if (j + W > d) {
            p = choose(lanes(j, d), zero(), p);
            q = choose(lanes(j, d), zero(), q);
        }
        store(up + j, p);
        store(down + j, q);
        total_up = add(total_up, p);
        total_down = add(total_down, q);
    }
}

// g := p ∘ (g − Σ g p), the gradient before a softmax whose result is p; both padded with zeros.
INLINE void softmax_gradient(const float* p, float* g, int64_t n) {
    const V mean = set(dot(p, g, n));
    for (int64_t j = 0; j < n; j += W) store(g + j, mul(load(p + j), sub(load(g + j), mean)));
}

class Features {
   public:
    explicit Features(const FeatureArgs& args)
        : a(args), B(a.x.size[0]), H(a.x.size[1]), S(a.x.size[2]), D(a.x.size[3]), d(up(D, W)) {
        per_head = up(d * D, 16);
    }

    template <class Op>
    void forward() {
        Buffer weights(H * per_head), rooms(a.threads * room());
        if (Op::PER == 1) pack(weights.get(), rooms.get(), false);
        else split<Op>(weights.get(), rooms.get());
        const int64_t tiles = (S + ROWS - 1) / ROWS;
        parallel(a.threads, B * H * tiles, [&](int64_t i) {
            const int64_t b = i / (H * tiles), h = i / tiles % H, from = i % tiles * ROWS;
            tile<Op>(b, h, from, std::min(ROWS, S - from), weights.get(), rooms.get() + room() * omp_get_thread_num());
        });
    }

    void backward() {
        Buffer weights(2 * H * per_head), rooms(a.threads * room());
        Buffer sums(a.kind == HEDGEHOG ? H * PARTS * up(D, MR) * d : 0);
        pack(weights.get(), rooms.get(), false);
        pack(weights.get() + H * per_head, rooms.get(), true);
        const int64_t tiles = (B * S + ROWS - 1) / ROWS;
        parallel(a.threads, H * PARTS, [&](int64_t i) {
            const int64_t h = i / PARTS, part = i % PARTS;
            float* total = sums.get() + i * up(D, MR) * d;
            if (a.kind == HEDGEHOG) std::memset(total, 0, up(D, MR) * d * 4);
            for (int64_t t = tiles * part / PARTS; t < tiles * (part + 1) / PARTS; t++)
                tile_back(h, t * ROWS, std::min(ROWS, B * S - t * ROWS), weights.get(), total,
                          rooms.get() + room() * omp_get_thread_num());
        });
        if (a.kind != HEDGEHOG) return;
        parallel(a.threads, H, [&](int64_t h) {
            float* total = sums.get() + h * PARTS * up(D, MR) * d;
            for (int64_t part = 1; part < PARTS; part++) add_to(total, total + part * up(D, MR) * d, D * d);
            for (int64_t e = 0; e < D; e++) from_float(a.d_weight.at(h, e), total + e * d, a.d_weight.dtype, D);
        });
    }

   private:
    int64_t room() const { return ROWS * (2 * d + up(D, W)) + 4 * d * BLOCK + D * D + PACK_SCRATCH + 64; }

    Panels panels(float* weights, int64_t h) const { return Panels{weights + h * per_head, d, D}; }

    void pack(float* to, float* work, bool turned) const {
        if (a.kind != HEDGEHOG) return;
        for (int64_t h = 0; h < H; h++) {
            const Rows w{a.weight.at(h), a.weight.stride[1] * bytes_of(a.weight.dtype), a.weight.dtype, D, D};
            if (!turned) {
                pack_rows<Floats>(w, panels(to, h), 0, D, work);
                continue;
            }
            std::memset(panels(to, h).data, 0, per_head * 4);
            pack_columns<Floats>(w, panels(to, h), 0, D, work);
        }
    }

    // y = x W of rows; x (rows, d) padded with zeros.
    void project(const float* x, int64_t rows, const Panels& w, float* y) const {
        product<Floats>(up(rows, MR), x, d, 1, w, 0, d, 0, D, y, d, false);
    }

    // W as the sum of two bf16 halves, one below the other: rows of x then stand twice side by side.
    template <class Op>
    void split(float* to, float* work) const {
        const int64_t parts = a.weight.dtype == BFLOAT16 ? 1 : 2;
        auto* half = reinterpret_cast<char*>(work + PACK_SCRATCH);
        for (int64_t h = 0; h < H; h++) {
            Panels out = panels(to, h);
            out.depth = parts * D / 2;
            for (int64_t e = 0; e < D; e++) {
                float *row = work, *wide = work + D;
                to_float(row, a.weight.at(h, e), a.weight.dtype, D);
                for (int64_t part = 0; part < parts; part++) {
                    char* at = half + (part * D + e) * D * 2;
                    from_float(at, row, BFLOAT16, D);
                    to_float(wide, at, BFLOAT16, D);
                    for (int64_t i = 0; i < D; i++) row[i] -= wide[i];
                }
            }
            pack_rows<Op>(Rows{half, D * 2, BFLOAT16, parts * D, D}, out, 0, parts * D, work);
        }
    }

    // y = x W of rows, in the arithmetic of Op.
    template <class Op>
    void load_and_project(int64_t b, int64_t h, int64_t from, int64_t rows, float* weights, float* x, float* y) const {
        const int64_t parts = Op::PER == 1 || a.weight.dtype == BFLOAT16 ? 1 : 2, used = parts * D / Op::PER;
        const int64_t ld = Op::PER == 1 ? d : used;
        std::memset(x + rows * ld, 0, (up(rows, MR) - rows) * ld * 4);
        for (int64_t i = 0; i < rows; i++) {
            const char* row = a.x.at(b, h, from + i);
            if (Op::PER == 1) to_float(x + i * ld, row, a.x.dtype, D);
            else
                for (int64_t part = 0; part < parts; part++) std::memcpy(x + i * ld + part * D / 2, row, D * 2);
        }
        if (a.kind != HEDGEHOG) return;
        Panels w = panels(weights, h);
        w.depth = used;
        product<Op>(up(rows, MR), x, ld, 1, w, 0, d, 0, used, y, d, false);
    }

    template <class Op>
    void tile(int64_t b, int64_t h, int64_t from, int64_t rows, float* weights, float* work) const {
        float *x = work, *y = x + ROWS * d, *f = y + ROWS * d;
        load_and_project<Op>(b, h, from, rows, weights, x, y);
        if (a.kind == HEDGEHOG) {
            for (int64_t i = 0; i < rows; i += BLOCK) {
                const int64_t n = std::min(BLOCK, rows - i);
                if (D == 64) pairs(64, b, h, from + i, n, y + i * d, f);  // unrolled
                else pairs(D, b, h, from + i, n, y + i * d, f);
            }
            return;
        }
        for (int64_t i = 0; i < rows; i++) {
            if (a.kind == SOFTMAX) softmax_row(x + i * d, 1.0f, D, f);
            else map(x + i * d, f);
            from_float(a.out.at(b, h, from + i), f, a.out.dtype, D);
        }
    }

    // Features of BLOCK rows y, the first `rows` of them written. All sums come before all writing: rows then overlap.
    INLINE void pairs(int64_t D, int64_t b, int64_t h, int64_t row, int64_t rows, const float* y, float* f) const {
        const int64_t d = up(D, W);
        float share[2 * BLOCK];
        uint32_t large = 0;
        for (int64_t i = 0; i < BLOCK; i += 2) {
            V p, q, r, s;
            exponentials(y + i * d, D, f + 2 * i * d, f + 2 * i * d + d, p, q);
            exponentials(y + i * d + d, D, f + 2 * i * d + 2 * d, f + 2 * i * d + 3 * d, r, s);
            const __m128 total = sums(p, q, r, s);
            large |= static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnlt_ps(total, _mm_set1_ps(LARGE)))) << 2 * i;
            _mm_storeu_ps(share + 2 * i, _mm_div_ps(_mm_set1_ps(1.0f), total));
        }
        for (int64_t i = 0; i < rows; i++) {
            char* out = a.out.at(b, h, row + i);
            for (int64_t half = 0; half < 2; half++, out += D * bytes_of(a.out.dtype)) {
                float* to = f + (2 * i + half) * d;
                V factor = set(share[2 * i + half]);
                if (large >> 2 * i & 3) {
                    softmax_row(y + i * d, half ? -1.0f : 1.0f, D, to);
                    factor = set(1.0f);
                }
UNROLL
                for (int64_t j = 0; j < d; j += W) store(to + j, max(set(FLOOR), mul(factor, load(to + j))));
                from_float(out, to, a.out.dtype, D);
            }
        }
    }

    void map(const float* x, float* f) const {
        for (int64_t j = 0; j < d; j += W) {
            const V y = load(x + j), positive = max(zero(), y);
            // elu + 1 is 1 + x above 0 and e^x below: one of the two terms is always what the other leaves
            store(f + j, a.kind == RELU ? positive : add(positive, exp(min(zero(), y))));
        }
    }

    void tile_back(int64_t h, int64_t from, int64_t rows, float* weights, float* total, float* work) const {
        float *x = work, *y = x + ROWS * d, *dy = y + ROWS * d, *f = dy + ROWS * d;
        const int64_t padded = up(rows, MR), size = bytes_of(a.d_out.dtype);
        std::memset(x, 0, padded * d * 4);
        std::memset(dy, 0, padded * d * 4);
        for (int64_t i = 0; i < rows; i++)
            to_float(x + i * d, a.x.at((from + i) / S, h, (from + i) % S), a.x.dtype, D);
        if (a.kind == HEDGEHOG) project(x, rows, panels(weights, h), y);
        for (int64_t i = 0; i < rows; i++) {
            const char* g = a.d_out.at((from + i) / S, h, (from + i) % S);
            float* to = dy + i * d;
            to_float(to, g, a.d_out.dtype, D);
            if (a.kind == HEDGEHOG) {
                half_back(y + i * d, 1.0f, to, f);
                float* other = f + d;
                std::memset(other, 0, d * 4);
                to_float(other, g + D * size, a.d_out.dtype, D);
                half_back(y + i * d, -1.0f, other, f);
                for (int64_t j = 0; j < d; j += W) store(to + j, sub(load(to + j), load(other + j)));
            } else if (a.kind == SOFTMAX) {
                softmax_row(x + i * d, 1.0f, D, f);
                softmax_gradient(f, to, d);
            } else {
                for (int64_t e = 0; e < D; e++) {
                    const float z = x[i * d + e];
                    if (z <= 0) to[e] *= a.kind == RELU ? 0.0f : std::exp(z);
                }
            }
            if (a.kind != HEDGEHOG) from_float(a.dx.at((from + i) / S, h, (from + i) % S), to, a.dx.dtype, D);
        }
        if (a.kind != HEDGEHOG) return;
        project(dy, rows, panels(weights + H * per_head, h), y);
        for (int64_t i = 0; i < rows; i++)
            from_float(a.dx.at((from + i) / S, h, (from + i) % S), y + i * d, a.dx.dtype, D);
        const Panels right{f, d, ROWS};  // dW += xᵀ dy
        const Rows source{reinterpret_cast<char*>(dy), d * 4, FLOAT32, rows, D};
        pack_rows<Floats>(source, right, 0, rows, f + ROWS * d);
        // the last register tile reads beyond column D of x: d leaves room for that, or the next row does
        product<Floats>(up(D, MR), x, 1, d, right, 0, d, 0, rows, total, d, true);
    }

    // The gradient of one softmax of the pair: g (D) in place.
    void half_back(const float* y, float sign, float* g, float* f) const {
        softmax_row(y, sign, D, f);
        for (int64_t j = 0; j < d; j += W) store(g + j, keep_from(load(f + j), FLOOR, load(g + j)));
        softmax_gradient(f, g, d);
    }

    const FeatureArgs& a;
    int64_t B, H, S, D, d, per_head = 0;
};

}  // namespace
}  // namespace attn

EXPORT int attnconvert_features(const attn::FeatureArgs* a, int64_t size, int64_t backward) try {
    if (size != sizeof *a) return 2;
    attn::Features f(*a);
    if (backward) {
        f.backward();
        return 0;
    }
#if defined(ATTNCONVERT_AVX512)
    if (a->kind == attn::HEDGEHOG && a->x.dtype == attn::BFLOAT16) {
        f.forward<attn::Pairs>();
        return 0;
    }
#endif
    f.forward<attn::Floats>();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
