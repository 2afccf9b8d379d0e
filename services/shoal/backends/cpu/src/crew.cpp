#include "crew.hpp"

#include <immintrin.h>
#include <x86intrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
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

// So long a thread waits for another one's piece before it does it, too: as long as its own longest took, but within
// these bounds (some 10 us and 1 ms), since it may have been displaced itself. Who had none waits for IDLE.
constexpr uint64_t LEAST_PATIENCE = 30'000, MOST_PATIENCE = 100 * LEAST_PATIENCE, IDLE_PATIENCE = 4 * LEAST_PATIENCE;

void rest(int looks) {
    if (looks < NUM_LOOKS) _mm_pause();
    else std::this_thread::yield();  // whom it waits for may want this core
}

// A share of what is gone through together.
struct Share {
    alignas(64) std::atomic<int64_t> num_taken{0};
    alignas(64) std::atomic<int64_t> num_done{0};
};

// What is gone through together: all its shares, one after the other, and claims of those that ask.
class Journey {
   public:
    // While nobody is on the way.
    void begin(int64_t num_shares, int64_t num_claims) {
        if (num_shares > num_shares_) shares_ = std::make_unique<Share[]>(num_shares_ = num_shares);
        if (num_claims > num_claims_) claims_ = std::make_unique<std::atomic<bool>[]>(num_claims_ = num_claims);
        is_over_.store(false, std::memory_order_relaxed);
    }

    void go(Way way, const void* job) noexcept {
        if (is_over_.load(std::memory_order_acquire)) return;
        Traveller traveller{this};
        Traveller::own = &traveller;
        way(job);
        Traveller::own = nullptr;
        // Where all have the same way, all have come equally far.
        num_shares_gone_.store(traveller.share, std::memory_order_relaxed);
        num_claims_gone_.store(traveller.claim, std::memory_order_relaxed);
        is_over_.store(true, std::memory_order_release);
    }

    // While nobody is on the way any more.
    void end() {
        for (int64_t i = 0; i < num_shares_gone_.load(std::memory_order_relaxed); i++) {
            shares_[i].num_taken.store(0, std::memory_order_relaxed);
            shares_[i].num_done.store(0, std::memory_order_relaxed);
        }
        for (int64_t i = 0; i < num_claims_gone_.load(std::memory_order_relaxed); i++)
            claims_[i].store(false, std::memory_order_relaxed);
    }

    // How far a thread has come.
    struct Traveller {
        Journey* journey;
        int64_t share = 0, claim = 0;

        static thread_local Traveller* own;
    };

    void share(Traveller& by, int64_t num_pieces, Piece piece, bool asks, const void* job) {
        if (by.share >= num_shares_ || (asks && by.claim + num_pieces > num_claims_)) std::abort();
        Share& share = shares_[by.share++];
        std::atomic<bool>* const claims = asks ? &claims_[by.claim] : nullptr;
        if (asks) by.claim += num_pieces;
        if (share.num_done.load(std::memory_order_acquire) == num_pieces) return;
        const auto work = [&](int64_t number) {
            Claim claim(asks ? claims + number : nullptr);
            piece(job, number, claim);
            if (!asks || claim.is_held()) share.num_done.fetch_add(1, std::memory_order_release);
        };
        uint64_t now = __rdtsc(), longest = 0;
        for (int64_t number; (number = share.num_taken.fetch_add(1, std::memory_order_acq_rel)) < num_pieces;) {
            work(number);
            const uint64_t begun = now;
            now = __rdtsc();
            longest = std::max(longest, now - begun);
        }
        const uint64_t patience = longest ? std::clamp(longest, LEAST_PATIENCE, MOST_PATIENCE) : IDLE_PATIENCE;
        for (int looks = 0; share.num_done.load(std::memory_order_acquire) < num_pieces; looks++) {
            const int64_t open = asks && __rdtsc() - now > patience ? first_open(claims, num_pieces) : num_pieces;
            if (open < num_pieces) work(open);
            else rest(looks);
        }
    }

