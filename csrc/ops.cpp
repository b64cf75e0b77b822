// Every operator of torch.ops.rnp, on one screen. Kernels attach from csrc/cpu and csrc/cuda
// (STABLE_TORCH_LIBRARY_IMPL); fake kernels, autograd and autocast rules attach from rnp_kernels/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(rnp, m) {
  // One copy of the weights in which every (input, output) prefix is contiguous runs: an opaque 1-D float tensor.
  m.def("pack_weight(Tensor weight, int groups) -> Tensor");

  // A float32 weight (C_out, C_in, 3, 3) transformed for Winograd's F(tile x tile, 3x3), tile 2 or 4, or (C_out, C_in,
  // 7, 7) of a stem in steps of two (core/winograd.h), tile 4: opaque, 1-D. CPU only.
  m.def("pack_winograd(Tensor weight, int tile) -> Tensor");

  // padding is (top, bottom, left, right). packed is pack_weight(weight, groups) or None: pack for this call only.
  // winograd is pack_winograd(weight, tile): samples for which the rule of csrc/core/algorithm.h names that tile use
  // it; None: it is made in the call where that pays (transforms_in_call), elsewhere all is computed directly. Returns
  // (output, pooled); pooled is (N, C_out) float32, or empty (0,) where `pooled` is false.
  m.def(
      "prefix_conv2d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int "
      "groups,"
      " Tensor? in_prefix, Tensor? out_prefix, Tensor? scale, Tensor? row, Tensor? residual, str activation, str tail,"
      " bool pooled, Tensor? packed, Tensor? winograd=None) -> (Tensor, Tensor)");

  // Gradients of y = conv2d(input[:in_prefix], weight)[:out_prefix] alone, without scale, bias, residual or activation.
  m.def(
      "prefix_conv2d_input_grad(Tensor grad_output, Tensor weight, int[] input_size, int[] stride, int[] padding,"
      " int[] dilation, int groups, Tensor? in_prefix, Tensor? out_prefix) -> Tensor");
  m.def(
      "prefix_conv2d_weight_grad(Tensor grad_output, Tensor input, int[] weight_size, int[] stride, int[] padding,"
      " int[] dilation, int groups, Tensor? in_prefix, Tensor? out_prefix) -> Tensor");

  // That of the weight at full width, in the dtype and the layout of `weight`, bfloat16 or float32: float32 spares a
  // rounding and two copies where the others come from autocast. CPU only.
  m.def(
      "conv2d_weight_grad(Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding,"
      " int[] dilation, int groups) -> Tensor");

  // min(max(prefix, 0), limit) on the device, without reading it back. CUDA only.
  m.def("clamp_prefix(Tensor prefix, int limit) -> Tensor");

  // Max-pooling of the live channels of each sample; prefix None: all. Inference only, float32 (on CUDA bfloat16 and
  // float16 too), a channels_last output.
  m.def("max_pool2d(Tensor input, Tensor? prefix, int[] kernel, int[] stride, int[] padding, str tail) -> Tensor");

  // torch.nn.functional.linear of a float32 (N, C) on a CPU, without a gradient: the classifier behind a converted
  // network. With `in_prefix` int32 (N,), only that many runs of `channel_inputs` inputs of each sample are read.
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, Tensor? in_prefix=None, int channel_inputs=1) -> Tensor");

  // One decision of the agent for every sample: standardise, encode, one GRU step, decode, argmax of Q + (i - 1) *
  // shift. weight_ih has a column for each action after the code's where the previous action is an input. Returns
  // (hidden (N, H) float32, q (N, k) float32, action (N,) int32 counted from 1, and the prefix of `channels` that the
  // action keeps (N,) int32).
  m.def(
      "agent_step(Tensor pooled, Tensor? hidden, Tensor? previous_action, Tensor mean, Tensor inv_std,"
      " Tensor encoder_weight, Tensor encoder_bias, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh,"
      " Tensor decoder_weight, Tensor decoder_bias, float shift, int channels) -> (Tensor, Tensor, Tensor, Tensor)");

  // A run of a converted network's layers, decisions of the agent included, as one call: maps that do not leave it are
  // never tensors. `program` is text (csrc/cpu/segment_program.h); `inputs` are its maps, indices and vectors, in this
  // order, like the result; `constants` its tables, packed weights and the agent's parameters. Inference, float32, CPU.
  m.def("run_segment(str program, Tensor[] inputs, Tensor[] constants, float shift) -> Tensor[]");
  // Frees the buffers that run_segment keeps from call to call.
  m.def("release_segment_memory() -> ()");
}
