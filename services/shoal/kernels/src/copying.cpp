// Rows of bytes from one place to others, and their CRC32C (RFC 3720), in one pass: what was checked is what was
// written, though somebody else may write to the source meanwhile.
#include <immintrin.h>

#include <cstdint>

namespace shoal {
namespace {

// The instruction takes 8 bytes in a cycle, but says what came of them after three: so three parts go at once. Each is as
// long as possible, since in short ones the processor doesn't see by itself what is next.
constexpr int PARTS = 3;
using Word = uint64_t __attribute__((aligned(1), may_alias));
constexpr uint32_t POLYNOMIAL = 0x82f63b78, ONE = 1u << 31;  // the bit of the highest value is the lowest power

// a * b modulo the polynomial, bits standing for powers of x.
uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1) {
        if (a & ONE) product ^= b;
        b = b >> 1 ^ (b & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

// What a checksum is multiplied by, so that it's that of the same bytes with `num_bytes` zeros behind them: x^(8 n).
uint32_t behind(uint64_t num_bytes) {
    uint32_t result = ONE, power = ONE >> 8;
    for (; num_bytes; num_bytes >>= 1) {
        if (num_bytes & 1) result = multiply(result, power);
        power = multiply(power, power);
    }
    return result;
}

// Each word is read once (volatile): what another process writes in between must not be stored and not checked.
template <int COUNT>
inline void copy(const volatile Word* from, int64_t from_next, Word* const (&to)[COUNT], int64_t num_words,
                 uint64_t (&crc)[COUNT]) {
    for (int64_t word = 0; word < num_words; word++)
        for (int part = 0; part < COUNT; part++) {
            const uint64_t bytes = from[part * from_next + word];
            to[part][word] = bytes;
            crc[part] = _mm_crc32_u64(crc[part], bytes);
        }
}

}  // namespace
}  // namespace shoal

// Copies [num_targets, num_rows, row_bytes] to the rows `at` [num_rows] of each target, or, without `at`, to its first
// ones. `crc` becomes the checksum of all. Returns 0, or 1 if row_bytes isn't a multiple of 8.
extern "C" int shoal_copy_rows(const void* source, int64_t num_targets, int64_t num_rows, int64_t row_bytes,
                               void* const* targets, const int64_t* at, uint32_t* crc) {
    using namespace shoal;
    if (row_bytes <= 0 || row_bytes % 8) return 1;
    const int64_t num_words = row_bytes / 8, part_rows = num_rows / PARTS;
    const uint32_t shift = behind(part_rows * row_bytes);
    const Word* from = static_cast<const Word*>(source);
    uint64_t all[1] = {~0u};
    for (int64_t target = 0; target < num_targets; target++) {
        const auto to = [&](int64_t row) {
            return static_cast<Word*>(targets[target]) + (at ? at[row] : row) * num_words;
        };
        uint64_t parts[PARTS] = {all[0]};
        for (int64_t row = 0; row < part_rows; row++, from += num_words)
            copy<PARTS>(from, part_rows * num_words, {to(row), to(part_rows + row), to(2 * part_rows + row)}, num_words,
                        parts);
        from += (PARTS - 1) * part_rows * num_words;
        all[0] = multiply(multiply((uint32_t)parts[0], shift) ^ (uint32_t)parts[1], shift) ^ (uint32_t)parts[2];
        for (int64_t row = PARTS * part_rows; row < num_rows; row++, from += num_words)
            copy<1>(from, 0, {to(row)}, num_words, all);
    }
    *crc = ~(uint32_t)all[0];
    return 0;
}
