// What the tests of the CUDA tile kernels share: the launches around them, on the emulator, and names.
#pragma once

#include <string>
#include <vector>

#include "cuda/conv_kernel.h"
#include "cuda/plain_kernels.h"
#include "tests/gpu_case.h"

namespace rnp::tests {

namespace emulator = cuda::emulator;

inline constexpr double kHalfStep = 0x1p-11;  // one rounding of float16 or TF32

template <typename T>
void pack(GpuCase<T>& c) {
  cuda::PackArgs a = cuda::pack_args(c.s, c.p.dtype, c.role, c.p.weight, c.p.weight_stride, nullptr);
  const cuda::PackedTiles& l = a.layout;
  c.packed.resize(static_cast<size_t>(l.elements()) * sizeof(T) + 16);
  void* to = c.packed.data() + (16 - reinterpret_cast<uintptr_t>(c.packed.data()) % 16) % 16;
  a.packed = to;
  emulator::launch(2, 128, 0, 1,
                   [&](char*) { cuda::pack_block<T>(a, l.elements(), l.chunks(), l.taps(), l.chunk(), l.flat()); });
  c.p.packed = static_cast<const float*>(to);
}

struct Ordered {
  std::vector<int32_t> sample, in, out;
  int32_t ticket = 77;
};

inline void set_order(cuda::ConvArgs& a, Ordered& o) {
  if (!a.in_prefix && !a.out_prefix) return;
  const size_t n = static_cast<size_t>(a.cut.n);
  o.sample.assign(n, -1), o.in.assign(n, -1), o.out.assign(n, -1);
  cuda::OrderArgs args{static_cast<int32_t>(a.cut.n),
                       a.c_in,
                       a.c_out,
                       a.in_prefix,
                       a.out_prefix,
                       o.sample.data(),
                       o.in.data(),
                       o.out.data(),
                       &o.ticket};
  emulator::launch((a.cut.n + 31) / 32, 32, 0, 1, [&](char*) { cuda::order_block(args); });
  a.order_sample = o.sample.data(), a.order_in = o.in.data(), a.order_out = o.out.data(), a.ticket = &o.ticket;
}

inline const char* mode_name(GpuMode mode) {
  const char* const names[] = {"full", "mixed", "tables", "residual", "skip", "groups"};
  return names[static_cast<int>(mode)];
}

inline constexpr GpuMode kModes[] = {GpuMode::kFull, GpuMode::kMixed, GpuMode::kTables, GpuMode::kResidual,
                                     GpuMode::kSkip};

}  // namespace rnp::tests
