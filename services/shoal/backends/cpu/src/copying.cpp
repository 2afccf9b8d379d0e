// Rows of bytes from one place to others, and their CRC32C (RFC 3720), in one pass: what was checked is what was
// written, though somebody else may write to the source meanwhile.
#include <immintrin.h>

#include <cstdint>

namespace shoal {
namespace {

constexpr int64_t LINE_BYTES = 64;
constexpr uint32_t POLYNOMIAL = 0x82f63b78, ONE = 1u << 31;  // the bit of the highest value is the lowest power

// x^power modulo the polynomial.
constexpr uint64_t x_to(int power) {
    uint32_t result = ONE;
    for (; power; power--) result = result >> 1 ^ (result & 1 ? POLYNOMIAL : 0);
    return result;
}

// What the halves of 16 bytes are multiplied by, so that both stand where they'd stand with a line of zeros behind them:
// the first one's powers are higher by 64. A product of reflected bits is short of one power, and these of 32 more.
constexpr uint64_t FIRST = x_to(8 * LINE_BYTES + 64 - 32) << 1, SECOND = x_to(8 * LINE_BYTES - 32) << 1;

// All lines so far, as one that has the same remainder ("Fast CRC computation using PCLMULQDQ", Gopal and others, 2009).
class Folded {
   public:
    void add(__m512i line) {
        const __m512i first = multiplied<0x00>(line_), second = multiplied<0x11>(line_);
        line_ = _mm512_ternarylogic_epi64(first, second, _mm512_xor_si512(line, start_), 0x96);
        start_ = _mm512_setzero_si512();
    }

    uint32_t crc() const {
        alignas(LINE_BYTES) uint64_t words[LINE_BYTES / sizeof(uint64_t)];
        _mm512_store_si512(words, line_);
        uint64_t crc = 0;
        for (const uint64_t word : words) crc = _mm_crc32_u64(crc, word);
        return ~(uint32_t)crc;
    }

   private:
    // Of each 16 bytes one half: all four of them at once, or one after the other on processors without VPCLMULQDQ.
    template <int HALVES>
    static __m512i multiplied(__m512i line) {
#ifdef __VPCLMULQDQ__
        return _mm512_clmulepi64_epi128(line, _mm512_set4_epi64(SECOND, FIRST, SECOND, FIRST), HALVES);
#else
        const __m128i by = _mm_set_epi64x(SECOND, FIRST);
        const auto quarter = [&]<int AT>() {
            return _mm_clmulepi64_si128(_mm512_extracti32x4_epi32(line, AT), by, HALVES);
        };
        const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(quarter.template operator()<0>()),
                                               quarter.template operator()<1>(), 1);
        return _mm512_inserti32x4(_mm512_inserti32x4(low, quarter.template operator()<2>(), 2),
                                  quarter.template operator()<3>(), 3);
#endif
    }

    __m512i line_ = _mm512_setzero_si512();
    __m512i start_ = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1));  // what the first four bytes are turned over by
};

// PAST: to memory past the caches, which needn't fetch first what is overwritten as a whole.
template <bool PAST>
void copy(const char* from, char* to, int64_t num_bytes, Folded& folded) {
    for (int64_t byte = 0; byte < num_bytes; byte += LINE_BYTES) {
        __m512i line = _mm512_loadu_si512(from + byte);
        asm("" : "+v"(line));  // read once: what another process writes in between must not be stored and not checked
        if constexpr (PAST) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + byte), line);
        } else {
            _mm512_storeu_si512(to + byte, line);
        }
        folded.add(line);
    }
}

}  // namespace
}  // namespace shoal

// Copies [num_targets, num_rows, row_bytes] to the rows `at` [num_rows] of each target, or, without `at`, to its first
// ones. `crc` becomes the checksum of all. Returns 0, or 1 if row_bytes isn't a multiple of 64.
extern "C" int shoal_copy_rows(const void* source, int64_t num_targets, int64_t num_rows, int64_t row_bytes,
                               void* const* targets, const int64_t* at, uint32_t* crc) {
    using namespace shoal;
    if (row_bytes <= 0 || row_bytes % LINE_BYTES) return 1;
    const char* from = static_cast<const char*>(source);
    Folded folded;
    for (int64_t target = 0; target < num_targets; target++) {
        char* const to = static_cast<char*>(targets[target]);
        // Rows of a pool are read much later; what is copied to one place, by somebody who waits for it.
        const bool past = at && reinterpret_cast<uintptr_t>(to) % LINE_BYTES == 0;
        for (int64_t row = 0; row < num_rows; row++, from += row_bytes) {
            char* const place = to + (at ? at[row] : row) * row_bytes;
            past ? copy<true>(from, place, row_bytes, folded) : copy<false>(from, place, row_bytes, folded);
        }
    }
    _mm_sfence();  // before anybody is told
    *crc = num_targets * num_rows ? folded.crc() : 0;
    return 0;
}

// The other way round: the rows `at` [num_rows] of each source to [num_sources, num_rows, row_bytes]. As above.
extern "C" int shoal_gather_rows(const void* const* sources, int64_t num_sources, const int64_t* at, int64_t num_rows,
                                 int64_t row_bytes, void* target, uint32_t* crc) {
    using namespace shoal;
    if (row_bytes <= 0 || row_bytes % LINE_BYTES) return 1;
    char* to = static_cast<char*>(target);
    Folded folded;
    for (int64_t source = 0; source < num_sources; source++) {
        const char* const from = static_cast<const char*>(sources[source]);
        for (int64_t row = 0; row < num_rows; row++, to += row_bytes)
            copy<false>(from + at[row] * row_bytes, to, row_bytes, folded);
    }
    *crc = num_sources * num_rows ? folded.crc() : 0;
    return 0;
}