    // Whether others are beyond the next share already.
    bool is_beyond(const Traveller& by) const {
        return by.share + 1 < num_shares_ && shares_[by.share + 1].num_taken.load(std::memory_order_acquire) > 0;
    }

   private:
    static int64_t first_open(const std::atomic<bool>* claims, int64_t num_pieces) {
        int64_t number = 0;
        while (number < num_pieces && claims[number].load(std::memory_order_relaxed)) number++;
        return number;
    }

    int64_t num_shares_ = 0, num_claims_ = 0;
    std::unique_ptr<Share[]> shares_;
    std::unique_ptr<std::atomic<bool>[]> claims_;
    std::atomic<int64_t> num_shares_gone_{0}, num_claims_gone_{0};
    std::atomic<bool> is_over_{false};
};

thread_local Journey::Traveller* Journey::Traveller::own = nullptr;

// A job's number, how many pieces it has and which is next, in one word: whoever moves it on has that piece of that job.
struct alignas(uint64_t) Ticket {
    uint32_t job;
    uint16_t num_pieces, next;
};

class Crew {
   public:
    // False if it is at work for another caller.
    bool run(int64_t num_pieces, int num_threads, Piece piece, const void* job) {
        const std::unique_lock<std::mutex> held(at_work_, std::try_to_lock);
        if (!held.owns_lock()) return false;
        work(num_pieces, num_threads, piece, job);
        return true;
    }

    // The same.
    bool go(int num_threads, int64_t num_shares, int64_t num_claims, Way way, const void* job) {
        const std::unique_lock<std::mutex> held(at_work_, std::try_to_lock);
        if (!held.owns_lock()) return false;
        journey_.begin(num_shares, num_claims);
        const auto traveller = [&] { journey_.go(way, job); };
        const Piece piece = [](const void* given, int64_t, Claim&) {
            (*static_cast<const decltype(traveller)*>(given))();
        };
        work(num_threads, num_threads, piece, &traveller);
        journey_.end();
        return true;
    }

   private:
    void work(int64_t num_pieces, int num_threads, Piece piece, const void* job) {
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
        for (int looks = 0; num_done_.load(std::memory_order_acquire) < num_pieces; looks++) rest(looks);
        is_long_.store(__rdtsc() - began > LONG_JOB, std::memory_order_relaxed);
    }

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
            Claim claim(nullptr);
            piece(job, ticket.next, claim);
            num_done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    std::mutex at_work_;
    Journey journey_;
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

void run_pieces(int64_t num_pieces, int num_threads, Piece piece, bool asks, const void* job) {
    if (Journey::Traveller* const own = Journey::Traveller::own; own && num_threads > 1)
        return own->journey->share(*own, num_pieces, piece, asks, job);
    struct Part {
        Piece piece;
        const void* job;
        int64_t first;
    };
    for (int64_t first = 0; first < num_pieces; first += MAX_PIECES) {
        const int64_t number = std::min(MAX_PIECES, num_pieces - first);
        const Part part = {piece, job, first};
        const Piece of_part = [](const void* given, int64_t index, Claim& claim) {
            const Part& own = *static_cast<const Part*>(given);
            own.piece(own.job, own.first + index, claim);
        };
        if (number > 1 && num_threads > 1 && crew().run(number, num_threads, of_part, &part)) continue;
        for (int64_t index = 0; index < number; index++) {
            Claim claim(nullptr);
            piece(job, first + index, claim);
        }
    }
}

bool is_left_behind() {
    const Journey::Traveller* const own = Journey::Traveller::own;
    return own && own->journey->is_beyond(*own);
}

void run_together(int num_threads, int64_t num_shares, int64_t num_claims, Way way, const void* job) {
    if (num_threads < 2 || !crew().go(num_threads, num_shares, num_claims, way, job)) way(job);
}

}  // namespace shoal
