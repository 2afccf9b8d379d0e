// Matrix products of any number of rows with weights that lie as they are multiplied (model/packed.py):
//
//     weights  [panel of 32 outputs][pair of inputs][output][2]
//
// What the last panel has more than there are outputs is zeros. A panel is read from end to end, and serves up to twelve
// rows at a time: 24 registers hold their sums, two what was loaded. What comes next is fetched meanwhile, a line or two
// with each pair: memory is as busy as the multipliers. Fetched by the dozen it would be waited for; and where rows are
// so few that all wait for memory, nothing is fetched far ahead: another thread may take that. Where there are tiles, they
// multiply: panels are what they take, and rows as they lie the other side.
//
// Where the outputs are gates and what they gate, nobody wants the products themselves: a panel of the ones is multiplied
// with its panel of the others, and only what comes of both is written.
//
// Weights of bytes (model/int8.py) lie alike, four inputs where there are two, and inputs become bytes, too (bytes.hpp).
// Registers hold two sums of each output then, of a block as whole numbers and of all blocks: of seven rows at a time.
#include "linear.hpp"

#include <type_traits>
#include <utility>

#include "bytes.hpp"
#include "kernels.hpp"
#include "pairs.hpp"
#include "room.hpp"
#include "tiles.hpp"

namespace shoal {
namespace {

constexpr int VECTORS = PANEL / 16;
constexpr int PAIRS = 16;  // a row's cache line holds so many, or fours of bytes: a block of these
constexpr int ROWS_OF_NUMBERS = 12, ROWS_OF_BYTES = 7;
template <class Inputs>
constexpr int ROWS = std::is_same_v<Inputs, Bytes> ? ROWS_OF_BYTES : ROWS_OF_NUMBERS;
constexpr int64_t FAR = 128;  // lines between what is fetched and what is read, where one group is all
static_assert(FAR % (PAIRS * VECTORS) == 0 && PAIRS * VECTORS == LINE);
constexpr int64_t NEAR_BYTES = 512 * 1024;      // of a block of many rows, widened
constexpr int64_t FEWEST = 2, MOST = 8;         // groups of such a block

// What is fetched meanwhile: `number` lines, those from `begin` to `end`, and then those at `then`.
struct Fetched {
    int64_t number;
    const bf16 *begin, *end, *then;

    const bf16* operator[](int64_t line) const {
        const bf16* const at = begin + line * LINE;
        return at < end ? at : then + (at - end);
    }
};

// The rows [first, first + number) of the inputs, which are Numbers or Bytes, in groups as equal as can be.
template <class Inputs>
struct Rows {
    Inputs inputs;
    int64_t first, number;

    int64_t num_groups() const { return (number + ROWS<Inputs> - 1) / ROWS<Inputs>; }
    Rows group(int64_t index) const {
        const int64_t begin = number * index / num_groups(), end = number * (index + 1) / num_groups();
        return {inputs.from(begin), first + begin, end - begin};
    }
};

// What some inputs, those of a line of each row, add to the sums of N rows: by pairs of bfloat16 as they come, by bytes at
// the block's end.
template <int N, class Inputs>
struct Adding;

template <int N>
struct Adding<N, Numbers> {
    __m512 (&sums)[N][VECTORS];
    const Numbers& inputs;

    inline __attribute__((always_inline)) void begin(int64_t) {}
    inline __attribute__((always_inline)) void add(int64_t pair, const bf16* weights) {
        each_half([&]<int HALF>() __attribute__((always_inline)) {
            Factor shared[VECTORS];
            for (int v = 0; v < VECTORS; v++) shared[v] = factor_of<HALF>(_mm512_loadu_si512(weights + v * LINE));
#pragma GCC unroll ROWS_OF_NUMBERS
            for (int n = 0; n < N; n++) add_spread<HALF>(sums[n], inputs[n] + 2 * pair, shared);
        });
    }
    inline __attribute__((always_inline)) void end(int64_t) {}
};

template <int N>
struct Adding<N, Bytes> {
    __m512 (&sums)[N][VECTORS];
    const Bytes& inputs;
    __m512i whole[N][VECTORS];

