// A work item by kernels that multiply matrices (matrix_kernels.h).
//
// They want whole chunks of 16 words. Where a pixel's live words are not that many, they are copied into *records*,
// filled up with zeros, and so are the weights beside them; where they are few, a record holds those of a whole kernel
// row. Which chunks a sample's sums consist of, and in which order, follows from the layer and the sample's input
// prefix alone.
#pragma once

#include <optional>

#include "cpu/call.h"
#include "cpu/matrix_plan.h"
#include "cpu/prefetch.h"

namespace rnp::cpu {

// What one worker keeps from item to item: the plan it used last.
class MatrixWorker {
 public:
  void run(const Call& call, const WorkItem& item, const WorkItem* following, float* memory);
  static int64_t floats(const Call& call, const WorkItem& item);  // of memory

 private:
  std::optional<MatrixPlan> plan_;
};

}  // namespace rnp::cpu
