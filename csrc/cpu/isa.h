// Which instruction set the CPU kernels use: the best that the machine offers, unless RNP_ISA or set_isa says
// otherwise.
#pragma once

#include <string>
#include <vector>

namespace rnp::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Amx = 4 };

// Names are "portable", "avx2", "avx512"; "avx512bf16": as "avx512", but bfloat16 is multiplied as it stands
// (kernels_avx512bf16.cpp) and not converted to float32 first; and "avx512amx": the same by whole matrices
// (kernels_amx.cpp), which the operating system has to allow.
const char* isa_name(Isa isa);
// What this machine can run and this build holds, slowest first; never empty.
std::vector<Isa> available_isas();
// Whether the processor has AMX's tiles and multiplies bfloat16 in them, allowed or not.
bool has_matrices();
// The one in use. Reads RNP_ISA at the first call; throws std::runtime_error where it names an unknown or unavailable
// ISA.
Isa current_isa();
// "auto" or one of the names. Throws std::runtime_error (and changes nothing) if this machine cannot run it.
void set_isa(const std::string& name);

}  // namespace rnp::cpu
