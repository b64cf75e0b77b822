// Winograd convolution of some samples of a call, and its transformed weights. Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "core/winograd.h"
#include "cpu/microkernel.h"
#include "cpu/pack_weight.h"

namespace rnp::cpu {

// weight: (c_out, c_in, layout.kernel, layout.kernel) float32. `packed` has layout.total_floats() floats. The transform
// is computed in double precision and rounded once. Only what samples of at most `in_live` input and `out_live` output
// channels read is written, but whole blocks of 32 output channels.
constexpr int64_t kAllChannels = std::numeric_limits<int64_t>::max();
void pack_winograd(const WeightView& weight, const WinogradLayout& layout, float* packed, const Threads& threads,
                   int64_t in_live = kAllChannels, int64_t out_live = kAllChannels);

// The same in memory that the calling thread keeps, valid until it transforms others.
const float* transform_for_call(const WeightView& weight, const WinogradLayout& layout, const Threads& threads,
                                int64_t in_live, int64_t out_live);

// Null if `packed` (of `floats` floats) was written by pack_winograd for a weight (c_out, c_in, kernel, kernel);
// otherwise what differs. On success `tile` receives the tile it was written for.
const char* winograd_mismatch(const float* packed, int64_t floats, int64_t c_out, int64_t c_in, int64_t kernel,
                              int64_t* tile);

// The samples of a call for which choose_algorithm names the tile of p.winograd; none where that is null.
struct WinogradSamples {
  std::vector<int64_t> samples;
  std::vector<uint8_t> chosen;  // (n,) 1 for those

  explicit WinogradSamples(const PrefixConv2dParams& p);
  bool all() const { return samples.size() == chosen.size(); }
};

// Rows of a ring (PrefixConv2dParams::ring) in which whatever is written before RowRing::done is called leaves alone
// the `before` rows that come before those.
int64_t winograd_ring_rows(const ConvShape& shape, int64_t tile, int64_t before);

// Computes the samples listed, whose prefixes are not 0, from p.winograd. `scratch(floats)` gives memory aligned to a
// cache line. Writes their means too, where p.pooled is given.
void winograd_conv2d(const PrefixConv2dParams& p, const std::vector<int64_t>& samples, const Kernels& kernels,
                     const Threads& threads, const std::function<float*(size_t)>& scratch);

}  // namespace rnp::cpu
