#include "row_blocks.hpp"

#include <algorithm>

#include "crew.hpp"
#include "room.hpp"
#include "rows.hpp"
#include "tiled_linear.hpp"

namespace shoal {
namespace {

constexpr int64_t NEAR_BYTES = 1408 * 1024;  // of a block
constexpr int64_t FEWEST = 4;                // squares of a block

int64_t mixed_size(const Shape& shape) { return shape.num_heads * shape.head_dim; }
int64_t widest_input(const Shape& shape) { return std::max(shape.hidden_size, mixed_size(shape)); }
Activation activation_of(const Shape& shape) { return shape.activation == 0 ? Activation::SILU : Activation::GELU; }

// That a block may have.
int64_t most_squares(const Shape& shape) {
    const int64_t numbers = widest_input(shape) + shape.hidden_size + shape.intermediate_size;  // of a row
    return NEAR_BYTES / (SQUARE_ROWS * numbers * (int64_t)sizeof(bf16));
}

// Calls `of_block(squares)` for all rows.
template <class OfBlock>
void share_blocks(const Shape& shape, int64_t num_rows, int num_threads, const OfBlock& of_block) {
    const int64_t num_squares = Squares::number_of(num_rows), most = most_squares(shape);
    const int64_t needed = (num_squares + most - 1) / most;
    const int64_t alike = std::min((needed + num_threads - 1) / num_threads * num_threads, num_squares);
    share(alike, num_threads, [&](int64_t block) { of_block(Squares::block(num_squares, block, alike)); });
}

// Of a block's rows from their inputs, which are packed, to `out`, whose first row is the block's, or to their heads.
void multiply(const Matrix& by, int64_t num_rows, int64_t num_outputs, int64_t size, Squares squares, const bf16* packed,
              Output out, Activation activation, const Heads* heads = nullptr) {
    Operands of = {nullptr, static_cast<const bf16*>(by.weights), static_cast<const bf16*>(by.bias),
                   num_rows, num_outputs, size, out, activation};
    if (heads) of.heads = heads, of.half = heads->head_dim / 2 / PANEL;
    else of.out.numbers -= out.steps ? squares.begin * out.steps * SQUARE_ROWS * TILE_NUMBERS
                                     : squares.first_row() * out.row;
    multiply_squares(of, squares, packed, 0, of.num_turns());
}

}  // namespace

bool goes_by_blocks(const Shape& shape, const Layer& layer, int64_t num_rows, int num_threads) {
    const bool has_int8 = layer.qkv.scales || layer.out.scales || layer.gate_up.scales || layer.down.scales;
    const bool norms_more = layer.q_norm || layer.k_norm || layer.attention_post_norm || layer.mlp_post_norm;
    // A thread takes whole blocks: each has one at least.
    const bool has_rows_enough = Squares::number_of(num_rows) >= FEWEST * num_threads;
    return rotates_at_once(num_rows, shape.head_dim) && !has_int8 && !norms_more && has_rows_enough &&
           most_squares(shape) >= FEWEST &&
           shape.hidden_size % TILE_NUMBERS == 0 && shape.intermediate_size % TILE_NUMBERS == 0;
}

void heads_by_blocks(const Shape& shape, const Layer& layer, const bf16* hidden, int64_t num_rows, const Heads& heads,
                     int num_threads) {
    const int64_t size = shape.hidden_size, num_outputs = heads.of_a_store() * heads.head_dim;
    share_blocks(shape, num_rows, num_threads, [&](Squares squares) {
        static thread_local Room<bf16> room;
        bf16* const normed = room.of(squares.num_rows() * size);
        const Output packed = {normed, 0, size / TILE_NUMBERS};
        for (int64_t row = squares.first_row(), n = 0; row < squares.end_row(num_rows); row++, n++)
            add_norm_row(hidden + row * size, nullptr, static_cast<const bf16*>(layer.input_norm), size, shape.eps, nullptr,
                         packed, n);
        multiply(layer.qkv, num_rows, num_outputs, size, squares, normed, {}, Activation::NONE, &heads);
    });
}

void mlp_by_blocks(const Shape& shape, const Layer& layer, const bf16* mixed, bf16* hidden, int64_t num_rows,
                   int num_threads) {
    const int64_t size = shape.hidden_size, inner = shape.intermediate_size, mixed_row = mixed_size(shape);
    share_blocks(shape, num_rows, num_threads, [&](Squares squares) {
        static thread_local Room<bf16> room;
        const int64_t rows = squares.num_rows(), first = squares.first_row(), end = squares.end_row(num_rows);
        bf16* const inputs = room.of(rows * (widest_input(shape) + size + inner));
        bf16* const added = inputs + rows * widest_input(shape);
        bf16* const gated = added + rows * size;
        pack_squares(mixed, num_rows, mixed_row, squares, inputs);
        multiply(layer.out, num_rows, size, mixed_row, squares, inputs, {added, size}, Activation::NONE);
        const Output packed = {inputs, 0, size / TILE_NUMBERS};
        for (int64_t row = first; row < end; row++)
            add_norm_row(hidden + row * size, added + (row - first) * size, static_cast<const bf16*>(layer.mlp_norm), size,
                         shape.eps, hidden + row * size, packed, row - first);
        multiply(layer.gate_up, num_rows, 2 * inner, size, squares, inputs, {gated, 0, inner / TILE_NUMBERS},
                 activation_of(shape));
        multiply(layer.down, num_rows, size, inner, squares, gated, {added, size}, Activation::NONE);
        for (int64_t row = first; row < end; row++)
            add_norm_row(hidden + row * size, added + (row - first) * size, nullptr, size, shape.eps, hidden + row * size, {},
                         0);
    });
}

}  // namespace shoal
