// Transposing in registers, on every instruction set that has it: every size around its blocks, and nothing beyond.
#include <cmath>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/microkernel.h"
#include "tests/check.h"

namespace rnp::tests {
namespace {

void check(cpu::Transpose transpose, const std::string& isa) {
  for (int64_t rows = 1; rows <= 19; ++rows)
    for (int64_t cols = 1; cols <= 19; ++cols) {
      const int64_t from_step = cols + 3, to_step = rows + 2;
      // The last row and column end their memory, where the sanitizer stands guard.
      std::vector<float> from(static_cast<size_t>((rows - 1) * from_step + cols), NAN);
      std::vector<float> to(static_cast<size_t>((cols - 1) * to_step + rows), -1.0f);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
          from[static_cast<size_t>(r * from_step + c)] = static_cast<float>(r * 100 + c);
      transpose(from.data(), from_step, rows, cols, to.data(), to_step);
      for (int64_t i = 0; i < static_cast<int64_t>(to.size()); ++i) {
        const int64_t c = i / to_step, r = i % to_step;
        const float expected = r < rows ? static_cast<float>(r * 100 + c) : -1.0f;
        CHECK(to[static_cast<size_t>(i)] == expected) << isa << ", " << rows << " x " << cols << ", element " << i;
      }
    }
}

}  // namespace

TEST(transposing_touches_its_elements_and_no_others) {
  CHECK(cpu::portable_kernels().transpose == nullptr) << "element by element";
#if defined(__x86_64__)
  for (cpu::Isa isa : cpu::available_isas()) {
    if (isa == cpu::Isa::kAvx2) check(cpu::avx2_kernels().transpose, "avx2");
    if (isa == cpu::Isa::kAvx512) check(cpu::avx512_kernels().transpose, "avx512");
  }
#endif
}

}  // namespace rnp::tests
