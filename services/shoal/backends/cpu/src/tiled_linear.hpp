// Many rows as the matrix unit takes them (tiled_linear.cpp).
#pragma once
#include "linear.hpp"
#include "tiles.hpp"

namespace shoal {

constexpr int64_t SQUARE_ROWS = 2 * TILE;

// Some of a product's rows, 32 at a time. Packed they are
//
//     inputs  [square of 32 rows][step of 32 inputs][row][input]
struct Squares {
    int64_t begin, end;

    static int64_t number_of(int64_t num_rows) { return (num_rows + SQUARE_ROWS - 1) / SQUARE_ROWS; }
    // One of so many blocks, as equal as can be.
    static Squares block(int64_t num_squares, int64_t index, int64_t num_blocks) {
        return {num_squares * index / num_blocks, num_squares * (index + 1) / num_blocks};
    }
    int64_t number() const { return end - begin; }
    int64_t num_rows() const { return number() * SQUARE_ROWS; }
    int64_t first_row() const { return begin * SQUARE_ROWS; }
    int64_t end_row(int64_t num_rows) const { return std::min(num_rows, end * SQUARE_ROWS); }
};

// Rows of inputs [num_rows, size]. What a square has more than there are rows is zeros.
void pack_squares(const bf16* inputs, int64_t num_rows, int64_t size, Squares squares, bf16* packed);

// Turns from `begin` to `end` with those rows, which are `packed`, on the calling thread.
void multiply_squares(const Operands& of, Squares squares, const bf16* packed, int64_t begin, int64_t end);

}  // namespace shoal
