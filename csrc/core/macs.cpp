#include "core/macs.h"

namespace rnp {

int64_t conv_macs(const ConvShape& s, int64_t in_prefix, int64_t out_prefix) {
  int64_t pairs = 0;
  for (int64_t g = 0; g < s.groups; ++g)
    pairs += live_in_group(in_prefix, g, s.group_in()) * live_in_group(out_prefix, g, s.group_out());
  return pairs * s.kh * s.kw * s.out_h * s.out_w;
}

}  // namespace rnp
