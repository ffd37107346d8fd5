// Large pages for what is large: rows picked from all over it need fewer translations of addresses.
#pragma once

#include <sys/mman.h>

#include <cstddef>

namespace pi {

constexpr size_t HUGE_PAGE = 2u << 20;

// Asks for them; where there are none nothing changes.
inline void use_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t n) {
#if defined(MADV_HUGEPAGE)
    madvise(p, n, MADV_HUGEPAGE);
#endif
}

}  // namespace pi
