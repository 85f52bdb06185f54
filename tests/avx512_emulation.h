// The AVX-512 intrinsics that kernels/cpp uses, in plain C++, so that its 16-lane and bf16 paths can be tested on any
// x86 machine with AVX2:  g++ -DATTNCONVERT_EMULATED -DATTNCONVERT_AVX512 -include avx512_emulation.h …
// Meanings and roundings follow Intel's Intrinsics Guide; VDPBF16PS takes denormals for zero and rounds to nearest.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

struct Emulated512 {
    float x[16];
};
struct Emulated512i {
    uint32_t x[16];
};
struct Emulated512bh {
    uint16_t x[32];
    Emulated512bh() = default;
    explicit Emulated512bh(const Emulated512i& y) { std::memcpy(x, y.x, sizeof x); }
    explicit operator Emulated512i() const {
        Emulated512i y;
        std::memcpy(y.x, x, sizeof x);
        return y;
    }
};
struct Emulated256bh {
    uint16_t x[16];
    explicit operator __m256i() const {
        __m256i y;
        std::memcpy(&y, x, sizeof x);
        return y;
    }
};

// not inlined, which would make the kernels large and slow to compile
#define EMULATE(type, name) static __attribute__((noinline, unused)) type name

template <class F>
static inline __attribute__((always_inline)) Emulated512 emulated_each(F f) {
    Emulated512 y;
    for (int i = 0; i < 16; i++) y.x[i] = f(i);
    return y;
}

EMULATE(Emulated512, emulated_setzero_ps)() { return emulated_each([](int) { return 0.0f; }); }
EMULATE(Emulated512, emulated_set1_ps)(float a) { return emulated_each([=](int) { return a; }); }
EMULATE(Emulated512, emulated_loadu_ps)(const void* p) {
    Emulated512 y;
    std::memcpy(y.x, p, sizeof y.x);
    return y;
}
EMULATE(void, emulated_storeu_ps)(void* p, Emulated512 a) { std::memcpy(p, a.x, sizeof a.x); }
EMULATE(Emulated512, emulated_add_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return a.x[i] + b.x[i]; });
}
EMULATE(Emulated512, emulated_sub_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return a.x[i] - b.x[i]; });
}
EMULATE(Emulated512, emulated_mul_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return a.x[i] * b.x[i]; });
}
EMULATE(Emulated512, emulated_div_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return a.x[i] / b.x[i]; });
}
EMULATE(Emulated512, emulated_fmadd_ps)(Emulated512 a, Emulated512 b, Emulated512 c) {
    return emulated_each([&](int i) { return std::fma(a.x[i], b.x[i], c.x[i]); });
}
// the second operand where either is NaN
EMULATE(Emulated512, emulated_max_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
EMULATE(Emulated512, emulated_min_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
EMULATE(Emulated512, emulated_scalef_ps)(Emulated512 a, Emulated512 b) {
    return emulated_each([&](int i) { return static_cast<float>(a.x[i] * std::exp2(std::floor(double{b.x[i]}))); });
}
EMULATE(__m256, emulated_castps512_ps256)(Emulated512 a) { return _mm256_loadu_ps(a.x); }
EMULATE(__m256, emulated_extractf32x8_ps)(Emulated512 a, int half) { return _mm256_loadu_ps(a.x + 8 * half); }
EMULATE(float, emulated_reduce_add_ps)(Emulated512 a) {
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) a.x[i] += a.x[i + n];
    return a.x[0];
}
EMULATE(float, emulated_reduce_max_ps)(Emulated512 a) {
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) a.x[i] = a.x[i] > a.x[i + n] ? a.x[i] : a.x[i + n];
    return a.x[0];
}
EMULATE(Emulated512, emulated_mask_mov_ps)(Emulated512 a, uint16_t k, Emulated512 b) {
    return emulated_each([&](int i) { return k >> i & 1 ? b.x[i] : a.x[i]; });
}
EMULATE(Emulated512, emulated_maskz_mov_ps)(uint16_t k, Emulated512 b) {
    return emulated_each([&](int i) { return k >> i & 1 ? b.x[i] : 0.0f; });
}
EMULATE(uint16_t, emulated_cmp_ps_mask)(Emulated512 a, Emulated512 b, int operation) {
    uint16_t k = 0;
    for (int i = 0; i < 16; i++) {
        const bool less = a.x[i] < b.x[i];
        k |= static_cast<uint16_t>((operation == _CMP_NLT_UQ ? !less : throw operation) << i);
    }
    return k;
}
EMULATE(Emulated512i, emulated_castps_si512)(Emulated512 a) {
    Emulated512i y;
    std::memcpy(y.x, a.x, sizeof y.x);
    return y;
}
EMULATE(Emulated512, emulated_castsi512_ps)(Emulated512i a) {
    Emulated512 y;
    std::memcpy(y.x, a.x, sizeof y.x);
    return y;
}
EMULATE(Emulated512i, emulated_set1_epi32)(int a) {
    Emulated512i y;
    for (uint32_t& x : y.x) x = static_cast<uint32_t>(a);
    return y;
}
EMULATE(Emulated512i, emulated_add_epi32)(Emulated512i a, Emulated512i b) {
    for (int i = 0; i < 16; i++) a.x[i] += b.x[i];
    return a;
}
EMULATE(Emulated512i, emulated_sub_epi32)(Emulated512i a, Emulated512i b) {
    for (int i = 0; i < 16; i++) a.x[i] -= b.x[i];
    return a;
}
EMULATE(Emulated512i, emulated_slli_epi32)(Emulated512i a, unsigned n) {
    for (uint32_t& x : a.x) x = n < 32 ? x << n : 0;
    return a;
}

