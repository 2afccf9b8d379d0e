// Matrix products of few rows with weights of int8, as decoding may have them: half of bfloat16's bytes are read.
//
// Nothing is widened on the way. Inputs are two bytes each (whole.hpp): weights are multiplied by either one, 64 at a time,
// and summed as whole numbers, so all that is rounded are inputs.
// The instruction wants one factor without a sign. Flipping a weight's highest bit adds 128 to it; 128 times the inputs'
// sum is what sums begin with, taken off. By lanes, inputs' bytes are turned, and each four or eight weights go to all
// rows. Tiles take signs on both sides: weights as they lie, and sixteen inputs' bytes turned.
#include <algorithm>
#include <vector>

#include "apart.hpp"
#include "crew.hpp"
#include "kernels.hpp"
#include "simd.hpp"
#include "tiles.hpp"
#include "whole.hpp"

namespace shoal {
namespace {

constexpr int64_t FEW_ROWS = 64;       // more are torch's to multiply (engine/native.py)
constexpr int64_t PIECE = 64;          // weights' rows a thread takes at a time
constexpr int64_t ROWS_PIECE = 8;      // inputs' rows
constexpr int64_t TILE_ROWS = 3;       // of inputs; with more of them, a lane or two each is faster
constexpr int64_t MIN_ROWS_TILED = 8;  // with fewer, dot products take no longer, and turn nothing

constexpr int64_t MAX_SIZE = 1 << 17;  // so many times 128 * 127 is in int32

static_assert(BLOCK == TILE_BYTES);

struct Operands {
    const bf16* inputs;
    const int8_t* weights;
    const float* scales;
    const bf16* bias;
    int64_t num_rows, num_outputs, size;
    Output out;

    bool fit_tiles() const { return size % BLOCK == 0 && num_outputs % (2 * TILE) == 0; }
    bool fit_lanes() const { return size % BLOCK == 0 && num_outputs % 16 == 0; }
};

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
                add_bytes(high[m][n], flipped[n], above);
                add_bytes(low[m][n], flipped[n], below);
            }
        }
    }
};

// N outputs of M rows, from `output` on; those beyond the last one repeat it.
template <int M, int N>
inline void several(const Operands& of, const Whole& inputs, int64_t row, int64_t output, int part,
                    ints (&high)[M][16], ints (&low)[M][16]) {
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
            if (N > 1) fetch(from + N * of.size);
        }
        sums.add(own, blocks + 2 * block, row_size);
    }
    if (num_full < inputs.num_blocks) {
        const __mmask64 mask = lanes(of.size % BLOCK, BLOCK);  // inputs are 0 beyond
        for (int n = 0; n < N; n++) own[n] = _mm512_maskz_loadu_epi8(mask, weights[n] + num_full * BLOCK);
        sums.add(own, blocks + 2 * num_full, row_size);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            high[m][part + n] = (ints)sums.high[m][n];
            low[m][part + n] = (ints)sums.low[m][n];
        }
}

template <int M, int N>
inline void sixteen(const Operands& of, const Whole& inputs, int64_t row, int64_t output) {
    ints high[M][16], low[M][16];
    for (int part = 0; part < 16; part += N) several<M, N>(of, inputs, row, output + part, part, high, low);
    const int64_t left = of.num_outputs - output;
    const __mmask16 mask = (__mmask16)lanes(left, 16);
    const __m512 scales = _mm512_maskz_loadu_ps(mask, of.scales + output);
    const __m512 bias = of.bias ? load_some(of.bias + output, left) : _mm512_setzero_ps();
    for (int m = 0; m < M; m++) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(inputs.scale(row + m)));
        const __m512 result = _mm512_fmadd_ps(joined((__m512i)sums(high[m]), (__m512i)sums(low[m])), scale, bias);
        _mm256_mask_storeu_epi16(of.out.numbers + (row + m) * of.out.row + output, mask, narrowed(result));
    }
}

inline void few(const Operands& of, const Whole& inputs, int64_t row, int64_t n, int64_t output) {
    // One or two rows wait for memory alone: weights' rows one after the other, as they lie.
    const bool is_all = n == of.num_rows;
    switch (n) {
        case 1: return is_all ? sixteen<1, 1>(of, inputs, row, output) : sixteen<1, 4>(of, inputs, row, output);
        case 2: return is_all ? sixteen<2, 1>(of, inputs, row, output) : sixteen<2, 4>(of, inputs, row, output);
        default: return sixteen<TILE_ROWS, 4>(of, inputs, row, output);
    }
}

// Of R registers of rows, all that a register's rows have, so many bytes at a time, high ones and low ones: [size /
// bytes][R][high, low][row]; then what sums begin with, [R][high, low][row]. Where there is no row, there is nothing.
//   sixteen rows  four bytes each
//   eight rows    eight, in two lanes: where half of sixteen would hold nothing
template <int ROWS>
constexpr int BYTES = 64 / ROWS;

