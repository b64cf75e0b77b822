// rnp_kernels._C: what involves no tensor. Import it after torch: librnp_ops.so, which holds the state, needs libtorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "core/algorithm.h"
#include "core/macs.h"
#include "core/processor.h"
#include "core/stock.h"
#include "cpu/fma_peak.h"
#include "cpu/isa.h"
#include "cpu/layer_call.h"
#include "cpu/output_pool.h"
#include "cpu/pack_weight.h"
#include "cpu/prefix_conv2d.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace {

// Empty text stands for "none".
py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

py::dict build_info() {
  py::dict info;
  info["version"] = RNP_VERSION;
  info["commit"] = text_or_none(RNP_COMMIT);
  info["compiler"] = RNP_COMPILER;
  info["build_type"] = RNP_BUILD_TYPE;
  info["system"] = RNP_SYSTEM;
  info["torch_headers"] = RNP_TORCH_HEADERS;
  info["torch_abi"] = "stable, 2.10";
  info["cuda_compiler"] = text_or_none(RNP_CUDA_COMPILER);
  info["cuda_archs"] = text_or_none(RNP_CUDA_ARCHS);
  info["cuda_reason"] = text_or_none(RNP_CUDA_REASON);
  return info;
}

// Where the operating system does not save the wide registers, the compiler's builtin says that the instructions are
// absent.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
#define RNP_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  RNP_FEATURE("avx");
  RNP_FEATURE("avx2");
  RNP_FEATURE("fma");
  RNP_FEATURE("avx512f");
  RNP_FEATURE("avx512bw");
  RNP_FEATURE("avx512dq");
  RNP_FEATURE("avx512vl");
  RNP_FEATURE("avx512vnni");
  RNP_FEATURE("avx512bf16");
#undef RNP_FEATURE
  features["amx_bf16"] = rnp::cpu::has_matrices();
#endif
  return features;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (rnp::cpu::Isa isa : rnp::cpu::available_isas()) names.emplace_back(rnp::cpu::isa_name(isa));
  return names;
}

void check(bool ok, const std::string& rule, int64_t value) {
  if (!ok) throw py::value_error("macs: " + rule + ", got " + std::to_string(value));
}

std::vector<int64_t> macs(const std::vector<int64_t>& in_prefix, const std::vector<int64_t>& out_prefix,
                          int64_t in_channels, int64_t out_channels, std::array<int64_t, 2> kernel_size,
                          std::array<int64_t, 2> output_size, int64_t groups) {
  check(groups >= 1, "groups must be positive", groups);
  check(in_channels >= 0 && in_channels % groups == 0, "in_channels must be a multiple of groups", in_channels);
  check(out_channels >= 0 && out_channels % groups == 0, "out_channels must be a multiple of groups", out_channels);
  for (int64_t size : kernel_size) check(size >= 0, "kernel_size must not be negative", size);
  for (int64_t size : output_size) check(size >= 0, "output_size must not be negative", size);
  check(in_prefix.size() == out_prefix.size(), "out_prefix must be as long as in_prefix",
        static_cast<int64_t>(out_prefix.size()));
  for (int64_t r : in_prefix) check(r >= 0 && r <= in_channels, "in_prefix must be 0..in_channels", r);
  for (int64_t r : out_prefix) check(r >= 0 && r <= out_channels, "out_prefix must be 0..out_channels", r);

  rnp::ConvShape shape;
  shape.c_in = in_channels;
  shape.c_out = out_channels;
  shape.kh = kernel_size[0];
  shape.kw = kernel_size[1];
  shape.out_h = output_size[0];
  shape.out_w = output_size[1];
  shape.groups = groups;
  std::vector<int64_t> result;
  for (size_t n = 0; n < in_prefix.size(); ++n) result.push_back(rnp::conv_macs(shape, in_prefix[n], out_prefix[n]));
  return result;
}

rnp::DType dtype_of(const std::string& name) {
  const std::array<const char*, 4> names = {"float32", "float64", "bfloat16", "float16"};  // in DType's order
  for (size_t i = 0; i < names.size(); ++i)
    if (name == names[i]) return static_cast<rnp::DType>(i);
  throw py::value_error("dtype must be float32, float64, bfloat16 or float16, got '" + name + "'");
}

