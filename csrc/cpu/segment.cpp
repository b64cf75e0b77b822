#include "cpu/segment.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>

#include "cpu/agent_step.h"
#include "cpu/buffer_pool.h"
#include "cpu/max_pool2d.h"
#include "cpu/prefix_conv2d.h"
#include "cpu/segment_check.h"
#include "cpu/segment_layout.h"
#include "cpu/segment_memory.h"
#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

BufferPool& pool() {
  static BufferPool* const all = new BufferPool;  // never destroyed: a thread may outlive the static objects
  return *all;
}

// body(begin, end, worker) over 0 … count − 1, split evenly over as many threads as have `least` of them to do.
template <typename F>
void split(const Threads& threads, int64_t count, int64_t least, F&& body) {
  const int workers = static_cast<int>(std::clamp<int64_t>(count / least, 1, threads.count));
  if (workers == 1) return body(int64_t{0}, count, 0);
  threads(workers, [&](int worker) { body(count * worker / workers, count * (worker + 1) / workers, worker); });
}

class Runner {
 public:
  Runner(const SegmentProgram& program, const std::vector<MapShape>& shapes, const SegmentCall& call,
         const Threads& threads, int64_t group_bytes)
      : p_(program),
        shapes_(shapes),
        call_(call),
        threads_(threads),
        memory_(program, shapes, call.n, group_bytes, threads.count),
        compact_(compact_maps(program, memory_)) {
    maps_.resize(shapes.size());
    for (size_t m = 0; m < maps_.size(); ++m) {
      const int64_t sample = memory_.offset[m] < 0 ? shapes[m].floats() : sample_room(shapes[m]);
      maps_[m].stride = {sample, 1, shapes[m].w * shapes[m].c, shapes[m].c};
    }
    for (size_t i = 0; i < p_.map_in.size(); ++i)
      maps_[slot(p_.map_in[i])] = {const_cast<float*>(call.map_in[i]), call.map_in_stride[i], nullptr, nullptr};
    indices_.resize(static_cast<size_t>(p_.indices));
    vectors_.resize(static_cast<size_t>(p_.vectors));
    for (size_t i = 0; i < p_.index_in.size(); ++i)
      indices_[slot(p_.index_in[i])] = const_cast<int32_t*>(call.index_in[i]);
    for (size_t i = 0; i < p_.vector_in.size(); ++i)
      vectors_[slot(p_.vector_in[i])] = const_cast<float*>(call.vector_in[i]);
    for (size_t i = 0; i < p_.map_out.size(); ++i) maps_[slot(p_.map_out[i])].data = call.map_out[i];
    for (size_t i = 0; i < p_.index_out.size(); ++i) indices_[slot(p_.index_out[i])] = call.index_out[i];
    for (size_t i = 0; i < p_.vector_out.size(); ++i) vectors_[slot(p_.vector_out[i])] = call.vector_out[i];
  }

  void run() {
    size_t floats = static_cast<size_t>(memory_.floats);
    const auto reserve = [&](int64_t elements) {
      const size_t begin = floats;
      floats += static_cast<size_t>((elements * call_.n + 15) / 16 * 16);
      return begin;
    };
    std::vector<std::pair<size_t, size_t>> vectors, indices;  // slot, first element
    for (size_t v = 0; v < vectors_.size(); ++v)
      if (!vectors_[v] && p_.vector_size[v] > 0) vectors.emplace_back(v, reserve(p_.vector_size[v]));
    for (size_t i = 0; i < indices_.size(); ++i)
      if (!indices_[i]) indices.emplace_back(i, reserve(1));
    std::vector<std::pair<size_t, size_t>> layouts;
    for (size_t m = 0; m < maps_.size(); ++m)
      if (compact_[m]) layouts.emplace_back(m, reserve(2));
    BufferPool::Buffer buffer = pool().take(floats);
    for (auto [v, first] : vectors) vectors_[v] = buffer.data.get() + first;
    for (auto [i, first] : indices) indices_[i] = reinterpret_cast<int32_t*>(buffer.data.get() + first);
    for (size_t m = 0; m < maps_.size(); ++m)
      if (!maps_[m].data && memory_.offset[m] >= 0) maps_[m].data = buffer.data.get() + memory_.offset[m];
    for (auto [m, first] : layouts) {
      maps_[m].pixel = reinterpret_cast<int32_t*>(buffer.data.get() + first);
      maps_[m].live = maps_[m].pixel + call_.n;
    }
    for (const SegmentPhase& phase : memory_.phases) run_phase(phase);
    pool().give(std::move(buffer));
  }

