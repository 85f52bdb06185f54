// Feature maps of linear attention in one pass, and their gradients.
#include "problem.h"

namespace attn {
namespace {

enum Kind : int64_t { HEDGEHOG = 0, ELU1 = 1, RELU = 2, SOFTMAX = 3 };

constexpr float FLOOR = 1e-12f;
constexpr int64_t ROWS = TILE;  // rows of a job
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

    void forward() {
        Buffer weights(H * per_head), rooms(a.threads * room());
        pack(weights.get(), rooms.get(), false);
        const int64_t tiles = (S + ROWS - 1) / ROWS;
        parallel(a.threads, B * H * tiles, [&](int64_t i) {
            const int64_t b = i / (H * tiles), h = i / tiles % H, from = i % tiles * ROWS;
            tile(b, h, from, std::min(ROWS, S - from), weights.get(), rooms.get() + room() * omp_get_thread_num());
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
    int64_t room() const { return ROWS * (2 * d + up(D, W) + 4 * d) + PACK_SCRATCH + 64; }

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

    void tile(int64_t b, int64_t h, int64_t from, int64_t rows, float* weights, float* work) const {
        float *x = work, *y = x + ROWS * d, *f = y + ROWS * d;
        std::memset(x, 0, up(rows, MR) * d * 4);
        for (int64_t i = 0; i < rows; i++) to_float(x + i * d, a.x.at(b, h, from + i), a.x.dtype, D);
        if (a.kind == HEDGEHOG) project(x, rows, panels(weights, h), y);
        for (int64_t i = 0; i < rows; i++) {
            char* out = a.out.at(b, h, from + i);
            const float* row = x + i * d;
            if (a.kind == HEDGEHOG) {
                softmax_row(y + i * d, 1.0f, D, f);
                softmax_row(y + i * d, -1.0f, D, f + d);
                for (int64_t j = 0; j < 2 * d; j += W) store(f + j, max(set(FLOOR), load(f + j)));
                from_float(out, f, a.out.dtype, D);
                from_float(out + D * bytes_of(a.out.dtype), f + d, a.out.dtype, D);
                continue;
            }
            if (a.kind == SOFTMAX) softmax_row(row, 1.0f, D, f);
            else map(row, f);
            from_float(out, f, a.out.dtype, D);
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
    if (backward) f.backward();
    else f.forward();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