rnp::ConvShape shape_of(const std::array<int64_t, 3>& input, const std::array<int64_t, 4>& weight,
                        const std::array<int64_t, 2>& stride, const std::array<int64_t, 4>& padding,
                        const std::array<int64_t, 2>& dilation, int64_t groups) {
  rnp::ConvShape s;
  s.n = 1;
  s.c_in = input[0];
  s.h = input[1];
  s.w = input[2];
  s.c_out = weight[0];
  s.kh = weight[2];
  s.kw = weight[3];
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.pad_top = padding[0];
  s.pad_bottom = padding[1];
  s.pad_left = padding[2];
  s.pad_right = padding[3];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  s.groups = groups;
  s.out_h = rnp::conv_output_size(s.h, s.kh, s.stride_h, s.pad_top, s.pad_bottom, s.dilation_h);
  s.out_w = rnp::conv_output_size(s.w, s.kw, s.stride_w, s.pad_left, s.pad_right, s.dilation_w);
  return s;
}

int stock_path(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
               std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups,
               const std::string& dtype, bool channels_last) {
  const rnp::ConvShape s = shape_of(input, weight, stride, padding, dilation, groups);
  const rnp::DType type = dtype_of(dtype);
  return static_cast<int>(rnp::stock_path(s, type, channels_last, rnp::cpu::bfloat16_in_use(s, type)));
}

int training_path(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
                  std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups, bool channels_last) {
  return static_cast<int>(
      rnp::training_path(shape_of(input, weight, stride, padding, dilation, groups), channels_last));
}

bool far_apart(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
               std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups) {
  return rnp::far_apart(shape_of(input, weight, stride, padding, dilation, groups));
}

bool onednn_grads_are_right(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
                            std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups,
                            const std::string& dtype) {
  return rnp::onednn_grads_are_right(shape_of(input, weight, stride, padding, dilation, groups), dtype_of(dtype));
}

// In bfloat16: whether our input's and our weight's gradient are the faster ones.
std::pair<bool, bool> our_gradients(std::array<int64_t, 4> input, std::array<int64_t, 4> weight,
                                    std::array<int64_t, 2> stride, std::array<int64_t, 4> padding,
                                    std::array<int64_t, 2> dilation, int64_t groups, bool channels_last) {
  rnp::ConvShape s = shape_of({input[1], input[2], input[3]}, weight, stride, padding, dilation, groups);
  s.n = input[0];
  const rnp::StockBFloat16 ours = rnp::cpu::bfloat16_in_use(s, rnp::DType::kBFloat16);
  return {rnp::our_input_grad_wins(s, channels_last, ours), rnp::our_weight_grad_wins(s, channels_last, ours)};
}

bool winograd_can(std::array<int64_t, 4> weight, std::array<int64_t, 2> stride, std::array<int64_t, 2> dilation,
                  int64_t groups) {
  return rnp::winograd_can(shape_of({weight[1] * groups, 1, 1}, weight, stride, {}, dilation, groups),
                           rnp::DType::kFloat32);
}

int64_t winograd_tile(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
                      std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups,
                      const std::string& dtype) {
  return rnp::winograd_tile(shape_of(input, weight, stride, padding, dilation, groups), dtype_of(dtype));
}

bool transforms_in_call(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
                        std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups,
                        const std::string& dtype) {
  return rnp::transforms_in_call(shape_of(input, weight, stride, padding, dilation, groups), dtype_of(dtype));
}

int choose_algorithm(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
                     std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups,
                     const std::string& dtype, int64_t in_prefix, int64_t out_prefix) {
  const rnp::ConvShape s = shape_of(input, weight, stride, padding, dilation, groups);
  return static_cast<int>(rnp::choose_algorithm(s, dtype_of(dtype), in_prefix, out_prefix));
}

std::string describe_kernel(std::array<int64_t, 3> input, std::array<int64_t, 4> weight, std::array<int64_t, 2> stride,
                            std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups,
                            const std::string& dtype) {
  const rnp::ConvShape s = shape_of(input, weight, stride, padding, dilation, groups);
  if (groups < 1 || s.out_h < 1 || s.out_w < 1) throw py::value_error("describe_kernel: the output must not be empty");
  return rnp::cpu::describe_kernel(s, dtype_of(dtype));
}

