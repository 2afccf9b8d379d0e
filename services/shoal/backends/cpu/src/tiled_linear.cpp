// Products by the matrix unit (tiles.hpp), with weights as linear.cpp has them: panels are what it takes.
//
// Few rows are taken as they lie. Many are packed by each thread, as what a square of sums wants of them at a time
// (tiled_linear.hpp). A thread takes a block of rows, of whose inputs, or of a chunk of them, the second cache holds all,
// and some panels, one after the other.
#include <atomic>
#include <vector>

#include "tiled_linear.hpp"

#include "room.hpp"

namespace shoal {
namespace {

constexpr int64_t SIDE = SQUARE_ROWS;
constexpr int64_t SQUARE = SIDE * PANEL;        // its sums
constexpr int64_t STEP = SIDE * TILE_NUMBERS;   // inputs of a square, and weights of a panel, that are multiplied at once
constexpr int64_t CHUNK = 64;                   // steps at most: 128 KiB of weights, and as much of a square
constexpr int64_t NEAR = 320 * 1024;            // inputs of a block's chunk: 640 KiB
constexpr int64_t FAR_TURNS = 32;               // that share a chunk: of five squares, sums of 640 KiB or twice that
constexpr int64_t FEWEST = 4;                   // squares of a block
static_assert(PANEL == SIDE);

int64_t num_chunks_of(int64_t size) { return (size / TILE_NUMBERS + CHUNK - 1) / CHUNK; }

// Up to MANY_ROWS rows as they lie, and panels that one thread takes, one after the other. With more rows than a tile has,
// weights are fetched two steps ahead: what the unit loads itself is waited for. With fewer, memory takes as long anyway.
class FewRows {
   public:
    explicit FewRows(const Operands& of) : of_(of) {}

    // Squares have equally many rows: where that can't be, two have one in common.
    void run(int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; panel++)
            for (int64_t square = 0; square < num_squares_; square++) {
                const int64_t row = std::min(square * num_rows_, of_.num_rows - num_rows_);
                const auto sums = [&](int64_t of_panel, float* to, int64_t first) {
                    if (num_rows_ <= TILE) multiply<false>(of_panel, row, to, first, 0);
                    else multiply<true>(of_panel, row, to, first, square ? 0 : STEP / LINE);
                };
                sums(panel, own_[next_], 0);
                if (of_.is_gated()) sums(of_.second_panel(panel), gated_[next_], num_steps_);
                ready_ = {panel, row, num_rows_};
                next_ = 1 - next_;
            }
        put_some(0, SIDE);
    }

   private:
    // Sums of a panel. With each step some outputs of the square before are written: there are as many steps as of this
    // square's panels together, and `first` of them were those of the other one.
    template <bool IS_WHOLE>
    void multiply(int64_t panel, int64_t row, float* to, int64_t first, int64_t num_fetched) {
        constexpr int64_t RIGHT_PAIR = 2 * PANEL, FAR = 2;
        const bf16 *inputs = of_.inputs + row * of_.size, *weights = of_.panel(panel);
        const int64_t num_all = of_.is_gated() ? 2 * num_steps_ : num_steps_;
        Square::zero();
        for (int64_t step = 0; step < num_steps_; step++, inputs += TILE_NUMBERS, weights += STEP) {
            for (int64_t line = 0; line < num_fetched; line++) fetch(weights + FAR * STEP + line * LINE);
            if constexpr (IS_WHOLE) Square::add(inputs, of_.size, weights, RIGHT_PAIR);
            else Square::add_half(inputs, of_.size, weights, RIGHT_PAIR);
            put_some(SIDE * (first + step) / num_all, SIDE * (first + step + 1) / num_all);
        }
        if constexpr (IS_WHOLE) Square::store(to, PANEL);
        else Square::store_half(to, PANEL);
    }

