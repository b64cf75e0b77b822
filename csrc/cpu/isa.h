// The instruction set the CPU kernels run with: chosen once at run time, the best this processor and operating system
// offer, unless the environment variable RNP_ISA or SetIsa forces another. One state for the whole process:
// librnp_ops.so holds it and exports these functions, rnp_kernels._C calls them.
#pragma once

#include <string>
#include <vector>

#define RNP_EXPORT __attribute__((visibility("default")))

namespace rnp {

// In ascending order of preference. kAvx2 means AVX2, FMA and F16C; kAvx512 means AVX-512 F, BW, DQ and VL on top of
// that.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// "portable", "avx2" or "avx512".
RNP_EXPORT const char* IsaName(Isa isa);

// Whether the processor has the instructions, the operating system saves their registers, and the kernels were compiled
// for them.
RNP_EXPORT bool IsaSupported(Isa isa);

// Every supported instruction set, ascending; kPortable is always among them.
RNP_EXPORT std::vector<Isa> SupportedIsas();

// The instruction set in use. The first call reads RNP_ISA; throws std::runtime_error where that names none, or one not
// supported.
RNP_EXPORT Isa CurrentIsa();

// Forces one by its name; "auto" goes back to what RNP_ISA names, or else the best. Throws std::runtime_error and
// changes nothing where the name is unknown or the instruction set is not supported. Not to be called while a kernel
// runs.
RNP_EXPORT void SetIsa(const std::string& name);

// What the processor and operating system offer, by the names of the compiler ("avx2", "fma", "avx512f", …).
struct CpuFeature {
  const char* name;
  bool present;
};
RNP_EXPORT std::vector<CpuFeature> CpuFeatures();

}  // namespace rnp
