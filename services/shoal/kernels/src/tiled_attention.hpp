// Attention of a prompt's rows by the matrix unit (tiles.hpp), 32 at a time.
//
// Keys are rows of what is multiplied, and queries its columns, so that a register holds a key's scores of sixteen
// queries, and each lane has its own softmax:
//
//     scores [key][query]     =  keys [key][channel]    *  queries [pair of channels][query][2]
//     sums [channel][query]  +=  values [channel][key]  *  probabilities [pair of keys][query][2]
//
// While the registers make probabilities of a block's scores, the tiles have the next block's keys to multiply, and the
// values of the block before. K and V are packed as they are asked for:
//
//     keys    [key][channel]
//     values  [square of 32 keys][channel][key]
#pragma once
#include <algorithm>

#include "prompt_attention.hpp"
#include "tiles.hpp"

namespace shoal {

// The rows of one head, of which row i sees the keys of seen[i]; both ends only grow from row to row.
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
    static constexpr int SIDE = 2 * TILE, BLOCK = KEYS, STEPS = D / TILE_NUMBERS;
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
            // Each by itself: a row's numbers must not depend on which others are beside it.
            const __mmask16 rises = _mm512_cmp_ps_mask(above, _mm512_set1_ps(ENOUGH), _CMP_GT_OQ);
            has_risen[half] = rises;
            if (!rises) continue;
            const __m512 risen = _mm512_mask_mov_ps(tops_[half], rises, top);
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

template <int D>
void pack_for_tiles(const Context& context, int kv_heads, int head, Range range, bf16* keys, bf16* values) {
    constexpr int SIDE = TILE_NUMBERS;
    static const bf16 nothing[D] = {};
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t at = range.begin; at < (range.end + KEYS - 1) / KEYS * KEYS; at += SIDE) {
        const bf16* from[SIDE];
        for (int key = 0; key < SIDE; key++) {
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
                _mm512_store_si512(values + at * D + (channel + 2 * n) * SIDE, even[n]);
                _mm512_store_si512(values + at * D + (channel + 2 * n + 1) * SIDE, odd[n]);
            }
        }
    }
}

}  // namespace shoal
