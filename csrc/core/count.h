// Counts the multiply-adds that kernels execute, for the tests: CMake option RNP_COUNT_FMAS. Nothing in any other
// build.
//
// A lane counts as one, whether its result is used or not: that is what rounding costs.
#pragma once

#include <cstdint>

#ifdef RNP_COUNT_FMAS
#define RNP_COUNT_FMA(lanes) ::rnp::count_fmas(lanes)
#else
#define RNP_COUNT_FMA(lanes) static_cast<void>(0)
#endif

namespace rnp {

void count_fmas(int64_t lanes);  // from any thread
int64_t take_fma_count();        // since the last call, by the caller and by threads that have ended

}  // namespace rnp
