// The most multiply-adds that this core executes: what the roofline of `rnp bench` is measured against.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rnp::cpu {

// Runs independent chains of multiply-adds in registers, `rounds` of each chain; returns how many float multiply-adds
// those were. The caller takes the time. It shares no code with the kernels.
int64_t fma_peak(Isa isa, int64_t rounds);

// The same of bfloat16: chains of vdpbf16ps, two multiply-adds to a lane, where the instruction set has it; elsewhere
// bfloat16 is converted to float first, so the peak is fma_peak's.
int64_t bfloat16_peak(Isa isa, int64_t rounds);

}  // namespace rnp::cpu