    inline __attribute__((always_inline)) void begin(int64_t block) {
#pragma GCC unroll ROWS_OF_BYTES
        for (int n = 0; n < N; n++)
#pragma GCC unroll VECTORS
            for (int v = 0; v < VECTORS; v++) whole[n][v] = _mm512_set1_epi32(inputs.begins(n)[block]);
    }
    inline __attribute__((always_inline)) void add(int64_t four, const bf16* weights) {
        __m512i shared[VECTORS];
        for (int v = 0; v < VECTORS; v++) shared[v] = _mm512_loadu_si512(weights + v * LINE);
#pragma GCC unroll ROWS_OF_BYTES
        for (int n = 0; n < N; n++) add_four(whole[n], inputs.bytes(n) + 4 * four, shared);
    }
    inline __attribute__((always_inline)) void end(int64_t block) {
#pragma GCC unroll ROWS_OF_BYTES
        for (int n = 0; n < N; n++) {
            const __m512 scale = _mm512_set1_ps(inputs.scales(n)[block]);
#pragma GCC unroll VECTORS
            for (int v = 0; v < VECTORS; v++)
                sums[n][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[n][v]), scale, sums[n][v]);
        }
    }
};

// A panel's outputs of N rows, or to `kept` their sums. LINES are fetched with each pair of inputs, until all are.
template <class Inputs, int N, bool IS_KEPT, int LINES>
void multiply(const Operands& of, int64_t panel, const Rows<Inputs>& rows, const Fetched& fetched, float* kept) {
    const bf16* const weights = of.panel(panel);
    const int64_t size = of.size;
    const bool is_once = LINES == VECTORS && fetches_once();
    __m512 sums[N][VECTORS];
    for (int n = 0; n < N; n++)
        for (int v = 0; v < VECTORS; v++) sums[n][v] = _mm512_setzero_ps();
    // Loops over sums are unrolled, here and above: Clang would keep in memory what one indexes.
    const auto add = [&]<bool FETCHES>(int64_t first) __attribute__((always_inline)) {
        const bf16* const ahead = FETCHES ? fetched[first * LINES] : nullptr;
        Adding<N, Inputs> adding = {sums, rows.inputs};
        adding.begin(first / PAIRS);
#pragma GCC unroll 2
        for (int64_t pair = first; pair < first + PAIRS; pair++) {
            if constexpr (FETCHES)
                for (int line = 0; line < LINES; line++) {
                    const bf16* const from = ahead + ((pair - first) * LINES + line) * LINE;
                    if (is_once) fetch_once(from);
                    else fetch(from);
                }
            adding.add(pair, weights + pair * VECTORS * LINE);
        }
        adding.end(first / PAIRS);
    };
    const int64_t fetching = std::min(size / 2, fetched.number / LINES);
    int64_t first = 0;
    for (; first < fetching; first += PAIRS) add.template operator()<true>(first);
    for (; first < size / 2; first += PAIRS) add.template operator()<false>(first);
#pragma GCC unroll VECTORS
    for (int v = 0; v < VECTORS; v++) {
        const int64_t output = panel * PANEL + 16 * v;
        const __m512 bias = IS_KEPT ? _mm512_setzero_ps() : of.bias_of(output);
        const __m512 scale = of.scales ? _mm512_loadu_ps(of.scales + output) : _mm512_set1_ps(1);
#pragma GCC unroll ROWS_OF_NUMBERS
        for (int n = 0; n < N; n++) {
            const __m512 sum = of.scales ? _mm512_mul_ps(sums[n][v], scale) : sums[n][v];
            if constexpr (IS_KEPT) _mm512_store_ps(kept + n * PANEL + 16 * v, sum);
            else of.put(rows.first + n, output, _mm512_add_ps(sum, bias));
        }
    }
}

template <class Inputs>
using Multiply = decltype(&multiply<Inputs, 1, false, 1>);

template <class Inputs, bool IS_KEPT, int LINES, int... N>
constexpr Multiply<Inputs> of_rows(int64_t number, std::integer_sequence<int, N...>) {
    constexpr Multiply<Inputs> all[] = {multiply<Inputs, N + 1, IS_KEPT, LINES>...};
    return all[number - 1];
}

// That of so many rows.
template <class Inputs, bool IS_KEPT, int LINES>
Multiply<Inputs> of_rows(int64_t number) {
    return of_rows<Inputs, IS_KEPT, LINES>(number, std::make_integer_sequence<int, ROWS<Inputs>>());
}

// One of the groups of rows goes through a panel. What is fetched is, where one group is all, what this thread reads soon:
// the panel itself, FAR lines on, and then `next`, a line for each that is read. Else it's the group's share of `next`, at
// half that pace: the multipliers have more to do.
template <bool IS_KEPT, class Inputs>
void pass(const Operands& of, int64_t panel, const bf16* next, const Rows<Inputs>& rows, int64_t group, float* kept) {
    const int64_t num_groups = rows.num_groups();
    if (num_groups == 1) {
        const int64_t ahead = std::min(FAR, of.size);
        const bf16* const own = of.panel(panel);
        const Fetched fetched = {next ? of.size : of.size - ahead, own + ahead * LINE, own + of.size * LINE, next};
        return of_rows<Inputs, IS_KEPT, VECTORS>(rows.number)(of, panel, rows, fetched, kept);
    }
    Fetched fetched = {};
    if (next) {
        const auto share = [&](int64_t number) { return of.size / PAIRS * number / num_groups * PAIRS; };
        fetched = {share(group + 1) - share(group), next + share(group) * LINE, next + of.size * LINE, nullptr};
    }
    const Rows<Inputs> own = rows.group(group);
    of_rows<Inputs, IS_KEPT, 1>(own.number)(of, panel, own, fetched, kept);
}

// All of `rows`; `next` is the panel that this thread takes then, if there's such a one.
template <class Inputs>
void multiply_panel(const Operands& of, const Rows<Inputs>& rows, int64_t panel, int64_t next) {
    const int64_t num_groups = rows.num_groups(), gated = of.second_panel(panel);
    const bf16* const own_next = next < of.num_turns() ? of.panel(next) : nullptr;
    alignas(64) float own[ROWS<Inputs> * PANEL], gated_sums[ROWS<Inputs> * PANEL];
    for (int64_t group = 0; group < num_groups; group++) {
        if (!of.is_gated()) {
            pass<false>(of, panel, own_next, rows, group, nullptr);
            continue;
        }
        const bf16* const gated_next = own_next ? of.panel(of.second_panel(next)) : nullptr;
        pass<true>(of, panel, num_groups == 1 ? of.panel(gated) : own_next, rows, group, own);
        pass<true>(of, gated, num_groups == 1 ? own_next : gated_next, rows, group, gated_sums);
        const Rows<Inputs> made = rows.group(group);
        put_gated(of, panel, made.first, made.number, own, gated_sums);
    }
}

// Those of the inputs, as this thread spreads them.
Rows<Numbers> rows_of(const Operands& of, int64_t first, int64_t number) {
    static thread_local Room<Number> widened;
    Number* const room = widened.of(number * of.size * ROOM_OF_A_NUMBER);
    return {spreadable(of.inputs + first * of.size, of.size, number, of.size, room), first, number};
}

// Each thread takes some panels, and all rows.
template <class Inputs>
void multiply_panels(const Operands& of, const Rows<Inputs>& rows, int num_threads) {
    const int64_t at_once = panels_at_once(of, num_threads);
    share_panels(of, num_threads, at_once, [&](const Operands& to, int64_t begin, int64_t end) {
        // The piece after this one is another thread's, most likely.
        for (int64_t panel = begin; panel < end; panel++)
            multiply_panel(to, rows, panel, panel + 1 < end ? panel + 1 : begin + at_once * num_threads);
    });
}

// Each thread takes some of many rows, widened in the second cache, and all panels. Rows are shared in whole groups: of
// one that isn't full, weights would be widened for fewer rows.
void multiply_blocks(const Operands& of, int num_threads) {
    constexpr int64_t ROWS = ROWS_OF_NUMBERS;
    const int64_t most = std::clamp<int64_t>(NEAR_BYTES / (ROWS * of.size * (int64_t)sizeof(Number)), FEWEST, MOST);
    const int64_t num_groups = (of.num_rows + ROWS - 1) / ROWS, needed = (num_groups + most - 1) / most;
    const int64_t num_blocks = std::min((needed + num_threads - 1) / num_threads * num_threads, num_groups);
    share(num_blocks, num_threads, [&](int64_t block) {
        const auto row = [&](int64_t index) { return std::min(num_groups * index / num_blocks * ROWS, of.num_rows); };
        const Rows<Numbers> rows = rows_of(of, row(block), row(block + 1) - row(block));
        for (int64_t panel = 0; panel < of.num_turns(); panel++) multiply_panel(of, rows, panel, panel + 1);
    });
}

void multiply_by_rows(const Operands& of, int num_threads) {
    // As they lie, many rows are read from anywhere as quickly.
    if (HALVES == 2 && of.num_rows > MANY_ROWS) return multiply_blocks(of, num_threads);
    const bool is_done = HALVES == 2 && is_left_behind();  // there is nothing to widen then
    multiply_panels(of, rows_of(of, 0, is_done ? 0 : of.num_rows), num_threads);
}

int linear(const Operands& of, int num_threads) {
    if (of.size % (2 * PAIRS) || of.num_rows < 1) return 1;
    // A single row takes as long as memory does, either way.
    if (of.num_rows == 1 || !have_tiles()) multiply_by_rows(of, num_threads);
    else if (of.num_rows <= MANY_ROWS) multiply_by_tiles(of, num_threads);
    else multiply_many_by_tiles(of, num_threads);
    return 0;
}

}  // namespace