    void put_some(int64_t begin, int64_t end) const {
        const int64_t number = std::min(end, ready_.num_rows) - begin, row = ready_.row + begin;
        if (number <= 0) return;
        const float* const own = own_[1 - next_] + begin * PANEL;
        if (of_.is_gated()) put_gated(of_, ready_.panel, row, number, own, gated_[1 - next_] + begin * PANEL);
        else put(of_, ready_.panel, row, number, own);
    }

    const Operands& of_;
    const int64_t num_steps_ = of_.size / TILE_NUMBERS, num_squares_ = (of_.num_rows + SIDE - 1) / SIDE;
    const int64_t num_rows_ = (of_.num_rows + num_squares_ - 1) / num_squares_;  // of a square
    const Tiles held_{num_rows_};
    // A square whose sums are made: they are those below that `next_` isn't.
    struct {
        int64_t panel, row, num_rows;
    } ready_ = {};
    int next_ = 0;
    alignas(64) float own_[2][SQUARE], gated_[2][SQUARE];
};

// Turns of one thread with a block's squares, which are packed. Of many inputs the second cache holds a chunk; sums wait
// there for the next one. The vector registers have nothing to do meanwhile: while a square is multiplied for the last
// time, they make outputs of the sums of the one before.
class ManySquares {
   public:
    ManySquares(const Operands& of, Squares squares, const bf16* packed) : of_(of), squares_(squares), packed_(packed) {}

    void run(int64_t begin, int64_t end) {
        static thread_local Room<float> room;
        const int64_t num_chunks = num_chunks_of(of_.size);
        const int64_t of_a_turn = (of_.is_paired() ? 2 : 1) * SQUARE;
        float* const sums = room.of((num_chunks > 1 ? (end - begin) * squares_.number() : 2) * of_a_turn);
        for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
            const Steps steps = {num_steps_ * chunk / num_chunks, num_steps_ * (chunk + 1) / num_chunks};
            const bool is_last = chunk + 1 == num_chunks;
            for (int64_t turn = begin, at = 0; turn < end; turn++) {
                const bool is_next_chunk = turn + 1 == end && !is_last;
                const int64_t next = is_next_chunk ? begin : turn + 1, from = is_next_chunk ? steps.end : steps.begin;
                const bf16* ahead[] = {of_.panel(of_.first_panel(next)) + from * STEP,
                                       of_.panel(of_.second_panel(next)) + from * STEP};
                for (int64_t square = 0; square < squares_.number(); square++, at++) {
                    float* const own = sums + (num_chunks > 1 ? at : at % 2) * of_a_turn;
                    multiply(square, of_.first_panel(turn), steps, own, 0, ahead[0]);
                    if (of_.is_paired())
                        multiply(square, of_.second_panel(turn), steps, own + SQUARE, steps.number(), ahead[1]);
                    if (is_last) ready_ = {of_.first_panel(turn), squares_.first_row() + square * SIDE, own};
                }
            }
        }
        put_some(0, SIDE);
    }

   private:
    struct Steps {
        int64_t begin, end;
        int64_t number() const { return end - begin; }
    };

    // `first` steps were multiplied by the turn's other panel. What comes after the panel is fetched on the way.
    void multiply(int64_t square, int64_t panel, Steps steps, float* sums, int64_t first, const bf16*& ahead) {
        const bf16* const inputs = packed_ + square * num_steps_ * STEP;
        const int64_t num_all = (of_.is_paired() ? 2 : 1) * steps.number();
        const int64_t num_lines = (STEP / LINE + squares_.number() - 1) / squares_.number();  // with each step
        if (steps.begin) Square::load(sums, PANEL);
        else Square::zero();
        for (int64_t step = steps.begin; step < steps.end; step++) {
            for (int64_t line = 0; line < num_lines; line++, ahead += LINE) fetch(ahead);
            Square::add(inputs + step * STEP, TILE_NUMBERS, of_.panel(panel) + step * STEP, 2 * PANEL);
            const int64_t done = first + step - steps.begin;
            put_some(SIDE * done / num_all, SIDE * (done + 1) / num_all);
        }
        Square::store(sums, PANEL);
    }

