#include "cpu/grouped_half.h"

#include <algorithm>
#include <vector>

#include "cpu/epilogue.h"
#include "cpu/grouped.h"
#include "cpu/grouped_kernels.h"
#include "cpu/scratch.h"
#include "cpu/work_queue.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kBandBytes = 512 * 1024;  // of a band's input, output and residual in float32: half of 1 MB of L2
constexpr int64_t kFewestRows = 4;          // of a band's output, where there are as many: its edge rows are read twice

int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Channels [0, live) of rows [row0, row0 + rows) of a sample of 16 bits, and where they lie in float32: channels side
// by side as there, or in planes.
struct Slab {
  Strides4 half, wide;
  int64_t live, rows, cols;
  bool pixels;

  Slab(const Strides4& strides, int64_t channels, int64_t live, int64_t rows, int64_t cols)
      : half(strides), live(live), rows(rows), cols(cols), pixels(strides.c == 1) {
    const int64_t pitch = lines(channels);
    wide = pixels ? Strides4{rows * cols * pitch, 1, cols * pitch, pitch}
                  : Strides4{channels * rows * cols, rows * cols, cols, 1};
  }

  // f(values of 16 bits from the slab's first, of float32 from its first, how many, step between those of 16 bits)
  template <class F>
  void each_run(F&& f) const {
    if (pixels && half.w == live && wide.w == live) {
      for (int64_t y = 0; y < rows; ++y) f(y * half.h, y * wide.h, cols * live, int64_t{1});
    } else if (pixels) {
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < cols; ++x) f(y * half.h + x * half.w, y * wide.h + x * wide.w, live, int64_t{1});
    } else {
      for (int64_t c = 0; c < live; ++c)
        for (int64_t y = 0; y < rows; ++y) f(c * half.c + y * half.h, c * wide.c + y * wide.h, cols, half.w);
    }
  }
};

void widen_slab(const Slab& slab, const HalfConversion& convert, const uint16_t* from, float* to) {
  std::vector<uint16_t> gathered;
  slab.each_run([&](int64_t half, int64_t wide, int64_t count, int64_t step) {
    const uint16_t* run = from + half;
    if (step != 1) {
      gathered.resize(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) gathered[static_cast<size_t>(i)] = run[i * step];
      run = gathered.data();
    }
    convert.widen(run, count, to + wide);
  });
}

void narrow_slab(const Slab& slab, const HalfConversion& convert, const float* from, uint16_t* to) {
  std::vector<uint16_t> gathered;
  slab.each_run([&](int64_t half, int64_t wide, int64_t count, int64_t step) {
    if (step == 1) return convert.narrow(from + wide, count, to + half);
    gathered.resize(static_cast<size_t>(count));
    convert.narrow(from + wide, count, gathered.data());
    for (int64_t i = 0; i < count; ++i) to[half + i * step] = gathered[static_cast<size_t>(i)];
  });
}

// Output rows [row0, row1) of a sample, and the input rows that they read.
struct Band {
  int64_t n, row0, row1, y0, y1, pad_top;

  Band(const ConvShape& s, int64_t n, int64_t row0, int64_t row1) : n(n), row0(row0), row1(row1) {
    const int64_t first = row0 * s.stride_h - s.pad_top;
    const int64_t end = (row1 - 1) * s.stride_h - s.pad_top + (s.kh - 1) * s.dilation_h + 1;
    y0 = std::clamp<int64_t>(first, 0, s.h);
    y1 = std::clamp<int64_t>(end, y0, s.h);
    pad_top = y0 - first;  // beyond the input's end too: the band has no rows there
  }
};

class HalfCall {
 public:
  HalfCall(const PrefixConv2dParams& p, float* row_sums)
      : p_(p),
        s_(p.shape),
        convert_(p.dtype == DType::kBFloat16 ? grouped_kernels_in_use().bfloat16 : grouped_kernels_in_use().float16),
        row_sums_(row_sums) {}

