// The interface between the driver of the weight's gradient in bfloat16 (pair_grad_item.cpp) and its per-ISA kernels,
// which multiply the values of two neighbouring positions at once. Plain structs only, for the reason given in
// microkernel.h.
#pragma once

#include <cstdint>

#include "cpu/weight_grad_kernel.h"

namespace rnp::cpu {

// Positions that a call counts in: what a matrix register holds of a channel.
constexpr int64_t kPairChunk = 32;
// Input channels side by side, and output channels of a panel: two matrices, and one.
constexpr int64_t kPairLanes = 32, kPairPanel = 16;

// sums[c][lane] += sum over positions of g[c][position] * x[position][lane], for one or two panels of output channels c
// and 16 or all 32 lanes, the input's channels.
struct PairGradArgs {
  const uint16_t* g;  // bfloat16: the first position of the first output channel
  int64_t g_step;     // values between output channels; the second panel's follow
  const uint32_t* x;  // words of two positions, the first in the low half: rows of kPairLanes, one for two positions
  int64_t chunks;     // of kPairChunk positions
  int64_t channels;   // 1…kPairPanel of the last panel; the others of it may be left out
  float* sums;        // rows of kPairLanes
  int64_t sums_step;  // floats to the second panel's
};
using PairGradTile = void (*)(const PairGradArgs&);

// Some positions of a tensor whose channels are neighbours: where the first channel of each lies, and how many of its
// channels are live. Nothing else is read of it, and stands for zero.
struct PairPositions {
  const uint16_t* const* pixel;
  const int32_t* live;
  int64_t count;  // whole chunks
};

struct PairGradKernels {
  PairGradTile tile[2][2];  // [panels - 1][halves of the lanes - 1]
  // Around the calls of `tile`: who runs after us pays nothing for matrix registers. Null where there are none.
  void (*start)();
  void (*stop)();
  // kPairLanes channels from `channel` on, as PairGradArgs::x.
  void (*interleave)(const PairPositions& from, int64_t channel, uint32_t* to);
  // The same of kPairLanes planes, `from_step` values apart, of whole chunks.
  void (*interleave_planes)(const uint16_t* from, int64_t from_step, int64_t positions, uint32_t* to);
  // kPairPanel channels from `channel` on, as PairGradArgs::g.
  void (*transpose)(const PairPositions& from, int64_t channel, uint16_t* to, int64_t to_step);
  // kPairLanes sums as bfloat16.
  void (*round)(const float* sums, uint16_t* to);
};

#if defined(__x86_64__)
const PairGradKernels& avx512bf16_pair_grad_kernels();
// The same with matrices; only where CMake found an assembler that knows them (RNP_AMX).
const PairGradKernels& amx_pair_grad_kernels();
#endif

}  // namespace rnp::cpu
