// Attention of a prompt's rows by the matrix unit (tiles.hpp), 32 at a time.
//
// Keys are rows of what is multiplied, and queries its columns, so that a register holds a key's scores of sixteen
// queries, and each lane has its own softmax:
//
//     scores [key][query]     =  keys [key][channel]    *  queries [pair of channels][query][2]
//     sums [channel][query]  +=  values [channel][key]  *  probabilities [pair of keys][query][2]
//
// While the registers make probabilities of a block's scores, the tiles have the values of the block before to multiply,
// then the next block's keys: a tile or more with each pair of keys, and what is multiplied is stored no sooner than four
// tiles later, since who waits for a tile keeps others from going on. While tiles are multiplied a core's registers are
// multiplied, and compared, by one unit of two, but added up by both: a probability takes as few of the former as may be.
// K and V are packed as they are asked for:
//
//     keys    [key][channel]
//     values  [square of 32 keys][channel][key]
#pragma once
#include <algorithm>
#include <utility>

#include "prompt_attention.hpp"
#include "tiles.hpp"

namespace shoal {

// While it lives, what comes out too small for a normal number is zero. To make such numbers takes fifty times as long.
class NoDenormals {
   public:
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_TO_ZERO); }
    ~NoDenormals() { _mm_setcsr(before_); }
    NoDenormals(const NoDenormals&) = delete;

   private:
    static constexpr unsigned FLUSH_TO_ZERO = 0x8000;
    const unsigned before_;
};

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
            tops_[half] = totals_[half] = _mm512_setzero_ps();
            are_new_[half] = (__mmask16)((1u << std::clamp(num_rows - half * TILE, 0, TILE)) - 1);
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
        const NoDenormals flushing;
        const int num_blocks = (int)((end_ - first_ + BLOCK - 1) / BLOCK);
        for (int run = 0; run < NUM_RUNS / 2; run++) multiply(keys(0, run));
        for (int block = 0; block < num_blocks; block++) {
            const auto around = [&](int run) {
                if (run < NUM_RUNS / 2) return block > 0 ? values(block - 1, run) : Run{};
                return block + 1 < num_blocks ? keys(block + 1, run - NUM_RUNS / 2) : Run{};
            };
            const int64_t begin = first_ + (int64_t)block * BLOCK;
            if (begin + BLOCK <= first_end_ && begin >= last_begin_)
                add(block, around, [](int, int) { return (__mmask16)0xffff; });
            else
                add(block, around, [&](int half, int key) { return sees(half, block * BLOCK + key); });
        }
        for (int run = 0; run < NUM_RUNS / 2; run++) multiply(values(num_blocks - 1, run));
        store_last();
        finish(out, out_row);
    }

   private:
    static constexpr int SIDE = 2 * TILE, SQUARE = SIDE * SIDE, BLOCK = KEYS, STEPS = D / TILE_NUMBERS;
    // What is multiplied around a block, runs of values and then of keys, and what comes with each.
    static constexpr int RUN_STEPS = 2, RUN_TILES = 4 * RUN_STEPS, NUM_RUNS = D / 16;
    static constexpr int NUM_PAIRS = BLOCK / 2, RUN_PAIRS = NUM_PAIRS / NUM_RUNS;
    static_assert(D % (RUN_STEPS * TILE_NUMBERS) == 0 && BLOCK == RUN_STEPS * TILE_NUMBERS && NUM_PAIRS % NUM_RUNS == 0);
    // A top stays until a block's probabilities together are so large. That takes nothing from their digits, and sums have
    // room for so many times what V are, which isn't 2^60.
    static constexpr float MOST_OF_BLOCK = 18446744073709551616.0f;  // 2^64

    // Two steps, one after the other, of 32 rows of 32 numbers by 32 columns. What they are added to is `sums` that are
    // there, or zeros that become them, or, without any, those of the run before.
    struct Run {
        const bf16 *left, *right;  // none: nothing to do
        int64_t left_row, left_step;
        float* sums;
        bool are_there;
    };
    Run keys(int block, int run) {
        constexpr int RUNS = STEPS / RUN_STEPS;  // of a square
        const int square = run / RUNS, step = run % RUNS * RUN_STEPS;
        return {kv_.keys + (first_ + block * BLOCK + square * SIDE) * D + step * TILE_NUMBERS,
                queries_ + step * TILE_NUMBERS * SIDE, D, TILE_NUMBERS,
                step ? nullptr : scores(block) + square * SQUARE, false};
    }
    Run values(int block, int run) {
        return {kv_.values + (first_ + block * BLOCK) * D + run * SIDE * TILE_NUMBERS, probabilities(block),
                TILE_NUMBERS, SIDE * D, sums_ + run * SQUARE, true};
    }
    // Probabilities come where scores were: of a pair of keys in half the memory, which is that of earlier pairs, or of this
    // one's scores that have been read. Of two blocks at a time: the next one's scores come when the values of the one
    // before are multiplied.
    float* scores(int block) { return scores_[block % 2]; }
    bf16* probabilities(int block) { return reinterpret_cast<bf16*>(scores(block)); }

    template <int QUARTER>
    static constexpr int64_t PLACE = QUARTER / 2 * TILE * SIDE + QUARTER % 2 * TILE;

    // One of a run's eight tiles: of its first step and then of its second one, each quarter of the square.
    template <int NUMBER>
    __attribute__((always_inline)) void multiply_tile(const Run& run) {
        constexpr int QUARTER = NUMBER % 4, STEP = NUMBER / 4;
        if constexpr (STEP == 0)
            if (run.sums) {
                if (unstored_) Tiles::store<QUARTER>(unstored_ + PLACE<QUARTER>, 4 * SIDE);
                if (run.are_there) Tiles::load<QUARTER>(run.sums + PLACE<QUARTER>, 4 * SIDE);
                else Tiles::zero<QUARTER>();
                if constexpr (QUARTER == 3) unstored_ = run.sums;
            }
        const bf16* const left = run.left + STEP * run.left_step;
        const bf16* const right = run.right + STEP * TILE_NUMBERS * SIDE;
        if constexpr (QUARTER == 0) Tiles::load<4>(left, 2 * run.left_row);
        if constexpr (QUARTER == 2) Tiles::load<5>(left + TILE * run.left_row, 2 * run.left_row);
        if constexpr (QUARTER == 0) Tiles::load<6>(right, 4 * SIDE);
        if constexpr (QUARTER == 1) Tiles::load<7>(right + 2 * TILE, 4 * SIDE);
        Tiles::multiply<QUARTER, 4 + QUARTER / 2, 6 + QUARTER % 2>();
    }
    template <int FIRST, int... NUMBERS>
    __attribute__((always_inline)) void multiply_tiles(const Run& run, std::integer_sequence<int, NUMBERS...>) {
        (multiply_tile<FIRST + NUMBERS>(run), ...);
    }
    void multiply(const Run& run) { multiply_tiles<0>(run, std::make_integer_sequence<int, RUN_TILES>{}); }
    void store_last() {
        if (unstored_) Square::store(unstored_, SIDE);
        unstored_ = nullptr;
    }

    // Of sixteen queries those that see a key.
    __mmask16 sees(int half, int key) const {
        const __m512i at = _mm512_set1_epi32(key);
        return _mm512_cmple_epi32_mask(_mm512_load_si512(begins_ + half * TILE), at) &
               _mm512_cmpgt_epi32_mask(_mm512_load_si512(ends_ + half * TILE), at);
    }

    // Makes probabilities of a block's scores, those that `sees(half, key)` allows, and multiplies what is around it
    // meanwhile.
    template <class AroundIt, class Sees>
    void add(int block, const AroundIt& around, const Sees& sees) {
        for (int half = 0; half < 2; half++)
            if (are_new_[half]) set_top(block, half, are_new_[half], sees);
        __m512 totals[2] = {};
        for (int run = 0; run < NUM_RUNS; run++) {
            const Run meanwhile = around(run);
            const auto at_pair = [&]<int PAIR>() __attribute__((always_inline)) {
                for (int half = 0; half < 2; half++)
                    totals[half] = _mm512_add_ps(totals[half], make_pair(block, half, run * RUN_PAIRS + PAIR, sees));
                constexpr int TILES = RUN_TILES / RUN_PAIRS;
                if (meanwhile.left) multiply_tiles<PAIR * TILES>(meanwhile, std::make_integer_sequence<int, TILES>{});
            };
            [&]<int... PAIRS>(std::integer_sequence<int, PAIRS...>) __attribute__((always_inline)) {
                (at_pair.template operator()<PAIRS>(), ...);
            }(std::make_integer_sequence<int, RUN_PAIRS>{});
        }
        // Each lane by itself: a row's numbers must not depend on which others are beside it. Of a power that is far too
        // large not even the sign is right.
        __mmask16 too_large[2];
        for (int half = 0; half < 2; half++)
            too_large[half] = _mm512_cmp_ps_mask(_mm512_abs_ps(totals[half]), _mm512_set1_ps(MOST_OF_BLOCK), _CMP_NLE_UQ);
        if (too_large[0] | too_large[1]) {
            // Once more: the scores aren't there any longer.
            for (int run = 0; run < NUM_RUNS / 2; run++) multiply(keys(block, run));
            for (int half = 0; half < 2; half++) {
                set_top(block, half, too_large[half], sees);
                totals[half] = _mm512_setzero_ps();
                for (int pair = 0; pair < NUM_PAIRS; pair++)
                    totals[half] = _mm512_add_ps(totals[half], make_pair(block, half, pair, sees));
            }
        }
        for (int half = 0; half < 2; half++) totals_[half] = _mm512_add_ps(totals_[half], totals[half]);
    }

    // Makes probabilities of two keys; returns what they are together.
    template <class Sees>
    __attribute__((always_inline)) __m512 make_pair(int block, int half, int pair, const Sees& sees) {
        const auto at = [&](int key) __attribute__((always_inline)) {
            const __m512 score = _mm512_load_ps(scores(block) + key * SIDE + half * TILE);
            const __m512 power = _mm512_mul_ps(_mm512_sub_ps(score, tops_[half]), factor_);
            return _mm512_maskz_mov_ps(sees(half, key), near_exp2(power));
        };
        const __m512 one = at(2 * pair), two = at(2 * pair + 1);
        // Rounded to bfloat16, the first one in the lower half of each word: conversions take longer.
        const __m512i half_bit = _mm512_set1_epi32(0x8000), low = _mm512_add_epi32(_mm512_castps_si512(one), half_bit);
        const __m512i high = _mm512_add_epi32(_mm512_castps_si512(two), half_bit);
        const __m512i upper_bytes = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
        _mm512_store_si512(probabilities(block) + 2 * (pair * SIDE + half * TILE),
                           _mm512_mask_shuffle_epi8(high, 0x3333333333333333, low, upper_bytes));
        return _mm512_add_ps(one, two);
    }

    // What those of sixteen queries have so far gets the scale of their largest score of a block.
    template <class Sees>
    void set_top(int block, int half, __mmask16 which, const Sees& sees) {
        store_last();
        __m512 most = _mm512_set1_ps(LOWEST);
        for (int key = 0; key < BLOCK; key++) {
            const __m512 score = _mm512_load_ps(scores(block) + key * SIDE + half * TILE);
            most = _mm512_mask_max_ps(most, sees(half, key), most, score);
        }
        which &= _mm512_cmp_ps_mask(most, _mm512_set1_ps(LOWEST), _CMP_GT_OQ);
        const __mmask16 have_some = which & ~are_new_[half];
        const __m512 by = exp2(_mm512_mul_ps(_mm512_sub_ps(tops_[half], most), factor_));
        const __m512 shrink = _mm512_mask_mov_ps(_mm512_set1_ps(1), have_some, by);
        tops_[half] = _mm512_mask_mov_ps(tops_[half], which, most);
        are_new_[half] &= ~which;
        if (!have_some) return;
        totals_[half] = _mm512_mul_ps(totals_[half], shrink);
        for (int channel = 0; channel < D; channel++) {
            float* const sum = sums_ + channel * SIDE + half * TILE;
            _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), shrink));
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
    __mmask16 are_new_[2];       // who has seen nothing yet
    float* unstored_ = nullptr;  // where what is in the tiles belongs
    alignas(64) int32_t begins_[SIDE], ends_[SIDE];
    alignas(64) bf16 queries_[SIDE * D];
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