int64_t kept_by_int8(int64_t num_rows, int64_t size) { return num_rows * Bytes::row_bytes(size); }

int int8_linear(const void* inputs, const void* weights, const void* scales, const void* bias, int64_t num_rows,
                int64_t num_outputs, int64_t size, int activation, void* out, int num_threads, char* kept) {
    constexpr int64_t PIECE = 8;
    const Activation activations[] = {Activation::NONE, Activation::SILU, Activation::GELU};
    Operands of = {static_cast<const bf16*>(inputs), static_cast<const bf16*>(weights), static_cast<const bf16*>(bias),
                   num_rows, num_outputs, size, {static_cast<bf16*>(out), num_outputs}, activations[activation + 1]};
    of.scales = static_cast<const float*>(scales);
    if (of.is_gated()) of.out.row = num_outputs / 2;
    if (num_rows < 1 || (of.is_gated() && num_outputs % (2 * PANEL))) return 1;
    const Bytes bytes = {kept, size};
    share_ranges(num_rows, PIECE, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) bytes.make(row, of.inputs + row * size);
    });
    of.size = bytes.num_blocks() * LINE;  // a line of a row, or of a panel's output, is a block
    multiply_panels(of, Rows<Bytes>{bytes, 0, num_rows}, num_threads);
    return 0;
}

}  // namespace shoal

