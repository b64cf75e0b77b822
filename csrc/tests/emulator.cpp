#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/emulator_machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace rnp::cuda::emulator {

Machine* machine = nullptr;

// ---- switching between coroutines ----

#if defined(__x86_64__)
// Keeps what the System V ABI asks a callee to keep. swapcontext would also save the signal mask: two system calls.
extern "C" void rnp_switch_stack(void** from, void* to);
asm(R"(
.text
.globl rnp_switch_stack
.type rnp_switch_stack, @function
rnp_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rnp_switch_stack, .-rnp_switch_stack
)");
#endif

void leave_to_scheduler(bool forever) {
  Fiber& fiber = machine->fibers[static_cast<size_t>(machine->current)];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, machine->scheduler_bottom, machine->scheduler_size);
#endif
#if defined(__x86_64__)
  rnp_switch_stack(&fiber.stack_pointer, machine->scheduler_pointer);
#else
  swapcontext(&fiber.context, &machine->scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  (void)forever;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_bottom, &machine->scheduler_size);
#endif
  Machine& m = *machine;
  Fiber& fiber = m.fibers[static_cast<size_t>(m.current)];
  (*m.body)(m.shared);
  if (!fiber.open.empty()) m.fault = "copies were never committed";
  fiber.done = true;
  ++m.finished;
  ++m.progress;
  leave_to_scheduler(true);
}

void enter(int index) {
  Machine& m = *machine;
  m.current = index;
  Fiber& fiber = m.fibers[static_cast<size_t>(index)];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
#if defined(__x86_64__)
  rnp_switch_stack(&m.scheduler_pointer, fiber.stack_pointer);
#else
  swapcontext(&m.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void prepare(Fiber& fiber) {
  fiber.done = false;
  fiber.groups.clear();
  fiber.open.clear();
  fiber.landed.clear();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);  // frames that were left for good
#endif
#if defined(__x86_64__)
  uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack) + kStack) & ~uintptr_t{15};
  void** slot = reinterpret_cast<void**>(top) - 2;  // the stack as it is at a function's entry
  *slot = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = slot - 6;
  std::memset(fiber.stack_pointer, 0, 6 * sizeof(void*));
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

void fail(const std::string& what) {
  if (machine->fault.empty()) machine->fault = what + " (thread " + std::to_string(machine->current) + ")";
}

char* checked_shared(const void* at, size_t size, size_t alignment) {
  char* p = const_cast<char*>(static_cast<const char*>(at));
  if (p < machine->shared || p + size > machine->shared + machine->shared_bytes) {
    fail("an address outside shared memory");
    return machine->shared;
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("a misaligned address in shared memory");
  return p;
}

// ---- operations of a whole warp ----

// Element (row, k) of A and (k, column) of B from the registers of the lanes that hold them (PTX ISA, m16n8k16,
// m16n8k8).
template <typename T>
float a_element(const Warp& w, int row, int k) {
  const int high = row / 8;
  if constexpr (sizeof(T) == 2) {
    const uint32_t word = w.lane[row % 8 * 4 + k % 8 / 2].a[high + k / 8 * 2];
    return to_float(T{static_cast<uint16_t>(word >> (k % 2 * 16))});
  } else {
    return std::bit_cast<float>(w.lane[row % 8 * 4 + k % 4].a[high + k / 4 * 2] & 0xffffe000u);
  }
}
template <typename T>
float b_element(const Warp& w, int k, int column) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t word = w.lane[column * 4 + k % 8 / 2].b[k / 8];
    return to_float(T{static_cast<uint16_t>(word >> (k % 2 * 16))});
  } else {
    return std::bit_cast<float>(w.lane[column * 4 + k % 4].b[k / 4] & 0xffffe000u);
  }
}

template <typename T>
void products(Warp& w) {
  constexpr int kDepth = 32 / static_cast<int>(sizeof(T));
  float a[16][kDepth], b[kDepth][8];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k) a[row][k] = a_element<T>(w, row, k);
  for (int k = 0; k < kDepth; ++k)
    for (int column = 0; column < 8; ++column) b[k][column] = b_element<T>(w, k, column);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float& d = w.lane[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
      double sum = d;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
      d = static_cast<float>(sum);
    }
  ++machine->statistics.matrix_products;
}

