// Attention of many rows of one sequence, after flash attention (arXiv 2205.14135).
//
// K and V of a K/V head are repacked once, so that one instruction multiplies pairs of numbers (all that bfloat16 dot
// products do) for 16 keys, or for 16 channels of V:
//
//     keys    [panel of 64 keys][pair of channels][key][2]
//     values  [pair of keys][channel][2]
//
// Six rows of queries share each load of them: 24 registers hold sums, four what was loaded. Where the processor has
// tiles, they multiply, and 32 rows share each load: what is packed for dot products is what tiles take. Rows go through
// the keys block by block, with an online softmax between. Scores and sums are float32; probabilities are rounded to
// bfloat16.

#include <algorithm>
#include <cmath>

#include "crew.hpp"
#include "room.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace shoal {
namespace {

constexpr int ROWS = 6;
constexpr int PANEL = 64;
constexpr int BLOCK = 512;
constexpr int VECTORS = PANEL / 16;

struct Range {
    int64_t begin, end;
};

struct Packed {
    const bf16 *keys, *values;
};

inline __m512bh both(const bf16* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

// sums[row][0..64) += sum over pairs of left[row][pair] * right[pair][0..64): both products of attention.
template <int N>
inline void multiply(const bf16* left, int64_t left_row, const bf16* right, int64_t right_pair, int num_pairs,
                     float* sums, int64_t sums_row, bool adds) {
    __m512 acc[N][VECTORS];
    for (int row = 0; row < N; row++)
        for (int j = 0; j < VECTORS; j++)
            acc[row][j] = adds ? _mm512_load_ps(sums + row * sums_row + 16 * j) : _mm512_setzero_ps();
    for (int pair = 0; pair < num_pairs; pair++) {
        __m512bh shared[VECTORS];
        for (int j = 0; j < VECTORS; j++)
            shared[j] = (__m512bh)_mm512_load_si512(right + pair * right_pair + 32 * j);
        for (int row = 0; row < N; row++) {
            const __m512bh own = both(left + row * left_row + 2 * pair);
            for (int j = 0; j < VECTORS; j++) acc[row][j] = _mm512_dpbf16_ps(acc[row][j], shared[j], own);
        }
    }
    for (int row = 0; row < N; row++)
        for (int j = 0; j < VECTORS; j++) _mm512_store_ps(sums + row * sums_row + 16 * j, acc[row][j]);
}

// 2^x for x <= 0; what is below 2^-125 becomes that. An addition rounds x, and leaves the exponent where it can be shifted
// into place. The relative error is below 8e-5, bfloat16's is 4e-3.
inline __m512 probability(__m512 x) {
    const __m512 ones = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: the last bit of a sum with it counts ones
    x = _mm512_max_ps(_mm512_set1_ps(-125.0f), x);    // of a number and a NaN it gives the second: NaN must stay
    const __m512 whole = _mm512_add_ps(x, ones);
    const __m512 rest = _mm512_sub_ps(x, _mm512_sub_ps(whole, ones));  // in [-1/2, 1/2]
    __m512 sum = _mm512_set1_ps(5.517167e-2f);
    for (const float next : {2.4261112e-1f, 6.9326099e-1f, 9.9992807e-1f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_slli_epi32(_mm512_castps_si512(whole), 23)));
}

// What a row has seen so far: `sum` of 2^(factor * (score - top)) * V, and `total` of these powers. Scores are subtracted
// before anything is rounded: the largest one has a power of 1, however large it is.
struct Softmax {
    float top = LOWEST, total = 0;

    // Turns the scores of a block, [0, width), into probabilities; those outside `seen` count nothing.
    template <int D>
    void add(const float* scores, int width, Range seen, float factor, float* sum, bf16* probabilities) {
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
    void add(const float* scores, int width, float factor, float* sum, bf16* probabilities, const Seen& sees) {
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
            _mm512_store_si512(probabilities + j, (__m512i)_mm512_cvtne2ps_pbh(two, one));
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
    alignas(64) bf16 probabilities[N * BLOCK];
    Softmax softmax[N];
    const int64_t end = seen[N - 1].end;
    for (int64_t block = seen[0].begin / PANEL * PANEL; block < end; block += BLOCK) {
        const int width = (int)(std::min<int64_t>(BLOCK, end - block) + PANEL - 1) / PANEL * PANEL;
        for (int key = 0; key < width; key += PANEL)
            multiply<N>(queries, query_row, kv.keys + (block + key) * D, 2 * PANEL, D / 2, scores + key, BLOCK, false);
        for (int row = 0; row < N; row++)
            softmax[row].template add<D>(scores + row * BLOCK, width, {seen[row].begin - block, seen[row].end - block},
                                         factor, sums + row * D, probabilities + row * BLOCK);
        for (int channel = 0; channel < D; channel += PANEL)
            multiply<N>(probabilities, BLOCK, kv.values + block * D + 2 * channel, 2 * D, width / 2, sums + channel, D,
                        true);
    }
    for (int row = 0; row < N; row++) finish<D>(sums + row * D, softmax[row], out + row * out_row);
}

// 32 rows of one head by tiles: keys are rows of what they multiply, and queries its columns, so that a register holds a
// key's scores of sixteen queries, and each lane has its own softmax.
//
//     scores [key][query] = keys [key][channel] * queries [pair of channels][query][2]
//     sums [channel][query] += values [channel][key] * probabilities [pair of keys][query][2]
//
// While the registers make probabilities of a block's scores, the tiles have the next block's keys to multiply, and the
// values of the block before.
template <int D>
class TiledRows {
   public:
    TiledRows(const bf16* queries, int64_t query_row, int num_rows, Packed kv, const Range* seen, float factor)
        : num_rows_(num_rows), kv_(kv), first_(seen[0].begin / BLOCK * BLOCK), end_(seen[num_rows - 1].end),
          factor_(_mm512_set1_ps(factor)) {
        // Who isn't there sees nothing.
        for (int row = 0; row < SIDE; row++) {
            begins_[row] = row < num_rows ? (int32_t)(seen[row].begin - first_) : 0;
            ends_[row] = row < num_rows ? (int32_t)(seen[row].end - first_) : 0;
        }
        last_begin_ = seen[num_rows - 1].begin, first_end_ = num_rows == SIDE ? seen[0].end : 0;
        for (int half = 0; half < 2; half++) {
            tops_[half] = _mm512_set1_ps(LOWEST), totals_[half] = _mm512_setzero_ps();
            for (int step = 0; step < STEPS; step++) {
                __m512i rows[TILE];
                for (int row = 0; row < TILE; row++)
                    rows[row] = TILE * half + row < num_rows
                                    ? _mm512_loadu_si512(queries + (TILE * half + row) * query_row + step * TILE_NUMBERS)
                                    : _mm512_setzero_si512();
                transpose(rows);
                for (int pair = 0; pair < TILE; pair++)
                    _mm512_store_si512(queries_ + (step * TILE + pair) * 2 * SIDE + half * 2 * TILE, rows[pair]);
            }
        }
    }

    void attend(bf16* out, int64_t out_row) {
        const int num_blocks = (int)((end_ - first_ + BLOCK - 1) / BLOCK);
        const auto block = [&](int index) {
            const int64_t begin = first_ + (int64_t)index * BLOCK;
            return Block{begin, (int)(std::clamp<int64_t>(end_ - begin, 0, BLOCK) + SIDE - 1) / SIDE, index % 2};
        };
        for (int unit = 0; unit < units(block(0)); unit++) multiply_keys(block(0), unit);
        for (int index = 0; index < num_blocks; index++) {
            const Block now = block(index), next = block(index + 1), before = index ? block(index - 1) : Block{};
            const int num_keys = units(next), num_units = num_keys + units(before);
            const auto multiply = [&](int unit) {
                if (unit < num_keys) multiply_keys(next, unit);
                else multiply_values(before, unit - num_keys);
            };
            if (now.begin + BLOCK <= first_end_ && now.begin >= last_begin_)
                add(now, num_units, multiply, [](int, int) { return (__mmask16)0xffff; });
            else
                add(now, num_units, multiply, [&](int half, int key) { return sees(half, (int)(now.begin - first_) + key); });
        }
        const Block last = block(num_blocks - 1);
        for (int unit = 0; unit < units(last); unit++) multiply_values(last, unit);
        finish(out, out_row);
    }

   private:
    static constexpr int SIDE = 2 * TILE, BLOCK = 64, STEPS = D / TILE_NUMBERS;
    // A top stays until scores are so far above it: powers may be as large as 2^8, which takes nothing from their digits.
    static constexpr float ENOUGH = 8;

    struct Block {
        int64_t begin;
        int num_squares;  // of 32 keys
        int side;         // of what there are two of
    };
    // What is multiplied at once, with keys or with values.
    static int units(const Block& of) { return of.num_squares * STEPS; }

    void multiply_keys(const Block& of, int unit) {
        const int key = unit / STEPS * SIDE, step = unit % STEPS;
        if (step == 0) Square::zero();
        Square::add(kv_.keys + (of.begin + key) * D + step * TILE_NUMBERS, D, queries_ + step * TILE_NUMBERS * SIDE, 2 * SIDE);
        if (step == STEPS - 1) Square::store(scores_[of.side] + key * SIDE, SIDE);
    }
    void multiply_values(const Block& of, int unit) {
        const int channel = unit / of.num_squares * SIDE, square = unit % of.num_squares;
        if (square == 0) Square::load(sums_ + channel * SIDE, SIDE);
        Square::add(kv_.values + (of.begin + square * SIDE) * D + channel * TILE_NUMBERS, TILE_NUMBERS,
                    probabilities_[of.side] + square * TILE_NUMBERS * SIDE, 2 * SIDE);
        if (square == of.num_squares - 1) Square::store(sums_ + channel * SIDE, SIDE);
    }

    // Of sixteen queries those that see a key.
    __mmask16 sees(int half, int key) const {
        const __m512i at = _mm512_set1_epi32(key);
        return _mm512_cmple_epi32_mask(_mm512_load_si512(begins_ + half * TILE), at) &
               _mm512_cmpgt_epi32_mask(_mm512_load_si512(ends_ + half * TILE), at);
    }

    // Makes probabilities of a block's scores, those that `sees(half, key)` allows, and calls `multiply` for each unit
    // meanwhile.
    template <class Multiply, class Sees>
    void add(const Block& of, int num_units, const Multiply& multiply, const Sees& sees) {
        const float* const scores = scores_[of.side];
        const int num_keys = of.num_squares * SIDE;
        __m512 shrinks[2];
        bool has_risen[2];
        for (int half = 0; half < 2; half++) {
            __m512 most = _mm512_set1_ps(LOWEST), most2 = most;  // neither waits for the other
            const auto score = [&](int key) { return _mm512_load_ps(scores + key * SIDE + half * TILE); };
            for (int key = 0; key < num_keys; key += 2) {
                most = _mm512_mask_max_ps(most, sees(half, key), most, score(key));
                most2 = _mm512_mask_max_ps(most2, sees(half, key + 1), most2, score(key + 1));
            }
            const __m512 top = _mm512_max_ps(most, most2), above = _mm512_mul_ps(_mm512_sub_ps(top, tops_[half]), factor_);
            has_risen[half] = _mm512_cmp_ps_mask(above, _mm512_set1_ps(ENOUGH), _CMP_GT_OQ);
            if (!has_risen[half]) continue;
            const __m512 risen = _mm512_max_ps(tops_[half], top);
            shrinks[half] = exp2(_mm512_mul_ps(_mm512_sub_ps(tops_[half], risen), factor_));
            totals_[half] = _mm512_mul_ps(totals_[half], shrinks[half]);
            tops_[half] = risen;
        }
        // Words of the one and of the other, in turns.
        alignas(64) static constexpr uint16_t IN_TURNS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i in_turns = _mm512_load_si512(IN_TURNS);
        const __m512 factor = factor_, top = tops_[0], top2 = tops_[1];
        __m512 total = totals_[0], total2 = totals_[1];
        const auto make = [&](int half, int pair, __m512 own_top) __attribute__((always_inline)) {
            const auto at = [&](int key) __attribute__((always_inline)) {
                const __m512 score = _mm512_load_ps(scores + key * SIDE + half * TILE);
                const __m512 below = _mm512_mul_ps(_mm512_sub_ps(score, own_top), factor);
                return _mm512_maskz_mov_ps(sees(half, key), probability(below));
            };
            const __m512 one = at(2 * pair), two = at(2 * pair + 1);
            const __m512i both = _mm512_permutexvar_epi16(in_turns, (__m512i)_mm512_cvtne2ps_pbh(two, one));
            _mm512_store_si512(probabilities_[of.side] + (2 * pair * SIDE + 2 * half * TILE), both);
            return _mm512_add_ps(one, two);
        };
        for (int pair = 0, unit = 0; pair < num_keys / 2; pair++) {
            total = _mm512_add_ps(total, make(0, pair, top));
            total2 = _mm512_add_ps(total2, make(1, pair, top2));
            for (; unit < num_units * (pair + 1) / (num_keys / 2); unit++) multiply(unit);
        }
        totals_[0] = total, totals_[1] = total2;
        // Not before all of what came before them is in the sums.
        for (int half = 0; half < 2; half++)
            for (int channel = 0; has_risen[half] && channel < D; channel++) {
                float* const sum = sums_ + channel * SIDE + half * TILE;
                _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), shrinks[half]));
            }
    }

    void finish(bf16* out, int64_t out_row) const {
        for (int half = 0; half < 2; half++) {
            const __m512 by = _mm512_div_ps(_mm512_set1_ps(1), totals_[half]);
            for (int channel = 0; channel < D; channel += TILE) {
                __m512i columns[TILE];
                for (int n = 0; n < TILE; n++) {
                    const __m512 sum = _mm512_load_ps(sums_ + (channel + n) * SIDE + half * TILE);
                    columns[n] = _mm512_castps_si512(_mm512_mul_ps(sum, by));
                }
                transpose(columns);
                for (int n = 0, row = half * TILE; n < TILE && row < num_rows_; n++, row++)
                    store(out + row * out_row + channel, _mm512_castsi512_ps(columns[n]));
            }
        }
    }

    const int num_rows_;
    const Packed kv_;
    const int64_t first_, end_;
    const __m512 factor_;
    int64_t last_begin_, first_end_;  // all rows see what is between
    __m512 tops_[2], totals_[2];
    alignas(64) int32_t begins_[SIDE], ends_[SIDE];
    alignas(64) bf16 queries_[SIDE * D];
    alignas(64) bf16 probabilities_[2][SIDE * BLOCK];
    alignas(64) float scores_[2][SIDE * BLOCK];
    alignas(64) float sums_[SIDE * D] = {};
};

// For tiles: keys [key][channel], and values [square of 32 keys][channel][key].
template <int D>
void pack_for_tiles(const Context& context, int kv_heads, int head, Range range, bf16* keys, bf16* values) {
    constexpr int KEYS = TILE_NUMBERS;
    static const bf16 nothing[D] = {};
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t at = range.begin; at < (range.end + PANEL - 1) / PANEL * PANEL; at += KEYS) {
        const bf16* from[KEYS];
        for (int key = 0; key < KEYS; key++) {
            const bf16* const token = at + key < range.end ? context[at + key] : nullptr;
            std::memcpy(keys + (at + key) * D, token ? token + head * D : nothing, D * sizeof(bf16));
            from[key] = token ? token + (kv_heads + head) * D : nothing;
        }
        for (int channel = 0; channel < D; channel += TILE_NUMBERS) {
            // Pairs of keys, of the even channels and of the odd ones.
            __m512i even[TILE], odd[TILE];
            for (int pair = 0; pair < TILE; pair++) {
                const __m512i first = _mm512_loadu_si512(from[2 * pair] + channel);
                const __m512i second = _mm512_loadu_si512(from[2 * pair + 1] + channel);
                even[pair] = _mm512_or_si512(_mm512_and_si512(first, low), _mm512_slli_epi32(second, 16));
                odd[pair] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_andnot_si512(low, second));
            }
            transpose(even);
            transpose(odd);
            for (int n = 0; n < TILE; n++) {
                _mm512_store_si512(values + at * D + (channel + 2 * n) * KEYS, even[n]);
                _mm512_store_si512(values + at * D + (channel + 2 * n + 1) * KEYS, odd[n]);
            }
        }
    }
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
    switch (head_dim) {
        case 64: return attend_prompt<64>(rows, context), 0;
        case 128: return attend_prompt<128>(rows, context), 0;
        case 256: return attend_prompt<256>(rows, context), 0;
        default: return 1;
    }
}
