// From a call of the operator to the launches that compute it: no CUDA, no torch, so C++ tests run it on the CPU.
#pragma once

#include <string>
#include <vector>

#include "core/prefix_conv2d.h"
#include "cuda/conv_args.h"
#include "cuda/plain_args.h"

namespace rnp::cuda {

// Which convolution is packed and run: the layer itself, or the one that takes its output's gradient to its input's.
enum class Role { kForward, kInputGrad };

int32_t element_size(DType dtype);

// Whether the tile kernel computes it; elsewhere the plain kernel does. Depends on the layer alone.
bool has_tile(const ConvShape& shape, DType dtype, Role role);

// What the packed weights of a layer look like, and how to make them from a weight of these strides.
PackArgs pack_args(const ConvShape& shape, DType dtype, Role role, const void* weight, const Strides4& weight_stride,
                   void* packed);

// What the choice of a kernel asks of the device. `hopper`: compute capability 9.0, and a library with code for sm_90a.
struct Device {
  int multiprocessors = 1;
  bool hopper = false;
};

struct TileLaunch {
  TileName tile;
  ConvArgs args;                 // order_*, ticket and partial are filled in by the launcher
  Im2colBox box;                 // for sm_90a
  int64_t partial_elements = 0;  // floats that args.partial must hold; none where K is not split
  // Where pieces() > 0 this copy of the input comes first, and the launch reads it: see use_unfolded.
  UnfoldArgs unfold;
};

// `memory`: 16 bytes for each of launch.unfold.pieces(), aligned to 16.
void use_unfolded(TileLaunch& launch, void* memory);

// `p` holds device pointers, `p.packed` what pack_args describes. For an input gradient `p` is the layer itself with
// the gradient of its output in `input`, the one of its input in `output`, and each prefix under its own name; one
// launch for each residue of the stride. `lines`: of the scale and bias tables. `tf32`: float32 may be rounded to TF32.
std::vector<TileLaunch> tile_launches(const PrefixConv2dParams& p, Role role, int32_t lines, bool tf32,
                                      const Device& device);

// Gives a launch of sm_90a another tile, with the input of a chunk kept for all taps or fetched for each; what K is
// split into stays. False, and nothing may be launched, where the layer has no windows or they do not fit.
bool set_hopper_tile(TileLaunch& launch, const TileSize& tile, bool window);

PlainArgs plain_args(const PrefixConv2dParams& p, Role role, int32_t lines);

// `partial` and `weight_grad` are the caller's to set: the first holds `splits` times the weight's elements.
WeightGradArgs weight_grad_args(const ConvShape& shape, int multiprocessors);

// Blocks of one run of samples.
int64_t weight_grad_tiles(const WeightGradArgs& args);

// For people: which kernel computes the layer's output, and its tile. The input is dense, channels_last or contiguous.
std::string describe_kernel(const ConvShape& shape, DType dtype, bool channels_last, bool tf32, const Device& device);

}  // namespace rnp::cuda
