// What is gone through together comes out right, though in each round one thread, the caller or a helper, holds on to a
// piece until the others are many shares further; and so does a short way between, of fewer pieces than threads, and what
// is shared by itself. Prints how many pieces were done twice; exits with 1 if anything came out wrong.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "crew.hpp"

constexpr int NUM_ROUNDS = 300, NUM_SHARES = 30, NUM_NUMBERS = 11, HELD_ON_TO = 5, UNTIL = 21;

// In turns, numbers are made of the numbers before, by whoever claims them, and changed where they are.
struct Numbers {
    std::atomic<unsigned> all[2][NUM_NUMBERS];
};

unsigned mixed(const std::atomic<unsigned>* of, int64_t index) {
    unsigned sum = (unsigned)index;
    for (int i = 0; i < NUM_NUMBERS; i++) sum = sum * 31 + of[(index + i) % NUM_NUMBERS].load(std::memory_order_relaxed);
    return sum;
}

unsigned expected() {
    unsigned now[NUM_NUMBERS], next[NUM_NUMBERS];
    for (unsigned i = 0; i < NUM_NUMBERS; i++) now[i] = i;
    for (int share = 0; share < NUM_SHARES; share++) {
        for (unsigned i = 0; i < NUM_NUMBERS; i++) {
            next[i] = i;
            for (int j = 0; j < NUM_NUMBERS; j++) next[i] = next[i] * 31 + now[(i + j) % NUM_NUMBERS];
        }
        for (int i = 0; i < NUM_NUMBERS; i++) now[i] = next[i] + 1;
    }
    return now[0];
}

int main() {
    const unsigned wanted = expected();
    long wrong = 0;
    std::atomic<bool> wrong_piece{false};
    std::atomic<long> twice{0};
    const auto caller = std::this_thread::get_id();
    for (int round = 0; round < NUM_ROUNDS; round++) {
        Numbers numbers;
        for (unsigned i = 0; i < NUM_NUMBERS; i++) numbers.all[0][i] = i;
        std::atomic<int> furthest{0};
        std::atomic<bool> is_held{false};
        const int num_threads = 2 + round % 3;
        shoal::go_together(num_threads, 2 * NUM_SHARES, NUM_SHARES * NUM_NUMBERS, [&] {
            for (int share = 0; share < NUM_SHARES; share++) {
                auto *const from = numbers.all[share % 2], *const to = numbers.all[(share + 1) % 2];
                shoal::share(NUM_NUMBERS, num_threads, [&](int64_t index, shoal::Claim& claim) {
                    const unsigned made = mixed(from, index);
                    const bool is_late = (std::this_thread::get_id() == caller) == (round % 2 == 0);
                    if (share == HELD_ON_TO && is_late && !is_held.exchange(true))
                        while (furthest < UNTIL) std::this_thread::yield();
                    if (claim()) to[index].store(made, std::memory_order_relaxed);
                    else twice++;
                    int before = furthest;
                    while (before < share && !furthest.compare_exchange_weak(before, share)) {}
                });
                shoal::share(NUM_NUMBERS, num_threads, [&](int64_t index) {
                    to[index].store(to[index].load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
                });
            }
        });
        wrong += numbers.all[NUM_SHARES % 2][0] != wanted;
        std::atomic<int> claimed{0}, done{0};
        shoal::go_together(num_threads, 2, 1, [&] {
            shoal::share(1, num_threads, [&](int64_t, shoal::Claim& claim) { claimed += claim(); });
            shoal::share(0, num_threads, [&](int64_t) { wrong_piece = true; });
        });
        shoal::share(7, num_threads, [&](int64_t) { done++; });
        wrong += claimed != 1 || done != 7 || wrong_piece;
    }
    std::printf("%ld\n", twice.load());
    std::fflush(stdout);
    std::_Exit(wrong != 0);
}
