// Who shares a kernel's work: pieces of it, and whoever is there takes the next one.
//
// A parallel region of OpenMP ends when each of its threads has come, also one whose core runs another process just now:
// on a machine that is shared with other replicas, a gateway and clients, a step of hundreds of short regions then waits
// most of its time. Of the crew nobody is waited for but while it works on a piece; who is late finds nothing to do.
// It works for one caller at a time: a second one does its work alone.
// With a matrix unit, though, products of many rows may be torch's (engine/native.py), whose OpenMP threads are awake then
// and would be in the way.
#pragma once
#include <cstdint>

#include "tiles.hpp"

namespace shoal {

constexpr int64_t FEW_ROWS = 64;

using Piece = void (*)(const void* job, int64_t piece);

// Call `piece` for 0..num_pieces-1, each once, on up to num_threads of the crew, this thread among them; all are done
// then.
void run_pieces(int64_t num_pieces, int num_threads, Piece piece, const void* job);

struct Team {
    int num_threads;
    bool is_openmp;

    Team(int num_threads, int64_t num_rows) : num_threads(num_threads), is_openmp(num_rows > FEW_ROWS && have_tiles()) {}
};

// The same for anything that can be called with a piece's number.
template <class Work>
void share(int64_t num_pieces, Team team, const Work& work) {
    if (!team.is_openmp)
        return run_pieces(
            num_pieces, team.num_threads,
            [](const void* job, int64_t piece) { (*static_cast<const Work*>(job))(piece); }, &work);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team.num_threads)
    for (int64_t piece = 0; piece < num_pieces; piece++) work(piece);
}

// The same for ranges of `size` numbers each, of 0..total-1, that take equally long.
template <class Work>
void share_ranges(int64_t total, int64_t size, Team team, const Work& work) {
    const auto range = [&](int64_t piece) {
        const int64_t begin = piece * size;
        work(begin, begin + size < total ? begin + size : total);
    };
    const int64_t num_pieces = (total + size - 1) / size;
    if (!team.is_openmp) return share(num_pieces, team, range);
    // Static: rows that a thread has had before are in its core's cache.
#pragma omp parallel for schedule(static) num_threads(team.num_threads)
    for (int64_t piece = 0; piece < num_pieces; piece++) range(piece);
}

}  // namespace shoal
