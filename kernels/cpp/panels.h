// Matrix products on packed panels: the one inner loop of every kernel.
//
// A panel holds NP columns of the right-hand factor, row after row. Its unit is 32 bits: one float, or two neighbouring
// bf16 of the summed axis where the product is that of AVX-512-BF16 (Pairs). Rows of the left factor are read by
// broadcast from anywhere. All panels are scratch memory of ours: only packing reads a user's tensor.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "simd.h"

namespace attn {

constexpr int MR = 6;                      // rows of a register tile
constexpr int NV = W == 16 ? 4 : 2;        // vectors of a register tile
constexpr int NP = NV * W;                 // columns of a panel
constexpr int ALIGN = 64;                  // keys are packed to a multiple of this

INLINE int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Scratch memory that outlives calls: fresh pages cost more than what many calls compute. At most KEPT bytes stay.
class Pool {
   public:
    static constexpr int64_t KEPT = int64_t{256} << 20, PAGE = int64_t{2} << 20;
    void* take(int64_t& bytes) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            auto best = free_.end();
            for (auto it = free_.begin(); it != free_.end(); ++it)
                if (it->first >= bytes && (best == free_.end() || it->first < best->first)) best = it;
            if (best != free_.end()) {
                void* p = best->second;
                bytes = best->first;
                kept_ -= bytes;
                free_.erase(best);
                return p;
            }
        }
        const int64_t alignment = bytes >= PAGE ? PAGE : 64;
        bytes = up(bytes, alignment);
        void* p = std::aligned_alloc(alignment, bytes);
        if (!p) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == PAGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
        return p;
    }
    void give(void* p, int64_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        while (!free_.empty() && kept_ + bytes > KEPT) {
            kept_ -= free_.front().first;
            std::free(free_.front().second);
            free_.erase(free_.begin());
        }
        if (kept_ + bytes > KEPT) return std::free(p);
        kept_ += bytes;
        free_.emplace_back(bytes, p);
    }

   private:
    std::mutex mutex_;
    std::vector<std::pair<int64_t, void*>> free_;
    int64_t kept_ = 0;
};
inline Pool& pool() {
    static Pool* one = new Pool;  // never destroyed: threads may still run when the process ends
    return *one;
}

