// Inside the emulator: what its two files share, the machine of sm_80 (emulator.cpp) and what Hopper adds
// (emulator_hopper.cpp).
#pragma once

#include <ucontext.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulator.h"

namespace rnp::cuda::emulator {

constexpr int kLanes = 32;
constexpr int kArrived = -1;
constexpr size_t kStack = 256 * 1024;

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

struct Operation {  // what one lane brings to an operation of its warp
  int kind;         // 0: ldmatrix, 1…3: mma, 4: shuffle, 5: ldmatrix.trans, 6…13: of emulator_hopper.cpp
  uint32_t* r;
  const void* row;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  float value;
  int mask;
  int width, type, left;  // of wgmma: columns, a type of emulator_hopper.cpp, groups left by wait_group
  uint64_t operand[2];
};

struct Product {  // one warp's share of a wgmma that has been issued: 16 rows
  int width, type;
  uint64_t operand[2];
  std::vector<char> bytes;  // both operands as they were then
  int64_t group;
  size_t sums;  // which of the warp's
};

struct Sums {  // what products under way add to, while the registers hold NaN
  int width;
  float* registers[kLanes];
  std::vector<float> values;
};

struct Warp {
  Operation lane[kLanes];
  int arrived = 0;
  int64_t generation = 0;
  std::vector<Product> products;  // of wgmma, under way
  std::vector<Sums> sums;
  int64_t groups = 0;  // of products, committed
  bool fenced = false;
};

struct Fiber {
  ucontext_t context;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
  std::vector<size_t> landed;  // units of 16 bytes of shared memory that wgmma does not see yet
};

struct Barrier {  // an mbarrier
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;   // announced and not yet come
  uint32_t phase = 0;  // how many have ended
};

struct BulkCopy {  // under way, and a barrier hears of its end
  struct Run {     // a place in shared memory, and where in `data` lies what goes there
    size_t place, at, size;
  };
  std::vector<Run> runs;
  std::vector<char> data;
  size_t barrier = 0;
  int64_t bytes = 0;         // of the copy engine: what the barrier was told to expect
  bool of_a_thread = false;  // the cp.async of one, which arrives with them

  // A run of `size` zeros; the caller fills it in.
  char* add(size_t place, size_t size) {
    runs.push_back({place, data.size(), size});
    data.resize(data.size() + size, 0);
    return data.data() + data.size() - size;
  }
};

struct NamedBarrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Machine {
  int threads = 0, current = -1, at_barrier = 0, finished = 0;
  int64_t block = 0, blocks = 0, barrier_generation = 0, progress = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> next;  // the order in which threads take turns
  void* scheduler_pointer = nullptr;
  const void* scheduler_bottom = nullptr;  // of its stack, for AddressSanitizer
  size_t scheduler_size = 0;
  ucontext_t scheduler;
  const std::function<void(char*)>* body = nullptr;
  std::string fault;
  Statistics statistics;
  std::map<size_t, Barrier> barriers;  // by their place in shared memory
  std::map<int, NamedBarrier> named;
  std::vector<BulkCopy> bulk;
  // Of each 16 bytes: 1 + the thread whose cp.async wgmma does not see yet, kArrived if a barrier heard that it landed,
  // 0.
  std::vector<int> unpublished;
  std::vector<size_t> arrived;  // places of kArrived
  std::vector<char> coming;     // of each 16 bytes: how many copies of the engine are about to write them
  bool barriers_published = false;
};
extern Machine* machine;

void leave_to_scheduler(bool forever);
void fail(const std::string& what);
char* checked_shared(const void* at, size_t size, size_t alignment);
Operation& meet(const Operation& mine);
void hopper_operation(Warp& w, const Operation& mine);
// Lets some copies of the copy engine land; `all`: at least one. Whether one did.
bool land_some(uint64_t seed, bool all);

}  // namespace rnp::cuda::emulator