 private:
  struct Map {
    float* data = nullptr;
    Strides4 stride;
    // Of a compact map (segment_layout.h), for every sample: elements between pixels, and channels that are kept.
    int32_t* pixel = nullptr;
    int32_t* live = nullptr;
  };

  static size_t slot(int64_t number) { return static_cast<size_t>(number); }

  // Groups of samples, each through all steps; with several places each thread takes one after the other, and no thread
  // waits for another between two layers.
  void run_phase(const SegmentPhase& phase) {
    const int64_t groups = (call_.n + phase.samples - 1) / phase.samples;
    const auto run_group = [&](int64_t group, int64_t place, const Threads& threads) {
      const int64_t first = group * phase.samples;
      const Part part{first, std::min(phase.samples, call_.n - first), place * phase.group_floats, threads};
      for (size_t i = phase.first; i < phase.end; ++i) {
        if (i + 1 < phase.end && pools(i, part)) {
          convolve(p_.steps[i], part, &p_.steps[i + 1]);
          ++i;
        } else if (i + 1 < phase.end && pools_behind(i, part)) {
          convolve_and_pool(p_.steps[i], p_.steps[i + 1], part);
          ++i;
        } else {
          step(p_.steps[i], part);
        }
      }
    };
    if (phase.places == 1) {
      for (int64_t group = 0; group < groups; ++group) run_group(group, 0, threads_);
      return;
    }
    const std::vector<int64_t> order = widest_first(phase, groups);
    const Threads alone;
    std::atomic<int64_t> next{0};
    threads_(static_cast<int>(phase.places), [&](int worker) {
      for (int64_t i = next++; i < groups; i = next++) run_group(order[slot(i)], worker, alone);
    });
  }

