// Matrix products of few rows with weights of int8, as decoding may have them: half of bfloat16's bytes are read.
//
// Nothing is widened on the way. Inputs become whole numbers of 16 bits, by one scale a row, as two bytes each:
// x = scale * (256 high + low). Weights are multiplied by either byte, 64 at a time, and summed as whole numbers, so all
// that is rounded are inputs: by 1/65278 of their row's largest number at most. Over a row of some thousand numbers this
// adds up to less than what bfloat16 has rounded it by.
// The instruction wants one factor without a sign. Flipping a weight's highest bit adds 128 to it; 128 times the inputs'
// sum is what sums begin with, taken off. Tiles take signs on both sides: weights as they lie, and sixteen inputs' bytes
// turned.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "crew.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace shoal {
namespace {

constexpr int64_t BLOCK = 64;      // inputs in a register
constexpr int64_t PIECE = 64;      // weights' rows a thread takes at a time
constexpr int64_t ROWS_PIECE = 8;  // inputs' rows
constexpr int64_t MIN_ROWS_TILED = 8;  // with fewer, dot products take no longer, and turn nothing
constexpr float LARGEST = 32639;   // 256 * 127 + 127
constexpr float NOTHING = 1e-30f;  // above it LARGEST / x is finite

static_assert(BLOCK == TILE_BYTES);

// Of each row, for each block a register of high bytes and one of low, then what the sums of each begin with.
struct Whole {
    std::vector<__m512i> registers;
    std::vector<float> scales;
    int64_t num_blocks;

    int64_t row_size() const { return 2 * num_blocks + 2; }
    __m512i* row(int64_t index) { return registers.data() + index * row_size(); }
    const __m512i* row(int64_t index) const { return registers.data() + index * row_size(); }
};

struct Operands {
    const bf16* inputs;
    const int8_t* weights;
    const float* scales;
    const bf16* bias;
    int64_t num_rows, num_outputs, size;
    bf16* out;

    bool fit_tiles() const { return size % BLOCK == 0 && num_outputs % (2 * TILE) == 0; }
};

// The first of `size` lanes, all or none.
inline uint64_t lanes(int64_t left, int size) {
    if (left >= size) return size == 64 ? ~0ull : (1ull << size) - 1;
    return left <= 0 ? 0 : (1ull << left) - 1;
}

inline __m512 load_some(const bf16* from, int64_t left) {
    const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)lanes(left, 16), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The largest of a row's absolute values, as bits: those of what isn't finite are above all numbers'.
inline float largest_of(const bf16* from, int64_t size) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < size; j += 16) {
        const __m512i bits = _mm512_castps_si512(load_some(from + j, size - j));
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    return std::bit_cast<float>(_mm512_reduce_max_epu32(most));
}

// One row of inputs. Where a number isn't finite, the scale is NaN, and so is all that comes of the row.
void make_whole(const bf16* from, int64_t size, Whole& to, int64_t row) {
    const float largest = largest_of(from, size);
    const bool is_finite = std::isfinite(largest), is_nothing = largest < NOTHING;
    to.scales[row] = !is_finite ? NAN : is_nothing ? 0 : largest / LARGEST;
    const __m512 factor = _mm512_set1_ps(!is_finite || is_nothing ? 0 : LARGEST / largest);
    const __m512i flipped = _mm512_set1_epi8(-128);  // 128, without a sign
    __m512i* const blocks = to.row(row);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int64_t block = 0; block < to.num_blocks; block++) {
        alignas(64) int8_t high[BLOCK], low[BLOCK];
        for (int64_t j = 0; j < BLOCK; j += 16) {
            const __m512 numbers = load_some(from + block * BLOCK + j, size - block * BLOCK - j);
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, factor));
            const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            const __m512i below = _mm512_sub_epi32(whole, _mm512_slli_epi32(above, 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(high + j), _mm512_cvtepi32_epi8(above));
            _mm_store_si128(reinterpret_cast<__m128i*>(low + j), _mm512_cvtepi32_epi8(below));
        }
        blocks[2 * block] = _mm512_load_si512(high);
        blocks[2 * block + 1] = _mm512_load_si512(low);
        high_sum = _mm512_dpbusd_epi32(high_sum, flipped, blocks[2 * block]);
        low_sum = _mm512_dpbusd_epi32(low_sum, flipped, blocks[2 * block + 1]);
    }
    blocks[2 * to.num_blocks] = _mm512_sub_epi32(_mm512_setzero_si512(), high_sum);
    blocks[2 * to.num_blocks + 1] = _mm512_sub_epi32(_mm512_setzero_si512(), low_sum);
}

// Adds to `sum` the products of bytes, four to a lane. In assembler: with the intrinsic, GCC 12 keeps a copy of each sum
// in memory, which takes twice as long.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

inline __m512 joined(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
}

