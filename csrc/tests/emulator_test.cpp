// The emulated Hopper machine itself: layouts against formulas written down from the PTX ISA, and each rule that a
// kernel can break is reported.
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/hopper_wgmma.h"
#include "tests/check.h"

namespace rnp::tests {
namespace {

using namespace rnp::cuda;

constexpr size_t kShared = 4 * 16384 + 1024;

float value_of(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 13 - 6); }

// Element k of a row of 128 bytes, at bytes 1024-aligned and swizzled: 16-byte pieces change places within eight rows.
template <typename T>
void put(char* at, int row, int k, T v) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  std::memcpy(at + row * 128 + ((k / kPiece) ^ (row % 8)) * 16 + k % kPiece * static_cast<int>(sizeof(T)), &v,
              sizeof(T));
}

// The value, and of float what wgmma does not look at: bits below the tenth of the mantissa.
template <typename T>
T operand_of(int row, int k) {
  const float v = value_of(row, k);
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(std::bit_cast<uint32_t>(v) | (static_cast<uint32_t>(row * 331 + k * 17) & 0x1fff));
  else
    return from_float<T, float>(v);
}

std::string fault_of(int threads, const std::function<void(char*)>& body) {
  return test::message_of([&] { emulator::launch(1, threads, kShared, 3, body); });
}

bool mentions(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

template <typename T>
void check_wgmma() {
  constexpr int kWidth = 48, kRow = 128 / static_cast<int>(sizeof(T)), kStep = kRow / 4;
  std::vector<float> found(128 * kWidth / 2, -1.0f);
  emulator::launch(1, 128, kShared, 1, [&](char* shared) {
    char *a = shared + 1024, *b = shared + 1024 + 64 * 128;
    if (thread_index() == 0) {
      for (int row = 0; row < 64; ++row)
        for (int k = 0; k < kRow; ++k) put(a, row, k, operand_of<T>(row, k));
      for (int column = 0; column < kWidth; ++column)
        for (int k = 0; k < kRow; ++k) put(b, column, k, operand_of<T>(column + 5, k + 1));
    }
    sync_block();
    float sums[kWidth / 2] = {};
    begin_products();
    for (uint64_t step = 1; step < 4; ++step)  // the first step of K is left out
      multiply_warpgroup(T{}, Width<kWidth>{}, sums, operand_descriptor(shared_address(a)) + step * kDescriptorStep,
                         operand_descriptor(shared_address(b)) + step * kDescriptorStep);
    CHECK(sums[0] != sums[0]) << "sums may be read before the wait";
    commit_products();
    wait_products<0>();
    std::memcpy(&found[static_cast<size_t>(thread_index() * kWidth / 2)], sums, sizeof sums);
  });
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < kWidth; ++column) {
      float sum = 0;
      for (int k = kStep; k < kRow; ++k) sum += value_of(row, k) * value_of(column + 5, k + 1);
      // Warp row / 16, lane (row % 8) * 4 + (column % 8) / 2, register 4 (column / 8) + 2 (row / 8 % 2) + column % 2.
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const float got = found[static_cast<size_t>(thread * kWidth / 2 + column / 8 * 4 + row / 8 % 2 * 2 + column % 2)];
      CHECK(got == sum) << sizeof(T) << " bytes, (" << row << ", " << column << "): " << got << " instead of " << sum;
    }
}

}  // namespace

TEST(emulator_wgmma_computes_what_the_layouts_say) {
  check_wgmma<BFloat16>();
  check_wgmma<Float16>();
  check_wgmma<float>();
}