void matrices(Warp& w, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    bool bank_group[8] = {};
    for (int row = 0; row < 8; ++row) {
      const char* from = checked_shared(w.lane[matrix * 8 + row].row, 16, 16);
      const size_t group = static_cast<size_t>(from - machine->shared) / 16 % 8;
      machine->statistics.bank_conflicts += bank_group[group];
      bank_group[group] = true;
      for (int word = 0; word < 4 && !transposed; ++word)
        std::memcpy(&w.lane[row * 4 + word].r[matrix], from + 4 * word, 4);
      for (int column = 0; column < 8 && transposed; ++column) {
        char* to = reinterpret_cast<char*>(&w.lane[column * 4 + row / 2].r[matrix]) + row % 2 * 2;
        std::memcpy(to, from + 2 * column, 2);
      }
    }
  }
}

void shuffle(Warp& w) {
  float values[kLanes];
  for (int l = 0; l < kLanes; ++l) values[l] = w.lane[l].value;
  for (int l = 0; l < kLanes; ++l) w.lane[l].value = values[l ^ w.lane[l].mask];
}

Operation& meet(const Operation& mine) {
  Machine& m = *machine;
  Warp& w = m.warps[static_cast<size_t>(m.current / kLanes)];
  Operation& slot = w.lane[m.current % kLanes];
  slot = mine;
  ++m.progress;
  if (++w.arrived < kLanes) {
    const int64_t generation = w.generation;
    while (w.generation == generation) leave_to_scheduler(false);
    return slot;
  }
  for (const Operation& o : w.lane)
    if (o.kind != mine.kind) fail("lanes of a warp meet in different operations");
  switch (m.fault.empty() ? mine.kind : -1) {
    case 0:
      matrices(w, false);
      break;
    case 1:
      products<BFloat16>(w);
      break;
    case 2:
      products<Float16>(w);
      break;
    case 3:
      products<float>(w);
      break;
    case 4:
      shuffle(w);
      break;
    case 5:
      matrices(w, true);
      break;
    case -1:
      break;
    default:
      hopper_operation(w, mine);
      break;
  }
  w.arrived = 0;
  ++w.generation;
  return slot;
}

void land(std::vector<Copy>& group) {
  for (const Copy& c : group) {
    std::memset(c.to, 0, 16);
    if (c.bytes > 0) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    machine->statistics.copied_bytes += c.bytes;
    machine->fibers[static_cast<size_t>(machine->current)].landed.push_back(
        static_cast<size_t>(c.to - machine->shared) / 16);
  }
}

Operation matrix_operation(int kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Operation o = {};
  o.kind = kind, o.d = d, o.a = a, o.b[0] = b0, o.b[1] = b1;
  return o;
}

int thread() { return machine->current; }
int threads() { return machine->threads; }
int64_t block() { return machine->block; }
int64_t blocks() { return machine->blocks; }

void barrier() {
  Machine& m = *machine;
  ++m.progress;
  const int64_t generation = m.barrier_generation;
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    ++m.barrier_generation;
    return;
  }
  while (m.barrier_generation == generation) leave_to_scheduler(false);
}

float xor_lane(float v, int mask) {
  Operation o = {};
  o.kind = 4, o.value = v, o.mask = mask;
  return meet(o).value;
}

void copy_async(void* shared, const void* global, int bytes) {
  char* to = checked_shared(shared, 16, 16);
  if (bytes < 0 || bytes > 16) fail("a copy of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a misaligned source of a copy");
  std::memset(to, 0xff, 16);  // NaN until it lands
  const size_t unit = static_cast<size_t>(to - machine->shared) / 16;
  if (machine->coming[unit]) fail("cp.async to where the copy engine writes");
  machine->unpublished[unit] = machine->current + 1;
  machine->fibers[static_cast<size_t>(machine->current)].open.push_back({to, static_cast<const char*>(global), bytes});
}

