// One pass over p, g, m and h: each entry is read once and written once. Compiled by fused.py, which defines
// PARAM, EXP_AVG and HESSIAN: what p and g, m, and h are stored as (double, float, half or bfloat16).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    bfloat16() = default;
    explicit bfloat16(float value) {  // to nearest, ties to even, as torch rounds
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        bits = value != value ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    }
};

using work = std::conditional_t<std::is_same_v<PARAM, double>, double, float>;

struct Piece {
    PARAM* p;
    const PARAM* g;
    EXP_AVG* m;
    const HESSIAN* h;
};

struct Numbers {  // of Rule, in reference.py
    double beta1, gain, scale, eps, bound, shrink, lr;
};

// The rule, with torch's rounding: add_(x, alpha) rounds once.
template <bool floor, bool cautious, bool root>
static void update(const Piece& t, int64_t begin, int64_t end, const Numbers& numbers) {
    const work beta1 = numbers.beta1, gain = numbers.gain, scale = numbers.scale, eps = numbers.eps;
    const work bound = numbers.bound, shrink = numbers.shrink, lr = numbers.lr;
    PARAM* __restrict__ p = t.p;
    const PARAM* __restrict__ g = t.g;
    EXP_AVG* __restrict__ m = t.m;
    const HESSIAN* __restrict__ h = t.h;
    for (int64_t i = begin; i < end; ++i) {
        const work momentum = std::fma(work(g[i]), gain, work(m[i]) * beta1);
        work denominator = work(h[i]) * scale;
        if (root) denominator = std::sqrt(denominator < 0 ? work(0) : denominator);
        if (floor) denominator = denominator < eps ? eps : denominator;
        else denominator += eps;
        work step = momentum / denominator;
        step = step < -bound ? -bound : step;  // these comparisons let NaN pass, as clamp does
        step = step > bound ? bound : step;
        if (cautious) {  // by the sign of the product, as the other implementations: NaN passes
            const work product = step * work(g[i]);
            step = (gain < 0 ? product >= 0 : product <= 0) ? step * 0 : step;
        }
        m[i] = EXP_AVG(momentum);
        p[i] = PARAM(std::fma(step, -lr, work(p[i]) * shrink));
    }
}

// Each thread takes an equal part of all entries, wherever the pieces begin and end.
// The table holds five rows of `length` numbers: the addresses of p, g, m and h, and the number of entries.
extern "C" void sophia_update(const int64_t* table, int64_t length, const Numbers* numbers, int floor, int cautious,
                              int root, int threads) {
    using Rule = decltype(&update<false, false, false>);
    static constexpr Rule rules[] = {update<false, false, false>, update<false, false, true>, update<false, true, false>,
                                     update<false, true, true>,   update<true, false, false>, update<true, false, true>,
                                     update<true, true, false>,   update<true, true, true>};
    const Rule apply = rules[(floor != 0) * 4 + (cautious != 0) * 2 + (root != 0)];
    const int64_t *params = table, *grads = params + length, *exp_avgs = grads + length, *hessians = exp_avgs + length;
    const int64_t* counts = hessians + length;
    int64_t total = 0;
    for (int64_t k = 0; k < length; ++k) total += counts[k];
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
        const int64_t thread = 0, team = 1;
#endif
        const int64_t first = total * thread / team, last = total * (thread + 1) / team;
        int64_t start = 0;
        for (int64_t k = 0; k < length && start < last; start += counts[k++]) {
            const int64_t begin = first > start ? first - start : 0;
            const int64_t end = last - start < counts[k] ? last - start : counts[k];
            if (begin >= end) continue;
            const Piece piece = {reinterpret_cast<PARAM*>(params[k]), reinterpret_cast<const PARAM*>(grads[k]),
                                 reinterpret_cast<EXP_AVG*>(exp_avgs[k]), reinterpret_cast<const HESSIAN*>(hessians[k])};
            apply(piece, begin, end, *numbers);
        }
    }
}
