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
#include <algorithm>
#include <vector>

#include "activations.hpp"
#include "apart.hpp"
#include "crew.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace shoal {
namespace {

constexpr int64_t PANEL = 32;
constexpr int VECTORS = PANEL / 16;
constexpr int ROWS = 12;
constexpr int PAIRS = 16;          // a row's cache line holds so many
constexpr int64_t FAR = 128;       // lines between what is fetched and what is read, where one group is all
static_assert(FAR % (PAIRS * VECTORS) == 0 && PAIRS * VECTORS == LINE);
constexpr int64_t MAX_PANELS = 8;  // that a thread takes at a time: memory is quickest where it's read from end to end
constexpr int64_t TURNS = 3;       // but each thread comes so often, or some would wait for others at the end
constexpr int64_t MANY_ROWS = 64;  // with more, one panel is work enough
constexpr int64_t MUCH = 64 * 1536 * MAX_PANELS;  // rows, inputs and panels: more would take others' patience

struct Operands {
    const bf16 *inputs, *weights, *bias;
    int64_t num_rows, num_outputs, size;
    Output out;
    Activation activation;  // none, or the outputs' second half is gated by the first one

    bool is_gated() const { return activation != Activation::NONE; }
    int64_t num_panels() const { return (num_outputs + PANEL - 1) / PANEL; }
    // That are multiplied together with another one.
    int64_t num_turns() const { return is_gated() ? num_panels() / 2 : num_panels(); }
    const bf16* panel(int64_t index) const { return weights + index * PANEL * size; }

    // Of sixteen outputs, those that there are.
    __mmask16 mask(int64_t output) const {
        return (__mmask16)((1u << std::clamp<int64_t>(num_outputs - output, 0, 16)) - 1);
    }
    __m512 bias_of(int64_t output) const {
        if (!bias) return _mm512_setzero_ps();
        const __m256i halves = _mm256_maskz_loadu_epi16(mask(output), bias + output);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    void put(int64_t row, int64_t output, __m512 sums) const {
        _mm256_mask_storeu_epi16(out.numbers + row * out.row + output, mask(output), (__m256i)_mm512_cvtneps_pbh(sums));
    }
};

// Of some rows, the sums [rows, PANEL] of a panel, and where it is gated, of what its numbers gate.
struct Sums {
    alignas(64) float own[2 * TILE * PANEL], gated[2 * TILE * PANEL];
};

inline __m512 rounded(__m512 numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers)), 16));
}

void put(const Operands& of, int64_t panel, int64_t row, int64_t num_rows, const Sums& sums) {
    for (int64_t output = panel * PANEL, at = 0; at < PANEL; output += 16, at += 16) {
        const __m512 bias = of.bias_of(output);
        for (int64_t n = 0; n < num_rows; n++)
            of.put(row + n, output, _mm512_add_ps(_mm512_load_ps(sums.own + n * PANEL + at), bias));
    }
}

// Rounded before, too: a row's numbers must not depend on whether it is one of few.
void put_gated(const Operands& of, int64_t panel, int64_t row, int64_t num_rows, const Sums& sums) {
    const int64_t num_gated = of.num_outputs / 2;
    for (int64_t output = panel * PANEL, at = 0; at < PANEL; output += 16, at += 16) {
        const __m512 bias = of.bias_of(output), gated_bias = of.bias_of(num_gated + output);
        for (int64_t n = 0; n < num_rows; n++) {
            const __m512 own = rounded(_mm512_add_ps(_mm512_load_ps(sums.own + n * PANEL + at), bias));
            const __m512 gated = rounded(_mm512_add_ps(_mm512_load_ps(sums.gated + n * PANEL + at), gated_bias));
            store(of.out.numbers + (row + n) * of.out.row + output,
                  _mm512_mul_ps(activate(of.activation, own), gated));
        }
    }
}

// What is fetched meanwhile: `number` lines, those from `begin` to `end`, and then those at `then`.
struct Fetched {
    int64_t number;
    const bf16 *begin, *end, *then;

    const bf16* operator[](int64_t line) const {
        const bf16* const at = begin + line * LINE;
        return at < end ? at : then + (at - end);
    }
};

