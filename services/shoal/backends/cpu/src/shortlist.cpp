// The largest of each row's outputs, and not much else, at half the bytes: products with weights of int8 say where it can
// be, and there they are made anew, of the weights themselves.
//
// Of each output it's known how far its two products can be apart, for inputs of length 1 (model/shortlist.py). If two are
// 24.0 and 21.0, and each can be off by 1.2, the second can't be the largest. Few are left: of 49,152 tokens in 1,536 panels,
// half of the time those of three panels or fewer.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "crew.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "simd.hpp"

namespace shoal {
namespace {

// Both products are rounded to bfloat16, by 1/256 of themselves at most. It's counted from one that is rounded already, so
// there is some to spare.
constexpr float ROUNDED = 0x1.08p-7f;
// What is below is taken for nothing somewhere: outputs by bfloat16, by multipliers that know no denormal numbers, and where
// inputs become whole (whole.hpp); of inputs, squares.
constexpr float NEGLIGIBLE = 1e-30f, NEGLIGIBLE_SQUARE = 0x1p-120f;

// One row: what was made of int8, and how far that can be off.
struct Row {
    const bf16* outputs;
    const float* bounds;
    float length;
    int64_t size;

    // Of sixteen outputs from `at` on: which there are, what they are, and how far those of the weights can be from them.
    __mmask16 mask(int64_t at) const { return (__mmask16)((1u << std::min<int64_t>(size - at, 16)) - 1); }
    __m512 outputs_at(int64_t at) const {
        const __m256i halves = _mm256_maskz_loadu_epi16(mask(at), outputs + at);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    __m512 apart_at(int64_t at, __m512 numbers) const {
        const __m512 rounded = _mm512_mul_ps(_mm512_abs_ps(numbers), _mm512_set1_ps(ROUNDED));
        return _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask(at), bounds + at), _mm512_set1_ps(length), rounded);
    }

    // What the largest is at least. Numbers that aren't are passed over.
    float least() const {
        __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t at = 0; at < size; at += 16) {
            const __m512 numbers = outputs_at(at);
            most = _mm512_mask_max_ps(most, mask(at), _mm512_sub_ps(numbers, apart_at(at, numbers)), most);
        }
        return _mm512_reduce_max_ps(most);
    }

    // Notes the panels of all that may be as large: of equals the first one counts. And of what is no number.
    void note(float least, uint8_t* wanted) const {
        const __m512 limit = _mm512_set1_ps(least - NEGLIGIBLE);
        for (int64_t at = 0; at < size; at += 16) {
            const __m512 numbers = outputs_at(at), most = _mm512_add_ps(numbers, apart_at(at, numbers));
            if (_mm512_mask_cmp_ps_mask(mask(at), most, limit, _CMP_NLT_UQ)) wanted[at / PANEL] = 1;
        }
    }
};

float length_of(const bf16* inputs, int64_t size) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < size; j += 16) {
        const __m512 own = load(inputs + j);
        sums = _mm512_fmadd_ps(own, own, sums);
    }
    return std::sqrt(_mm512_reduce_add_ps(sums) + (float)size * NEGLIGIBLE_SQUARE);
}

// Whether each panel may hold the largest of some row.
std::vector<uint8_t> notes_of(const bf16* inputs, const float* bounds, const bf16* outputs, int64_t num_rows,
                              int64_t num_outputs, int64_t size, int num_threads) {
    const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    std::vector<uint8_t> notes(num_rows * num_panels);
    share(num_rows, num_threads, [&](int64_t index) {
        const Row row = {outputs + index * num_outputs, bounds, length_of(inputs + index * size, size), num_outputs};
        row.note(row.least(), notes.data() + index * num_panels);
    });
    for (int64_t index = 1; index < num_rows; index++)
        for (int64_t panel = 0; panel < num_panels; panel++) notes[panel] |= notes[index * num_panels + panel];
    notes.resize(num_panels);
    return notes;
}

}  // namespace
}  // namespace shoal

// outputs [num_rows, num_outputs] are of inputs [num_rows, size] and weights of int8. Those of `weights`, which lie in
// panels, differ from them by an input's length times bounds [num_outputs] at most, before they are rounded. Where the
// largest of a row may be, they take their place, in num_made panels, and what is left of int8 is smaller. Returns 0, or 1
// if size isn't a multiple of 32.
extern "C" int shoal_settle(const void* inputs, const void* weights, const float* bounds, int64_t num_rows,
                            int64_t num_outputs, int64_t size, void* outputs, int64_t* num_made, int num_threads) {
    using namespace shoal;
    if (size % LINE) return 1;
    const bf16 *const own = static_cast<const bf16*>(inputs), *const panels = static_cast<const bf16*>(weights);
    bf16* const to = static_cast<bf16*>(outputs);
    const std::vector<uint8_t> notes = notes_of(own, bounds, to, num_rows, num_outputs, size, num_threads);
    std::vector<int64_t> firsts;
    for (size_t panel = 0; panel < notes.size(); panel++)
        if (notes[panel]) firsts.push_back((int64_t)panel * PANEL);
    *num_made = (int64_t)firsts.size();
    share(*num_made, num_threads, [&](int64_t index) {
        const int64_t first = firsts[index], number = std::min(PANEL, num_outputs - first);
        static thread_local std::vector<bf16> made;
        made.resize(num_rows * number);
        shoal_linear(own, panels + first * size, nullptr, num_rows, number, size, made.data(), 1);
        for (int64_t row = 0; row < num_rows; row++)
            std::memcpy(to + row * num_outputs + first, made.data() + row * number, sizeof(bf16) * number);
    });
    return 0;
}
