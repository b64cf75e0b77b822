// How a torch-free kernel is given threads: the caller owns the pool, the kernel says how many workers it can use.
#pragma once

#include <cstdint>
#include <functional>

namespace rnp {

struct Threads {
  int count = 1;
  // run(workers, body) calls body(0) … body(workers - 1), possibly at once, and returns when all are done. Null:
  // serial.
  std::function<void(int workers, const std::function<void(int)>& body)> run;

  void operator()(int workers, const std::function<void(int)>& body) const {
    if (workers > count) workers = count;
    if (workers <= 1 || !run) {
      for (int i = 0; i < (workers < 1 ? 1 : workers); ++i) body(i);
    } else {
      run(workers, body);
    }
  }
};

}  // namespace rnp
