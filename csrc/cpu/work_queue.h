// Handing out a call's work items to its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "core/parallel.h"

namespace rnp::cpu {

// Waking a thread and waiting for it costs some microseconds: each must have this much to do, about cycles.
constexpr double kCostOfThread = 5e4;

inline int useful_workers(double cost, size_t items, const Threads& threads) {
  const auto useful = static_cast<int64_t>(cost / kCostOfThread) + 1;
  return static_cast<int>(std::min<int64_t>({threads.count, static_cast<int64_t>(items), useful}));
}

// Times that each worker comes for items, where there are so many: enough to balance what is left.
constexpr size_t kClaims = 16;

// start(worker) gives what a worker does with an item: run(i, following), `following` being the number of its next one
// (`items` where that is not known yet), whose input it may fetch meanwhile. Many items are taken some at a time:
// neighbours are groups whose channels share pages, and lines that the hardware fetches in pairs (1024 channels at 7x7
// in groups of 16, batch 8, two threads: 948 us one by one, 594 so).
template <class Start>
void hand_out(size_t items, int workers, const Threads& threads, const Start& start) {
  const size_t batch = std::max<size_t>(1, items / (kClaims * static_cast<size_t>(workers)));
  // An item is claimed while its predecessor runs; not near the end, where an idle worker could take it.
  const size_t claimable = items > 2 * static_cast<size_t>(workers) ? items - static_cast<size_t>(workers) : 0;
  std::atomic<size_t> next{0};
  threads(workers, [&](int worker) {
    auto run = start(worker);
    size_t i = 0, end = 0;  // the item at hand, the end of those taken with it
    const auto take = [&] {
      if (i + 1 < end) return i + 1;
      const size_t first = next.fetch_add(batch);
      end = std::min(first + batch, items);
      return first;
    };
    for (i = take(); i < items;) {
      const bool claim = workers == 1 || i + 1 < end || i < claimable;
      const size_t following = claim ? take() : items;
      run(i, std::min(following, items));
      i = claim ? following : take();
    }
#if defined(__x86_64__)
    __builtin_ia32_sfence();  // what was stored past the caches, before anyone reads it
#endif
  });
}

}  // namespace rnp::cpu
