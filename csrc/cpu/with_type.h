// From a dtype known at run time to a type.
#pragma once

#include "core/half.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// Calls f with a value of the type that a float32, bfloat16 or float16 tensor holds. float64 has kernels of its own.
template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat32:
    case DType::kFloat64:
      return f(0.0f);
  }
}

}  // namespace rnp::cpu