  // Groups in the order of their work, as far as it is known before they run: threads end at about the same time.
  std::vector<int64_t> widest_first(const SegmentPhase& phase, int64_t groups) const {
    std::vector<double> work(slot(groups), 0.0);
    for (int64_t n = 0; n < call_.n; ++n) work[slot(n / phase.samples)] += work_of(phase, n);
    std::vector<int64_t> order(slot(groups));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[slot(a)] > work[slot(b)]; });
    return order;
  }

  // About the multiply-adds of a sample in a phase. Widths that an agent has yet to choose count as full.
  double work_of(const SegmentPhase& phase, int64_t n) const {
    constexpr double kWinograd = 0.35;  // of a layer's multiply-adds, the transforms' time counted too
    constexpr double kElement = 8;      // multiply-adds that moving an element costs
    std::vector<double> share(indices_.size(), 1.0);
    const auto known = [&](int64_t i) {
      share[slot(i)] = indices_[slot(i)][n] / static_cast<double>(std::max<int64_t>(1, p_.index_limit[slot(i)]));
    };
    const auto of = [&](int64_t i) { return i < 0 ? 1.0 : share[slot(i)]; };
    for (int64_t i : p_.index_in) known(i);
    double work = 0;
    for (size_t i = 0; i < phase.end; ++i) {
      const SegmentStep& s = p_.steps[i];
      if (i < phase.first) {
        if (s.result >= 0) known(s.result);
      } else if (s.op == SegmentOp::kPrefix) {
        share[slot(s.result)] = of(s.a);
      } else if (s.op == SegmentOp::kLargest) {
        share[slot(s.result)] = std::max(of(s.a), of(s.b));
      } else if (s.op == SegmentOp::kConv) {
        const MapShape &x = shapes_[slot(s.x)], &y = shapes_[slot(s.y)];
        const double in = static_cast<double>(s.c_in) * of(s.in), out = static_cast<double>(s.c_out) * of(s.out);
        const double pixels = static_cast<double>(y.h * y.w);
        work += pixels * static_cast<double>(s.kh * s.kw) * in * out / static_cast<double>(s.groups) *
                (s.winograd < 0 ? 1 : kWinograd);
        work += kElement * (static_cast<double>(x.h * x.w) * in + pixels * out);
      }
    }
    return work;
  }

  // Samples that pass through a step together, and who computes them.
  struct Part {
    int64_t first, count;
    int64_t place;  // floats from the first place of the maps that hold a group to the part's
    const Threads& threads;
  };

  // A map slot from the part's first sample on.
  float* map_at(int64_t m, const Part& part) const {
    const Map& map = maps_[slot(m)];
    return map.data + (memory_.whole_batch[slot(m)] ? part.first * map.stride.n : part.place);
  }
  const int32_t* pixel_at(int64_t m, const Part& part) const {
    const int32_t* pixel = maps_[slot(m)].pixel;
    return pixel ? pixel + part.first : nullptr;
  }
  int32_t* index_at(int64_t i, const Part& part) const { return i < 0 ? nullptr : indices_[slot(i)] + part.first; }
  float* vector_at(int64_t v, const Part& part) const {
    return v < 0 ? nullptr : vectors_[slot(v)] + part.first * p_.vector_size[slot(v)];
  }

  void step(const SegmentStep& s, const Part& part) {
    switch (s.op) {
      case SegmentOp::kConv:
        return convolve(s, part);
      case SegmentOp::kMaxPool:
        return max_pool(s, part);
      case SegmentOp::kAdd:
        return add(s, part);
      case SegmentOp::kPrefix: {
        const int32_t* group = index_at(s.a, part);
        int32_t* to = index_at(s.result, part);
        for (int64_t n = 0; n < part.count; ++n)
          to[n] = static_cast<int32_t>((group[n] * s.channels + s.actions - 1) / s.actions);
        return;
      }
      case SegmentOp::kLargest: {
        const int32_t *a = index_at(s.a, part), *b = index_at(s.b, part);
        int32_t* to = index_at(s.result, part);
        for (int64_t n = 0; n < part.count; ++n) to[n] = std::max(a[n], b[n]);
        return;
      }
      case SegmentOp::kDecide:
        return decide(s, part);
    }
  }

  // Whether step i does the pooling of the next one too: every sample goes through Winograd, and the channels beyond
  // the prefix are nobody's.
  bool pools(size_t i, const Part& part) const {
    if (!pooling_follows(p_, shapes_, i)) return false;
    const SegmentStep &s = p_.steps[i], &next = p_.steps[i + 1];
    if (!compact_[slot(next.y)] && next.skip <= 0 && s.out >= 0) return false;
    return all_by_winograd(s, part);
  }

  // Whether the next step can pool a stem's rows as they come, while they are in the caches: a sample alone on its
  // thread, whose image lies outside of the segment's memory (the pooling's output might lie over it there), while its
  // own rows lie inside: a map that the segment gives out is wanted whole.
  bool pools_behind(size_t i, const Part& part) const {
    const SegmentStep &s = p_.steps[i], &next = p_.steps[i + 1];
    return part.count == 1 && part.threads.count == 1 && s.op == SegmentOp::kConv && s.winograd >= 0 && s.kh == 7 &&
           s.out < 0 && s.residual < 0 && memory_.offset[slot(s.x)] < 0 && memory_.offset[slot(s.y)] >= 0 &&
           next.op == SegmentOp::kMaxPool && next.x == s.y && p_.last_use[slot(s.y)] == static_cast<int64_t>(i) + 1 &&
           all_by_winograd(s, part);
  }

  bool all_by_winograd(const SegmentStep& s, const Part& part) const {
    PrefixConv2dParams p;
    p.shape = step_shape(s, shapes_[slot(s.x)]);
    p.shape.n = part.count;
    p.in_prefix = index_at(s.in, part), p.out_prefix = index_at(s.out, part);
    set_winograd(p, s);
    return WinogradSamples(p).all();
  }

  void set_winograd(PrefixConv2dParams& p, const SegmentStep& s) const {
    if (s.winograd < 0) return;
    const Constant& transformed = call_.constants[slot(s.winograd)];
    p.winograd = transformed.data;
    winograd_mismatch(transformed.data, transformed.floats, s.c_out, s.c_in, s.kh, &p.winograd_tile);
  }

  // With `pool`, that step's max-pooling too; with `ring`, only so many rows are kept.
  void convolve(const SegmentStep& s, const Part& part, const SegmentStep* pool = nullptr,
                const RowRing* ring = nullptr) {
    PrefixConv2dParams p;
    p.shape = step_shape(s, shapes_[slot(s.x)]);
    p.shape.n = part.count;
    p.input = map_at(s.x, part);
    p.input_stride = maps_[slot(s.x)].stride;
    p.input_pixel = pixel_at(s.x, part);
    p.packed = call_.constants[slot(s.weight)].data;
    set_winograd(p, s);
    p.in_prefix = index_at(s.in, part);
    p.out_prefix = index_at(s.out, part);
    p.row = index_at(s.row, part);
    const float* tables = s.scale >= 0 || s.bias >= 0 ? call_.constants[0].data : nullptr;
    p.scale = s.scale >= 0 ? tables + s.scale : nullptr;
    p.bias = s.bias >= 0 ? tables + s.bias : nullptr;
    p.scale_row_stride = p.bias_row_stride = s.lines > 0 ? s.c_out : 0;
    const SegmentStep& writes = pool ? *pool : s;
    p.max_pool = pool != nullptr;
    p.ring = ring;
    const Map& y = maps_[slot(writes.y)];
    if (y.pixel) lay_out(writes, part, p.out_prefix);
    p.output_pixel = pixel_at(writes.y, part);
    if (s.residual >= 0) {
      const int64_t residual = y.pixel ? s.y : s.residual;  // lay_out has brought a compact one there
      p.residual = map_at(residual, part);
      p.residual_stride = maps_[slot(residual)].stride;
      p.residual_pixel = p.output_pixel;
    }
    p.activation = s.relu > 0 ? Activation::kRelu : Activation::kNone;
    p.tail = writes.skip > 0 ? Tail::kSkip : Tail::kZero;
    p.output = map_at(writes.y, part);
    p.output_stride = y.stride;
    p.pooled = vector_at(s.mean, part);
    if (y.pixel) {
      p.tail = s.residual >= 0 ? Tail::kKeep : Tail::kSkip;
      p.output_live = y.live + part.first;
    } else if (p.residual == p.output && p.residual && residual_stays(p_, s)) {
      p.tail = Tail::kKeep;
    }
    prefix_conv2d(p, part.threads);
  }

  // Gives samples of the compact map that a step writes their layout. Of a sum, its residual is brought there: in
  // place, only samples that get wider are touched.
  void lay_out(const SegmentStep& s, const Part& part, const int32_t* prefix) {
    const Map& y = maps_[slot(s.y)];
    const MapShape& shape = shapes_[slot(s.y)];
    const Map* r = s.residual >= 0 ? &maps_[slot(s.residual)] : nullptr;
    const float* from = r ? map_at(s.residual, part) : nullptr;
    float* to = map_at(s.y, part);
    std::vector<int64_t> moved;
    for (int64_t n = part.first; n < part.first + part.count; ++n) {
      y.live[n] = prefix ? prefix[n - part.first] : static_cast<int32_t>(shape.c);
      if (r && (from != to || y.live[n] > r->live[n])) moved.push_back(n);
      if (r) y.live[n] = std::max(y.live[n], r->live[n]);
      y.pixel[n] = static_cast<int32_t>(compact_pixel(y.live[n]));
    }
    split(part.threads, static_cast<int64_t>(moved.size()), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = moved[slot(i)], at = n - part.first;
        widen_pixels(from + at * r->stride.n, r->pixel[n], to + at * y.stride.n, y.pixel[n], shape.h * shape.w,
                     r->live[n], y.live[n]);
      }
    });
  }

  void convolve_and_pool(const SegmentStep& s, const SegmentStep& pool, const Part& part) {
    MaxPoolParams p = pooling(pool, part);
    p.input_ring = std::min(p.h, winograd_ring_rows(step_shape(s, shapes_[slot(s.x)]), 4, p.kernel_h - 1));
    int64_t row = 0;  // of the pooling's output
    const RowRing ring{p.input_ring, [&](int64_t rows) {
                         const int64_t first = row;
                         while (row < p.out_h && (rows == p.h || row * p.stride_h - p.pad_h + p.kernel_h <= rows))
                           ++row;
                         max_pool2d(p, first, row);
                       }};
    convolve(s, part, nullptr, &ring);
  }

  void max_pool(const SegmentStep& s, const Part& part) {
    const MaxPoolParams p = pooling(s, part);
    const int64_t row_reads = p.out_w * p.kernel_h * p.kernel_w * p.c;
    split(part.threads, p.n * p.out_h, 65536 / std::max<int64_t>(1, row_reads) + 1,
          [&](int64_t begin, int64_t end, int) { max_pool2d(p, begin, end); });
  }

  MaxPoolParams pooling(const SegmentStep& s, const Part& part) {
    const MapShape &in = shapes_[slot(s.x)], &out = shapes_[slot(s.y)];
    MaxPoolParams p;
    p.n = part.count, p.c = in.c, p.h = in.h, p.w = in.w, p.out_h = out.h, p.out_w = out.w;
    p.kernel_h = s.kh, p.kernel_w = s.kw, p.stride_h = s.stride_h, p.stride_w = s.stride_w;
    p.pad_h = s.pad_top, p.pad_w = s.pad_left;
    p.input = map_at(s.x, part);
    p.prefix = index_at(s.in, part);
    p.zero_tail = s.skip <= 0 && !maps_[slot(s.y)].pixel;
    p.output = map_at(s.y, part);
    if (maps_[slot(s.y)].pixel) lay_out(s, part, p.prefix);
    p.input_sample = maps_[slot(s.x)].stride.n, p.output_sample = maps_[slot(s.y)].stride.n;
    p.input_pixel = pixel_at(s.x, part), p.output_pixel = pixel_at(s.y, part);
    return p;
  }

  void add(const SegmentStep& s, const Part& part) {
    const float *a = map_at(s.x, part), *b = map_at(s.residual, part);
    float* to = map_at(s.y, part);
    const int64_t rows = shapes_[slot(s.y)].h, floats = shapes_[slot(s.y)].floats() / rows;
    const int64_t a_step = maps_[slot(s.x)].stride.n, b_step = maps_[slot(s.residual)].stride.n;
    const int64_t to_step = maps_[slot(s.y)].stride.n;
    split(part.threads, part.count * rows, 32768 / floats + 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / rows, at = i % rows * floats;
        for (int64_t c = at; c < at + floats; ++c) to[n * to_step + c] = a[n * a_step + c] + b[n * b_step + c];
      }
    });
  }

  void decide(const SegmentStep& s, const Part& part) {
    AgentStepParams p;
    p.samples = part.count, p.features = s.feature_size, p.code = s.code, p.hidden = s.hidden;
    p.actions = s.actions, p.channels = s.channels, p.input = s.input, p.shift = call_.shift;
    const Constant* constants = &call_.constants[slot(s.agent)];
    p.pooled = vector_at(s.features, part);
    p.hidden_in = vector_at(s.hidden_in, part);
    p.previous = index_at(s.previous, part);
    p.mean = constants[0].data, p.inv_std = constants[1].data;
    p.encoder_weight = constants[2].data, p.encoder_bias = constants[3].data;
    p.weight_ih = constants[4].data, p.weight_hh = constants[5].data;
    p.bias_ih = constants[6].data, p.bias_hh = constants[7].data;
    p.decoder_weight = constants[8].data, p.decoder_bias = constants[9].data;
    p.hidden_out = vector_at(s.hidden_out, part);
    p.action = index_at(s.action, part);
    p.out_prefix = index_at(s.result, part);
    constexpr int64_t kBlock = 16,
                      kBlocksWorthAThread = 4;  // samples, a multiple of what share weights; some microseconds
    const int64_t floats = agent_step_scratch(p);
    const std::unique_ptr<float[]> memory(new float[slot(part.count * s.actions + floats * part.threads.count)]);
    p.q = memory.get();
    float* scratch = p.q + part.count * s.actions;
    split(part.threads, (part.count + kBlock - 1) / kBlock, kBlocksWorthAThread,
          [&](int64_t begin, int64_t end, int worker) {
            agent_step(p, begin * kBlock, std::min(part.count, end * kBlock), scratch + worker * floats);
          });
  }

  const SegmentProgram& p_;
  const std::vector<MapShape>& shapes_;
  const SegmentCall& call_;
  const Threads& threads_;
  SegmentMemory memory_;
  std::vector<bool> compact_;
  std::vector<Map> maps_;
  std::vector<int32_t*> indices_;
  std::vector<float*> vectors_;
};

}  // namespace

void run_segment(const SegmentProgram& program, const std::vector<MapShape>& shapes, const SegmentCall& call,
                 const Threads& threads, int64_t group_bytes) {
  check_segment(program, shapes, call);
  if (call.n > 0) Runner(program, shapes, call, threads, group_bytes).run();
}

void release_segment_memory() { pool().release(); }

}  // namespace rnp::cpu
