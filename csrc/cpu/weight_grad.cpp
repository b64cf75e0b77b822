// The gradient of the weight: items are summed on all threads, then slots are added up in their order.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

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

// Null where bfloat16 is converted to float32: there is no instruction for it, or vectors would be mostly empty.
const PairGradKernels* pair_grad_kernels(const PrefixConv2dGradParams& p) {
#if defined(__x86_64__)
  const bool narrow = p.shape.groups > 1 && std::min(p.shape.group_in(), p.shape.group_out()) < kGradPanel;
  if (p.dtype != DType::kBFloat16 || narrow) return nullptr;
#if defined(RNP_AMX)
  if (current_isa() == Isa::kAvx512Amx) return &amx_pair_grad_kernels();
#endif
  if (current_isa() >= Isa::kAvx512Bf16) return &avx512bf16_pair_grad_kernels();
#endif
  return nullptr;
}

// Where the gradient of one weight lies.
template <typename T>
struct Place {
  T* first;
  Strides4 stride;
  std::vector<int64_t> tap;  // from a filter's first

  explicit Place(const PrefixConv2dGradParams& p)
      : first(static_cast<T*>(p.grad_weight)), stride(p.grad_weight_stride) {
    for (int64_t i = 0; i < p.shape.kh; ++i)
      for (int64_t j = 0; j < p.shape.kw; ++j) tap.push_back(i * stride.h + j * stride.w);
  }
  T* at(int64_t out, int64_t in) const { return first + out * stride.n + in * stride.c; }
};

// One block of an item's sums into the gradient.
template <typename T>
void store_block(const PrefixConv2dGradParams& p, const GradItem& item, int64_t block, const float* sums) {
  const Place<T> place(p);
  const int64_t area = static_cast<int64_t>(place.tap.size()), step = place.stride.c;
  const int64_t first = item.group * p.shape.group_out() + item.out0 + block * kGradLanes;
  const int64_t lanes = std::min(kGradLanes, item.out_count - block * kGradLanes);
  for (int64_t c0 = 0; c0 < item.in_count; c0 += kGradPanel) {
    const float* panel = sums + c0 * area * kGradLanes;
    const int64_t channels = std::min(kGradPanel, item.in_count - c0);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      T* filter = place.at(first + lane, item.in0 + c0);
      const float* from = panel + lane;
      for (const int64_t tap : place.tap) {
        T* to = filter + tap;
        for (int64_t c = 0; c < channels; ++c, to += step) *to = from_float<T, float>(from[c * kGradLanes]);
        from += kGradPanel * kGradLanes;
      }
    }
  }
}

// The same of sums in pairs (layout: weight_grad_plan.h). T: float or uint16_t, a bfloat16.
template <typename T>
void store_pair_block(const PrefixConv2dGradParams& p, const PairGradKernels& kernels, const GradItem& item,
                      int64_t block, const float* sums) {
  const Place<T> place(p);
  const int64_t area = static_cast<int64_t>(place.tap.size());
  const int64_t lanes = std::min(kPairLanes, item.in_count - block * kPairLanes);
  for (int64_t c = 0; c < item.out_count; ++c) {
    const float* row = sums + (c / kPairPanel * area * kPairPanel + c % kPairPanel) * kPairLanes;
    T* filter = place.at(item.group * p.shape.group_out() + item.out0 + c, item.in0 + block * kPairLanes);
    for (const int64_t tap : place.tap) {
      T rounded[kPairLanes];
      const T* from = rounded;
      if constexpr (std::is_same_v<T, float>) {
        from = row;
      } else {
        kernels.round(row, rounded);
      }
      if (place.stride.c == 1) {
        std::memcpy(filter + tap, from, sizeof(T) * static_cast<size_t>(lanes));
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane) filter[tap + lane * place.stride.c] = from[lane];
      }
      row += kPairPanel * kPairLanes;
    }
  }
}

void finish_block(const PrefixConv2dGradParams& p, const PairGradKernels* pairs, const GradItem& item, int64_t block,
                  const float* sums) {
  if (!pairs) {
    with_type(p.grad_weight_dtype, [&](auto tag) { store_block<decltype(tag)>(p, item, block, sums); });
  } else if (p.grad_weight_dtype == DType::kFloat32) {
    store_pair_block<float>(p, *pairs, item, block, sums);
  } else {
    store_pair_block<uint16_t>(p, *pairs, item, block, sums);
  }
}

}  // namespace

void prefix_conv2d_weight_grad(const PrefixConv2dGradParams& p, const Threads& threads) {
  const ConvShape& s = p.shape;
  if (s.c_out * s.group_in() * s.kh * s.kw == 0) return;
  const PairGradKernels* pairs = pair_grad_kernels(p);
  const WeightGradPlan plan(p, threads.count, pairs != nullptr);
  const WeightGradKernels& kernels = weight_grad_kernels_of(current_isa());
  const int64_t area = s.kh * s.kw, slots = plan.slot_count();
  double cost = 0;
  for (const GradItem& item : plan.items) cost += item.cost;
  const int workers = static_cast<int>(std::min<int64_t>(
      {threads.count, static_cast<int64_t>(plan.items.size()), static_cast<int64_t>(cost / kCostOfThread) + 1}));
  const int64_t packed = plan.packed_floats();
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
      if (pairs) {
        sum_pair_item(p, plan, *pairs, item, mine, sums);
      } else {
        sum_item(p, plan, kernels, item, mine, sums);
      }
      for (int64_t b = 0; slots == 1 && b < plan.blocks(item); ++b)
        finish_block(p, pairs, item, b, sums + b * plan.block_floats(item, area));
    }
  });
  if (slots == 1) return;

  struct Block {
    const GradItem* item;
    int64_t index;
  };
  std::vector<Block> blocks;
  for (const GradItem& item : plan.items)
    for (int64_t b = 0; item.slot == 0 && b < plan.blocks(item); ++b) blocks.push_back({&item, b});
  next = 0;
  threads(std::min<int>(workers, static_cast<int>(blocks.size())), [&](int) {
    for (size_t i = next++; i < blocks.size(); i = next++) {
      const auto [item, index] = blocks[i];
      const int64_t floats = plan.block_floats(*item, area);
      float* sums = shared + item->sums_at + index * floats;
      for (int64_t slot = 1; slot < slots; ++slot) {
        const float* more = sums + slot * plan.slot_floats;
        for (int64_t k = 0; k < floats; ++k) sums[k] += more[k];
      }
      finish_block(p, pairs, *item, index, sums);
    }
  });
}

}  // namespace rnp::cpu