template <int ROWS, int R>
int64_t turned_registers(const Whole& from) {
    return (from.num_blocks * BLOCK / BYTES<ROWS> + 1) * R * 2;
}

template <int ROWS, int R>
void turn(const Whole& from, int64_t first, __m512i* to) {
    constexpr int AT_A_TIME = BLOCK / BYTES<ROWS>;
    __m512i* const begin = to + from.num_blocks * AT_A_TIME * R * 2;
    for (int r = 0; r < R; r++)
        for (int part = 0; part < 2; part++) {
            const int64_t row = first + ROWS * r, num_rows = std::clamp<int64_t>(from.num_rows - row, 0, ROWS);
            const __m512i* const rows = from.row(row) + part;
            for (int64_t block = 0; block < from.num_blocks; block++) {
                __m512i found[ROWS];
                for (int n = 0; n < ROWS; n++)
                    found[n] = n < num_rows ? rows[n * from.row_size() + 2 * block] : _mm512_setzero_si512();
                transpose(found);
                for (int at = 0; at < AT_A_TIME; at++)
                    to[((block * AT_A_TIME + at) * R + r) * 2 + part] = found[at];
            }
            alignas(64) int32_t sums[16] = {};
            for (int n = 0; n < num_rows; n++)
                sums[n * 16 / ROWS] = _mm512_reduce_add_epi32(rows[n * from.row_size() + 2 * from.num_blocks]);
            begin[r * 2 + part] = _mm512_load_si512(sums);
        }
}

// Sixteen outputs of R registers of rows, N outputs at a time.
template <int ROWS, int R, int N>
inline void sixteen_by_lanes(const Operands& of, const Whole& inputs, const __m512i* turned, int64_t first,
                             int64_t output) {
    constexpr int AT_A_TIME = BLOCK / BYTES<ROWS>, LANES = 16 / ROWS;
    const __m512i* const begin = turned + inputs.num_blocks * AT_A_TIME * R * 2;
    __m512i found[R][2][16];
    for (int part = 0; part < 16; part += N) {
        const int8_t* const weights = of.weights + (output + part) * of.size;
        __m512i acc[N][R][2];
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 2 * R; i++) acc[n][i / 2][i % 2] = begin[i];
        const __m512i* own = turned;
        for (int64_t k = 0; k < of.size; k += BLOCK) {
            for (int n = 0; n < N; n++) fetch(weights + (AHEAD + n) * of.size + k);
#pragma GCC unroll 4
            for (int64_t at = k; at < k + BLOCK; at += BYTES<ROWS>, own += 2 * R)
                for (int n = 0; n < N; n++) {
                    const __m512i shared =
                        _mm512_xor_si512(spread<ROWS>(weights + n * of.size + at), _mm512_set1_epi8(-128));
                    for (int i = 0; i < 2 * R; i++) add_bytes(acc[n][i / 2][i % 2], shared, own[i]);
                }
        }
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 2 * R; i++) found[i / 2][i % 2][part + n] = acc[n][i / 2][i % 2];
    }
    const __m512 scales = _mm512_loadu_ps(of.scales + output);
    const __m512 bias = of.bias ? load(of.bias + output) : _mm512_setzero_ps();
    for (int r = 0; r < R; r++) {
        transpose(found[r][0]);  // to [lane][output]
        transpose(found[r][1]);
        const int64_t row = first + ROWS * r;
        for (int64_t n = 0; n < std::min<int64_t>(ROWS, of.num_rows - row); n++) {
            const auto sum = [&](int part) {
                const __m512i* const lanes = &found[r][part][n * LANES];
                return LANES == 2 ? _mm512_add_epi32(lanes[0], lanes[1]) : lanes[0];
            };
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(inputs.scale(row + n)));
            store(of.out.numbers + (row + n) * of.out.row + output,
                  _mm512_fmadd_ps(joined(sum(0), sum(1)), scale, bias));
        }
    }
}

// Ranges of outputs, of the rows from `first` on, by `multiply(to, begin, end)`.
template <class Multiply>
void share_outputs(const Operands& of, int64_t first, int64_t num_rows, int num_threads, const Multiply& multiply) {
    share_ranges(of.num_outputs, PIECE, num_threads, [&](int64_t begin, int64_t end, Claim& claim) {
        make_part(of.out, {first, num_rows, begin, end}, claim, [&](const Output& out) {
            Operands to = of;
            to.out = out;
            multiply(to, begin, end);
        });
    });
}

template <int ROWS, int R, int N>
void multiply_by_lanes(const Operands& of, const Whole& inputs, int64_t first, int num_threads) {
    thread_local std::vector<__m512i> kept;
    kept.resize(turned_registers<ROWS, R>(inputs));
    if (!is_left_behind()) turn<ROWS, R>(inputs, first, kept.data());
    const __m512i* const turned = kept.data();  // this thread's
    const int64_t num_rows = std::min<int64_t>(ROWS * R, of.num_rows - first);
    share_outputs(of, first, num_rows, num_threads, [&](const Operands& to, int64_t begin, int64_t end) {
        for (int64_t output = begin; output < end; output += 16)
            sixteen_by_lanes<ROWS, R, N>(to, inputs, turned, first, output);
    });
}

