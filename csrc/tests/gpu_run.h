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
  emulator::launch(2, 128, 0, 1, [&](char*) {
    cuda::pack_block<T>(a, l.elements(), l.chunks(), l.taps(), l.chunk(), l.run(), l.pixel());
  });
  c.p.packed = static_cast<const float*>(to);
}

// The copy of the input that the launch reads, in memory that held NaN; none where it reads the input itself.
template <typename T>
std::vector<cuda::Vec16> unfold(cuda::TileLaunch& launch) {
  constexpr cuda::Vec16 kPoison = {{~0u, ~0u, ~0u, ~0u}};
  std::vector<cuda::Vec16> memory(static_cast<size_t>(launch.unfold.pieces()), kPoison);
  if (memory.empty()) return memory;
  cuda::use_unfolded(launch, memory.data());
  emulator::launch(3, 64, 0, 1, [&](char*) { cuda::unfold_block<T>(launch.unfold); });
  return memory;
}

// Sorts as a launch does: a small batch by one block, or (`by_places`) any batch by counting.
inline void set_order(cuda::ConvArgs& a, std::vector<int32_t>& memory, bool by_places = false) {
  if (!a.in_prefix && !a.out_prefix) return;
  cuda::OrderArgs args;
  args.n = static_cast<int32_t>(a.cut.n), args.c_in = a.c_in, args.c_out = a.c_out, args.cut = a.cut;
  args.in_prefix = a.in_prefix, args.out_prefix = a.out_prefix;
  memory.assign(static_cast<size_t>(args.workspace()), -1);
  args.place(memory.data());
  if (by_places) {
    emulator::launch((a.cut.n + 31) / 32, 32, 0, 1, [&](char*) { cuda::order_block(args); });
    use_order(a, args);
    a.order_live = nullptr;
    return;
  }
  int threads = 32;
  while (threads < args.n) threads *= 2;
  emulator::launch(1, threads, static_cast<size_t>(threads) * 8, 1,
                   [&](char* shared) { cuda::sort_block(args, shared); });
  use_order(a, args);
}

inline const char* mode_name(GpuMode mode) {
  const char* const names[] = {"full", "mixed", "tables", "residual", "skip", "groups"};
  return names[static_cast<int>(mode)];
}

inline constexpr GpuMode kModes[] = {GpuMode::kFull, GpuMode::kMixed, GpuMode::kTables, GpuMode::kResidual,
                                     GpuMode::kSkip};

}  // namespace rnp::tests
