// The most multiply-adds that this core executes: what the roofline of `rnp bench` is measured against.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rnp::cpu {

// Runs independent chains of multiply-adds in registers, `rounds` of each chain; returns how many float multiply-adds
// those were. The caller takes the time. It shares no code with the kernels.
int64_t fma_peak(Isa isa, int64_t rounds);

}  // namespace rnp::cpu
