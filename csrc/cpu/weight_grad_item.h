// One item of the weight's gradient: a rectangle of the weight, summed over the units of one slot.
#pragma once

#include "cpu/pair_grad_kernel.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/weight_grad_kernel.h"
#include "cpu/weight_grad_plan.h"

namespace rnp::cpu {

// Fills `sums` (layout: weight_grad_plan.h); `packed` holds input_floats + grad_floats of the plan.
void sum_item(const PrefixConv2dGradParams& p, const WeightGradPlan& plan, const WeightGradKernels& kernels,
              const GradItem& item, float* packed, float* sums);

// The same in bfloat16, where plan.pairs is set; `packed` holds plan.staged_floats more.
void sum_pair_item(const PrefixConv2dGradParams& p, const WeightGradPlan& plan, const PairGradKernels& kernels,
                   const GradItem& item, float* packed, float* sums);

}  // namespace rnp::cpu
