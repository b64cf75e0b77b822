// The program of a segment: a run of a converted network's layers between two points where Python has to act.
//
// It is text, one instruction a line, a word and integers. Values live in numbered slots of three kinds: *maps* (n, h,
// w, c) float32, *indices* (n) int32 (groups and prefixes), *vectors* (n, f) float32 (pooled features, the agent's
// hidden state). Every slot is written once, before it is read. −1 means "none". `kFields` in segment_program.cpp lists
// the operands of each instruction; python/rnp/segments.py writes them, rnp_kernels/segment.py reads them for shapes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rnp::cpu {

enum class SegmentOp { kConv, kMaxPool, kAdd, kPrefix, kLargest, kDecide };

struct SegmentStep {
  SegmentOp op = SegmentOp::kConv;
  int64_t x = -1, y = -1, residual = -1;  // maps
  int64_t in = -1, out = -1, row = -1;    // indices
  int64_t mean = -1;                      // vector
  int64_t weight = -1;                    // constant: packed weights
  int64_t winograd = -1;                  // constant: the same transformed (core/winograd.h)
  int64_t scale = -1, bias = -1;          // first element in the table of constants (constant 0)
  int64_t lines = 0;                      // of scale and bias: 0 for one line that all samples share
  int64_t c_in = 0, c_out = 0, groups = 1, kh = 1, kw = 1, stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0, dilation_h = 1, dilation_w = 1;
  int64_t relu = 0, skip = 0;                              // flags
  int64_t a = -1, b = -1, result = -1;                     // indices: operands and result of kPrefix and kLargest
  int64_t channels = 0, actions = 0;                       // kPrefix, kDecide
  int64_t features = -1, hidden_in = -1, hidden_out = -1;  // vectors of kDecide
  int64_t previous = -1, action = -1;                      // indices of kDecide
  int64_t agent = -1;                                      // kDecide: first of its kAgentConstants constants
  int64_t feature_size = 0, code = 0, hidden = 0, input = 0;
};

// mean, inv_std, encoder weight and bias, weight_ih, weight_hh, bias_ih, bias_hh, decoder weight and bias.
constexpr int64_t kAgentConstants = 10;

struct SegmentProgram {
  int64_t maps = 0, indices = 0, vectors = 0;  // numbers of slots
  std::vector<int64_t> map_in, index_in, vector_in, map_out, index_out, vector_out;
  std::vector<int64_t> index_limit;  // index slot → values lie in 0…limit; an input's are checked at every call
  std::vector<int64_t> vector_size;  // vector slot → f
  std::vector<SegmentStep> steps;
  std::vector<bool> dense;         // map slot → read by something else than a convolution: no strides but the usual
  std::vector<int64_t> last_use;   // map slot → last step that reads it; map_out is no step
  std::vector<int64_t> first_use;  // map slot → the step that writes it; −1 for inputs

  // Throws std::invalid_argument for text that is no program.
  explicit SegmentProgram(const std::string& text);
};

// The program of `text`, parsed once in this process while it is in use.
std::shared_ptr<const SegmentProgram> segment_program(const std::string& text);

}  // namespace rnp::cpu
