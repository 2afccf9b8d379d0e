// Who shares a kernel's work: pieces of it, and whoever is there takes the next one.
//
// A parallel region of OpenMP ends when each of its threads has come, also one whose core runs another process just now:
// on a machine that is shared with other replicas, a gateway and clients, a step of hundreds of short regions then waits
// most of its time. Of the crew nobody is waited for but while it works on a piece; who is late finds nothing to do. And
// of what is gone through together (SPMD: a single program, each thread by itself) nobody is waited for then either: a
// piece that takes another thread too long is done once more by whoever has nothing else to do, as MapReduce's backup
// tasks are (Dean and Ghemawat, 2004). The crew works for one caller at a time: a second one does its work alone.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace shoal {

// Whose results of a piece count, where two may have begun it: each asks when it has them, once, and before it writes
// anything that others see.
class Claim {
   public:
    explicit Claim(std::atomic<bool>* claimed) : claimed_(claimed) {}

    // Whether two may have.
    bool is_shared() const { return claimed_; }
    bool operator()() {
        is_held_ = !claimed_ || !claimed_->exchange(true, std::memory_order_acq_rel);
        return is_held_;
    }
    bool is_held() const { return is_held_; }

   private:
    std::atomic<bool>* const claimed_;
    bool is_held_ = false;
};

using Piece = void (*)(const void* job, int64_t piece, Claim& claim);

// Call `piece` for 0..num_pieces-1, each once, on up to num_threads of the crew, this thread among them; all are done
// then. With `asks` a piece asks its claim; of what is gone through together it may be called for more than once.
void run_pieces(int64_t num_pieces, int num_threads, Piece piece, bool asks, const void* job);

// The same for anything that can be called with a piece's number, and with its claim, if it asks.
template <class Work>
void share(int64_t num_pieces, int num_threads, const Work& work) {
    constexpr bool ASKS = std::is_invocable_v<Work, int64_t, Claim&>;
    const Piece piece = [](const void* job, int64_t number, Claim& claim) {
        if constexpr (ASKS) (*static_cast<const Work*>(job))(number, claim);
        else (*static_cast<const Work*>(job))(number);
    };
    run_pieces(num_pieces, num_threads, piece, ASKS, &work);
}

// The same for ranges of `size` numbers each, of 0..total-1.
template <class Work>
void share_ranges(int64_t total, int64_t size, int num_threads, const Work& work) {
    const int64_t num_pieces = (total + size - 1) / size;
    const auto end_of = [=](int64_t begin) { return begin + size < total ? begin + size : total; };
    if constexpr (std::is_invocable_v<Work, int64_t, int64_t, Claim&>)
        share(num_pieces, num_threads, [&](int64_t piece, Claim& claim) {
            work(piece * size, end_of(piece * size), claim);
        });
    else share(num_pieces, num_threads, [&](int64_t piece) { work(piece * size, end_of(piece * size)); });
}

// What is gone through together, each of the threads by itself, by the same way: what it shares, one after the other, is
// shared among them, and whoever sees a share's last piece done goes on to the next, whether the others have come so far
// or not. So whatever it changes, it changes in pieces; and since a thread that was left behind may still read what
// others have long overwritten, none of that may be an address or an index. Nobody is on the way any more when this
// returns. There are num_shares of them at most, and num_claims pieces of those that ask.
using Way = void (*)(const void* job);
void run_together(int num_threads, int64_t num_shares, int64_t num_claims, Way way, const void* job);

template <class Work>
void go_together(int num_threads, int64_t num_shares, int64_t num_claims, const Work& work) {
    const Way way = [](const void* job) { (*static_cast<const Work*>(job))(); };
    run_together(num_threads, num_shares, num_claims, way, &work);
}

// Whether others have done all of what this thread shares next: it needs no preparing then.
bool is_left_behind();

}  // namespace shoal
