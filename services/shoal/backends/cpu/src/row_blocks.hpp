// What a layer does to each row by itself, all but attention, for a block of rows at a time that the second cache holds:
// what passes from one product to the next stays there, packed as the next one takes it. For many rows, by tiles.
#pragma once
#include "heads.hpp"
#include "layers.hpp"

namespace shoal {

// Whether it's of use: weights are read once for each block, which must have rows enough, and be small enough.
bool goes_by_blocks(const Shape& shape, const Layer& layer, int64_t num_rows, int num_threads);

// hidden [num_rows, hidden_size] -> the heads of its norm, each to its place.
void heads_by_blocks(const Shape& shape, const Layer& layer, const bf16* hidden, int64_t num_rows, const Heads& heads,
                     int num_threads);

// hidden [num_rows, hidden_size] += what attention's `mixed` [num_rows, num_heads * head_dim] brings, and then the MLP.
void mlp_by_blocks(const Shape& shape, const Layer& layer, const bf16* mixed, bf16* hidden, int64_t num_rows,
                   int num_threads);

}  // namespace shoal
