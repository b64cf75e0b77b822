#include "cpu/output_pool.h"

#include <algorithm>
#include <array>
#include <memory>
#include <new>

namespace rnp::cpu {
namespace {

constexpr std::align_val_t kLine{64};

// DLPack's C structures, whose layout is fixed (dmlc/dlpack, dlpack.h, before version 1): torch's own copy of that
// header refuses code that keeps to the stable ABI.
struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2;

struct Output {
  DLManagedTensor tensor = {};
  int64_t sizes[4], strides[4];
  OutputPool::Block block;
};

void free_block(const OutputPool::Block& block) { ::operator delete(block.data, kLine); }

size_t total(const std::vector<OutputPool::Block>& blocks) {
  size_t bytes = 0;
  for (const OutputPool::Block& block : blocks) bytes += block.bytes;
  return bytes;
}

}  // namespace

OutputPool& OutputPool::instance() {
  static OutputPool& pool = *new OutputPool;
  return pool;
}

OutputPool::Block OutputPool::take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = kept_.size(); i-- > 0;) {
      const Block block = kept_[i];
      if (block.bytes < bytes || block.bytes - bytes > bytes / 8) continue;
      kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
      return block;
    }
  }
  return {::operator new(bytes, kLine), bytes};
}

void OutputPool::give(Block block) {
  std::array<Block, kMostBlocks + 1> old;  // freed without the lock
  size_t drop = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);
    size_t bytes = total(kept_);
    for (; kept_.size() - drop > kMostBlocks || bytes > kMostKept; ++drop) bytes -= kept_[drop].bytes;
    const auto end = kept_.begin() + static_cast<std::ptrdiff_t>(drop);
    std::copy(kept_.begin(), end, old.begin());
    kept_.erase(kept_.begin(), end);
  }
  for (size_t i = 0; i < drop; ++i) free_block(old[i]);
}

void OutputPool::release() {
  std::vector<Block> old;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    old.swap(kept_);
    kept_.reserve(kMostBlocks + 1);
  }
  for (const Block& block : old) free_block(block);
}

size_t OutputPool::kept() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return total(kept_);
}

void* new_output(const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  auto output = std::make_unique<Output>();
  std::copy_n(sizes, 4, output->sizes);
  std::copy_n(strides, 4, output->strides);
  int64_t floats = 1;
  for (int i = 0; i < 4; ++i) floats += (sizes[i] - 1) * strides[i];
  output->block = OutputPool::instance().take(static_cast<size_t>(floats) * sizeof(float));
  DLTensor& t = output->tensor.dl_tensor;
  t.data = output->block.data;
  t.device = {kDLCPU, 0};
  t.ndim = 4;
  t.dtype = {kDLFloat, 32, 1};
  t.shape = output->sizes;
  t.strides = output->strides;
  output->tensor.manager_ctx = output.get();
  output->tensor.deleter = [](DLManagedTensor* self) {
    const std::unique_ptr<Output> own(static_cast<Output*>(self->manager_ctx));
    OutputPool::instance().give(own->block);
  };
  return &output.release()->tensor;
}

void free_output(void* managed_tensor) {
  DLManagedTensor* tensor = static_cast<DLManagedTensor*>(managed_tensor);
  tensor->deleter(tensor);
}

}  // namespace rnp::cpu
