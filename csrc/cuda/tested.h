// Whether these kernels have passed the conformance suite on a GPU. While they have not, `rnp doctor` says so.
#pragma once

namespace rnp::cuda {

constexpr bool kTestedOnDevice = false;

}  // namespace rnp::cuda