// Of M rows and N outputs, by bytes of the inputs.
template <int M, int N>
struct Sums {
    __m512i high[M][N], low[M][N];

    // `weights` is a block of each output's, `blocks` the inputs' of the first row, `row_size` from one to the next.
    inline __attribute__((always_inline)) void add(const __m512i (&weights)[N], const __m512i* blocks,
                                                   int64_t row_size) {
        __m512i flipped[N];
        for (int n = 0; n < N; n++) flipped[n] = _mm512_xor_si512(weights[n], _mm512_set1_epi8(-128));
        for (int m = 0; m < M; m++) {
            const __m512i above = blocks[m * row_size], below = blocks[m * row_size + 1];
            for (int n = 0; n < N; n++) {
                add_products(high[m][n], flipped[n], above);
                add_products(low[m][n], flipped[n], below);
            }
        }
    }
};

// N outputs of M rows, from `output` on; those beyond the last one repeat it.
template <int M, int N>
inline void several(const Operands& of, const Whole& inputs, int64_t row, int64_t output, __m512* found, int part) {
    const int64_t row_size = inputs.row_size(), num_full = of.size / BLOCK;
    const int8_t* weights[N];
    for (int n = 0; n < N; n++) weights[n] = of.weights + std::min(output + n, of.num_outputs - 1) * of.size;
    const __m512i *const blocks = inputs.row(row), *const begin = blocks + 2 * inputs.num_blocks;
    Sums<M, N> sums;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            sums.high[m][n] = begin[m * row_size];
            sums.low[m][n] = begin[m * row_size + 1];
        }
    __m512i own[N];
    for (int64_t block = 0; block < num_full; block++) {
        for (int n = 0; n < N; n++) {
            const int8_t* const from = weights[n] + block * BLOCK;
            own[n] = _mm512_loadu_si512(from);
            // The next N outputs'. Of one after the other, the processor sees by itself what comes.
            if (N > 1) _mm_prefetch(reinterpret_cast<const char*>(from + N * of.size), _MM_HINT_T0);
        }
        sums.add(own, blocks + 2 * block, row_size);
    }
    if (num_full < inputs.num_blocks) {
        const __mmask64 mask = lanes(of.size % BLOCK, BLOCK);  // inputs are 0 beyond
        for (int n = 0; n < N; n++) own[n] = _mm512_maskz_loadu_epi8(mask, weights[n] + num_full * BLOCK);
        sums.add(own, blocks + 2 * num_full, row_size);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            found[m * 16 + part + n] = joined(sums.high[m][n], sums.low[m][n]);
}

template <int M, int N>
inline void sixteen(const Operands& of, const Whole& inputs, int64_t row, int64_t output) {
    __m512 found[M][16];
    for (int part = 0; part < 16; part += N) several<M, N>(of, inputs, row, output + part, found[0], part);
    const int64_t left = of.num_outputs - output;
    const __mmask16 mask = (__mmask16)lanes(left, 16);
    const __m512 scales = _mm512_maskz_loadu_ps(mask, of.scales + output);
    const __m512 bias = of.bias ? load_some(of.bias + output, left) : _mm512_setzero_ps();
    for (int m = 0; m < M; m++) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(inputs.scales[row + m]));
        const __m512 result = _mm512_fmadd_ps(sums(found[m]), scale, bias);
        _mm256_mask_storeu_epi16(of.out + (row + m) * of.num_outputs + output, mask,
                                 (__m256i)_mm512_cvtneps_pbh(result));
    }
}

inline void few(const Operands& of, const Whole& inputs, int64_t row, int64_t n, int64_t output) {
    // One or two rows wait for memory alone: weights' rows one after the other, as they lie (linear.cpp).
    const bool is_all = n == of.num_rows;
    switch (n) {
        case 1: return is_all ? sixteen<1, 1>(of, inputs, row, output) : sixteen<1, 4>(of, inputs, row, output);
        case 2: return is_all ? sixteen<2, 1>(of, inputs, row, output) : sixteen<2, 4>(of, inputs, row, output);
        default: return sixteen<3, 4>(of, inputs, row, output);
    }
}

// For tiles: of sixteen rows, for each block [16 times four inputs][row] of high bytes, then of low ones.
struct Turned {
    std::vector<__m512i> registers;

    void turn(const Whole& from, int64_t num_rows) {
        const int64_t num_blocks = from.num_blocks;
        registers.resize((num_rows + TILE - 1) / TILE * num_blocks * 2 * TILE);
        __m512i* to = registers.data();
        for (int64_t first = 0; first < num_rows; first += TILE)
            for (int64_t part = 0; part < 2 * num_blocks; part++, to += TILE) {
                __m512i block[TILE];
                for (int64_t row = 0; row < TILE; row++)
                    block[row] = first + row < num_rows ? from.row(first + row)[part] : _mm512_setzero_si512();
                transpose(block);
                std::copy(block, block + TILE, to);
            }
    }

