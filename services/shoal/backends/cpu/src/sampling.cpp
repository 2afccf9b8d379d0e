// The next token of each row of logits, as engine/sampler.py describes it. A logit has 16 bits, so that few of them are
// different: equals are counted, and what a probability needs is computed once for all of them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "crew.hpp"
#include "simd.hpp"

namespace shoal {
namespace {

constexpr bf16 SIGN = 0x8000, INFINITE = 0x7f80, LOWEST_BITS = SIGN | INFINITE;
constexpr int64_t WIDTH = 32;
constexpr int NUM_RANKS = 1 << 16;
constexpr double SCALE = 0x1p52;  // as sampler.py has it

// Of WIDTH numbers from `from` on those that there are; behind the last one, minus infinity.
inline __m512i numbers(const bf16* row, int64_t from, int64_t size) {
    const int64_t left = size - from;
    if (left >= WIDTH) return _mm512_loadu_si512(row + from);
    return _mm512_mask_loadu_epi16(_mm512_set1_epi16((short)LOWEST_BITS), (__mmask32)((1ull << left) - 1), row + from);
}

template <class Is>
int64_t first_that(const bf16* row, int64_t size, const Is& is) {
    for (int64_t from = 0; from < size; from += WIDTH)
        if (const __mmask32 found = is(numbers(row, from, size))) return from + __builtin_ctz(found);
    return 0;
}

// Of the largest numbers the first; of NaNs, if there's one.
int64_t argmax(const bf16* row, int64_t size) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_set1_epi16(-0x8000), farthest = _mm512_setzero_si512();
    for (int64_t from = 0; from < size; from += WIDTH) {
        const __m512i own = numbers(row, from, size);
        // As whole numbers, those below zero are in the wrong order.
        const __m512i turned = _mm512_and_si512(_mm512_srai_epi16(own, 15), magnitude);
        most = _mm512_max_epi16(most, _mm512_xor_si512(own, turned));
        farthest = _mm512_max_epu16(farthest, _mm512_and_si512(own, magnitude));
    }
    alignas(64) int16_t ordered[WIDTH];
    alignas(64) uint16_t magnitudes[WIDTH];
    _mm512_store_si512(ordered, most);
    _mm512_store_si512(magnitudes, farthest);
    if (*std::max_element(magnitudes, magnitudes + WIDTH) > INFINITE)
        return first_that(row, size, [&](__m512i own) {
            return _mm512_cmpgt_epu16_mask(_mm512_and_si512(own, magnitude), _mm512_set1_epi16(INFINITE));
        });
    const int16_t top = *std::max_element(ordered, ordered + WIDTH);
    if (top == 0 || top == -1)  // both zeros are equals
        return first_that(row, size, [&](__m512i own) { return _mm512_testn_epi16_mask(own, magnitude); });
    const __m512i bits = _mm512_set1_epi16(top < 0 ? (short)(top ^ 0x7fff) : top);
    return first_that(row, size, [&](__m512i own) { return _mm512_cmpeq_epi16_mask(own, bits); });
}

// In the order of the numbers; both zeros have one. No branches: signs come as they like.
inline uint16_t rank_of(bf16 number) {
    const uint16_t turned = (uint16_t)((int16_t)number >> 15) | SIGN;
    const uint16_t rank = number ^ turned;
    return rank + (rank == SIGN - 1);
}

inline double number_of(int rank) {
    const uint32_t bits = (uint32_t)(rank & SIGN ? rank ^ SIGN : (bf16)~rank) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

struct Options {
    double temperature, top_p, uniform;
    int64_t top_k;
};

// Of each token its rank; of each rank, how many tokens have it, and what each of them weighs.
struct Ranks {
    std::vector<uint16_t> tokens;
    std::vector<uint32_t> counts = std::vector<uint32_t>(NUM_RANKS);
    std::vector<double> weights = std::vector<double>(NUM_RANKS);
    std::vector<int64_t> shares = std::vector<int64_t>(NUM_RANKS);
};

// Ranks of a row from `most` down to `least`, of which only the first `num_least` tokens, are what may be drawn.
struct Kept {
    int most, least;
    int64_t num_least;
    double total;  // of their weights
};

// Weights of all that temperature and top k leave; equals of the k-th stay.
Kept weigh(const Options& options, int64_t size, int most, Ranks& ranks) {
    const int64_t limit = options.top_k > 0 ? std::min(options.top_k, size) : size;
    const double top = number_of(most);
    Kept kept = {most, most, ranks.counts[most], 0};
    int64_t num_seen = 0;
    for (int rank = most; rank >= 0 && num_seen < limit; rank--) {
        const int64_t count = ranks.counts[rank];
        if (!count) continue;
        const double weight = std::exp((number_of(rank) - top) / options.temperature);
        if (weight == 0) break;
        ranks.weights[rank] = weight;
        kept.least = rank, kept.num_least = count, kept.total += (double)count * weight;
        num_seen += count;
    }
    return kept;
}

// Of these, those whose likelier ones have less than p; of equals, lower ids are likelier. The first always stays.
Kept narrow(const Options& options, const Kept& of, const Ranks& ranks) {
    if (options.top_p >= 1) return of;
    Kept kept = {of.most, of.most, 0, 0};
    double before = 0;
    for (int rank = of.most; rank >= of.least; rank--) {
        const int64_t count = ranks.counts[rank];
        const double share = ranks.weights[rank] / of.total;
        for (int64_t i = 0; i < count; i++, before += share) {
            if (kept.total > 0 && before >= options.top_p) return kept;
            if (rank != kept.least) kept.least = rank, kept.num_least = 0;
            kept.num_least++, kept.total += ranks.weights[rank];
        }
    }
    return kept;
}

// The token at `uniform` of the cumulative distribution, tokens in the order of their ids.
int64_t draw(const bf16* row, int64_t size, const Options& options, Ranks& ranks) {
    ranks.tokens.resize(size);
    std::transform(row, row + size, ranks.tokens.begin(), rank_of);
    std::fill(ranks.counts.begin(), ranks.counts.end(), 0);
    for (const uint16_t rank : ranks.tokens) ranks.counts[rank]++;
    const int most = rank_of(row[argmax(row, size)]);
    const Kept kept = narrow(options, weigh(options, size, most, ranks), ranks);
    int64_t total = 0;
    for (int rank = most; rank >= kept.least; rank--)
        if (const int64_t count = rank > kept.least ? ranks.counts[rank] : kept.num_least) {
            ranks.shares[rank] = std::llrint(ranks.weights[rank] / kept.total * SCALE);
            total += count * ranks.shares[rank];
        }
    const int64_t target = (int64_t)(options.uniform * (double)total);
    int64_t sum = 0, num_least = 0, last = 0;
    for (int64_t i = 0; i < size; i++) {
        const int rank = ranks.tokens[i];
        if (rank < kept.least || (rank == kept.least && num_least++ >= kept.num_least)) continue;
        sum += ranks.shares[rank], last = i;
        if (sum > target) break;
    }
    return last;
}

}  // namespace
}  // namespace shoal

