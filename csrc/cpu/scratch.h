// Memory that a calling thread keeps between calls: page faults and zeroing would cost more than small layers.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace rnp::cpu {

class ScratchMemory {
 public:
  // At least `floats` floats on a cache line's boundary, valid until the next call; what they hold is undefined.
  float* get(size_t floats) {
    if (floats > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64})));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

}  // namespace rnp::cpu
