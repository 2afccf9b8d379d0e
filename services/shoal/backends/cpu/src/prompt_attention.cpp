// Attention of many rows of one sequence, after flash attention (arXiv 2205.14135).
//
// K and V of a K/V head are repacked once, so that one instruction multiplies pairs of numbers (all that bfloat16 dot
// products do) for 16 keys, or for 16 channels of V:
//
//     keys    [panel of 64 keys][pair of channels][key][2]
//     values  [pair of keys][channel][2]
//
// Six rows of queries share each load of them: 24 registers hold sums, four what was loaded. Rows go through the keys block
// by block, with an online softmax between. Scores and sums are float32; probabilities are rounded to bfloat16, where pairs
// of it are multiplied (pairs.hpp). Where the processor has tiles, they do all this in their own way (tiled_attention.hpp).

#include <algorithm>
#include <cmath>

#include "crew.hpp"
#include "pairs.hpp"
#include "prompt_attention.hpp"
#include "room.hpp"
#include "tiled_attention.hpp"

namespace shoal {
namespace {

constexpr int ROWS = 6;
constexpr int PANEL = KEYS;
constexpr int BLOCK = 512;
constexpr int VECTORS = PANEL / 16;

// sums[row][0..64) += sum over pairs of left[row][pair] * right[pair][0..64): both products of attention.
template <int N>
inline void multiply(Numbers left, const bf16* right, int64_t right_pair, int num_pairs, float* sums, int64_t sums_row,
                     bool adds) {
    __m512 acc[N][VECTORS];
    for (int row = 0; row < N; row++)
        for (int j = 0; j < VECTORS; j++)
            acc[row][j] = adds ? _mm512_load_ps(sums + row * sums_row + 16 * j) : _mm512_setzero_ps();
    for (int pair = 0; pair < num_pairs; pair++)
        each_half([&]<int HALF>() __attribute__((always_inline)) {
            Factor shared[VECTORS];
            for (int j = 0; j < VECTORS; j++)
                shared[j] = factor_of<HALF>(_mm512_load_si512(right + pair * right_pair + 32 * j));
            for (int row = 0; row < N; row++) {
                const Factor own = spread_pair<HALF>(left[row] + 2 * pair);
                for (int j = 0; j < VECTORS; j++) acc[row][j] = add_products(acc[row][j], shared[j], own);
            }
        });
    for (int row = 0; row < N; row++)
        for (int j = 0; j < VECTORS; j++) _mm512_store_ps(sums + row * sums_row + 16 * j, acc[row][j]);
}

// What a row has seen so far: `sum` of 2^(factor * (score - top)) * V, and `total` of these powers. Scores are subtracted
// before anything is rounded: the largest one has a power of 1, however large it is.
struct Softmax {
    float top = LOWEST, total = 0;

    // Turns the scores of a block, [0, width), into probabilities; those outside `seen` count nothing.
    template <int D>
    void add(const float* scores, int width, Range seen, float factor, float* sum, Number* probabilities) {
        if (seen.begin <= 0 && seen.end >= width)
            add<D>(scores, width, factor, sum, probabilities, [](int) { return (__mmask16)0xffff; });
        else
            add<D>(scores, width, factor, sum, probabilities, [seen](int j) { return mask(seen, j); });
    }

    template <int D>
    void shrink(float now, float factor, float* sum) {
        const __m512 by = exp2(_mm512_set1_ps(factor * (top - now)));
        for (int j = 0; j < D; j += 16) _mm512_store_ps(sum + j, _mm512_mul_ps(_mm512_load_ps(sum + j), by));
        total *= _mm512_cvtss_f32(by);
        top = now;
    }

    static __mmask16 mask(Range seen, int j) {
        const uint32_t low = (uint32_t)std::clamp<int64_t>(seen.begin - j, 0, 16);
        const uint32_t high = (uint32_t)std::clamp<int64_t>(seen.end - j, 0, 16);
        return (__mmask16)(((1u << high) - 1) & ~((1u << low) - 1));
    }

