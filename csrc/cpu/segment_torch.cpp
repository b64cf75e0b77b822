// Binding of run_segment on the CPU: check tensors, allocate what leaves the segment, run.
#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/output_pool.h"
#include "cpu/segment.h"
#include "cpu/torch_common.h"
#include "torch_text.h"

namespace rnp::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "run_segment";

class Call {
 public:
  Call(const SegmentProgram& program, const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants)
      : p_(program), inputs_(inputs) {
    const size_t count = p_.map_in.size() + p_.index_in.size() + p_.vector_in.size();
    STD_TORCH_CHECK(inputs.size() == count, kOp, ": the program needs ", count, " inputs; got ", inputs.size());
    STD_TORCH_CHECK(!inputs.empty(), kOp, ": a program needs an input");
    call_.n = inputs[0].dim() > 0 ? inputs[0].size(0) : 0;
    size_t next = 0;
    for (int64_t slot : p_.map_in) map(inputs[next++], p_.dense[static_cast<size_t>(slot)]);
    for (size_t i = 0; i < p_.index_in.size(); ++i)
      call_.index_in.push_back(
          static_cast<const int32_t*>(dense("an index input", inputs[next++], ScalarType::Int, -1)));
    for (int64_t slot : p_.vector_in)
      call_.vector_in.push_back(static_cast<const float*>(
          dense("a vector input", inputs[next++], ScalarType::Float, p_.vector_size[static_cast<size_t>(slot)])));
    call_.constants.reserve(constants.size());
    for (const Tensor& t : constants) {
      check_dtype(kOp, "a constant", t, ScalarType::Float);
      STD_TORCH_CHECK(t.is_contiguous(), kOp, ": constants must be contiguous; got shape ", text(t));
      call_.constants.push_back({static_cast<const float*>(t.const_data_ptr()), t.numel()});
    }
  }

  std::vector<Tensor> run(double shift) {
    call_.shift = static_cast<float>(shift);
    const std::vector<MapShape> shapes = segment_shapes(p_, call_.map_in_shape);
    std::vector<Tensor> outputs;
    for (int64_t slot : p_.map_out) {
      const MapShape& s = shapes[static_cast<size_t>(slot)];
      outputs.push_back(torch::stable::empty({call_.n, s.c, s.h, s.w}, ScalarType::Float, std::nullopt, std::nullopt,
                                             std::nullopt, MemoryFormat::ChannelsLast));
      call_.map_out.push_back(static_cast<float*>(outputs.back().mutable_data_ptr()));
    }
    for (size_t i = 0; i < p_.index_out.size(); ++i) {
      outputs.push_back(torch::stable::empty({call_.n}, ScalarType::Int));
      call_.index_out.push_back(static_cast<int32_t*>(outputs.back().mutable_data_ptr()));
    }
    for (int64_t slot : p_.vector_out) {
      outputs.push_back(torch::stable::empty({call_.n, p_.vector_size[static_cast<size_t>(slot)]}, ScalarType::Float));
      call_.vector_out.push_back(static_cast<float*>(outputs.back().mutable_data_ptr()));
    }
    run_segment(p_, shapes, call_, torch_threads());
    return outputs;
  }

 private:
  void map(const Tensor& given, bool dense) {
    check_dtype(kOp, "a map input", given, ScalarType::Float);
    STD_TORCH_CHECK(given.dim() == 4 && given.size(0) == call_.n, kOp,
                    ": a map input must be (N, C, H, W) with N = ", call_.n, "; got ", text(given));
    const Tensor& t = dense ? keep(torch::stable::contiguous(given, MemoryFormat::ChannelsLast)) : given;
    call_.map_in.push_back(static_cast<const float*>(t.const_data_ptr()));
    const MapShape shape = {t.size(1), t.size(2), t.size(3)};
    call_.map_in_shape.push_back(shape);
    // Strides of axes of one element say nothing; the usual ones are as good.
    call_.map_in_stride.push_back(dense ? Strides4{shape.floats(), 1, shape.w * shape.c, shape.c} : strides_of(t));
  }

  // (N, columns), or (N,) where columns < 0.
  const void* dense(const char* name, const Tensor& given, ScalarType dtype, int64_t columns) {
    check_dtype(kOp, name, given, dtype);
    const bool matrix = columns >= 0;
    STD_TORCH_CHECK(
        given.dim() == (matrix ? 2 : 1) && given.size(0) == call_.n && (!matrix || given.size(1) == columns), kOp, ": ",
        name, " must have shape (", call_.n, matrix ? ", " + std::to_string(columns) : ",", "); got ", text(given));
    return given.is_contiguous() ? given.const_data_ptr() : keep(torch::stable::contiguous(given)).const_data_ptr();
  }

  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }

  const SegmentProgram& p_;
  const std::vector<Tensor>& inputs_;
  std::vector<Tensor> kept_;
  SegmentCall call_;
};

std::vector<Tensor> run_segment_cpu(const Text& program, const std::vector<Tensor>& inputs,
                                    const std::vector<Tensor>& constants, double shift) {
  try {
    const std::shared_ptr<const SegmentProgram> parsed = segment_program(program.value);
    return Call(*parsed, inputs, constants).run(shift);
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, kOp, ": ", error.what());
  }
}

void release_memory() {
  release_segment_memory();
  OutputPool::instance().release();
}

}  // namespace
}  // namespace rnp::cpu

STABLE_TORCH_LIBRARY_IMPL(rnp, CPU, m) { m.impl("run_segment", TORCH_BOX(&rnp::cpu::run_segment_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(rnp, CompositeExplicitAutograd, m) {
  m.impl("release_segment_memory", TORCH_BOX(&rnp::cpu::release_memory));
}
