// Some columns of what a kernel makes, where another thread may be making the same ones: they are written apart from the
// others, and put where they belong by the one whose results count.
#pragma once
#include <algorithm>
#include <vector>

#include "crew.hpp"
#include "simd.hpp"

namespace shoal {

// What a kernel makes: `row` numbers from one row to the next, or packed as the matrix unit takes many rows
// (tiled_linear.hpp), with so many `steps` a square.
struct Output {
    bf16* numbers;
    int64_t row, steps = 0;

    bf16* at(int64_t of_row, int64_t column) const {
        constexpr int64_t SIDE = 32;
        if (!steps) return numbers + of_row * row + column;
        return numbers + ((of_row / SIDE * steps + column / SIDE) * SIDE + of_row % SIDE) * SIDE + column % SIDE;
    }
};

// A part of it: of each of the rows some columns.
struct Part {
    int64_t first_row, num_rows, begin, end;
};

// Calls `make(to)`, which writes all of `part`, and nothing else, to `out`, which isn't packed, or to memory of this thread's
// own.
template <class Make>
void make_part(const Output& out, const Part& part, Claim& claim, const Make& make) {
    if (!claim.is_shared()) return make(out);
    static thread_local std::vector<bf16> kept;
    const int64_t width = part.end - part.begin;
    kept.resize(std::max<size_t>(kept.size(), part.num_rows * width));
    make(Output{kept.data() - part.first_row * width - part.begin, width});
    if (!claim()) return;
    for (int64_t row = 0; row < part.num_rows; row++)
        std::memcpy(out.numbers + (part.first_row + row) * out.row + part.begin, kept.data() + row * width,
                    width * sizeof(bf16));
}

}  // namespace shoal