   private:
    // Two registers at a time: neither waits for the other.
    template <int D, class Seen>
    void add(const float* scores, int width, float factor, float* sum, Number* probabilities, const Seen& sees) {
        const auto score = [&](int j) {
            return _mm512_mask_mov_ps(_mm512_set1_ps(LOWEST), sees(j), _mm512_load_ps(scores + j));
        };
        __m512 most = _mm512_set1_ps(LOWEST), most2 = most;
        for (int j = 0; j < width; j += 32) {
            most = _mm512_max_ps(most, score(j));
            most2 = _mm512_max_ps(most2, score(j + 16));
        }
        const float now = _mm512_reduce_max_ps(_mm512_max_ps(most, most2));
        if (now > top) shrink<D>(now, factor, sum);
        const auto at = [&](int j) {
            const __m512 below = _mm512_sub_ps(_mm512_load_ps(scores + j), _mm512_set1_ps(top));
            return probability(_mm512_mul_ps(below, _mm512_set1_ps(factor)));
        };
        __m512 added = _mm512_setzero_ps(), added2 = added;
        for (int j = 0; j < width; j += 32) {
            const __m512 one = _mm512_maskz_mov_ps(sees(j), at(j));
            const __m512 two = _mm512_maskz_mov_ps(sees(j + 16), at(j + 16));
            added = _mm512_add_ps(added, one);
            added2 = _mm512_add_ps(added2, two);
            store(probabilities + j, one, two);
        }
        total += _mm512_reduce_add_ps(_mm512_add_ps(added, added2));
    }
};

template <int D>
void finish(const float* sum, const Softmax& softmax, bf16* out) {
    for (int j = 0; j < D; j += 16)
        store(out + j, _mm512_mul_ps(_mm512_load_ps(sum + j), _mm512_set1_ps(1 / softmax.total)));
}

// N rows of one head, of which row i sees the keys of seen[i]; both ends only grow from row to row.
template <int D, int N>
void attend(const bf16* queries, int64_t query_row, Packed kv, const Range* seen, float factor, bf16* out,
            int64_t out_row) {
    alignas(64) float scores[N * BLOCK], sums[N * D] = {};
    alignas(64) Number probabilities[N * BLOCK], widened[N * D * ROOM_OF_A_NUMBER + 1];
    const Numbers asked = spreadable(queries, query_row, N, D, widened);
    Softmax softmax[N];
    const int64_t end = seen[N - 1].end;
    for (int64_t block = seen[0].begin / PANEL * PANEL; block < end; block += BLOCK) {
        const int width = (int)(std::min<int64_t>(BLOCK, end - block) + PANEL - 1) / PANEL * PANEL;
        for (int key = 0; key < width; key += PANEL)
            multiply<N>(asked, kv.keys + (block + key) * D, 2 * PANEL, D / 2, scores + key, BLOCK, false);
        for (int row = 0; row < N; row++)
            softmax[row].template add<D>(scores + row * BLOCK, width, {seen[row].begin - block, seen[row].end - block},
                                         factor, sums + row * D, probabilities + row * BLOCK);
        for (int channel = 0; channel < D; channel += PANEL)
            multiply<N>({probabilities, BLOCK}, kv.values + block * D + 2 * channel, 2 * D, width / 2, sums + channel, D,
                        true);
    }
    for (int row = 0; row < N; row++) finish<D>(sums + row * D, softmax[row], out + row * out_row);
}

template <int D>
void pack(const Context& context, int kv_heads, int head, Range range, bf16* keys, bf16* values) {
    const int64_t end = (range.end + PANEL - 1) / PANEL * PANEL;
    static const bf16 nothing[D] = {};
    const auto key = [&](int64_t at) { return at < range.end ? context[at] + head * D : nothing; };
    const auto value = [&](int64_t at) { return at < range.end ? context[at] + (kv_heads + head) * D : nothing; };
    for (int64_t at = range.begin; at < end; at++) {
        bf16* const to = keys + at / PANEL * PANEL * D + 2 * (at % PANEL);
        const bf16* const from = key(at);
        for (int pair = 0; pair < D / 2; pair++) std::memcpy(to + pair * 2 * PANEL, from + 2 * pair, 2 * sizeof(bf16));
    }
    for (int64_t at = range.begin; at < end; at += 2) {
        const bf16 *first = value(at), *second = value(at + 1);
        bf16* const to = values + at * D;
        for (int channel = 0; channel < D; channel++) {
            to[2 * channel] = first[channel];
            to[2 * channel + 1] = second[channel];
        }
    }
}

struct Rows {
    const bf16* queries;
    int64_t query_row, num_rows, num_context, window;
    int num_heads, kv_heads;
    float factor;
    bf16* out;
    int num_threads;
};

// Rows [first, first + num_rows) of the heads that share a K/V head: N at most, by tiles or without.
template <int D, int N, bool BY_TILES>
void attend_heads(const Rows& rows, int kv_head, int64_t first, int num_rows, Packed kv) {
    Range seen[N];
    for (int row = 0; row < num_rows; row++) {
        const int64_t end = rows.num_context - rows.num_rows + first + row + 1;
        seen[row] = {rows.window ? std::max<int64_t>(0, end - rows.window) : 0, end};
    }
    const int shared = rows.num_heads / rows.kv_heads;
    const int64_t out_row = (int64_t)rows.num_heads * D;
    for (int head = kv_head * shared; head < (kv_head + 1) * shared; head++) {
        const bf16* const queries = rows.queries + first * rows.query_row + head * D;
        bf16* const out = rows.out + first * out_row + head * D;
        if constexpr (BY_TILES)
            TiledRows<D>(queries, rows.query_row, num_rows, kv, seen, rows.factor).attend(out, out_row);
        else
            attend<D, N>(queries, rows.query_row, kv, seen, rows.factor, out, out_row);
    }
}

template <int D>
void attend_prompt(const Rows& rows, const Context& context) {
    constexpr int64_t PIECE = 4 * PANEL, TILED_RUN = 2 * TILE;
    const bool by_tiles = have_tiles();
    const int64_t run = by_tiles ? TILED_RUN : 8 * ROWS;
    const int64_t padded = (rows.num_context + PANEL - 1) / PANEL * PANEL;
    const int64_t num_pieces = (rows.num_context + PIECE - 1) / PIECE, num_runs = (rows.num_rows + run - 1) / run;
    constexpr int64_t KEPT = 64 << 20;  // bytes: a longer context's are seldom wanted again
    static thread_local Room<bf16> packed;
    bf16* const memory = packed.of(2 * rows.kv_heads * padded * D);
    const auto keys = [&](int head) { return memory + 2 * head * padded * D; };
    const auto values = [&](int head) { return memory + (2 * head + 1) * padded * D; };
    share(rows.kv_heads * num_pieces, rows.num_threads, [&](int64_t item) {
        const int head = (int)(item / num_pieces);
        const int64_t begin = item % num_pieces * PIECE;
        const Range range = {begin, std::min(rows.num_context, begin + PIECE)};
        (by_tiles ? pack_for_tiles<D> : pack<D>)(context, rows.kv_heads, head, range, keys(head), values(head));
    });
    // The last rows see most: first, so that no thread is left with them at the end.
    share(rows.kv_heads * num_runs, rows.num_threads, [&](int64_t item) {
        const int head = (int)(item / num_runs);
        const int64_t begin = (num_runs - 1 - item % num_runs) * run;
        const int64_t end = std::min(rows.num_rows, begin + run);
        const Packed kv = {keys(head), values(head)};
        if (by_tiles) {
            const Tiles held;
            return attend_heads<D, TILED_RUN, true>(rows, head, begin, (int)(end - begin), kv);
        }
        int64_t row = begin;
        for (; row + ROWS <= end; row += ROWS) attend_heads<D, ROWS, false>(rows, head, row, ROWS, kv);
        for (; row < end; row++) attend_heads<D, 1, false>(rows, head, row, 1, kv);
    });
    packed.keep(KEPT);
}

}  // namespace
}  // namespace shoal

// queries [num_rows, num_heads, D] with query_row numbers between rows; out the same, contiguous. The rows are the last
// ones of the context; each sees the `window` (0: all) keys up to its own. Returns 0, or 1 if it can't.
extern "C" int shoal_attend_prompt(const void* queries, int64_t query_row, const void* pool, const int64_t* slots,
                                   int64_t first_slot, int64_t num_context, int64_t num_rows, int num_heads,
                                   int kv_heads, int head_dim, int64_t window, float scale, void* out,
                                   int num_threads) {
    using namespace shoal;
    const Context context = {static_cast<const bf16*>(pool), slots, first_slot, 2 * (int64_t)kv_heads * head_dim};
    const Rows rows = {static_cast<const bf16*>(queries), query_row, num_rows, num_context, window,
                       num_heads, kv_heads, scale * LOG2_E, static_cast<bf16*>(out), num_threads};
    try {
        switch (head_dim) {
            case 64: return attend_prompt<64>(rows, context), 0;
            case 128: return attend_prompt<128>(rows, context), 0;
            case 256: return attend_prompt<256>(rows, context), 0;
        }
    } catch (const std::bad_alloc&) {  // of a long context, this may be gigabytes
    }
    return 1;
}
