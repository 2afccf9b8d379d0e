#include "crew.hpp"

#include <immintrin.h>
#include <x86intrin.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

namespace shoal {
namespace {

constexpr int64_t MAX_PIECES = 0xffff;
// How often a helper looks for the next job before it sleeps: some 40 us, more than what lies between two short ones.
constexpr int NUM_LOOKS = 2500;
// After a job of so many cycles the next one is long, too, most likely: waking costs little then, and until it comes the
// core is of more use to others.
constexpr uint64_t LONG_JOB = 1'000'000;

// A job's number, how many pieces it has and which is next, in one word: whoever moves it on has that piece of that job.
struct Ticket {
    uint32_t job;
    uint16_t num_pieces, next;
};

class Crew {
   public:
    // False if it is at work for another caller.
    bool run(int64_t num_pieces, int num_threads, Piece piece, const void* job) {
        const std::unique_lock<std::mutex> held(at_work_, std::try_to_lock);
        if (!held.owns_lock()) return false;
        hire(num_threads - 1);
        const uint64_t began = __rdtsc();
        piece_.store(piece, std::memory_order_relaxed);
        job_.store(job, std::memory_order_relaxed);
        num_wanted_.store(num_threads - 1, std::memory_order_relaxed);
        num_done_.store(0, std::memory_order_relaxed);
        number_++;
        ticket_.store({number_, (uint16_t)num_pieces, 0}, std::memory_order_release);
        newest_.store(number_, std::memory_order_seq_cst);  // before it's asked who sleeps
        newest_.notify_all();
        take_pieces();
        for (int looks = 0; num_done_.load(std::memory_order_acquire) < num_pieces; looks++) {
            if (looks < NUM_LOOKS) _mm_pause();
            else std::this_thread::yield();  // a helper's core may be this one
        }
        is_long_.store(__rdtsc() - began > LONG_JOB, std::memory_order_relaxed);
        return true;
    }

   private:
    // Threads are started once; where there can't be more, fewer help.
    void hire(int num_helpers) {
        try {
            for (; num_hired_ < num_helpers; num_hired_++) std::thread(&Crew::help, this, num_hired_, number_).detach();
        } catch (const std::system_error&) {
        }
    }

    void help(int index, uint32_t seen) {
        for (;;) {
            for (int looks = 0; newest_.load(std::memory_order_acquire) == seen; looks++) {
                if (looks < NUM_LOOKS && !is_long_.load(std::memory_order_relaxed)) _mm_pause();
                else newest_.wait(seen, std::memory_order_acquire);
            }
            seen = newest_.load(std::memory_order_acquire);
            if (index < num_wanted_.load(std::memory_order_relaxed)) take_pieces();
        }
    }

    void take_pieces() {
        Ticket ticket = ticket_.load(std::memory_order_acquire);
        while (ticket.next < ticket.num_pieces) {
            // They are of the ticket's job if the exchange succeeds: while it has pieces left, no other one begins.
            const Piece piece = piece_.load(std::memory_order_relaxed);
            const void* const job = job_.load(std::memory_order_relaxed);
            const Ticket taken = {ticket.job, ticket.num_pieces, (uint16_t)(ticket.next + 1)};
            if (!ticket_.compare_exchange_weak(ticket, taken, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            piece(job, ticket.next);
            num_done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    std::mutex at_work_;
    int num_hired_ = 0;
    uint32_t number_ = 0;
    alignas(64) std::atomic<Ticket> ticket_{Ticket{0, 0, 0}};
    alignas(64) std::atomic<int64_t> num_done_{0};
    alignas(64) std::atomic<uint32_t> newest_{0};
    std::atomic<Piece> piece_{nullptr};
    std::atomic<const void*> job_{nullptr};
    std::atomic<int> num_wanted_{0};
    std::atomic<bool> is_long_{false};
};

static_assert(std::atomic<Ticket>::is_always_lock_free);

Crew& crew() {
    static Crew& one = *new Crew;  // never destroyed: its threads use it until the process ends
    return one;
}

}  // namespace

void run_pieces(int64_t num_pieces, int num_threads, Piece piece, const void* job) {
    struct Part {
        Piece piece;
        const void* job;
        int64_t first;
    };
    for (int64_t first = 0; first < num_pieces; first += MAX_PIECES) {
        const int64_t number = std::min(MAX_PIECES, num_pieces - first);
        const Part part = {piece, job, first};
        const Piece of_part = [](const void* given, int64_t index) {
            const Part& own = *static_cast<const Part*>(given);
            own.piece(own.job, own.first + index);
        };
        if (number > 1 && num_threads > 1 && crew().run(number, num_threads, of_part, &part)) continue;
        for (int64_t index = 0; index < number; index++) piece(job, first + index);
    }
}

}  // namespace shoal