// out [num_rows]: of each row of logits [num_rows, size] the first of the largest, or of the NaNs; num_finite is how many
// of these numbers are finite. Returns 0.
extern "C" int shoal_argmax(const void* logits, int64_t num_rows, int64_t size, int64_t* out, int64_t* num_finite,
                            int num_threads) {
    using namespace shoal;
    const bf16* const numbers = static_cast<const bf16*>(logits);
    share(num_rows, num_threads, [&](int64_t row) { out[row] = argmax(numbers + row * size, size); });
    *num_finite = 0;
    for (int64_t row = 0; row < num_rows; row++)
        *num_finite += (numbers[row * size + out[row]] & INFINITE) != INFINITE;
    return 0;
}

// out [num_rows]: a token drawn from each row of logits [num_rows, size], none of them NaN, by its temperature, top k (0:
// none), top p and uniform number. Returns 0.
extern "C" int shoal_draw(const void* logits, int64_t num_rows, int64_t size, const double* temperatures,
                          const int64_t* top_k, const double* top_p, const double* uniforms, int64_t* out,
                          int num_threads) {
    using namespace shoal;
    share(num_rows, num_threads, [&](int64_t row) {
        thread_local Ranks ranks;
        const Options options = {temperatures[row], top_p[row], uniforms[row], top_k[row]};
        out[row] = draw(static_cast<const bf16*>(logits) + row * size, size, options, ranks);
    });
    return 0;
}