  void run(const Threads& threads) {
    const double cost = static_cast<double>(s_.n * s_.out_h * s_.out_w * s_.c_out) *
                        static_cast<double>(s_.kh * s_.kw * s_.group_in() + 4) / grouped_kernels_in_use().lanes;
    const int64_t row_floats = s_.stride_h * s_.w * lines(s_.c_in) + s_.out_w * lines(s_.c_out) * (p_.residual ? 2 : 1);
    const int64_t fitting = kBandBytes / std::max<int64_t>(1, row_floats * static_cast<int64_t>(sizeof(float)));
    int64_t rows = std::clamp<int64_t>(fitting, std::min(kFewestRows, s_.out_h), s_.out_h);
    const int wanted = useful_workers(cost, static_cast<size_t>(s_.n * s_.out_h), threads);
    while (wanted > 1 && rows > kFewestRows && s_.n * ((s_.out_h + rows - 1) / rows) < 2 * wanted)
      rows = (rows + 1) / 2;
    const int64_t bands = (s_.out_h + rows - 1) / rows, items = s_.n * bands;
    hand_out(static_cast<size_t>(items), useful_workers(cost, static_cast<size_t>(items), threads), threads, [&](int) {
      return [&](size_t i, size_t) {
        const int64_t n = static_cast<int64_t>(i) / bands, row0 = static_cast<int64_t>(i) % bands * rows;
        if (!p_.elsewhere || !p_.elsewhere[n]) band({s_, n, row0, std::min(s_.out_h, row0 + rows)});
      };
    });
  }

 private:
  void band(const Band& b) const {
    const int64_t live = p_.out_live(b.n), rows = b.row1 - b.row0;
    if (live > 0) convolve(b, live, rows);
    fill_tail(p_, b.n, b.row0, b.row1, live, s_.c_out);
    const int64_t written = p_.tail == Tail::kSkip ? live : s_.c_out;
    if (row_sums_ && written > 0) sum_rows(p_, b.n, b.row0, b.row1, 0, written, row_sums_);
  }

  void convolve(const Band& b, int64_t live, int64_t rows) const {
    static thread_local ScratchMemory slabs, inner;
    const auto half = [&](const void* tensor, const Strides4& st, int64_t row) {
      return static_cast<const uint16_t*>(tensor) + b.n * st.n + row * st.h;
    };
    const Slab in(p_.input_stride, s_.c_in, p_.in_live(b.n), b.y1 - b.y0, s_.w);
    const Slab out(p_.output_stride, s_.c_out, live, rows, s_.out_w);
    const Slab added(p_.residual_stride, s_.c_out, live, rows, s_.out_w);
    const int64_t in_floats = lines(in.wide.n), out_floats = lines(out.wide.n);
    float* x = slabs.get(static_cast<size_t>(in_floats + out_floats + (p_.residual ? added.wide.n : 0)));
    widen_slab(in, convert_, half(p_.input, in.half, b.y0), x);
    PrefixConv2dParams q = p_;
    q.dtype = DType::kFloat32;
    q.shape.n = 1, q.shape.h = in.rows, q.shape.out_h = rows;
    q.shape.pad_top = b.pad_top;
    q.tail = Tail::kSkip;
    q.pooled = nullptr, q.elsewhere = nullptr;
    q.input = x, q.input_stride = in.wide;
    q.output = x + in_floats, q.output_stride = out.wide;
    if (p_.in_prefix) q.in_prefix += b.n;
    if (p_.out_prefix) q.out_prefix += b.n;
    if (p_.row) q.row += b.n;
    if (p_.residual) {
      float* residual = x + in_floats + out_floats;
      widen_slab(added, convert_, half(p_.residual, added.half, b.row0), residual);
      q.residual = residual, q.residual_stride = added.wide;
    }
    grouped_conv2d(q, {}, [](size_t floats) { return inner.get(floats); }, nullptr);
    narrow_slab(out, convert_, x + in_floats, const_cast<uint16_t*>(half(p_.output, out.half, b.row0)));
  }

  const PrefixConv2dParams& p_;
  const ConvShape& s_;
  const HalfConversion convert_;
  float* row_sums_;
};

}  // namespace

void grouped_half(const PrefixConv2dParams& p, const Threads& threads, float* row_sums) {
  HalfCall(p, row_sums).run(threads);
}

}  // namespace rnp::cpu