void commit_copies() {
  Fiber& fiber = machine->fibers[static_cast<size_t>(machine->current)];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_copies(int most) {
  Fiber& fiber = machine->fibers[static_cast<size_t>(machine->current)];
  while (static_cast<int>(fiber.groups.size()) > most) {
    land(fiber.groups.front());
    fiber.groups.erase(fiber.groups.begin());
  }
}

void load_matrices(uint32_t* r, const void* shared_row, bool transposed) {
  Operation o = {};
  o.kind = transposed ? 5 : 0, o.r = r, o.row = shared_row;
  meet(o);
}

void multiply_matrices(BFloat16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  meet(matrix_operation(1, d, a, b0, b1));
}
void multiply_matrices(Float16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  meet(matrix_operation(2, d, a, b0, b1));
}
void multiply_matrices(float, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  meet(matrix_operation(3, d, a, b0, b1));
}

void check_aligned(const void* global, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(global) % alignment != 0) fail("a misaligned access to global memory");
}

uint32_t to_tf32(uint32_t bits) {
  const float v = std::bit_cast<float>(bits);
  if (v != v || std::isinf(v)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

Statistics launch(int64_t blocks, int threads, size_t shared_bytes, uint64_t seed,
                  const std::function<void(char*)>& body) {
  if (threads % kLanes != 0) throw std::runtime_error("the block's size is not a multiple of 32");
  Machine m;
  machine = &m;
  m.threads = threads, m.blocks = blocks, m.body = &body, m.shared_bytes = shared_bytes;
  std::unique_ptr<char[]> memory(new char[shared_bytes + 1024]);
  m.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 1023) & ~uintptr_t{1023});
  m.fibers.resize(static_cast<size_t>(threads));
  const size_t stacks_size = static_cast<size_t>(threads) * kStack;
  void* stacks = mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the emulator's stacks");
  for (int i = 0; i < threads; ++i) {
    m.fibers[static_cast<size_t>(i)].stack = static_cast<char*>(stacks) + static_cast<size_t>(i) * kStack;
    m.next.push_back(i);
  }
  int asleep = 0, asleep_for = 0;
  for (m.block = 0; m.block < blocks && m.fault.empty(); ++m.block) {
    std::memset(m.shared, 0xff, shared_bytes);
    m.warps.assign(static_cast<size_t>(threads / kLanes), Warp{});
    m.at_barrier = m.finished = 0;
    m.barriers.clear(), m.named.clear(), m.bulk.clear();
    m.unpublished.assign(shared_bytes / 16 + 1, 0), m.coming.assign(shared_bytes / 16 + 1, 0);
    m.arrived.clear();
    m.barriers_published = false;
    for (Fiber& fiber : m.fibers) prepare(fiber);
    while (m.finished < threads && m.fault.empty()) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;  // another order in every round
      const size_t turn = static_cast<size_t>(seed >> 33) % m.next.size();
      std::rotate(m.next.begin(), m.next.begin() + static_cast<std::ptrdiff_t>(turn), m.next.end());
      if (seed >> 63) std::reverse(m.next.begin(), m.next.end());
      // Now and then one thread sleeps for a few rounds: nobody may rely on lanes or warps keeping pace.
      if (asleep_for == 0 && (seed >> 41 & 3) == 0) {
        asleep_for = 1 + static_cast<int>(seed >> 43 & 15);
        asleep = static_cast<int>((seed >> 20) % static_cast<uint64_t>(threads));
      }
      const int64_t before = m.progress;
      for (int i : m.next)
        if (!m.fibers[static_cast<size_t>(i)].done && m.fault.empty() && !(asleep_for > 0 && i == asleep)) enter(i);
      const bool stuck = m.progress == before && asleep_for == 0;
      asleep_for = asleep_for > 0 ? asleep_for - 1 : 0;
      if (m.fault.empty() && !land_some(seed, stuck) && stuck && m.finished < threads)
        m.fault = "a barrier that not every thread reaches";
    }
    if (m.fault.empty() && !m.bulk.empty()) m.fault = "a bulk copy is under way at the end of the block";
    for (const Warp& w : m.warps)
      if (m.fault.empty() && !w.products.empty()) m.fault = "wgmma is under way at the end of the block";
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks, stacks_size);
#endif
  munmap(stacks, stacks_size);
  machine = nullptr;
  if (!m.fault.empty()) throw std::runtime_error("emulator: " + m.fault);
  return m.statistics;
}

}  // namespace rnp::cuda::emulator
