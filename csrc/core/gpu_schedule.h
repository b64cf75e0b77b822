// Which tile of the implicit GEMM a thread block computes next. Host-device and free of CUDA: the kernels run these
// functions, and C++ tests run the same ones on the CPU (csrc/tests/gpu_schedule_test.cpp).
//
// The batch is put in the order (out-prefix descending, in-prefix descending, sample ascending). Then the samples that
// have a live channel in a block of output channels are the first ones of the order, whatever the block; and neighbours
// share their in-prefix, so that a tile of rows (sample, pixel) has one length of K nearly everywhere. A tile that
// straddles samples of different prefixes computes the widest and longest of them; shorter rows read zeros and are not
// stored, so the sums of a sample stay the same bits in any company.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RNP_HD __host__ __device__ __forceinline__
#else
#define RNP_HD inline
#endif

namespace rnp::gpu {

// A prefix as the kernels use it: on a GPU values out of 0…channels are clamped.
RNP_HD int32_t clamp_prefix(int32_t prefix, int32_t channels) {
  return prefix < 0 ? 0 : (prefix > channels ? channels : prefix);
}

// Of a prefix over all groups, what group g has.
RNP_HD int32_t live_of_group(int32_t prefix, int32_t g, int32_t group_size) {
  const int64_t rest = int64_t{prefix} - int64_t{g} * group_size;
  return rest < 0 ? 0 : (rest > group_size ? group_size : static_cast<int32_t>(rest));
}

// The batch in its order. Null arrays: every sample has full width and the order is 0, 1, 2, …
struct Order {
  const int32_t* sample;  // (n): which sample stands at a place of the order
  const int32_t* in;      // (n): its live input channels
  const int32_t* out;     // (n): its live output channels
  int32_t c_in, c_out;
  const int32_t* live = nullptr;  // (groups, blocks): live_samples of a cut; null where nobody counted them

  RNP_HD int32_t sample_at(int64_t i) const { return sample ? sample[i] : static_cast<int32_t>(i); }
  RNP_HD int32_t in_at(int64_t i) const { return in ? in[i] : c_in; }
  RNP_HD int32_t out_at(int64_t i) const { return out ? out[i] : c_out; }
};

// Sorting by this key, ascending, is the order above; it is unique for every sample (n < 2^31).
struct OrderKey {
  int32_t out, in, sample;
};

RNP_HD bool before(const OrderKey& a, const OrderKey& b) {
  if (a.out != b.out) return a.out > b.out;
  if (a.in != b.in) return a.in > b.in;
  return a.sample < b.sample;
}

// The place of sample i: how many come before it. One pass over the batch, no exchange between threads.
RNP_HD int32_t place_of(int32_t i, int32_t n, const int32_t* in_prefix, const int32_t* out_prefix, int32_t c_in,
                        int32_t c_out) {
  const OrderKey own{out_prefix ? clamp_prefix(out_prefix[i], c_out) : c_out,
                     in_prefix ? clamp_prefix(in_prefix[i], c_in) : c_in, i};
  int32_t place = 0;
  for (int32_t j = 0; j < n; ++j) {
    const OrderKey other{out_prefix ? clamp_prefix(out_prefix[j], c_out) : c_out,
                         in_prefix ? clamp_prefix(in_prefix[j], c_in) : c_in, j};
    place += before(other, own) ? 1 : 0;
  }
  return place;
}

// How the output is cut: rows of `bm` (sample, pixel) pairs by `bn` channels of one group.
struct Cut {
  int64_t n;          // samples
  int64_t positions;  // pixels of one sample's output
  int32_t groups, group_in, group_out;
  int32_t bm, bn;

  RNP_HD int32_t blocks() const { return (group_out + bn - 1) / bn; }  // of channels, in each group
  RNP_HD int64_t most_tiles() const { return int64_t{groups} * blocks() * ((n * positions + bm - 1) / bm); }
};

// How many samples have a live output channel in the block: the list's entry, or a binary search, since out-prefixes
// descend.
RNP_HD int64_t live_samples(const Cut& cut, const Order& order, int32_t group, int32_t block) {
  if (order.live) return order.live[int64_t{group} * cut.blocks() + block];
  const int64_t first = int64_t{group} * cut.group_out + int64_t{block} * cut.bn;  // the block's first channel
  int64_t low = 0, high = cut.n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (order.out_at(middle) > first)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// a / b without the division of 64 bits, which a GPU has no instruction for, where 32 will do.
RNP_HD int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t{static_cast<uint32_t>(a) / static_cast<uint32_t>(b)} : a / b;
}

// Walks the list of tiles: rows by rows, the live blocks of channels of each in turn. So blocks that run at once share
// their input and not all of them ask for the same weights, and the list begins with the tiles that cost most. Rows
// with `width` live blocks are one run of the list. `seek` takes growing numbers.
struct Cursor {
  int32_t group = -1, block = 0, width = 0;
  int64_t begin = 0, end = 0;   // numbers of the tiles of the run
  int64_t first = 0, last = 0;  // tiles of rows of the run
  int64_t row_tile = 0;

  // Moves to tile number t; false where the list ends before it.
  RNP_HD bool seek(const Cut& cut, const Order& order, int64_t t) {
    while (t >= end) {
      if (width > 1) {
        --width;
        first = last;
      } else {
        if (++group == cut.groups) return false;
        width = cut.blocks();
        first = 0;
      }
      last = (live_samples(cut, order, group, width - 1) * cut.positions + cut.bm - 1) / cut.bm;
      begin = end;
      end = begin + (last - first) * width;
    }
    const int64_t row = quotient(t - begin, width);
    row_tile = first + row;
    block = static_cast<int32_t>(t - begin - row * width);
    return true;
  }

  RNP_HD int64_t first_row(const Cut& cut) const { return row_tile * cut.bm; }
};

// Where a row of a tile lies. `place` counts in the order; beyond the batch no row is live.
struct RowPlace {
  int64_t place;
  uint32_t pixel;
  bool live;
};

RNP_HD RowPlace place_row(const Cut& cut, const Cursor& at, int32_t row) {
  const int64_t first_row = at.first_row(cut);
  const int64_t first = quotient(first_row, cut.positions);  // the same for all rows of the tile
  const uint32_t positions = static_cast<uint32_t>(cut.positions);
  const uint32_t rest = static_cast<uint32_t>(first_row - first * cut.positions) + static_cast<uint32_t>(row);
  const uint32_t step = rest / positions;
  RowPlace out;
  out.place = first + step;
  out.pixel = rest - step * positions;
  out.live = out.place < cut.n;
  return out;
}

// A run of chunks of K. Where K is split, tile number t is segment t mod `splits` of tile t / splits of the list above,
// and has the chunks of its segment that are live; none where all its rows end before.
struct ChunkRange {
  int32_t first, end;
};

RNP_HD ChunkRange chunks_of(int32_t live_chunks, int32_t segment_chunks, int32_t segment, int32_t splits) {
  if (splits == 1) return {0, live_chunks};
  const int32_t first = segment * segment_chunks, end = first + segment_chunks;
  return {first, end < live_chunks ? end : live_chunks};
}

}  // namespace rnp::gpu
