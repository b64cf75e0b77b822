// How processors differ that run the same instructions.
#pragma once

namespace rnp {

struct Processor {
  // 512-bit multiply-adds start two in a cycle, which leaves two reads of memory for each pair of them: they share what
  // is read. Otherwise each may as well read an operand of its own.
  bool paired_multiply_adds = false;
  // Its prefetchers follow the rows of pixels that a kernel walks. Asking for their lines as well fills the miss
  // buffers that the kernel's own reads wait for.
  bool follows_rows = false;
  // What lies past L2 comes at 2 to 3 bytes a cycle: weights that are read once for few pixels are better small than
  // few.
  bool slow_past_l2 = false;
  // Torch's matrix product is MKL's and uses whole vectors; on others' processors it uses halves.
  bool wide_product = false;
};

// This machine's, by vendor and family (measured: Zen 4, Emerald Rapids; bench/NOTES.md, "Two processors").
const Processor& processor();
// For tests: another from now on. Not to be called while an operator runs.
void set_processor(const Processor& processor);

}  // namespace rnp
