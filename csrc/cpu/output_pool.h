// Blocks for outputs, kept from call to call. A block of some megabytes that torch frees rarely fits its own next
// request: the allocator cuts off the ends to align it, and what is cut off stays with small records. So every call
// gets another place, whose lines and pages are cold: small layers of large maps then take up to 1.6 times as long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace rnp::cpu {

// Unlike BufferPool (buffer_pool.h), whose buffers come back when a call ends, one for each that ran at a time: a block
// of these belongs to whoever holds the tensor, so what is kept has to be bounded.
class OutputPool {
 public:
  // Smaller outputs are torch's; larger ones come from pages of their own, which the system takes back.
  static constexpr size_t kFewestBytes = size_t{256} << 10, kMostBytes = size_t{32} << 20;
  // Of those that are kept; the oldest go first.
  static constexpr size_t kMostBlocks = 8, kMostKept = size_t{64} << 20;

  static bool serves(size_t bytes) { return bytes >= kFewestBytes && bytes <= kMostBytes; }

  // The process's. Never destroyed: tensors may outlive everything.
  static OutputPool& instance();

  // A block of at least `bytes`, aligned to a cache line, of undefined contents: the one given back last that is not
  // larger by more than an eighth, else a new one. `give` takes it back, from any thread.
  struct Block {
    void* data;
    size_t bytes;
  };
  Block take(size_t bytes);
  void give(Block block);

  void release();       // frees all that is kept
  size_t kept() const;  // bytes

 private:
  OutputPool() { kept_.reserve(kMostBlocks + 1); }  // a deleter must not fail

  mutable std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
};

// A float32 tensor on such a block, as a DLManagedTensor of DLPack, whose deleter gives the block back; free_output
// calls it where nobody took the tensor over.
void* new_output(const int64_t (&sizes)[4], const int64_t (&strides)[4]);
void free_output(void* managed_tensor);

}  // namespace rnp::cpu