// A piece of it, aligned to 64 bytes and not initialised.
class Buffer {
   public:
    explicit Buffer(int64_t floats) : bytes_(floats * 4 + 64), p_(pool().take(bytes_)) {
#if defined(ATTNCONVERT_POISON)
        std::memset(p_, 0xff, bytes_);  // NaN: what is read before it is written shows
#endif
    }
    ~Buffer() { pool().give(p_, bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* get() const { return static_cast<float*>(p_); }

   private:
    int64_t bytes_;
    void* p_;
};

struct Panels {
    float* data = nullptr;
    int64_t cols = 0, depth = 0;  // columns, a multiple of W; rows of a panel in units
    INLINE int64_t width(int64_t col) const { return cols - col / NP * NP < NP ? cols - col / NP * NP : NP; }
    INLINE float* at(int64_t col, int64_t row) const {
        return data + col / NP * NP * depth + row * width(col) + col % NP;
    }
    int64_t floats() const { return cols * depth; }
};

struct Floats {
    static constexpr int PER = 1;  // numbers of the summed axis in a unit
    static INLINE V broadcast(const float* p) { return set(*p); }
    static INLINE V step(V a, V b, V c) { return fma(a, b, c); }
    static INLINE void put(float* row, int64_t i, V x) { store(row + i, x); }
    static INLINE V power(V x) { return exp2(x); }
    static INLINE V ones() { return set(1.0f); }
    static INLINE void narrow(float* to, V x, V) { store(to, x); }
    static INLINE void split(float* to, const float* x, int64_t n) { std::memcpy(to, x, n * 4); }
    static INLINE V along(const float* a, const float* b, int64_t n) {
        V total = zero();
        for (int64_t i = 0; i < n; i += W) total = step(load(a + i), load(b + i), total);
        return total;
    }
};

#if defined(ATTNCONVERT_AVX512)
constexpr uint16_t IN_TURN[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct Pairs {
    static constexpr int PER = 2;
    static INLINE V broadcast(const float* p) {
        int32_t bits;
        std::memcpy(&bits, p, 4);
        return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
    }
    static INLINE V step(V a, V b, V c) {
        return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
    static INLINE void put(float* row, int64_t i, V x) {  // may overwrite the row that x was read from
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(row) + i),
                            (__m256i)_mm512_cvtneps_pbh(x));
    }
    static INLINE V power(V x) { return exp2_short(x); }
    static INLINE V ones() { return _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80)); }
    static INLINE __m512i both(V x, V y) {  // their numbers in turn
        return _mm512_permutexvar_epi16(_mm512_loadu_si512(IN_TURN), (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
    static INLINE void narrow(float* to, V x, V y) { store(to, _mm512_castsi512_ps(both(x, y))); }
    // 2n numbers as n units and, behind them, what their rounding lost
    static INLINE void split(float* to, const float* x, int64_t n) {
        for (int64_t i = 0; i < 2 * n; i += W) {
            put(to, i, load(x + i));
            float lost[W];
            for (int64_t e = 0; e < W; e++) {
                uint16_t half;
                std::memcpy(&half, reinterpret_cast<uint16_t*>(to) + i + e, 2);
                const uint32_t bits = static_cast<uint32_t>(half) << 16;
                float high;
                std::memcpy(&high, &bits, 4);
                lost[e] = x[i + e] - high;
            }
            put(to + n, i, load(lost));
        }
    }
    static INLINE V along(const float* a, const float* b, int64_t n) {  // a row of units against what `split` made
        V total = zero(), lost = zero();
        for (int64_t i = 0; i < n; i += W) {
            total = step(load(a + i), load(b + i), total);
            lost = step(load(a + i), load(b + n + i), lost);
        }
        return add(total, lost);
    }
};
#endif

template <class Op, int N>
INLINE void tile(int64_t depth, const float* a, int64_t row, int64_t step, const float* b, int64_t width, float* c,
                 int64_t ldc, bool accumulate) {
    V acc[MR][N];
UNROLL
    for (int i = 0; i < MR; i++)
UNROLL
        for (int j = 0; j < N; j++) acc[i][j] = accumulate ? load(c + i * ldc + j * W) : zero();
    for (int64_t k = 0; k < depth; k++) {
        V right[N];
UNROLL
        for (int j = 0; j < N; j++) right[j] = load(b + j * W);
UNROLL
        for (int i = 0; i < MR; i++) {
            const V left = Op::broadcast(a + i * row);
UNROLL
            for (int j = 0; j < N; j++) acc[i][j] = Op::step(left, right[j], acc[i][j]);
        }
        a += step;
        b += width;
    }
UNROLL
    for (int i = 0; i < MR; i++)
UNROLL
        for (int j = 0; j < N; j++) store(c + i * ldc + j * W, acc[i][j]);
}

// C[0:rows, 0:to-from] (+)= A[0:rows, 0:depth] B[first : first + depth, from:to], rows a multiple of MR, the columns
// multiples of W, depth in units. A(i, k) is a[i * row + k * step].
template <class Op>
NOCLONE void product(int64_t rows, const float* a, int64_t row, int64_t step, const Panels& b, int64_t from, int64_t to,
             int64_t first, int64_t depth, float* c, int64_t ldc, bool accumulate) {
    for (int64_t col = from; col < to;) {
        const int64_t width = b.width(col);
        const int64_t left = width - col % NP < to - col ? width - col % NP : to - col;
        const float* p = b.at(col, first);
        float* q = c + (col - from);
        const int n = static_cast<int>(left / W);
        for (int64_t i = 0; i < rows; i += MR) {
            const float* x = a + i * row;
            float* y = q + i * ldc;
            if (n == 2) tile<Op, 2>(depth, x, row, step, p, width, y, ldc, accumulate);
            else if (n == 1) tile<Op, 1>(depth, x, row, step, p, width, y, ldc, accumulate);
            else if (NV == 4 && n == 4) tile<Op, NV>(depth, x, row, step, p, width, y, ldc, accumulate);
            else if (NV == 4) tile<Op, NV == 4 ? 3 : 1>(depth, x, row, step, p, width, y, ldc, accumulate);
        }
        col += left;
    }
}

// The same with C in panels (all of its columns, the first `rows` of its rows).
inline void product_into(int64_t rows, const float* a, int64_t row, int64_t step, const Panels& b, int64_t first,
                         int64_t depth, const Panels& c, bool accumulate) {
    for (int64_t col = 0; col < b.cols; col += NP) {
        const int64_t to = col + b.width(col);
        product<Floats>(rows, a, row, step, b, col, to, first, depth, c.at(col, 0), c.width(col), accumulate);
    }
}

// Where the rows of one head of a tensor stand; a row that is not `real` counts as zeros, whatever memory holds.
struct Rows {
    const char* data;
    int64_t stride;  // bytes
    int64_t dtype;
    int64_t n, d;                 // rows, numbers in a row
    const uint32_t* real = nullptr;  // bits; all where null
    INLINE bool has(int64_t i) const { return i < n && (!real || (real[i / 32] >> (i % 32) & 1)); }
    INLINE const char* at(int64_t i) const { return data + i * stride; }
};

INLINE void transpose8(const float* from, int64_t lda, float* to, int64_t ldb) {
    __m256 r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * lda);
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * ldb, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * ldb, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

constexpr int64_t WIDEST = 4096;  // numbers in a row that packing can hold: head sizes and features

// A row as units: floats, or its own bf16 in pairs. Fills up to n units with zeros.
template <class Op>
INLINE void units(float* to, const Rows& x, int64_t i, int64_t n) {
    const int64_t used = x.d / Op::PER;
    if (!x.has(i)) {
        std::memset(to, 0, n * 4);
        return;
    }
    if (Op::PER == 2) std::memcpy(to, x.at(i), x.d * 2);
    else to_float(to, x.at(i), x.dtype, x.d);
    if (n > used) std::memset(to + used, 0, (n - used) * 4);
}

// Rows from : to as columns of `out`, whose depth is units of d; row `origin` is the first of x. `to` may pass the last
// row; both are multiples of 8.
template <class Op>
void pack_columns(const Rows& x, const Panels& out, int64_t from, int64_t to, float* scratch, int64_t origin = 0) {
    const int64_t n = x.d / Op::PER, wide = up(n, 8);
    float* square = scratch + 8 * wide;  // 8 x 8, for the last units of a row that is no multiple of 8
    for (int64_t j = from; j < to; j += 8) {
        for (int64_t i = 0; i < 8; i++) units<Op>(scratch + i * wide, x, j + i - origin, wide);
        const int64_t width = out.width(j);
        float* p = out.at(j, 0);
        for (int64_t d = 0; d < n; d += 8) {
            if (d + 8 <= n) {
                transpose8(scratch + d, wide, p + d * width, width);
            } else {
                transpose8(scratch + d, wide, square, 8);
                for (int64_t e = d; e < n; e++) std::memcpy(p + e * width, square + (e - d) * 8, 32);
            }
        }
    }
}

// Two rows of 16-bit numbers side by side: n units, multiples of 16.
INLINE void interleave(const uint16_t* a, const uint16_t* b, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
        const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
        const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i + 8), _mm256_permute2x128_si256(low, high, 0x31));
    }
}