// out [num_rows, num_outputs] = inputs [num_rows, size] times weights [num_outputs, size] transposed, which lie in panels,
// plus bias [num_outputs], if given. Returns 0, or 1 if size isn't a multiple of 32, or there are no rows.
extern "C" int shoal_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows,
                            int64_t num_outputs, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    return linear({static_cast<const bf16*>(inputs), static_cast<const bf16*>(weights), static_cast<const bf16*>(bias),
                   num_rows, num_outputs, size, {static_cast<bf16*>(out), num_outputs}, Activation::NONE},
                  num_threads);
}

// out [num_rows, num_gated] = activation(products[:, :num_gated]) * products[:, num_gated:], where products are what
// shoal_linear makes with twice as many outputs. Returns 0, or 1 if size or num_gated isn't a multiple of 32, or there
// are no rows.
extern "C" int shoal_gated_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows,
                                  int64_t num_gated, int64_t size, int activation, void* out, int num_threads) {
    using namespace shoal;
    if (num_gated % PANEL) return 1;
    return linear({static_cast<const bf16*>(inputs), static_cast<const bf16*>(weights), static_cast<const bf16*>(bias),
                   num_rows, 2 * num_gated, size, {static_cast<bf16*>(out), num_gated},
                   activation == 0 ? Activation::SILU : Activation::GELU},
                  num_threads);
}

// What shoal_linear makes, or with an activation (0 or 1; none is -1) shoal_gated_linear, of weights that are bytes, times
// scales float32 [num_outputs], both with whole panels: [panel of 32 outputs][four inputs][output][4], 128 added to each
// (model/int8.py). Inputs are rounded to bytes (bytes.hpp). Returns 0, or 1 if there are no rows, or gates aren't whole
// panels.
extern "C" int shoal_int8_linear(const void* inputs, const void* weights, const void* scales, const void* bias,
                                 int64_t num_rows, int64_t num_outputs, int64_t size, int activation, void* out,
                                 int num_threads) {
    using namespace shoal;
    static thread_local Room<char> room;
    return int8_linear(inputs, weights, scales, bias, num_rows, num_outputs, size, activation, out, num_threads,
                       room.of(kept_by_int8(num_rows, size)));
}
