// Memory that a kernel's next call needs as well: it's kept, and large ones lie on huge pages.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace shoal {

template <class T>
class Room {
   public:
    Room() = default;
    Room(const Room&) = delete;
    ~Room() { std::free(numbers_); }

    // For so many, of which nothing is known: what was asked for before is lost. Throws std::bad_alloc.
    T* of(int64_t number) {
        if (number <= size_) return numbers_;
        std::free(numbers_);
        numbers_ = nullptr, size_ = 0;
        const int64_t bytes = number * (int64_t)sizeof(T), unit = bytes < HUGE_PAGE ? LINE_BYTES : HUGE_PAGE;
        const int64_t whole = (bytes + unit - 1) / unit * unit;
        void* const memory = std::aligned_alloc(unit, whole);
        if (!memory) throw std::bad_alloc();
        if (unit == HUGE_PAGE) madvise(memory, whole, MADV_HUGEPAGE);  // without them it's as right
        numbers_ = static_cast<T*>(memory), size_ = whole / (int64_t)sizeof(T);
        return numbers_;
    }

    // Keeps no more than so many bytes for the next call.
    void keep(int64_t bytes) {
        if (size_ * (int64_t)sizeof(T) <= bytes) return;
        std::free(numbers_);
        numbers_ = nullptr, size_ = 0;
    }

    // What was asked for last.
    T* numbers() const { return numbers_; }

   private:
    static constexpr int64_t LINE_BYTES = 64, HUGE_PAGE = 2 << 20;

    T* numbers_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace shoal
