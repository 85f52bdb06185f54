// What the inner loop reaches on matrices that stay in the first cache: the peak that benchmarks compare with.
#include <ctime>

#include "problem.h"

namespace attn {
namespace {

double thread_seconds() {  // of this thread alone: other processes do not count
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class Op>
double rate(int64_t threads, double seconds) {
    constexpr int64_t DEPTH = 64, M = 8 * MR;  // in units
    const int64_t each = M * DEPTH + NP * DEPTH + M * NP;
    Buffer memory(each * threads);
    std::memset(memory.get(), 0, each * threads * 4);
    double flops = 0;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : flops)
    {
        float *a = memory.get() + each * omp_get_thread_num(), *c = a + M * DEPTH;
        const Panels b{c + M * NP, NP, DEPTH};
        const double start = thread_seconds();
        double taken = 0, done = 0;
        while (taken < seconds) {
            for (int i = 0; i < 200; i++) product<Op>(M, a, DEPTH, 1, b, 0, NP, 0, DEPTH, c, NP, true);
            done += 200.0 * 2 * M * NP * DEPTH * Op::PER;
            taken = thread_seconds() - start;
        }
        flops += done / taken;
    }
    return flops;
}

}  // namespace
}  // namespace attn

EXPORT double attnconvert_peak(int64_t pairs, int64_t threads, double seconds) {
#if defined(ATTNCONVERT_AVX512)
    if (pairs) return attn::rate<attn::Pairs>(threads, seconds);
#endif
    (void)pairs;
    return attn::rate<attn::Floats>(threads, seconds);
}
