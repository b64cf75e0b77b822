// The gradient of the weight: items are summed on all threads, then slots are added up in their order.
#include <algorithm>
#include <atomic>

#include "cpu/isa.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/scratch.h"
#include "cpu/weight_grad_item.h"
#include "cpu/with_type.h"

namespace rnp::cpu {
namespace {

constexpr double kCostOfThread = 5e4;  // cycles that must wait for a thread to be worth waking

const WeightGradKernels& weight_grad_kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512_weight_grad_kernels();
  if (isa == Isa::kAvx2) return avx2_weight_grad_kernels();
#endif
  return portable_weight_grad_kernels();
}

// One block of an item's sums into the gradient.
template <typename T>
void store_block(const PrefixConv2dGradParams& p, const GradItem& item, int64_t block, const float* sums) {
  const ConvShape& s = p.shape;
  const int64_t area = s.kh * s.kw, first = item.group * s.group_out() + item.out0 + block * kGradLanes;
  const int64_t lanes = std::min(kGradLanes, item.out_count - block * kGradLanes);
  T* out = static_cast<T*>(p.grad_weight) + (first * s.group_in() + item.in0) * area;
  for (int64_t c0 = 0; c0 < item.in_count; c0 += kGradPanel) {
    const float* panel = sums + c0 * area * kGradLanes;
    const int64_t channels = std::min(kGradPanel, item.in_count - c0);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      T* to = out + (lane * s.group_in() + c0) * area;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < area; ++t)
          *to++ = from_float<T, float>(panel[(t * kGradPanel + c) * kGradLanes + lane]);
    }
  }
}

void finish_block(const PrefixConv2dGradParams& p, const GradItem& item, int64_t block, const float* sums) {
  with_type(p.dtype, [&](auto tag) { store_block<decltype(tag)>(p, item, block, sums); });
}

}  // namespace

void prefix_conv2d_weight_grad(const PrefixConv2dGradParams& p, const Threads& threads) {
  const ConvShape& s = p.shape;
  if (s.c_out * s.group_in() * s.kh * s.kw == 0) return;
  const WeightGradPlan plan(p, threads.count);
  const WeightGradKernels& kernels = weight_grad_kernels_of(current_isa());
  const int64_t area = s.kh * s.kw, slots = plan.slot_count();
  double cost = 0;
  for (const GradItem& item : plan.items) cost += item.cost;
  const int workers = static_cast<int>(std::min<int64_t>(
      {threads.count, static_cast<int64_t>(plan.items.size()), static_cast<int64_t>(cost / kCostOfThread) + 1}));
  const int64_t packed = (plan.input_floats + plan.grad_floats + 15) / 16 * 16;
  const int64_t own = packed + (slots == 1 ? plan.item_floats : 0);
  static thread_local ScratchMemory scratch;
  float* memory = scratch.get(static_cast<size_t>(own * workers + (slots == 1 ? 0 : plan.slot_floats * slots)));
  float* shared = memory + own * workers;

  std::atomic<size_t> next{0};
  threads(workers, [&](int worker) {
    float* mine = memory + own * worker;
    for (size_t i = next++; i < plan.items.size(); i = next++) {
      const GradItem& item = plan.items[i];
      float* sums = slots == 1 ? mine + packed : shared + item.slot * plan.slot_floats + item.sums_at;
      sum_item(p, plan, kernels, item, mine, sums);
      for (int64_t b = 0; slots == 1 && b < grad_blocks(item); ++b)
        finish_block(p, item, b, sums + b * grad_block_floats(item, area));
    }
  });
  if (slots == 1) return;

  struct Block {
    const GradItem* item;
    int64_t index;
  };
  std::vector<Block> blocks;
  for (const GradItem& item : plan.items)
    for (int64_t b = 0; item.slot == 0 && b < grad_blocks(item); ++b) blocks.push_back({&item, b});
  next = 0;
  threads(std::min<int>(workers, static_cast<int>(blocks.size())), [&](int) {
    for (size_t i = next++; i < blocks.size(); i = next++) {
      const auto [item, index] = blocks[i];
      const int64_t floats = grad_block_floats(*item, area);
      float* sums = shared + item->sums_at + index * floats;
      for (int64_t slot = 1; slot < slots; ++slot) {
        const float* more = sums + slot * plan.slot_floats;
        for (int64_t k = 0; k < floats; ++k) sums[k] += more[k];
      }
      finish_block(p, *item, index, sums);
    }
  });
}

}  // namespace rnp::cpu