// Rows from : to as rows of `out`, whose columns are d padded with zeros.
template <class Op>
void pack_rows(const Rows& x, const Panels& out, int64_t from, int64_t to, float* scratch, int64_t origin = 0) {
    const int64_t wide = out.cols, full = x.d / 16 * 16;
    if (Op::PER == 2) std::memset(scratch, 0, wide * 4);
    auto* rest = reinterpret_cast<uint16_t*>(scratch + wide);  // the ends of two rows, where 16 does not divide them
    std::memset(rest, 0, 64);
    for (int64_t j = from; j < to; j += Op::PER) {
        if (Op::PER == 1) {
            units<Floats>(scratch, x, j - origin, wide);
            for (int64_t col = 0; col < wide; col += NP)
                std::memcpy(out.at(col, j), scratch + col, out.width(col) * 4);
            continue;
        }
        const uint16_t* row[2];
        for (int64_t e = 0; e < 2; e++) {
            const int64_t i = j - origin + e;
            row[e] = reinterpret_cast<const uint16_t*>(x.has(i) ? x.at(i) : reinterpret_cast<char*>(scratch));
            if (full < x.d) std::memcpy(rest + 16 * e, row[e] + full, (x.d - full) * 2);
        }
        for (int64_t col = 0; col < wide; col += NP) {
            float* p = out.at(col, j / 2);
            const int64_t n = std::min(out.width(col), full - col);
            interleave(row[0] + col, row[1] + col, p, n);
            if (n < out.width(col)) interleave(rest, rest + 16, p + n, 16);
        }
    }
}

constexpr int64_t PACK_SCRATCH = 8 * WIDEST + 64;

}  // namespace attn