static inline float emulated_flush(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
static inline float emulated_wide(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return emulated_flush(y);
}
// the odd pair first, each product added with one rounding
EMULATE(Emulated512, emulated_dpbf16_ps)(Emulated512 c, Emulated512bh a, Emulated512bh b) {
    return emulated_each([&](int i) {
        float y = emulated_flush(c.x[i]);
        for (int e = 1; e >= 0; e--)
            y = emulated_flush(std::fma(emulated_wide(a.x[2 * i + e]), emulated_wide(b.x[2 * i + e]), y));
        return y;
    });
}
EMULATE(Emulated256bh, emulated_cvtneps_pbh)(Emulated512 a) {
    Emulated256bh y;
    for (int i = 0; i < 16; i++) {
        const float x = emulated_flush(a.x[i]);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        y.x[i] = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    return y;
}

EMULATE(Emulated512bh, emulated_cvtne2ps_pbh)(Emulated512 high, Emulated512 low) {
    const Emulated256bh a = emulated_cvtneps_pbh(low), b = emulated_cvtneps_pbh(high);
    Emulated512bh y;
    std::memcpy(y.x, a.x, sizeof a.x);
    std::memcpy(y.x + 16, b.x, sizeof b.x);
    return y;
}
EMULATE(Emulated512i, emulated_loadu_si512)(const void* p) {
    Emulated512i y;
    std::memcpy(y.x, p, sizeof y.x);
    return y;
}
EMULATE(Emulated512i, emulated_permutexvar_epi16)(Emulated512i at, Emulated512i a) {
    uint16_t from[32], to[32], n[32];
    std::memcpy(from, a.x, sizeof from);
    std::memcpy(n, at.x, sizeof n);
    for (int i = 0; i < 32; i++) to[i] = from[n[i] % 32];
    std::memcpy(a.x, to, sizeof to);
    return a;
}

#define __m512 Emulated512
#define __m512i Emulated512i
#define __m512bh Emulated512bh
#define __mmask16 uint16_t
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_add_ps emulated_add_ps
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_div_ps emulated_div_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_scalef_ps emulated_scalef_ps
#define _mm512_castps512_ps256 emulated_castps512_ps256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_mask_mov_ps emulated_mask_mov_ps
#define _mm512_maskz_mov_ps emulated_maskz_mov_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated_cmp_ps_mask
#define _mm512_castps_si512 emulated_castps_si512
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_sub_epi32 emulated_sub_epi32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
