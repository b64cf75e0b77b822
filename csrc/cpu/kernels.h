// The kernels of an instruction set. Not part of microkernel.h, which the kernels themselves include.
#pragma once

#include "cpu/isa.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// `pairs`: those that multiply bfloat16 in pairs, or with matrices.
const Kernels& kernels_of(Isa isa, bool pairs = false);

}  // namespace rnp::cpu
