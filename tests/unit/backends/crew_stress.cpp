// Two callers give the crew jobs of all sizes: each piece must be done once, by whoever it is. Prints how many pieces
// helpers did; exits with 1 if a piece was done otherwise than once.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "crew.hpp"

int main() {
    std::atomic<long> wrong{0}, helped{0};
    const auto ask = [&](int caller) {
        const auto self = std::this_thread::get_id();
        for (int round = 0; round < 300'000; round++) {
            const int num_pieces = round % 100'000 == 99'999 ? 70'000 : 1 + (round * 7 + caller) % 37;
            std::vector<int> times(num_pieces, 0);
            std::atomic<long> by_helpers{0};
            shoal::share(num_pieces, 1 + round % 4, [&](int64_t piece) {
                times[piece]++;
                if (std::this_thread::get_id() != self) by_helpers++;
            });
            for (const int number : times) wrong += number != 1;
            helped += by_helpers;
        }
    };
    std::thread first(ask, 0), second(ask, 1);
    first.join();
    second.join();
    std::printf("%ld\n", helped.load());
    std::fflush(stdout);
    std::_Exit(wrong != 0);
}
