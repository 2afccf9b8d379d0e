// The kernels that layers.cpp puts together; each is described where it is.
#pragma once
#include <immintrin.h>

#include <cstdint>

extern "C" {
int shoal_add_norm(const void* hidden, const void* added, const void* weight, int64_t num_rows, int64_t size, float eps,
                   void* sum, void* out, int num_threads);
int shoal_rotate_store(void* heads, int64_t heads_row, const void* cos, const void* sin, int64_t num_rows, int num_heads,
                       int kv_heads, int head_dim, void* pool, const int64_t* slots, int num_threads);
int shoal_gate(const void* both, int activation, int64_t num_rows, int64_t size, void* out, int num_threads);
int shoal_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows, int64_t num_outputs,
                 int64_t size, void* out, int num_threads);
int shoal_gated_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows, int64_t num_gated,
                       int64_t size, int activation, void* out, int num_threads);
int shoal_attend_prompt(const void* queries, int64_t query_row, const void* pool, const int64_t* slots,
                        int64_t first_slot, int64_t num_context, int64_t num_rows, int num_heads, int kv_heads,
                        int head_dim, int64_t window, float scale, void* out, int num_threads);
}

namespace shoal {

// Of shoal_attend_decode, shoal_int8_linear and shoal_whole_linear, those that keep something meanwhile, for which room is
// given: of floats, or of bytes.
int64_t kept_by_attention(int64_t batch, int64_t longest, int num_heads, int head_dim, int num_threads);
int64_t kept_by_int8(int64_t num_rows, int64_t size);
int64_t kept_by_whole(int64_t num_rows, int64_t size);
int attend_decode(const void* queries, int64_t query_row, const int64_t* at, const void* pool, const int64_t* slots,
                  int64_t first_slot, int64_t longest, const int64_t* lengths, int64_t batch, int num_heads, int kv_heads,
                  int head_dim, float scale, void* out, int num_threads, float* kept);
int int8_linear(const void* inputs, const void* weights, const void* scales, const void* bias, int64_t num_rows,
                int64_t num_outputs, int64_t size, int activation, void* out, int num_threads, char* kept);
int whole_linear(const void* inputs, const void* weights, const void* scales, int64_t num_rows, int64_t num_outputs,
                 int64_t size, void* out, int num_threads, char* kept);

}  // namespace shoal
