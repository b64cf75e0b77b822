// What Hopper adds to the emulated machine: barriers of shared memory, the copy engine, wgmma. Layouts are those of the
// PTX ISA: matrix descriptors and the 128-byte swizzle, the accumulator's registers, im2col mode.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/emulator_machine.h"

namespace rnp::cuda::emulator {
namespace {

constexpr int kStepBytes = 32;  // K of one product
constexpr int kBFloat16 = 0, kFloat16 = 1, kTf32 = 2;

size_t place_of(const void* p) { return static_cast<size_t>(static_cast<const char*>(p) - machine->shared); }

// The 128-byte swizzle: bits 4 … 6 of an address, exclusive-or bits 7 … 9.
size_t swizzle(size_t address) { return address ^ ((address >> 7 & 7) << 4); }

Barrier* barrier_at(const uint64_t* p) {
  checked_shared(p, 8, 8);
  const auto found = machine->barriers.find(place_of(p));
  if (found != machine->barriers.end()) return &found->second;
  fail("a barrier that was not initialised");
  return nullptr;
}

void end_phase(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
}

void issue(BulkCopy copy, uint64_t* barrier) {
  Machine& m = *machine;
  if (!barrier_at(barrier)) return;
  if (!m.barriers_published) fail("the copy engine does not know the barriers yet");
  copy.barrier = place_of(barrier);
  // What is on its way to a place already: the same may come twice, since no order could matter then.
  const auto on_its_way = [&](const BulkCopy::Run& run) {
    bool same = true;
    for (const BulkCopy& other : m.bulk)
      for (const BulkCopy::Run& coming : other.runs)
        if (coming.place < run.place + run.size && run.place < coming.place + coming.size)
          same = same && coming.place == run.place && coming.size == run.size &&
                 std::memcmp(&other.data[coming.at], &copy.data[run.at], run.size) == 0;
    return same;
  };
  for (const BulkCopy::Run& run : copy.runs) {
    const size_t first = run.place / 16, behind = (run.place + run.size) / 16;
    if (run.place + run.size > m.shared_bytes || run.place % 16 != 0) return fail("a bulk copy outside shared memory");
    bool twice = false;
    for (size_t unit = first; unit < behind; ++unit) {
      twice = twice || m.coming[unit] > 0;
      if (m.unpublished[unit]) fail("a bulk copy over a cp.async that was not published");
    }
    if (twice && !on_its_way(run)) fail("two bulk copies to one place");
    std::memset(m.shared + run.place, 0xff, run.size);
    for (size_t unit = first; unit < behind; ++unit) ++m.coming[unit];
  }
  m.bulk.push_back(std::move(copy));
}

void take_arrivals(Barrier& b, int count) {
  if (b.pending < count) return fail("more arrivals than a phase has");
  b.pending -= count;
  end_phase(b);
}

void land(const BulkCopy& copy) {
  Machine& m = *machine;
  for (const auto& [place, at, size] : copy.runs) {
    std::memcpy(m.shared + place, copy.data.data() + at, size);
    for (size_t unit = place / 16; unit < (place + size) / 16; ++unit) {
      if (copy.of_a_thread)
        m.unpublished[unit] = kArrived, m.arrived.push_back(unit);
      else
        --m.coming[unit];
    }
  }
  Barrier& b = m.barriers[copy.barrier];
  if (copy.of_a_thread) return take_arrivals(b, 1);
  b.bytes -= copy.bytes;
  end_phase(b);
}

// Rows of 32 bytes from where the descriptor points: `rows` of them from row `first` on. Returns the end of what it
// wrote.
char* read_operand(uint64_t descriptor, int first, int rows, bool check, char* to) {
  Machine& m = *machine;
  const size_t start = static_cast<size_t>(descriptor & 0x3fff) << 4;
  const size_t stride = static_cast<size_t>(descriptor >> 32 & 0x3fff) << 4;  // from eight rows to the next eight
  if (descriptor >> 62 != 1) fail("wgmma: an operand that is not swizzled by 128 bytes");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: a base offset");
  for (int r = first; r < first + rows; ++r)
    for (size_t piece = 0; piece < 2; ++piece) {
      const size_t row = static_cast<size_t>(r);
      const size_t place = swizzle(start + row / 8 * stride + row % 8 * 128 + piece * 16);
      if (place + 16 > m.shared_bytes) {
        fail("wgmma: an operand outside shared memory");
        return to;
      }
      if (check && m.coming[place / 16]) fail("wgmma: an operand that has not come yet");
      if (check && m.unpublished[place / 16]) fail("wgmma: an operand that cp.async wrote and nobody published");
      std::memcpy(to, m.shared + place, 16);
      to += 16;
    }
  return to;
}

float element(const Product& p, int row, int k) {
  const char* at = p.bytes.data() + row * kStepBytes;
  if (p.type == kTf32) {
    uint32_t bits;
    std::memcpy(&bits, at + k * 4, 4);
    return std::bit_cast<float>(bits & 0xffffe000u);  // the low 13 bits mean nothing
  }
  uint16_t bits;
  std::memcpy(&bits, at + k * 2, 2);
  return p.type == kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

// Sum (row, column) of a warp's 16 rows: which lane holds it, and where.
float& sum_at(Sums& sums, int row, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int at = column / 8 * 4 + row / 8 * 2 + column % 2;
  return sums.values[static_cast<size_t>(lane * (sums.width / 2) + at)];
}

// The sums that the lanes name: those of products under way, or new ones.
size_t sums_of(Warp& w, const Operation& mine) {
  const size_t own = static_cast<size_t>(mine.width) / 2;
  for (size_t i = 0; i < w.sums.size(); ++i) {
    const Sums& s = w.sums[i];
    int same = 0;
    for (int l = 0; l < kLanes; ++l) {
      const float* const d = w.lane[l].d;
      same += d == s.registers[l];
      if (d != s.registers[l] && d < s.registers[l] + s.width / 2 && s.registers[l] < d + own)
        fail("wgmma: sums that overlap others under way");
    }
    if (same == 0) continue;
    if (same != kLanes || s.width != mine.width) fail("wgmma: sums that are others in part");
    return i;
  }
  Sums s{mine.width, {}, std::vector<float>(kLanes * own)};
  for (int l = 0; l < kLanes; ++l) {
    s.registers[l] = w.lane[l].d;
    for (size_t i = 0; i < own; ++i) {
      s.values[static_cast<size_t>(l) * own + i] = s.registers[l][i];
      s.registers[l][i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  w.sums.push_back(std::move(s));
  return w.sums.size() - 1;
}

std::vector<char> operands(const Product& p, int warp, bool check) {
  std::vector<char> bytes(static_cast<size_t>((16 + p.width) * kStepBytes));
  read_operand(p.operand[1], 0, p.width, check, read_operand(p.operand[0], warp % 4 * 16, 16, check, bytes.data()));
  return bytes;
}

void start(Warp& w, const Operation& mine, int warp) {
  if (!w.fenced) fail("wgmma without wgmma.fence");
  for (int l = 0; l < kLanes; ++l) {
    const Operation& o = w.lane[l];
    if (o.width != mine.width || o.type != mine.type || o.operand[0] != mine.operand[0] ||
        o.operand[1] != mine.operand[1])
      fail("wgmma: lanes differ");
  }
  if (!machine->fault.empty()) return;
  Product p{mine.width, mine.type, {mine.operand[0], mine.operand[1]}, {}, w.groups, sums_of(w, mine)};
  p.bytes = operands(p, warp, true);
  w.products.push_back(std::move(p));
  ++machine->statistics.group_products;
}

void finish(Warp& w, const Product& p, int warp) {
  if (operands(p, warp, false) != p.bytes) fail("wgmma: an operand was overwritten before the wait");
  const int step = kStepBytes / (p.type == kTf32 ? 4 : 2);
  std::vector<float> a(static_cast<size_t>(16 * step)), b(static_cast<size_t>(p.width * step));
  for (int i = 0; i < 16 * step; ++i) a[static_cast<size_t>(i)] = element(p, i / step, i % step);
  for (int i = 0; i < p.width * step; ++i) b[static_cast<size_t>(i)] = element(p, 16 + i / step, i % step);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < p.width; ++column) {
      float& d = sum_at(w.sums[p.sums], row, column);
      const float *x = &a[static_cast<size_t>(row * step)], *y = &b[static_cast<size_t>(column * step)];
      double sum = d;
      for (int k = 0; k < step; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(y[k]);
      d = static_cast<float>(sum);
    }
}

void wait(Warp& w, int64_t most, int warp) {
  if (most == 0 && !w.products.empty() && w.products.back().group == w.groups)
    fail("wgmma: a wait for products that were not committed");
  size_t done = 0;
  while (done < w.products.size() && w.products[done].group < w.groups - most) finish(w, w.products[done++], warp);
  if (done == 0 || done < w.products.size()) {
    w.products.erase(w.products.begin(), w.products.begin() + static_cast<std::ptrdiff_t>(done));
    return;
  }
  for (const Sums& sums : w.sums) {
    const size_t own = static_cast<size_t>(sums.width) / 2;
    for (int l = 0; l < kLanes; ++l)
      std::memcpy(sums.registers[l], &sums.values[static_cast<size_t>(l) * own], own * 4);
  }
  w.sums.clear();
  w.products.clear();
  w.fenced = false;
}

Operation operation(int kind) {
  Operation o = {};
  o.kind = kind;
  return o;
}

void meet_product(int type, int width, float* d, uint64_t a, uint64_t b) {
  Operation o = operation(6);
  o.type = type, o.width = width, o.d = d, o.operand[0] = a, o.operand[1] = b;
  meet(o);
}

}  // namespace

void hopper_operation(Warp& w, const Operation& mine) {
  const int warp = machine->current / kLanes;
  switch (mine.kind) {
    case 6:
      return start(w, mine, warp);
    case 7:
      ++w.groups;
      return;
    case 8:
      return wait(w, mine.left, warp);
    case 9:
      w.fenced = true;
      return;
    case 10:
      return;
    case 11: {  // the greatest value, and whose low bits are set
      int32_t most = w.lane[0].left;
      uint32_t bits = 0;
      for (int l = 0; l < kLanes; ++l) {
        most = std::max(most, w.lane[l].left);
        bits |= static_cast<uint32_t>(w.lane[l].left & 1) << l;
      }
      for (int l = 0; l < kLanes; ++l) w.lane[l].left = most, w.lane[l].width = static_cast<int>(bits);
      return;
    }
    case 12: {  // another lane's value
      int32_t values[kLanes];
      for (int l = 0; l < kLanes; ++l) values[l] = w.lane[l].left;
      for (int l = 0; l < kLanes; ++l) w.lane[l].left = values[w.lane[l].width];
      return;
    }
    case 13:  // stmatrix
      for (int matrix = 0; matrix < 4; ++matrix) {
        bool bank_group[8] = {};
        for (int row = 0; row < 8; ++row) {
          char* to = checked_shared(w.lane[matrix * 8 + row].row, 16, 16);
          const size_t group = place_of(to) / 16 % 8;
          machine->statistics.bank_conflicts += bank_group[group];
          bank_group[group] = true;
          for (int word = 0; word < 4; ++word) std::memcpy(to + 4 * word, &w.lane[row * 4 + word].a[matrix], 4);
        }
      }
      return;
    default:
      fail("an unknown operation");
  }
}

bool land_some(uint64_t seed, bool all) {
  Machine& m = *machine;
  bool any = false;
  for (size_t i = 0; i < m.bulk.size();) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    if (!all && seed >> 62) {  // one in four
      ++i;
      continue;
    }
    const BulkCopy copy = std::move(m.bulk[i]);
    m.bulk.erase(m.bulk.begin() + static_cast<std::ptrdiff_t>(i));
    land(copy);
    all = false, any = true;
  }
  return any;
}

uint32_t shared_address(const void* p) { return static_cast<uint32_t>(place_of(p)); }

void init_barrier(uint64_t* barrier, int arrivals) {
  checked_shared(barrier, 8, 8);
  machine->barriers[place_of(barrier)] = Barrier{arrivals, arrivals, 0, 0};
}

void publish_barriers() { machine->barriers_published = true; }

void arrive(uint64_t* barrier, int count) {
  Barrier* b = barrier_at(barrier);
  if (!b) return;
  ++machine->progress;
  take_arrivals(*b, count);
}

void arrive_after_copies(uint64_t* barrier) {
  Machine& m = *machine;
  if (!barrier_at(barrier)) return;
  Fiber& fiber = m.fibers[static_cast<size_t>(m.current)];
  if (!fiber.groups.empty()) fail("copies that were committed and not waited for");
  BulkCopy all;
  all.barrier = place_of(barrier), all.of_a_thread = true;
  for (const Copy& c : fiber.open) {
    char* const values = all.add(place_of(c.to), 16);
    if (c.bytes > 0) std::memcpy(values, c.from, static_cast<size_t>(c.bytes));
    m.statistics.copied_bytes += c.bytes;
  }
  fiber.open.clear();
  m.bulk.push_back(std::move(all));
}

void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  Barrier* b = barrier_at(barrier);
  if (b) b->bytes += bytes;
}

void wait_barrier(uint64_t* barrier, uint32_t parity) {
  const Barrier* b = barrier_at(barrier);
  while (b && (b->phase & 1) == parity && machine->fault.empty()) leave_to_scheduler(false);
  ++machine->progress;
}

void sync_threads(int number, int threads) {
  Machine& m = *machine;
  NamedBarrier& b = m.named[number];
  ++m.progress;
  const int64_t generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  while (b.generation == generation) leave_to_scheduler(false);
}

void wrote(const void* shared) {
  const size_t unit = place_of(checked_shared(shared, 1, 1)) / 16;
  machine->unpublished[unit] = machine->current + 1;
  machine->fibers[static_cast<size_t>(machine->current)].landed.push_back(unit);
}

void publish_writes() {
  Machine& m = *machine;
  Fiber& fiber = m.fibers[static_cast<size_t>(m.current)];
  for (size_t unit : fiber.landed)
    if (m.unpublished[unit] == m.current + 1) m.unpublished[unit] = 0;
  fiber.landed.clear();
  for (size_t unit : m.arrived)
    if (m.unpublished[unit] == kArrived) m.unpublished[unit] = 0;
  m.arrived.clear();
}

void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 != 0 || bytes == 0) fail("a bulk copy of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a misaligned source of a bulk copy");
  BulkCopy copy;
  copy.bytes = bytes;
  std::memcpy(copy.add(place_of(checked_shared(shared, bytes, 16)), bytes), global, bytes);
  machine->statistics.bulk_bytes += bytes;
  issue(std::move(copy), barrier);
}

void copy_im2col(void* shared, const TensorMap& map, uint64_t* barrier, int32_t c, int32_t w, int32_t h, int32_t n,
                 int32_t offset_w, int32_t offset_h) {
  const size_t row_bytes = static_cast<size_t>(map.channels * map.element);
  const size_t bytes = row_bytes * static_cast<size_t>(map.pixels);
  const size_t place = place_of(checked_shared(shared, bytes, 128));
  if (offset_w < 0 || offset_h < 0 || offset_w > 255 || offset_h > 255) fail("im2col: an offset beyond 0…255");
  if (row_bytes != 128) fail("im2col: a row of another size than the swizzle's");
  BulkCopy copy;
  copy.bytes = static_cast<int64_t>(bytes);
  copy.runs.reserve(static_cast<size_t>(8 * map.pixels)), copy.data.reserve(bytes);
  const int32_t in_piece = 16 / map.element;
  for (int32_t pixel = 0; pixel < map.pixels; ++pixel) {
    const int64_t x = w + offset_w, y = h + offset_h;
    const bool inside = x >= 0 && x < map.size[1] && y >= 0 && y < map.size[2] && n >= 0 && n < map.size[3];
    for (int32_t piece = 0; piece < 8; ++piece) {
      char* const values =
          copy.add(swizzle(place + static_cast<size_t>(pixel) * row_bytes + static_cast<size_t>(piece) * 16), 16);
      const int64_t channel = c + piece * in_piece;
      const int64_t count = inside ? std::min<int64_t>(in_piece, map.size[0] - channel) : 0;
      if (count > 0)
        std::memcpy(
            values,
            map.base + int64_t{n} * map.stride[3] + y * map.stride[2] + x * map.stride[1] + channel * map.element,
            static_cast<size_t>(count * map.element));
    }
    w += map.step[0];
    if (w <= map.size[1] - 1 + map.upper[0]) continue;
    w = map.lower[0];
    h += map.step[1];
    if (h <= map.size[2] - 1 + map.upper[1]) continue;
    h = map.lower[1];
    ++n;
  }
  machine->statistics.im2col_bytes += static_cast<int64_t>(bytes);
  issue(std::move(copy), barrier);
}

int32_t max_in_warp(int32_t v) {
  Operation o = operation(11);
  o.left = v;
  return meet(o).left;
}

int32_t from_lane(int32_t v, int lane) {
  if (lane < 0 || lane >= kLanes) fail("a lane that no warp has");
  Operation o = operation(12);
  o.left = v, o.width = lane;
  return meet(o).left;
}

void store_matrices(void* shared_row, const uint32_t* r) {
  Operation o = operation(13);
  o.a = r, o.row = shared_row;
  meet(o);
}

uint32_t ballot(bool v) {
  Operation o = operation(11);
  o.left = v;
  return static_cast<uint32_t>(meet(o).width);
}

void sync_warp() { meet(operation(10)); }
void begin_products() { meet(operation(9)); }
void commit_products() { meet(operation(7)); }
void wait_products(int most) {
  Operation o = operation(8);
  o.left = most;
  meet(o);
}
void multiply_warpgroup(BFloat16, int width, float* d, uint64_t a, uint64_t b) {
  meet_product(kBFloat16, width, d, a, b);
}
void multiply_warpgroup(Float16, int width, float* d, uint64_t a, uint64_t b) {
  meet_product(kFloat16, width, d, a, b);
}
void multiply_warpgroup(float, int width, float* d, uint64_t a, uint64_t b) { meet_product(kTf32, width, d, a, b); }

}  // namespace rnp::cuda::emulator
