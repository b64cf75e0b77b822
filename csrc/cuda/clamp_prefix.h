#pragma once

#include <cstdint>

namespace rnp::cuda {

// output[i] = min(max(prefix[i], 0), limit) for i < count, enqueued on `stream` (a cudaStream_t). Nothing is read back
// to the host: on a GPU a prefix outside 0…C is clamped, since raising would stall the stream. Returns null, or CUDA's
// message where the launch failed.
const char* clamp_prefix(const int32_t* prefix, int32_t* output, int64_t count, int32_t limit, void* stream);

}  // namespace rnp::cuda
