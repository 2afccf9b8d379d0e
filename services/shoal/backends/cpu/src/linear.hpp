// What the ways to multiply have in common: who multiplies what, and what becomes of the sums.
#pragma once
#include <algorithm>

#include "activations.hpp"
#include "apart.hpp"
#include "crew.hpp"
#include "simd.hpp"

namespace shoal {

constexpr int64_t PANEL = 32;
constexpr int64_t MAX_PANELS = 8;  // that a thread takes at a time: memory is quickest where it's read from end to end
constexpr int64_t TURNS = 3;       // but each thread comes so often, or some would wait for others at the end
constexpr int64_t MANY_ROWS = 64;  // with more, one panel is work enough
constexpr int64_t MUCH = 64 * 1536 * MAX_PANELS;  // rows, inputs and panels: more would take others' patience

// Outputs that are queries, keys and values, of a layer or of several: where each of them belongs (heads.hpp).
struct Heads;

struct Operands {
    const bf16 *inputs, *weights, *bias;
    int64_t num_rows, num_outputs, size;
    Output out;
    Activation activation;         // none, or the outputs' second half is gated by the first one
    const Heads* heads = nullptr;  // or they go there, instead of to `out`
    int64_t half = 0;              // panels of half a head
    const float* scales = nullptr;  // of weights that are bytes, an output's each: then two inputs are a number here

    bool is_gated() const { return activation != Activation::NONE; }
    // Whether a panel's outputs are made of its sums and another one's.
    bool is_paired() const { return is_gated() || heads; }
    int64_t num_panels() const { return (num_outputs + PANEL - 1) / PANEL; }
    // A panel each, or two.
    int64_t num_turns() const { return is_paired() ? num_panels() / 2 : num_panels(); }
    int64_t first_panel(int64_t turn) const { return heads ? turn + turn / half * half : turn; }
    int64_t second_panel(int64_t turn) const { return first_panel(turn) + (heads ? half : num_turns()); }
    const bf16* panel(int64_t index) const { return weights + index * PANEL * size; }

    // Of sixteen outputs, those that there are.
    __mmask16 mask(int64_t output) const {
        return (__mmask16)((1u << std::clamp<int64_t>(num_outputs - output, 0, 16)) - 1);
    }
    __m512 bias_of(int64_t output) const {
        if (!bias) return _mm512_setzero_ps();
        const __m256i halves = _mm256_maskz_loadu_epi16(mask(output), bias + output);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    void put_line(int64_t row, int64_t output, __m512 low, __m512 high) const {
        store(out.at(row, output), low, high);
    }
    void put(int64_t row, int64_t output, __m512 sums) const {
        _mm256_mask_storeu_epi16(out.at(row, output), mask(output), narrowed(sums));
    }
};

// Sums [num_rows, PANEL] of a panel, of rows from `row` on, become outputs: a row's are a line of the cache, and written at
// once, but at the end, where there may be fewer.
inline void put(const Operands& of, int64_t panel, int64_t row, int64_t num_rows, const float* sums) {
    const int64_t output = panel * PANEL;
    const __m512 bias = of.bias_of(output), bias2 = of.bias_of(output + 16);
    const bool is_whole = output + PANEL <= of.num_outputs;
    for (int64_t n = 0; n < num_rows; n++) {
        const __m512 low = _mm512_add_ps(_mm512_load_ps(sums + n * PANEL), bias);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + n * PANEL + 16), bias2);
        if (is_whole) {
            of.put_line(row + n, output, low, high);
            continue;
        }
        of.put(row + n, output, low);
        of.put(row + n, output + 16, high);
    }
}

inline __m512 rounded(__m512 numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(numbers)), 16));
}

// The same where a panel's outputs gate those of another one, whose sums are `gated`. They are rounded before, too: a row's
// numbers must not depend on whether it is one of few.
inline void put_gated(const Operands& of, int64_t panel, int64_t row, int64_t num_rows, const float* own,
                      const float* gated) {
    const int64_t output = panel * PANEL, gated_output = of.num_outputs / 2 + output;
    const __m512 bias[] = {of.bias_of(output), of.bias_of(output + 16)};
    const __m512 gated_bias[] = {of.bias_of(gated_output), of.bias_of(gated_output + 16)};
    const auto gate = [&](int64_t n, int half) __attribute__((always_inline)) {
        const int64_t at = n * PANEL + 16 * half;
        const __m512 by = rounded(_mm512_add_ps(_mm512_load_ps(own + at), bias[half]));
        return _mm512_mul_ps(activate(of.activation, by),
                             rounded(_mm512_add_ps(_mm512_load_ps(gated + at), gated_bias[half])));
    };
    for (int64_t n = 0; n < num_rows; n++) of.put_line(row + n, output, gate(n, 0), gate(n, 1));
}

// The same where they are the first and the second half of a head. They are rounded before, as gates are.
void put_heads(const Operands& of, int64_t panel, int64_t row, int64_t num_rows, const float* first, const float* second);

inline int64_t panels_at_once(const Operands& of, int num_threads) {
    if (of.num_rows > MANY_ROWS) return 1;
    const int64_t most = std::clamp<int64_t>(MUCH / (of.num_rows * of.size), 1, MAX_PANELS);
    return std::clamp<int64_t>(of.num_turns() / (TURNS * num_threads), 1, most);
}

// The panels of `of`, `at_once` at a time, by `multiply(to, begin, end)`.
template <class Multiply>
void share_panels(const Operands& of, int num_threads, int64_t at_once, const Multiply& multiply) {
    const int64_t num_made = of.is_gated() ? of.num_outputs / 2 : of.num_outputs;
    share_ranges(of.num_turns(), at_once, num_threads, [&](int64_t begin, int64_t end, Claim& claim) {
        const Part made = {0, of.num_rows, begin * PANEL, std::min(end * PANEL, num_made)};
        make_part(of.out, made, claim, [&](const Output& out) {
            Operands to = of;
            to.out = out;
            multiply(to, begin, end);
        });
    });
}

// By the matrix unit (tiled_linear.cpp): some rows, or more than MANY_ROWS, which nobody goes through together (layers.cpp).
void multiply_by_tiles(const Operands& of, int num_threads);
void multiply_many_by_tiles(const Operands& of, int num_threads);

}  // namespace shoal
