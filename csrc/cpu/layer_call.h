// A convolution layer at one input shape, described once, so that a later call brings addresses alone: the way of a
// module's eager call around the dispatcher, whose boxing costs more than a small layer.
#pragma once

#include <cstdint>

#include "core/prefix_conv2d.h"

namespace rnp::cpu {

class LayerCall {
 public:
  enum Answer : int {
    kDone = 0,
    kChanged = 1,  // the weights or the algorithm in force are not those of the pack
    kRefused = 2,  // a prefix lies out of range
  };

  // float32; the weight is packed (pack_weight), or transformed for Winograd tiles of edge `tile`, or both.
  LayerCall(const ConvShape& shape, const Strides4& input, const Strides4& weight, const Strides4& output,
            int64_t tile);

  // Addresses of tensors with the sizes and strides above, of two contiguous int32 (n,) prefixes, and of the packs; 0:
  // absent. With a prefix the direct pack is needed. Nothing is written unless the answer is kDone. On torch's threads.
  Answer operator()(uintptr_t input, uintptr_t output, uintptr_t in_prefix, uintptr_t out_prefix, uintptr_t weight,
                    uintptr_t bias, uintptr_t packed, uintptr_t transformed) const;

  // Whether this layer's output has a size that the pool serves, and what new_output (cpu/output_pool.h) gives for it.
  bool pools_output() const;
  void* new_output() const;

 private:
  PrefixConv2dParams params_;
};

}  // namespace rnp::cpu
