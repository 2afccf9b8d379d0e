// Who shares a kernel's work: pieces of it, and whoever is there takes the next one.
//
// A parallel region of OpenMP ends when each of its threads has come, also one whose core runs another process just now:
// on a machine that is shared with other replicas, a gateway and clients, a step of hundreds of short regions then waits
// most of its time. Of the crew nobody is waited for but while it works on a piece; who is late finds nothing to do.
// It works for one caller at a time: a second one does its work alone.
#pragma once
#include <cstdint>

namespace shoal {

using Piece = void (*)(const void* job, int64_t piece);

// Call `piece` for 0..num_pieces-1, each once, on up to num_threads of the crew, this thread among them; all are done
// then.
void run_pieces(int64_t num_pieces, int num_threads, Piece piece, const void* job);

// The same for anything that can be called with a piece's number.
template <class Work>
void share(int64_t num_pieces, int num_threads, const Work& work) {
    run_pieces(
        num_pieces, num_threads, [](const void* job, int64_t piece) { (*static_cast<const Work*>(job))(piece); }, &work);
}

// The same for ranges of `size` numbers each, of 0..total-1.
template <class Work>
void share_ranges(int64_t total, int64_t size, int num_threads, const Work& work) {
    share((total + size - 1) / size, num_threads, [&](int64_t piece) {
        const int64_t begin = piece * size;
        work(begin, begin + size < total ? begin + size : total);
    });
}

}  // namespace shoal
