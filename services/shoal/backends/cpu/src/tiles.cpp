#include "tiles.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace shoal {
namespace {

bool asked_for() {
#ifdef SHOAL_EMULATE_TILES
    return true;
#else
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned BF16 = 1u << 22, UNIT = 1u << 24, BYTES = 1u << 25, ALL = BF16 | UNIT | BYTES;
    if ((d & ALL) != ALL) return false;
    // Eight KiB more of each thread's state: Linux wants to be asked before it keeps them (from 5.16 on).
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

std::atomic<bool> is_allowed{true};

}  // namespace

bool have_tiles() {
    static const bool there = asked_for();
    return there && is_allowed.load(std::memory_order_relaxed);
}

}  // namespace shoal

// Whether kernels use the matrix unit; with `allowed` 0 they don't from now on, with 1 they may again, below 0 it's only
// asked.
extern "C" int shoal_tiles(int allowed) {
    if (allowed >= 0) shoal::is_allowed = allowed;
    return shoal::have_tiles();
}
