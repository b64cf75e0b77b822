#include "cpu/prefix_conv2d.h"

namespace rnp::cpu {

void prefix_conv2d(const PrefixConv2dParams& params, const Threads& threads) { prefix_conv2d_plain(params, threads); }

}  // namespace rnp::cpu