namespace {

// 5 x 4 pixels of 8 channels, a 3 x 3 kernel with padding 1, stride 2 along w: every tap's column from pixel 1 on.
template <typename Bits>
void check_im2col() {
  constexpr int kW = 5, kH = 4, kN = 2, kC = 8, kOutW = 3, kOutH = 4, kSize = sizeof(Bits);
  std::vector<Bits> input(kN * kH * kW * kC);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<Bits>(i + 1);
  emulator::TensorMap map;
  map.element = kSize, map.channels = 128 / kSize;
  map.base = reinterpret_cast<const char*>(input.data());
  const int64_t sizes[] = {kC, kW, kH, kN}, strides[] = {kSize, kC * kSize, kW * kC * kSize, kH * kW * kC * kSize};
  std::memcpy(map.size, sizes, sizeof sizes), std::memcpy(map.stride, strides, sizeof strides);
  // The last first pixel is 3 along w, of 5, and 2 along h, of 4: both 1 short of the tensor's last.
  map.lower[0] = map.lower[1] = -1, map.upper[0] = map.upper[1] = -1, map.step[0] = 2, map.step[1] = 1;
  for (int tap = 0; tap < 9; ++tap) {
    const int tap_y = tap / 3, tap_x = tap % 3;
    emulator::launch(1, 32, kShared, 1, [&](char* shared) {
      uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 65536);
      if (thread_index() != 0) return;
      init_barrier(barrier, 1);
      publish_barriers();
      expect_bytes(barrier, 128 * 128);
      copy_im2col(shared, &map, barrier, 0, 1, -1, 0, static_cast<uint16_t>(tap_x), static_cast<uint16_t>(tap_y));
      arrive(barrier);
      wait_barrier(barrier, 0);
      for (int pixel = 0; pixel < 128; ++pixel)
        for (int c = 0; c < 128 / kSize; ++c) {
          const int at = pixel + 1, n = at / (kOutW * kOutH), oy = at / kOutW % kOutH, ox = at % kOutW;
          const int y = oy - 1 + tap_y, x = ox * 2 - 1 + tap_x;
          const bool inside = n < kN && y >= 0 && y < kH && x >= 0 && x < kW && c < kC;
          const Bits expected = inside ? input[static_cast<size_t>(((n * kH + y) * kW + x) * kC + c)] : Bits{0};
          constexpr int kPiece = 16 / kSize;
          Bits got;
          std::memcpy(&got, shared + pixel * 128 + ((c / kPiece) ^ (pixel % 8)) * 16 + c % kPiece * kSize, kSize);
          CHECK(got == expected) << "tap " << tap << ", pixel " << pixel << ", channel " << c << ": " << got;
        }
    });
  }
}

}  // namespace

TEST(emulator_im2col_walks_the_box_and_fills_with_zeros) {
  check_im2col<uint16_t>();
  check_im2col<uint32_t>();
}

TEST(emulator_reports_what_a_hopper_kernel_may_not_do) {
  alignas(16) static const char global[16384] = {};
  const auto product = [](char* at, float* sums) {
    const uint64_t operand = operand_descriptor(shared_address(at));
    multiply_warpgroup(BFloat16{}, Width<16>{}, sums, operand, operand);
  };
  const auto multiply = [&](char* at) {
    float sums[8] = {};
    begin_products();
    product(at, sums);
    commit_products();
    wait_products<0>();
  };
  const auto barrier_of = [](char* shared) {
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 65536);
    if (thread_index() == 0) init_barrier(barrier, 1), publish_barriers();
    sync_block();
    return barrier;
  };
  const auto fetch = [&](char* shared, bool publish) {  // all 64 rows by cp.async
    for (int piece = thread_index(); piece < 512; piece += 128)
      copy_async(shared + piece * 16, global + piece * 16, 16);
    commit_copies();
    wait_copies<0>();
    if (publish) publish_writes();
    sync_block();
  };
  CHECK(fault_of(128, [&](char* shared) { fetch(shared, true), multiply(shared); }).empty());
  CHECK(mentions(fault_of(128, [&](char* shared) { fetch(shared, false), multiply(shared); }), "nobody published"));
  CHECK(mentions(fault_of(128,
                          [&](char* shared) {
                            uint64_t* barrier = barrier_of(shared);
                            if (thread_index() == 0)
                              expect_bytes(barrier, 8192), copy_bulk(shared, global, 8192, barrier), arrive(barrier);
                            sync_block();
                            multiply(shared);  // without waiting for the barrier
                          }),
                 "not come yet"));
  CHECK(mentions(fault_of(128,
                          [&](char* shared) {
                            float sums[8] = {};
                            begin_products();
                            product(shared, sums);
                            commit_products();
                            sync_block();
                            std::memset(shared + thread_index() * 64, 1, 64);
                            wait_products<0>();
                          }),
                 "overwritten before the wait"));
  CHECK(mentions(fault_of(128,
                          [&](char* shared) {
                            float sums[8] = {};
                            product(shared, sums);
                          }),
                 "without wgmma.fence"));
  CHECK(mentions(fault_of(128,
                          [&](char* shared) {
                            float sums[8] = {};
                            begin_products();
                            product(shared, sums);
                            wait_products<0>();
                          }),
                 "not committed"));
  CHECK(mentions(fault_of(32, [&](char* shared) { wait_barrier(barrier_of(shared), 0); }), "not every thread"));
  CHECK(mentions(fault_of(32,
                          [&](char* shared) {
                            uint64_t* barrier = barrier_of(shared);
                            if (thread_index() == 0) copy_bulk(shared, global + 2, 16, barrier);
                          }),
                 "misaligned"));
  CHECK(mentions(fault_of(32, [&](char* shared) { wait_barrier(reinterpret_cast<uint64_t*>(shared + 8), 1); }),
                 "not initialised"));
}

}  // namespace rnp::tests
