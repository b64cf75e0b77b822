#include "core/count.h"

#include <atomic>

namespace rnp {
namespace {

std::atomic<int64_t> counted{0};

}  // namespace

void count_fmas(int64_t lanes) { counted.fetch_add(lanes, std::memory_order_relaxed); }
int64_t take_fma_count() { return counted.exchange(0); }

}  // namespace rnp