rnp::Strides4 strides_of(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

rnp::cpu::LayerCall layer_call(std::array<int64_t, 4> input, std::array<int64_t, 4> weight,
                               std::array<int64_t, 2> stride, std::array<int64_t, 4> padding,
                               std::array<int64_t, 2> dilation, int64_t groups, std::array<int64_t, 4> input_stride,
                               std::array<int64_t, 4> weight_stride, std::array<int64_t, 4> output_stride,
                               int64_t tile) {
  rnp::ConvShape s = shape_of({input[1], input[2], input[3]}, weight, stride, padding, dilation, groups);
  s.n = input[0];
  return {s, strides_of(input_stride), strides_of(weight_stride), strides_of(output_stride), tile};
}

// Whoever takes a DLPack capsule over renames it.
py::object new_output(const rnp::cpu::LayerCall& call) {
  void* tensor = call.new_output();
  constexpr const char* kName = "dltensor";
  PyObject* capsule = PyCapsule_New(tensor, kName, [](PyObject* own) {
    if (PyCapsule_IsValid(own, kName)) rnp::cpu::free_output(PyCapsule_GetPointer(own, kName));
  });
  if (!capsule) {
    rnp::cpu::free_output(tensor);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

std::string describe_cuda_kernel(std::array<int64_t, 4> input, std::array<int64_t, 4> weight,
                                 std::array<int64_t, 2> stride, std::array<int64_t, 4> padding,
                                 std::array<int64_t, 2> dilation, int64_t groups, const std::string& dtype,
                                 bool channels_last, bool tf32, int multiprocessors, bool hopper) {
  rnp::ConvShape s = shape_of({input[1], input[2], input[3]}, weight, stride, padding, dilation, groups);
  s.n = input[0];
  if (groups < 1 || s.n < 1 || s.out_h < 1 || s.out_w < 1)
    throw py::value_error("describe_cuda_kernel: the output must not be empty");
  return rnp::cuda::describe_kernel(s, dtype_of(dtype), channels_last, tf32, {multiprocessors, hopper});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What rnp_kernels needs from C++ that involves no tensor.";
  m.def("build_info", &build_info,
        "What this build is: version, commit, compiler, build_type, system, torch_headers, torch_abi, "
        "cuda_compiler,\n"
        "cuda_archs, cuda_reason (why the CUDA library was not built). Commit and the last three are None where\n"
        "they do not apply.");
  m.def("cpu_features", &cpu_features,
        "Instruction sets that this processor and its operating system offer: name to bool.");
  m.def(
      "available_isas", &available_isas,
      "The instruction sets the CPU kernels can run with here, in ascending order: 'portable', 'avx2', "
      "'avx512',\n"
      "'avx512bf16' (which multiplies bfloat16 without converting it to float32), 'avx512amx' (the same by matrices).");
  m.def(
      "isa", [] { return rnp::cpu::isa_name(rnp::cpu::current_isa()); },
      "The instruction set in use. RuntimeError where the environment's RNP_ISA names one that cannot run.");
  m.def("set_isa", &rnp::cpu::set_isa, py::arg("name"),
        "Use 'auto' (the best), 'portable', 'avx2', 'avx512', 'avx512bf16' or 'avx512amx' from now on, in the whole\n"
        "process. "
        "RuntimeError, and no change, where this machine or build lacks it. Not to be called while an operator runs.");
  m.def(
      "fma_peak",
      [](int64_t rounds) {
        if (rounds < 0) throw py::value_error("fma_peak: rounds must not be negative, got " + std::to_string(rounds));
        return rnp::cpu::fma_peak(rnp::cpu::current_isa(), rounds);
      },
      py::arg("rounds"), py::call_guard<py::gil_scoped_release>(),
      "Multiply-adds in registers with the instruction set in use, on this thread and without the GIL; returns how "
      "many.\nTo be timed: the most this core can do.");
  m.def(
      "bfloat16_peak",
      [](int64_t rounds) {
        if (rounds < 0)
          throw py::value_error("bfloat16_peak: rounds must not be negative, got " + std::to_string(rounds));
        return rnp::cpu::bfloat16_peak(rnp::cpu::current_isa(), rounds);
      },
      py::arg("rounds"), py::call_guard<py::gil_scoped_release>(),
      "As fma_peak, of bfloat16: with the instruction that multiplies it, or, where there is none, fma_peak itself.");
  m.def(
      "set_stock_dtypes",
      [](bool float32, int bfloat16, bool float16) {
        if (bfloat16 < 0 || bfloat16 > 3)
          throw py::value_error("set_stock_dtypes: bfloat16 must be 0..3, got " + std::to_string(bfloat16));
        rnp::set_stock_dtypes(float32, static_cast<rnp::StockBFloat16>(bfloat16), float16);
      },
      py::arg("float32"), py::arg("bfloat16"), py::arg("float16"),
      "Say in which dtypes oneDNN runs here. Until then the CPU operator never falls back to it. bfloat16: 0 not at "
      "all,\n1 by converting to float32, 2 with AVX512-BF16, 3 with AMX. ValueError for another number.");
  m.def(
      "processor",
      [] {
        const rnp::Processor& p = rnp::processor();
        return std::array<bool, 4>{p.paired_multiply_adds, p.follows_rows, p.slow_past_l2, p.wide_product};
      },
      "What csrc/core/processor.h says of this one, in its order.");
  m.def(
      "set_processor", [](std::array<bool, 4> p) { rnp::set_processor({p[0], p[1], p[2], p[3]}); },
      py::arg("processor"), "For tests: another from now on. Not to be called while an operator runs.");
  m.def("stock_path", &stock_path, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("dtype"), py::arg("channels_last"),
        "What the CPU operator does with samples of full width in this layer: 0 its own kernel, 1 oneDNN's, 2 one "
        "matrix\n"
        "product each. input is (C, H, W), weight (C_out, C_in / groups, KH, KW), padding (top, bottom, left, right).");
  m.def("describe_kernel", &describe_kernel, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("dtype"),
        "The CPU operator's own kernel for this layer, in words: instruction set and register tile.");
  py::class_<rnp::cpu::LayerCall>(
      m, "LayerCall", "A float32 layer at one input shape: called with addresses, as csrc/cpu/layer_call.h says.")
      .def(py::init(&layer_call), py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"), py::arg("input_stride"), py::arg("weight_stride"),
           py::arg("output_stride"), py::arg("tile"))
      .def_property_readonly("pools_output", &rnp::cpu::LayerCall::pools_output,
                             "Whether the output has a size that the pool serves.")
      .def("new_output", &new_output, "The output, uninitialized, on memory of the pool, as a DLPack capsule.")
      .def(
          "__call__",
          [](const rnp::cpu::LayerCall& call, uintptr_t input, uintptr_t output, uintptr_t in_prefix,
             uintptr_t out_prefix, uintptr_t weight, uintptr_t bias, uintptr_t packed, uintptr_t transformed) {
            return static_cast<int>(call(input, output, in_prefix, out_prefix, weight, bias, packed, transformed));
          },
          py::call_guard<py::gil_scoped_release>(),
          "Addresses, 0 for what is absent; returns 0 done, 1 the weights or the algorithm changed, 2 a prefix out of "
          "range.\nOnly after 0 the output is written.");
  m.def(
      "output_pool_bytes", [] { return rnp::cpu::OutputPool::instance().kept(); },
      "Bytes kept for outputs to come (csrc/cpu/output_pool.h).");
  m.def("describe_cuda_kernel", &describe_cuda_kernel, py::arg("input"), py::arg("weight"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("dtype"), py::arg("channels_last"),
        py::arg("tf32"), py::arg("multiprocessors"), py::arg("hopper") = false,
        "The CUDA operator's kernel and tile for this layer and batch, in words. input is (N, C, H, W); hopper: on a "
        "device "
        "of compute capability 9.0, by a library with code for sm_90a.");
  m.def("algorithm", &rnp::get_algorithm, "The name last given to set_algorithm.");
  m.def("set_algorithm", &rnp::set_algorithm, py::arg("name"),
        "Use 'auto' (a measured rule), 'direct', 'winograd2' or 'winograd4' on a CPU. ValueError, and no change, for\n"
        "another name.");
  m.def("training_path", &training_path, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("channels_last"),
        "What stock_path is for a float32 step of training at full width. Arguments as there.");
  m.def("far_apart", &far_apart, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"),
        "Whether the plain kernel alone computes this layer, whose outputs span far more than its image. Arguments as\n"
        "in stock_path.");
  m.def(
      "onednn_grads_are_right", &onednn_grads_are_right, py::arg("input"), py::arg("weight"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("dtype"),
      "Whether oneDNN, and so torch, computes this layer and its gradients as it should. Arguments as in stock_path.");
  m.def("our_gradients", &our_gradients, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("channels_last"));
  m.def("winograd_can", &winograd_can, py::arg("weight"), py::arg("stride"), py::arg("dilation"), py::arg("groups"),
        "Whether Winograd can compute a float32 convolution with these arguments at all, fast or not.");
  m.def("winograd_tile", &winograd_tile, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("dtype"),
        "The tile (2 or 4) for which the weights of this layer are worth transforming under the algorithm in force, or "
        "0.\n"
        "Arguments as in stock_path.");
  m.def("transforms_in_call", &transforms_in_call, py::arg("input"), py::arg("weight"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("dtype"),
        "Whether the operator, given no transformed weights, transforms them in the call. Arguments as in stock_path.");
  m.def("choose_algorithm", &choose_algorithm, py::arg("input"), py::arg("weight"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("dtype"), py::arg("in_prefix"),
        py::arg("out_prefix"),
        "The tile (2 or 4) that a sample of these prefixes uses where the weights are transformed for it; 0: direct.");
  m.def("macs", &macs, py::arg("in_prefix"), py::arg("out_prefix"), py::kw_only(), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("kernel_size"), py::arg("output_size"), py::arg("groups") = 1,
        "Multiply-accumulates of each sample of a prefix convolution: the live input times the live output channels, "
        "group\n"
        "by group, times kernel area, times output positions. Prefixes are sequences of ints of one length N, "
        "0..channels;\n"
        "kernel_size and output_size are (height, width). Returns N ints. ValueError for anything out of range.");
}
