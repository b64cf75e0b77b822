// Multiply-accumulates, counted by hand.
#include "core/macs.h"

#include "tests/check.h"

namespace rnp {
namespace {

ConvShape layer(int64_t c_in, int64_t c_out, int64_t groups) {
  ConvShape shape;
  shape.c_in = c_in;
  shape.c_out = c_out;
  shape.groups = groups;
  shape.kh = 3;
  shape.kw = 2;
  shape.out_h = 5;
  shape.out_w = 7;
  return shape;
}
constexpr int64_t kPerPair = 3 * 2 * 5 * 7;

TEST(macs_are_live_inputs_times_live_outputs) {
  CHECK_EQUAL(conv_macs(layer(8, 16, 1), 8, 16), 8 * 16 * kPerPair);
  CHECK_EQUAL(conv_macs(layer(8, 16, 1), 3, 5), 3 * 5 * kPerPair);
  CHECK_EQUAL(conv_macs(layer(8, 16, 1), 0, 16), 0);
  CHECK_EQUAL(conv_macs(layer(8, 16, 1), 8, 0), 0);
}

TEST(macs_of_groups_count_each_groups_own_live_channels) {
  // Groups of 4 inputs and 8 outputs: in-prefix 6 leaves 4 and 2 alive, out-prefix 11 leaves 8 and 3.
  CHECK_EQUAL(conv_macs(layer(8, 16, 2), 6, 11), (4 * 8 + 2 * 3) * kPerPair);
  // The second group has no live input.
  CHECK_EQUAL(conv_macs(layer(8, 16, 2), 2, 16), 2 * 8 * kPerPair);
  // Depthwise.
  CHECK_EQUAL(conv_macs(layer(6, 6, 6), 4, 5), 4 * kPerPair);
}

TEST(macs_are_64_bit) {
  ConvShape shape = layer(1 << 12, 1 << 12, 1);
  shape.kh = shape.kw = 3;
  shape.out_h = shape.out_w = 1 << 10;
  CHECK_EQUAL(conv_macs(shape, 1 << 12, 1 << 12), int64_t{9} << 44);
}

TEST(macs_output_size_of_one_axis) {
  CHECK_EQUAL(conv_output_size(9, 3, 2, 1, 1, 1), 5);
  CHECK_EQUAL(conv_output_size(10, 3, 1, 0, 2, 2), 8);
  CHECK_EQUAL(conv_output_size(2, 5, 1, 1, 1, 1), 0);  // the kernel does not fit
  CHECK_EQUAL(conv_output_size(0, 1, 1, 0, 0, 1), 0);
  CHECK_EQUAL(conv_output_size(8, 3, 1, 0, 0, int64_t{1} << 62), 0);
  CHECK_EQUAL(conv_output_size(8, 5, 1, 1, 1, int64_t{1} << 62), 0);  // 4 x 2^62 = 0 in 64 bits
  CHECK_EQUAL(conv_output_size(8, 3, 1, INT64_MAX, INT64_MAX, 1), 0);
  CHECK_EQUAL(conv_output_size(8, 3, int64_t{1} << 60, kEndOfPadding - 1, kEndOfPadding - 1, 1), 5);
  CHECK_EQUAL(conv_output_size(8, 1, INT64_MAX, 1, 1, INT64_MAX), 1);
}

}  // namespace
}  // namespace rnp