    const __m512i* of(int64_t first, int64_t num_blocks) const {
        return registers.data() + first / TILE * num_blocks * 2 * TILE;
    }
};

// 32 outputs of sixteen rows.
void tiled(const Operands& of, const Whole& inputs, const __m512i* turned, int64_t row, int64_t output) {
    alignas(64) int32_t high[2 * TILE * TILE], low[2 * TILE * TILE];
    const int8_t* const weights = of.weights + output * of.size;
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::zero<3>();
    for (int64_t block = 0; block < inputs.num_blocks; block++, turned += 2 * TILE) {
        Tiles::load<4>(turned, TILE_BYTES);
        Tiles::load<5>(turned + TILE, TILE_BYTES);
        Tiles::load<6>(weights + block * BLOCK, of.size);
        Tiles::multiply_bytes<0, 6, 4>();
        Tiles::multiply_bytes<1, 6, 5>();
        Tiles::load<7>(weights + TILE * of.size + block * BLOCK, of.size);
        Tiles::multiply_bytes<2, 7, 4>();
        Tiles::multiply_bytes<3, 7, 5>();
    }
    Tiles::store<0>(high, TILE_BYTES);
    Tiles::store<1>(low, TILE_BYTES);
    Tiles::store<2>(high + TILE * TILE, TILE_BYTES);
    Tiles::store<3>(low + TILE * TILE, TILE_BYTES);
    for (int part = 0; part < 2 * TILE; part += TILE) {
        __m512i block[TILE];
        for (int n = 0; n < TILE; n++)
            block[n] = _mm512_castps_si512(joined(_mm512_load_si512(high + (part + n) * TILE),
                                                  _mm512_load_si512(low + (part + n) * TILE)));
        transpose(block);
        const __m512 scales = _mm512_loadu_ps(of.scales + output + part);
        const __m512 bias = of.bias ? load(of.bias + output + part) : _mm512_setzero_ps();
        for (int64_t lane = 0; lane < std::min<int64_t>(TILE, of.num_rows - row); lane++) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(inputs.scales[row + lane]));
            store(of.out + (row + lane) * of.num_outputs + output + part,
                  _mm512_fmadd_ps(_mm512_castsi512_ps(block[lane]), scale, bias));
        }
    }
}

void multiply_by_tiles(const Operands& of, const Whole& inputs, Team team) {
    thread_local Turned kept;
    kept.turn(inputs, of.num_rows);
    const Turned& turned = kept;  // this thread's
    share_ranges(of.num_outputs, PIECE, team, [&](int64_t begin, int64_t end) {
        const Tiles held;
        for (int64_t output = begin; output < end; output += 2 * TILE)
            for (int64_t row = 0; row < of.num_rows; row += TILE)
                tiled(of, inputs, turned.of(row, inputs.num_blocks), row, output);
    });
}

}  // namespace
}  // namespace shoal

// out [num_rows, num_outputs] = inputs [num_rows, size] times weights [num_outputs, size] transposed times scales
// [num_outputs], plus bias [num_outputs], if given. inputs, bias and out are bfloat16, weights int8, scales float32.
// Returns 0, or 1 if there are more than FEW_ROWS rows.
extern "C" int shoal_int8_linear(const void* inputs, const void* weights, const void* scales, const void* bias,
                                 int64_t num_rows, int64_t num_outputs, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    if (num_rows > FEW_ROWS) return 1;
    const Operands of = {static_cast<const bf16*>(inputs), static_cast<const int8_t*>(weights),
                         static_cast<const float*>(scales), static_cast<const bf16*>(bias), num_rows, num_outputs, size,
                         static_cast<bf16*>(out)};
    thread_local Whole whole;  // kept: the next product is as large
    whole.num_blocks = (size + BLOCK - 1) / BLOCK;
    whole.registers.resize(std::max(whole.registers.size(), (size_t)(num_rows * whole.row_size())));
    whole.scales.resize(FEW_ROWS);
    Whole& own = whole;  // this thread's, for its helpers, too
    const Team team(num_threads, num_rows);
    share_ranges(num_rows, ROWS_PIECE, team, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) make_whole(of.inputs + row * size, size, own, row);
    });
    if (num_rows >= MIN_ROWS_TILED && of.fit_tiles() && have_tiles()) {
        multiply_by_tiles(of, own, team);
        return 0;
    }
    share_ranges(num_outputs, PIECE, team, [&](int64_t begin, int64_t end) {
        for (int64_t row = 0; row < num_rows; row += 3)
            for (int64_t output = begin; output < end; output += 16)
                few(of, own, row, std::min<int64_t>(3, num_rows - row), output);
    });
    return 0;
}
