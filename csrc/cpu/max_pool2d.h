// Max-pooling of channels_last feature maps over only the live channels of each sample.
//
// torch's own pooling on a CPU also writes the int64 index of every maximum, three times the memory of the result
// itself, and visits the channels that nobody will read.
#pragma once

#include <cstdint>

namespace rnp::cpu {

// input (n, h, w, c), output (n, out_h, out_w, c), float32, rows and pixels without gaps but those that the pixels' own
// distance makes. Windows are clipped at the border. NaN wins, as in torch.
struct MaxPoolParams {
  int64_t n = 0, c = 0, h = 0, w = 0, out_h = 0, out_w = 0;
  int64_t kernel_h = 0, kernel_w = 0, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0;
  const float* input = nullptr;
  const int32_t* prefix = nullptr;  // (n), null: all channels
  bool zero_tail = false;           // write zeros beyond the prefix; otherwise leave it as it is
  float* output = nullptr;
  int64_t input_sample = 0, output_sample = 0;  // floats from one sample to the next; 0: dense
  // (n) floats from one pixel of a sample to the next; null: c.
  const int32_t* input_pixel = nullptr;
  const int32_t* output_pixel = nullptr;
  int64_t input_ring = 0;  // so many rows of input are kept: row y lies where y % input_ring would; 0: all of them
};

// Rows begin … end − 1 of the n · out_h rows of the output.
void max_pool2d(const MaxPoolParams& p, int64_t begin, int64_t end);

}  // namespace rnp::cpu
