// A vector of floats, written once for AVX2 (8 lanes) and once for AVX-512 (16 lanes); nothing else knows the width.
// Only the intrinsics named here are used, so that tests can replace those of AVX-512 by plain C++.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#if defined(ATTNCONVERT_EMULATED)  // tests that replace intrinsics by functions gain nothing from longer code
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#if defined(__clang__)
#define NOCLONE __attribute__((noinline))
#else
#define NOCLONE __attribute__((noinline, noclone))  // specialised to constant sizes it comes out slower
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace attn {

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT32 = 3, BOOL = 4 };

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;
constexpr float LOWEST = -INFINITY;

#if defined(ATTNCONVERT_AVX512)

constexpr int W = 16;
using V = __m512;
INLINE V zero() { return _mm512_setzero_ps(); }
INLINE V set(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
INLINE float sum(V x) { return _mm512_reduce_add_ps(x); }
INLINE __m256 fold(V x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
INLINE float highest(V x) { return _mm512_reduce_max_ps(x); }
// b in the lanes whose bit is set, a in the others
INLINE V choose(uint32_t bits, V a, V b) { return _mm512_mask_mov_ps(a, static_cast<__mmask16>(bits), b); }
INLINE V keep_from(V x, float low, V p) {  // p where x >= low or x is NaN, 0 elsewhere
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(low), _CMP_NLT_UQ), p);
}
INLINE V times_power(V p, V t) {  // adds the low bits of t to the exponent of p
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
INLINE V over_power(V p, V t) {
    return _mm512_castsi512_ps(
        _mm512_sub_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

INLINE V power(V p, V n) { return _mm512_scalef_ps(p, n); }  // p 2^n for whole n, 0 where that is too small

#else

constexpr int W = 8;
using V = __m256;
INLINE V zero() { return _mm256_setzero_ps(); }
INLINE V set(float x) { return _mm256_set1_ps(x); }
INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
INLINE float sum(V x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE __m256 fold(V x) { return x; }
INLINE float highest(V x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE V choose(uint32_t bits, V a, V b) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lanes), lanes);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(on));
}
INLINE V keep_from(V x, float low, V p) { return _mm256_and_ps(_mm256_cmp_ps(x, set(low), _CMP_NLT_UQ), p); }
INLINE V times_power(V p, V t) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
INLINE V over_power(V p, V t) {
    return _mm256_castsi256_ps(
        _mm256_sub_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}

#endif

// 2^x to 2e-7 of its value for x <= 127; 0 below -126. The nearest integer is split off by adding 1.5 * 2^23, and the
// polynomial is the minimax one of degree 5 on [-1/2, 1/2].
INLINE V exp2(V x) {
    const V magic = set(12582912.0f);
    const V y = max(set(-126.0f), x);
    const V t = add(y, magic);
    const V r = sub(y, sub(t, magic));
    V p = fma(r, set(1.326472567e-3f), set(9.671513826e-3f));
    p = fma(p, r, set(5.550733758e-2f));
    p = fma(p, r, set(2.402224207e-1f));
    p = fma(p, r, set(6.931469776e-1f));
    p = fma(p, r, set(1.0f));
    return keep_from(x, -126.0f, times_power(p, t));
}
#if defined(ATTNCONVERT_AVX512)
// 2^x to 5e-6 of its value, for what is rounded to bf16: the minimax polynomial of degree 4 on [-1/2, 1/2].
INLINE V exp2_short(V x) {
    const V magic = set(12582912.0f);
    const V y = max(set(-200.0f), x);
    const V n = sub(add(y, magic), magic), r = sub(y, n);
    V p = fma(r, set(9.570100638e-03f), set(5.591786022e-02f));
    p = fma(p, r, set(2.402474486e-01f));
    p = fma(p, r, set(6.931218148e-01f));
    p = fma(p, r, set(9.999992614e-01f));
    return power(p, n);
}
#endif
// e^x and e^-x to 5e-7 of their values, for x drawn to within ±80: the same polynomial, its even and odd part apart.
INLINE void exp_both(V x, V& up, V& down) {
    const V magic = set(12582912.0f);
    const V y = max(set(-80.0f), min(set(80.0f), x)), t = fma(y, set(LOG2E), magic);
    const V r = fma(y, set(LOG2E), sub(magic, t)), r2 = mul(r, r);
    const V even = fma(fma(set(9.671513826e-3f), r2, set(2.402224207e-1f)), r2, set(1.0f));
    const V odd = fma(fma(set(1.326472567e-3f), r2, set(5.550733758e-2f)), r2, set(6.931469776e-1f));
    up = times_power(fma(r, odd, even), t);
    down = over_power(fma(sub(zero(), r), odd, even), t);
}
// e^x to 3e-7 of its value, for x <= 88; 0 below -87.
INLINE V exp(V x) {
    const V magic = set(12582912.0f);
    const V t = fma(max(set(-87.0f), x), set(LOG2E), magic), n = sub(t, magic);
    const V r = fma(n, set(-1.42860677e-6f), fma(n, set(-0.693145751953125f), x));  // x - n ln 2, in two parts
    return keep_from(x, -87.0f, times_power(exp2(mul(r, set(LOG2E))), t));
}
// 1 - 2 / (e^2x + 1); exact at both ends, absolute error below 2e-7
INLINE V tanh(V x) {
    const V e = exp2(min(set(126.0f), mul(x, set(2.0f * LOG2E))));
    return sub(set(1.0f), div(set(2.0f), add(e, set(1.0f))));
}

// The sums of four vectors.
INLINE __m128 sums(V a, V b, V c, V d) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

// Reading and writing 8 numbers of a user's tensor; the tails of rows go one by one, so nothing beyond is touched.
INLINE __m256 load8(const char* p, int64_t dtype) {
    if (dtype == FLOAT32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (dtype == FLOAT16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
INLINE void store8(char* p, __m256 x, int64_t dtype) {
    if (dtype == FLOAT32) return _mm256_storeu_ps(reinterpret_cast<float*>(p), x);
    __m128i y;
    if (dtype == FLOAT16) {
        y = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    } else {  // to the nearest, ties to even; a NaN stays one
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i half = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
        y = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), y);
}

INLINE int64_t bytes_of(int64_t dtype) { return dtype == BOOL ? 1 : dtype == FLOAT32 || dtype == INT32 ? 4 : 2; }

INLINE void to_float(float* to, const char* from, int64_t dtype, int64_t n) {
    const int64_t size = bytes_of(dtype);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, load8(from + i * size, dtype));
    if (i < n) {
        char rest[32] = {};
        float wide[8];
        std::memcpy(rest, from + i * size, (n - i) * size);
        _mm256_storeu_ps(wide, load8(rest, dtype));
        std::memcpy(to + i, wide, (n - i) * sizeof(float));
    }
}
INLINE void from_float(char* to, const float* from, int64_t dtype, int64_t n) {
    const int64_t size = bytes_of(dtype);
    int64_t i = 0;
#if defined(ATTNCONVERT_AVX512)
    if (dtype == BFLOAT16)
        for (; i + W <= n; i += W)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 2), (__m256i)_mm512_cvtneps_pbh(load(from + i)));
#endif
    for (; i + 8 <= n; i += 8) store8(to + i * size, _mm256_loadu_ps(from + i), dtype);
    if (i < n) {
        float wide[8] = {};
        char rest[32];
        std::memcpy(wide, from + i, (n - i) * sizeof(float));
        store8(rest, _mm256_loadu_ps(wide), dtype);
        std::memcpy(to + i * size, rest, (n - i) * size);
    }
}

// n is a multiple of W
INLINE float dot(const float* a, const float* b, int64_t n) {
    V x = zero();
    for (int64_t i = 0; i < n; i += W) x = fma(load(a + i), load(b + i), x);
    return sum(x);
}
INLINE void scale_by(float* a, float s, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(a + i, mul(load(a + i), set(s)));
}
INLINE void add_to(float* a, const float* b, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(a + i, add(load(a + i), load(b + i)));
}

}  // namespace attn