    void put_some(int64_t begin, int64_t end) const {
        if (!ready_.sums) return;
        const int64_t row = ready_.row + begin, number = std::min(end, of_.num_rows - ready_.row) - begin;
        if (number <= 0) return;
        const float *const own = ready_.sums + begin * PANEL, *const other = own + SQUARE;
        if (of_.heads) put_heads(of_, ready_.panel, row, number, own, other);
        else if (of_.is_gated()) put_gated(of_, ready_.panel, row, number, own, other);
        else put(of_, ready_.panel, row, number, own);
    }

    const Operands& of_;
    const Squares squares_;
    const bf16* const packed_;
    const int64_t num_steps_ = of_.size / TILE_NUMBERS;
    const Tiles held_;
    // A square whose sums are made.
    struct {
        int64_t panel, row;
        const float* sums;
    } ready_ = {};
};

}  // namespace

void multiply_by_tiles(const Operands& of, int num_threads) {
    share_panels(of, num_threads, panels_at_once(of, num_threads), [&](const Operands& to, int64_t begin, int64_t end) {
        FewRows(to).run(begin, end);
    });
}

// Each thread begins with a block of its own, which it packs: inputs that another one has packed would come from that
// one's cache. Who has none left helps the others.
void multiply_many_by_tiles(const Operands& of, int num_threads) {
    const int64_t num_squares = Squares::number_of(of.num_rows), turns = of.num_turns(), wanted = TURNS * num_threads;
    // But so many squares that weights serve more than a few rows: those are read once for each block.
    const int64_t most = std::max<int64_t>(1, num_squares / FEWEST);
    const int64_t of_a_chunk = of.size / num_chunks_of(of.size);
    const int64_t by_cache = std::min((of.num_rows * of_a_chunk + NEAR - 1) / NEAR, most);
    const int64_t alike = (by_cache + num_threads - 1) / num_threads * num_threads;  // each thread has as many
    const int64_t by_threads = (wanted + turns - 1) / turns;
    const int64_t num_blocks = std::min(std::max(alike <= most ? alike : by_cache, by_threads), num_squares);
    const int64_t most_at_once = num_chunks_of(of.size) > 1 ? FAR_TURNS : MAX_PANELS;
    const int64_t at_once = std::clamp<int64_t>(turns * num_blocks / wanted, 1, most_at_once);
    const int64_t num_groups = (turns + at_once - 1) / at_once;
    std::vector<std::atomic<int64_t>> num_taken(num_blocks);
    share(num_threads, num_threads, [&](int64_t thread) {
        static thread_local Room<bf16> room;
        for (int64_t turn = 0; turn < num_blocks; turn++) {
            const int64_t block = (turn + thread * num_blocks / num_threads) % num_blocks;
            const Squares squares = Squares::block(num_squares, block, num_blocks);
            bf16* packed = nullptr;
            for (int64_t group; (group = num_taken[block].fetch_add(1)) < num_groups;) {
                if (!packed) {
                    packed = room.of(squares.num_rows() * of.size);
                    pack_squares(of.inputs, of.num_rows, of.size, squares, packed);
                }
                const int64_t begin = group * at_once;
                multiply_squares(of, squares, packed, begin, std::min(begin + at_once, turns));
            }
        }
    });
}

void pack_squares(const bf16* inputs, int64_t num_rows, int64_t size, Squares squares, bf16* packed) {
    for (int64_t first = squares.first_row(); first < squares.end * SIDE; first += SIDE)
        for (int64_t step = 0; step < size; step += TILE_NUMBERS)
            for (int64_t row = first; row < first + SIDE; row++, packed += TILE_NUMBERS)
                _mm512_store_si512(packed, row < num_rows ? _mm512_loadu_si512(inputs + row * size + step)
                                                          : _mm512_setzero_si512());
}

void multiply_squares(const Operands& of, Squares squares, const bf16* packed, int64_t begin, int64_t end) {
    ManySquares(of, squares, packed).run(begin, end);
}

}  // namespace shoal
