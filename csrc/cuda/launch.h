// Launches of the CUDA kernels: plain structs of device pointers, a stream (cudaStream_t), and CUDA's message where a
// launch failed, or null. Nothing waits for the device and nothing is allocated.
#pragma once

#include "core/prefix_conv2d.h"
#include "cuda/conv_args.h"
#include "cuda/plain_args.h"
#include "cuda/plan.h"

namespace rnp::cuda {

// The current device; null or CUDA's message.
const char* current_device(Device* out);

const char* launch_tile(const TileLaunch& launch, int multiprocessors, void* stream);
const char* launch_hopper_tile(const TileLaunch& launch, int multiprocessors, void* stream);
const char* launch_order(const OrderArgs& args, void* stream);
const char* launch_pack(const PackArgs& args, void* stream);
const char* launch_unfold(const UnfoldArgs& args, int element, int multiprocessors, void* stream);
const char* launch_plain(const PlainArgs& args, DType dtype, int multiprocessors, void* stream);
const char* launch_weight_grad(const WeightGradArgs& args, DType dtype, void* stream);
const char* launch_mean(const MeanArgs& args, DType dtype, void* stream);

}  // namespace rnp::cuda