void multiply_by_lanes(const Operands& of, const Whole& inputs, int num_threads) {
    for (int64_t first = 0; first < of.num_rows; first += 32) switch ((of.num_rows - first + 7) / 8) {
            case 1: multiply_by_lanes<8, 1, 8>(of, inputs, first, num_threads); break;
            case 2: multiply_by_lanes<8, 2, 4>(of, inputs, first, num_threads); break;
            case 3: multiply_by_lanes<8, 3, 4>(of, inputs, first, num_threads); break;
            default: multiply_by_lanes<16, 2, 4>(of, inputs, first, num_threads);
        }
}

// 32 outputs of sixteen rows.
void tiled(const Operands& of, const Whole& inputs, const __m512i* turned, int64_t row, int64_t output) {
    alignas(64) int32_t high[2 * TILE * TILE], low[2 * TILE * TILE];
    const int8_t* const weights = of.weights + output * of.size;
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::zero<3>();
    for (int64_t block = 0; block < inputs.num_blocks; block++, turned += 2 * TILE) {
        Tiles::load<4>(turned, 2 * TILE_BYTES);
        Tiles::load<5>(turned + 1, 2 * TILE_BYTES);
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
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(inputs.scale(row + lane)));
            store(of.out.numbers + (row + lane) * of.out.row + output + part,
                  _mm512_fmadd_ps(_mm512_castsi512_ps(block[lane]), scale, bias));
        }
    }
}

void multiply_by_tiles(const Operands& of, const Whole& inputs, int num_threads) {
    thread_local std::vector<__m512i> kept;
    const int64_t turned_size = turned_registers<16, 1>(inputs);
    kept.resize((of.num_rows + TILE - 1) / TILE * turned_size);
    for (int64_t row = 0; row < of.num_rows && !is_left_behind(); row += TILE)
        turn<16, 1>(inputs, row, kept.data() + row / TILE * turned_size);
    const __m512i* const turned = kept.data();  // this thread's
    share_outputs(of, 0, of.num_rows, num_threads, [&](const Operands& to, int64_t begin, int64_t end) {
        const Tiles held;
        for (int64_t output = begin; output < end; output += 2 * TILE)
            for (int64_t row = 0; row < to.num_rows; row += TILE)
                tiled(to, inputs, turned + row / TILE * turned_size, row, output);
    });
}

}  // namespace

int64_t kept_by_int8(int64_t num_rows, int64_t size) { return num_rows * Whole::row_size((size + BLOCK - 1) / BLOCK); }

int int8_linear(const void* inputs, const void* weights, const void* scales, const void* bias, int64_t num_rows,
                int64_t num_outputs, int64_t size, void* out, int num_threads, __m512i* kept) {
    if (num_rows > FEW_ROWS || size > MAX_SIZE) return 1;
    const Operands of = {static_cast<const bf16*>(inputs),
                         static_cast<const int8_t*>(weights),
                         static_cast<const float*>(scales),
                         static_cast<const bf16*>(bias),
                         num_rows,
                         num_outputs,
                         size,
                         {static_cast<bf16*>(out), num_outputs}};
    const Whole whole = {kept, num_rows, (size + BLOCK - 1) / BLOCK};
    share_ranges(num_rows, ROWS_PIECE, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) make_whole(of.inputs + row * size, size, whole, row);
    });
    if (num_rows >= MIN_ROWS_TILED && of.fit_tiles() && have_tiles()) {
        multiply_by_tiles(of, whole, num_threads);
        return 0;
    }
    if (num_rows > TILE_ROWS && of.fit_lanes()) {
        multiply_by_lanes(of, whole, num_threads);
        return 0;
    }
    share_outputs(of, 0, of.num_rows, num_threads, [&](const Operands& to, int64_t begin, int64_t end) {
        for (int64_t row = 0; row < num_rows; row += TILE_ROWS)
            for (int64_t output = begin; output < end; output += 16)
                few(to, whole, row, std::min(TILE_ROWS, num_rows - row), output);
    });
    return 0;
}

}  // namespace shoal

// out [num_rows, num_outputs] = inputs [num_rows, size] times weights [num_outputs, size] transposed times scales
// [num_outputs], plus bias [num_outputs], if given. inputs, bias and out are bfloat16, weights int8, scales float32.
// Returns 0, or 1 if there are more than FEW_ROWS rows, or size is above MAX_SIZE.
extern "C" int shoal_int8_linear(const void* inputs, const void* weights, const void* scales, const void* bias,
                                 int64_t num_rows, int64_t num_outputs, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    thread_local std::vector<__m512i> kept;  // the next product is as large
    kept.resize(std::max<size_t>(kept.size(), kept_by_int8(num_rows, size)));
    return int8_linear(inputs, weights, scales, bias, num_rows, num_outputs, size, out, num_threads, kept.data());
}