// A panel's outputs of N rows, or to `kept` their sums. LINES are fetched with each pair of inputs, until all are.
template <int N, bool IS_KEPT, int LINES>
void multiply(const Operands& of, int64_t panel, int64_t row, const Fetched& fetched, float* kept) {
    const bf16* const weights = of.panel(panel);
    const bf16* const inputs = of.inputs + row * of.size;
    const int64_t size = of.size;
    const bool is_once = LINES == VECTORS && fetches_once();
    __m512 sums[N][VECTORS];
    for (int n = 0; n < N; n++)
        for (int v = 0; v < VECTORS; v++) sums[n][v] = _mm512_setzero_ps();
    const auto add = [&]<bool FETCHES>(int64_t first) __attribute__((always_inline)) {
        const bf16* const ahead = FETCHES ? fetched[first * LINES] : nullptr;
#pragma GCC unroll 2
        for (int64_t pair = first; pair < first + PAIRS; pair++) {
            if constexpr (FETCHES)
                for (int line = 0; line < LINES; line++) {
                    const bf16* const from = ahead + ((pair - first) * LINES + line) * LINE;
                    if (is_once) fetch_once(from);
                    else fetch(from);
                }
            __m512bh shared[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                shared[v] = (__m512bh)_mm512_loadu_si512(weights + (pair * VECTORS + v) * LINE);
            for (int n = 0; n < N; n++) {
                const __m512bh own = (__m512bh)spread<16>(inputs + n * size + 2 * pair);
                for (int v = 0; v < VECTORS; v++) sums[n][v] = _mm512_dpbf16_ps(sums[n][v], own, shared[v]);
            }
        }
    };
    const int64_t fetching = std::min(size / 2, fetched.number / LINES);
    int64_t first = 0;
    for (; first < fetching; first += PAIRS) add.template operator()<true>(first);
    for (; first < size / 2; first += PAIRS) add.template operator()<false>(first);
    for (int v = 0; v < VECTORS; v++) {
        const int64_t output = panel * PANEL + 16 * v;
        const __m512 bias = IS_KEPT ? _mm512_setzero_ps() : of.bias_of(output);
        for (int n = 0; n < N; n++) {
            if constexpr (IS_KEPT) _mm512_store_ps(kept + n * PANEL + 16 * v, sums[n][v]);
            else of.put(row + n, output, _mm512_add_ps(sums[n][v], bias));
        }
    }
}

template <bool IS_KEPT, int LINES>
constexpr decltype(&multiply<1, IS_KEPT, LINES>) MULTIPLY[ROWS] = {
    multiply<1, IS_KEPT, LINES>, multiply<2, IS_KEPT, LINES>, multiply<3, IS_KEPT, LINES>,
    multiply<4, IS_KEPT, LINES>, multiply<5, IS_KEPT, LINES>, multiply<6, IS_KEPT, LINES>,
    multiply<7, IS_KEPT, LINES>, multiply<8, IS_KEPT, LINES>, multiply<9, IS_KEPT, LINES>,
    multiply<10, IS_KEPT, LINES>, multiply<11, IS_KEPT, LINES>, multiply<12, IS_KEPT, LINES>,
};

// One of so many groups of rows, as equal as can be, goes through a panel. What is fetched is, where one group is all,
// what this thread reads soon: the panel itself, FAR lines on, and then `next`, a line for each that is read. Else it's
// the group's share of `next`, at half that pace: the multipliers have more to do.
template <bool IS_KEPT>
void pass(const Operands& of, int64_t panel, const bf16* next, int64_t group, int64_t num_groups, float* kept) {
    const int64_t begin = of.num_rows * group / num_groups, end = of.num_rows * (group + 1) / num_groups;
    if (num_groups == 1) {
        const int64_t ahead = std::min(FAR, of.size);
        const bf16* const own = of.panel(panel);
        const Fetched fetched = {next ? of.size : of.size - ahead, own + ahead * LINE, own + of.size * LINE, next};
        return MULTIPLY<IS_KEPT, VECTORS>[end - 1](of, panel, 0, fetched, kept);
    }
    Fetched fetched = {};
    if (next) {
        const auto share = [&](int64_t number) { return of.size / PAIRS * number / num_groups * PAIRS; };
        fetched = {share(group + 1) - share(group), next + share(group) * LINE, next + of.size * LINE, nullptr};
    }
    MULTIPLY<IS_KEPT, 1>[end - begin - 1](of, panel, begin, fetched, kept);
}

// All rows; `next` is the panel that this thread takes then, if there's such a one.
void multiply_panel(const Operands& of, int64_t panel, int64_t next) {
    const int64_t num_groups = (of.num_rows + ROWS - 1) / ROWS, gated = of.num_turns() + panel;
    const bf16* const own_next = next < of.num_turns() ? of.panel(next) : nullptr;
    Sums sums;
    for (int64_t group = 0; group < num_groups; group++) {
        if (!of.is_gated()) {
            pass<false>(of, panel, own_next, group, num_groups, nullptr);
            continue;
        }
        const bf16* const gated_next = own_next ? of.panel(of.num_turns() + next) : nullptr;
        pass<true>(of, panel, num_groups == 1 ? of.panel(gated) : own_next, group, num_groups, sums.own);
        pass<true>(of, gated, num_groups == 1 ? own_next : gated_next, group, num_groups, sums.gated);
        const int64_t begin = of.num_rows * group / num_groups, end = of.num_rows * (group + 1) / num_groups;
        put_gated(of, panel, begin, end - begin, sums);
    }
}

int64_t panels_at_once(const Operands& of, int num_threads) {
    if (of.num_rows > MANY_ROWS) return 1;
    const int64_t most = std::clamp<int64_t>(MUCH / (of.num_rows * of.size), 1, MAX_PANELS);
    return std::clamp<int64_t>(of.num_turns() / (TURNS * num_threads), 1, most);
}

// The panels of `of`, `at_once` at a time, by `multiply(to, begin, end)`.
template <class Multiply>
void share_panels(const Operands& of, int num_threads, int64_t at_once, const Multiply& multiply) {
    const int64_t num_made = of.is_gated() ? of.num_outputs / 2 : of.num_outputs;
    share_ranges(of.num_turns(), at_once, num_threads, [&](int64_t begin, int64_t end, Claim& claim) {
        const Part made = {0, of.num_rows, begin * PANEL, std::min(end * PANEL, num_made)};
        make_part(of.out, made, claim, [&](const Output& out) {
            Operands to = of;
            to.out = out;
            multiply(to, begin, end);
        });
    });
}

void multiply_by_rows(const Operands& of, int num_threads) {
    const int64_t at_once = panels_at_once(of, num_threads);
    share_panels(of, num_threads, at_once, [&](const Operands& to, int64_t begin, int64_t end) {
        // The piece after this one is another thread's, most likely.
        for (int64_t panel = begin; panel < end; panel++)
            multiply_panel(to, panel, panel + 1 < end ? panel + 1 : begin + at_once * num_threads);
    });
}

// A panel's sums of up to 32 rows, or 16. Nothing is fetched ahead: the processor does that by itself, and a tile's load
// waits for sixteen lines at once.
template <bool IS_WHOLE>
void multiply_by_tiles(const Operands& of, int64_t panel, const bf16* inputs, float* sums) {
    constexpr int64_t RIGHT_PAIR = 2 * PANEL;
    const bf16* const weights = of.panel(panel);
    Square::zero();
    for (int64_t k = 0; k < of.size; k += TILE_NUMBERS) {
        const bf16* const right = weights + k / 2 * RIGHT_PAIR;
        if constexpr (IS_WHOLE) Square::add(inputs + k, of.size, right, RIGHT_PAIR);
        else Square::add_half(inputs + k, of.size, right, RIGHT_PAIR);
    }
    if constexpr (IS_WHOLE) Square::store(sums, PANEL);
    else Square::store_half(sums, PANEL);
}

void multiply_by_tiles(const Operands& of, int num_threads) {
    constexpr int64_t MOST = 2 * TILE;
    // The last rows, with nothing after them where a tile wants more.
    const int64_t last = of.num_rows % TILE ? (of.num_rows - 1) / MOST * MOST : of.num_rows;
    static thread_local std::vector<bf16> kept;
    if (last < of.num_rows && !is_left_behind()) {
        kept.assign(MOST * of.size, 0);
        std::copy(of.inputs + last * of.size, of.inputs + of.num_rows * of.size, kept.begin());
    }
    const bf16* const filled = kept.data();  // the crew's threads have a `kept` of their own
    share_panels(of, num_threads, panels_at_once(of, num_threads), [&](const Operands& to, int64_t begin, int64_t end) {
        const Tiles held;
        Sums sums;
        for (int64_t panel = begin; panel < end; panel++)
            for (int64_t row = 0; row < to.num_rows; row += MOST) {
                const bf16* const inputs = row < last ? to.inputs + row * to.size : filled;
                const auto multiply = to.num_rows - row > TILE ? multiply_by_tiles<true> : multiply_by_tiles<false>;
                multiply(to, panel, inputs, sums.own);
                const int64_t num_rows = std::min(MOST, to.num_rows - row);
                if (!to.is_gated()) {
                    put(to, panel, row, num_rows, sums);
                    continue;
                }
                multiply(to, to.num_turns() + panel, inputs, sums.gated);
                put_gated(to, panel, row, num_rows, sums);
            }
    });
}

int linear(const Operands& of, int num_threads) {
    if (of.size % (2 * PAIRS) || of.num_rows < 1) return 1;
    // A single row takes as long as memory does, either way.
    if (of.num_rows > 1 && have_tiles()) multiply_by_tiles(of, num_threads);
    else multiply_by_rows(of, num_threads);
    return 0;
}

}  // namespace
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
