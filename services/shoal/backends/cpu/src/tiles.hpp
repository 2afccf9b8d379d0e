// The processor's matrix unit (Intel's AMX): eight registers of sixteen rows of 64 bytes. One instruction multiplies
// sixteen rows of 32 numbers by sixteen columns of them, as much as 256 dot products of `simd.hpp`'s registers.
//
//     sums[16 rows][16 columns]  +=  left[16 rows][32 numbers]  *  right[16 pairs of numbers][16 columns][2]
//
// With SHOAL_EMULATE_TILES plain code does the same, to test on any machine what is built upon them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "simd.hpp"

namespace shoal {

constexpr int TILE = 16;          // rows, and columns of sums
constexpr int TILE_NUMBERS = 32;  // of bfloat16 in a row

// Whether this processor has the unit, and the system lets this process use it. Asked for once.
bool have_tiles();

// The rows of each tile where a Square has `num_rows`: an instruction takes as long as rows are many.
struct TileRows {
    uint8_t of[8];

    explicit TileRows(int64_t num_rows) {
        const auto upper = (uint8_t)std::clamp<int64_t>(num_rows, 1, TILE);
        const auto lower = (uint8_t)std::clamp<int64_t>(num_rows - TILE, 1, TILE);
        const uint8_t rows[] = {upper, upper, lower, lower, upper, lower, TILE, TILE};
        std::copy(rows, rows + 8, of);
    }
};

#ifdef SHOAL_EMULATE_TILES

struct Tiles {
    explicit Tiles(int64_t num_rows = 2 * TILE) {
        std::memset(registers(), 0, 8 * 1024);
        rows() = TileRows(num_rows);
    }

    template <int T>
    static void zero() {
        std::memset(at(T, 0), 0, 1024);
    }
    template <int T>
    static void load(const void* from, int64_t row_bytes) {
        for (int row = 0; row < rows().of[T]; row++)
            std::memcpy(at(T, row), static_cast<const char*>(from) + row * row_bytes, 64);
    }
    template <int T>
    static void store(void* to, int64_t row_bytes) {
        for (int row = 0; row < rows().of[T]; row++)
            std::memcpy(static_cast<char*>(to) + row * row_bytes, at(T, row), 64);
    }
    template <int SUMS, int LEFT, int RIGHT>
    static void multiply() {
        require_alike(SUMS, LEFT);
        for (int row = 0; row < rows().of[SUMS]; row++) {
            auto* const sums = reinterpret_cast<float*>(at(SUMS, row));
            const auto* const left = reinterpret_cast<const bf16*>(at(LEFT, row));
            for (int k = 0; k < TILE_NUMBERS; k++)
                for (int column = 0; column < TILE; column++)
                    sums[column] += widened(left[k]) *
                                    widened(reinterpret_cast<const bf16*>(at(RIGHT, k / 2))[2 * column + k % 2]);
        }
    }

   private:
    static char* registers() {
        alignas(64) static thread_local char all[8 * 1024];
        return all;
    }
    // The unit itself refuses it, too.
    static void require_alike(int sums, int left) {
        if (rows().of[sums] != rows().of[left]) std::abort();
    }
    static TileRows& rows() {
        static thread_local TileRows now(2 * TILE);
        return now;
    }
    static char* at(int tile, int row) { return registers() + 1024 * tile + 64 * row; }
    static float widened(bf16 number) {
        const uint32_t bits = (uint32_t)number << 16;
        float wide;
        std::memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
};

#else

// While it lives, the thread's tiles are ours, all of them whole, but for the rows that a Square hasn't. Whoever used them
// before gets back the shapes that were set: torch's products remember what they have set.
class Tiles {
   public:
    explicit Tiles(int64_t num_rows = 2 * TILE) {
        asm volatile("sttilecfg %0" : "=m"(before_));
        const TileRows rows(num_rows);
        Shapes ours = {};
        ours.palette = 1;
        for (int tile = 0; tile < 8; tile++) {
            ours.row_bytes[tile] = 64;
            ours.num_rows[tile] = rows.of[tile];
        }
        asm volatile("ldtilecfg %0" ::"m"(ours));
    }
    ~Tiles() {
        if (before_.palette) asm volatile("ldtilecfg %0" ::"m"(before_));
        else asm volatile("tilerelease");
    }
    Tiles(const Tiles&) = delete;

    template <int T>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    static void load(const void* from, int64_t row_bytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
    }
    template <int T>
    static void store(void* to, int64_t row_bytes) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
    }
    template <int SUMS, int LEFT, int RIGHT>
    static void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
    }

   private:
    struct alignas(64) Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t num_rows[16];
    };
    Shapes before_;
};

#endif

// Two by two tiles of sums, 32 rows of 32 columns: each row, and each column, that is loaded is used twice. `left_row`
// and so on are numbers from a row to the next.
struct Square {
    static void zero() {
        Tiles::zero<0>();
        Tiles::zero<1>();
        Tiles::zero<2>();
        Tiles::zero<3>();
    }
    static void load(const float* from, int64_t row) {
        Tiles::load<0>(from, 4 * row);
        Tiles::load<1>(from + TILE, 4 * row);
        Tiles::load<2>(from + TILE * row, 4 * row);
        Tiles::load<3>(from + TILE * row + TILE, 4 * row);
    }
    static void store(float* to, int64_t row) {
        Tiles::store<0>(to, 4 * row);
        Tiles::store<1>(to + TILE, 4 * row);
        Tiles::store<2>(to + TILE * row, 4 * row);
        Tiles::store<3>(to + TILE * row + TILE, 4 * row);
    }
    // Of sixteen rows alone.
    static void store_half(float* to, int64_t row) {
        Tiles::store<0>(to, 4 * row);
        Tiles::store<1>(to + TILE, 4 * row);
    }
    static void add_half(const bf16* left, int64_t left_row, const bf16* right, int64_t right_pair) {
        Tiles::load<4>(left, 2 * left_row);
        Tiles::load<6>(right, 2 * right_pair);
        Tiles::multiply<0, 4, 6>();
        Tiles::load<7>(right + 2 * TILE, 2 * right_pair);
        Tiles::multiply<1, 4, 7>();
    }
    // 32 rows of 32 numbers times 16 pairs for 32 columns.
    static void add(const bf16* left, int64_t left_row, const bf16* right, int64_t right_pair) {
        Tiles::load<4>(left, 2 * left_row);
        Tiles::load<6>(right, 2 * right_pair);
        Tiles::multiply<0, 4, 6>();
        Tiles::load<7>(right + 2 * TILE, 2 * right_pair);
        Tiles::multiply<1, 4, 7>();
        Tiles::load<5>(left + TILE * left_row, 2 * left_row);
        Tiles::multiply<2, 5, 6>();
        Tiles::multiply<3, 5, 7>();
    }
};

}  // namespace shoal
