// Large buffers kept from call to call. The system takes back what is freed above 32 MB at once, and every page that it
// hands out again costs a fault and zeroing: for large activations that is a tenth of the convolution that fills them.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace rnp::cpu {

class BufferPool {
 public:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;
    size_t floats = 0;
  };

  // A buffer of at least `floats`, aligned to a cache line, with undefined contents. At most one is kept for each call
  // that ever ran at the same time as others, and each is as large as the largest call it has served.
  Buffer take(size_t floats) {
    Buffer found;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      size_t best = kept_.size();
      for (size_t i = 0; i < kept_.size(); ++i)
        if (best == kept_.size() || better(kept_[i].floats, kept_[best].floats, floats)) best = i;
      if (best < kept_.size()) {
        found = std::move(kept_[best]);
        kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(best));
      }
    }
    if (found.floats < floats) {
      found.data.reset();  // before the new one is asked for
      found.data.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64})));
      found.floats = floats;
    }
    return found;
  }

  void give(Buffer buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(std::move(buffer));
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.clear();
  }

 private:
  // Whether a buffer of size `a` suits better than one of `b`: the smallest that is large enough, else the largest.
  static bool better(size_t a, size_t b, size_t wanted) {
    if ((a >= wanted) != (b >= wanted)) return a >= wanted;
    return a >= wanted ? a < b : a > b;
  }

  std::mutex mutex_;
  std::vector<Buffer> kept_;
};

}  // namespace rnp::cpu
