// Sums over pixels for the pooled means.
#pragma once

#include <cstdint>

namespace rnp::cpu {

// sums[c] += x[c] + x[c + step] + … over `pixels` pixels, added in this order, for `channels` channels. The order is
// the same on every instruction set.
void sum_pixels(const float* x, int64_t step, int64_t pixels, int64_t channels, float* sums);

}  // namespace rnp::cpu
