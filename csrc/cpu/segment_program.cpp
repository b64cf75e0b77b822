#include "cpu/segment_program.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace rnp::cpu {
namespace {

enum class Role {
  kReadMap,
  kWriteMap,
  kReadIndex,
  kWriteIndex,
  kReadVector,
  kWriteVector,
  kNumber,  // −1 (none) or more
};

struct Field {
  int64_t SegmentStep::* member;
  Role role;
  bool optional = false;
};

using S = SegmentStep;
using enum Role;

struct Form {
  const char* word;
  SegmentOp op;
  std::vector<Field> fields;
};

// The operands of every instruction, in the order of the text.
const std::vector<Form>& forms() {
  static const std::vector<Form> all = {
      {"conv",
       SegmentOp::kConv,
       {{&S::x, kReadMap},
        {&S::residual, kReadMap, true},
        {&S::y, kWriteMap},
        {&S::in, kReadIndex, true},
        {&S::out, kReadIndex, true},
        {&S::row, kReadIndex, true},
        {&S::mean, kWriteVector, true},
        {&S::weight, kNumber},
        {&S::winograd, kNumber},
        {&S::scale, kNumber},
        {&S::bias, kNumber},
        {&S::lines, kNumber},
        {&S::c_in, kNumber},
        {&S::c_out, kNumber},
        {&S::groups, kNumber},
        {&S::kh, kNumber},
        {&S::kw, kNumber},
        {&S::stride_h, kNumber},
        {&S::stride_w, kNumber},
        {&S::pad_top, kNumber},
        {&S::pad_bottom, kNumber},
        {&S::pad_left, kNumber},
        {&S::pad_right, kNumber},
        {&S::dilation_h, kNumber},
        {&S::dilation_w, kNumber},
        {&S::relu, kNumber},
        {&S::skip, kNumber}}},
      {"max_pool",
       SegmentOp::kMaxPool,
       {{&S::x, kReadMap},
        {&S::y, kWriteMap},
        {&S::in, kReadIndex, true},
        {&S::kh, kNumber},
        {&S::kw, kNumber},
        {&S::stride_h, kNumber},
        {&S::stride_w, kNumber},
        {&S::pad_top, kNumber},
        {&S::pad_left, kNumber},
        {&S::skip, kNumber}}},
      {"add", SegmentOp::kAdd, {{&S::x, kReadMap}, {&S::residual, kReadMap}, {&S::y, kWriteMap}}},
      {"prefix",
       SegmentOp::kPrefix,
       {{&S::a, kReadIndex}, {&S::result, kWriteIndex}, {&S::channels, kNumber}, {&S::actions, kNumber}}},
      {"largest", SegmentOp::kLargest, {{&S::a, kReadIndex}, {&S::b, kReadIndex}, {&S::result, kWriteIndex}}},
      {"decide",
       SegmentOp::kDecide,
       {{&S::features, kReadVector},
        {&S::hidden_in, kReadVector, true},
        {&S::previous, kReadIndex, true},
        {&S::hidden_out, kWriteVector},
        {&S::action, kWriteIndex},
        {&S::result, kWriteIndex},
        {&S::agent, kNumber},
        {&S::feature_size, kNumber},
        {&S::code, kNumber},
        {&S::hidden, kNumber},
        {&S::input, kNumber},
        {&S::actions, kNumber},
        {&S::channels, kNumber}}},
  };
  return all;
}

[[noreturn]] void fail(const std::string& line, const std::string& rule) {
  throw std::invalid_argument(rule + "; got \"" + line + "\"");
}

// The words and integers of one line.
struct Line {
  std::string text, word, second;
  std::vector<int64_t> numbers;

  explicit Line(const std::string& from) : text(from) {
    const char* at = text.c_str();
    while (*at) {
      while (*at == ' ') ++at;
      if (!*at) break;
      char* end = nullptr;
      const int64_t value = std::strtoll(at, &end, 10);
      if (end != at && (*end == ' ' || *end == 0)) {
        numbers.push_back(value);
        at = end;
        continue;
      }
      const char* start = at;
      while (*at && *at != ' ') ++at;
      (word.empty() ? word : second) = std::string(start, at);
    }
  }
};

class Parser {
 public:
  explicit Parser(SegmentProgram& program) : p_(program) {}

  void line(const Line& l) {
    if (l.word == "slots") return slots(l);
    if (l.word == "in") return input(l);
    if (l.word == "out") return output(l);
    for (const Form& form : forms())
      if (l.word == form.word) return step(l, form);
    fail(l.text, "an instruction must be one of the known ones");
  }

 private:
  void slots(const Line& l) {
    if (l.numbers.size() != 3 || *std::min_element(l.numbers.begin(), l.numbers.end()) < 0 ||
        *std::max_element(l.numbers.begin(), l.numbers.end()) > 1 << 16 || !p_.steps.empty() || !p_.map_in.empty())
      fail(l.text, "slots needs the numbers of maps, indices and vectors, once");
    p_.maps = l.numbers[0], p_.indices = l.numbers[1], p_.vectors = l.numbers[2];
    p_.first_use.assign(static_cast<size_t>(p_.maps), -2);
    p_.dense.assign(static_cast<size_t>(p_.maps), false);
    p_.last_use.assign(static_cast<size_t>(p_.maps), -1);
    p_.index_limit.assign(static_cast<size_t>(p_.indices), -1);
    p_.vector_size.assign(static_cast<size_t>(p_.vectors), -1);
  }

  size_t slot(const Line& l, int64_t number, int64_t count) {
    if (number < 0 || number >= count) fail(l.text, "a slot must lie below the number of slots");
    return static_cast<size_t>(number);
  }

  void input(const Line& l) {
    const bool map = l.second == "map";
    if (l.numbers.size() != (map ? 1 : 2)) fail(l.text, "an input needs its slot, and its limit or size");
    if (map) {
      write_map(l, l.numbers[0], -1);
      p_.map_in.push_back(l.numbers[0]);
    } else if (l.second == "index") {
      write_index(l, l.numbers[0], l.numbers[1]);
      p_.index_in.push_back(l.numbers[0]);
    } else {
      write_vector(l, l.numbers[0], l.numbers[1]);
      p_.vector_in.push_back(l.numbers[0]);
    }
  }

  void output(const Line& l) {
    if (l.numbers.size() != 1) fail(l.text, "an output needs its slot");
    const int64_t number = l.numbers[0];
    if (l.second == "map") {
      if (p_.first_use[slot(l, number, p_.maps)] < 0) fail(l.text, "an output map must have been written by a step");
      p_.map_out.push_back(number);
    } else if (l.second == "index") {
      if (p_.index_limit[slot(l, number, p_.indices)] < 0) fail(l.text, "an output must have been written");
      p_.index_out.push_back(number);
    } else {
      if (p_.vector_size[slot(l, number, p_.vectors)] < 0) fail(l.text, "an output must have been written");
      p_.vector_out.push_back(number);
    }
  }

  void write_map(const Line& l, int64_t number, int64_t at) {
    int64_t& first = p_.first_use[slot(l, number, p_.maps)];
    if (first != -2) fail(l.text, "a slot must be written once");
    first = at;
  }
  void write_index(const Line& l, int64_t number, int64_t limit) {
    int64_t& known = p_.index_limit[slot(l, number, p_.indices)];
    if (known != -1 || limit < 0 || limit > INT32_MAX) fail(l.text, "a slot must be written once, with a limit");
    known = limit;
  }
  void write_vector(const Line& l, int64_t number, int64_t size) {
    int64_t& known = p_.vector_size[slot(l, number, p_.vectors)];
    if (known != -1 || size < 1) fail(l.text, "a slot must be written once, with a size");
    known = size;
  }

  void step(const Line& l, const Form& form) {
    if (l.numbers.size() != form.fields.size())
      fail(l.text, form.word + (" needs " + std::to_string(form.fields.size())) + " operands");
    SegmentStep s;
    s.op = form.op;
    for (size_t i = 0; i < form.fields.size(); ++i) {
      const Field& f = form.fields[i];
      const int64_t value = l.numbers[i];
      s.*f.member = value;
      if (value < -1) fail(l.text, "an operand must be -1 or more");
      if (f.role == kNumber || (value == -1 && f.optional)) continue;
      if (f.role == kReadMap) {
        if (p_.first_use[slot(l, value, p_.maps)] == -2) fail(l.text, "a map must be written before it is read");
        p_.last_use[static_cast<size_t>(value)] = static_cast<int64_t>(p_.steps.size());
        if (form.op != SegmentOp::kConv) p_.dense[static_cast<size_t>(value)] = true;
      }
      if (f.role == kReadIndex && p_.index_limit[slot(l, value, p_.indices)] < 0)
        fail(l.text, "an index must be written before it is read");
      if (f.role == kReadVector && p_.vector_size[slot(l, value, p_.vectors)] < 0)
        fail(l.text, "a vector must be written before it is read");
    }
    check(l, s);
    if (s.y >= 0) write_map(l, s.y, static_cast<int64_t>(p_.steps.size()));
    p_.steps.push_back(s);
  }

  int64_t limit(int64_t index) const { return index < 0 ? 0 : p_.index_limit[static_cast<size_t>(index)]; }

  void check(const Line& l, const SegmentStep& s) {
    switch (s.op) {
      case SegmentOp::kConv:
        if (std::min({s.c_in, s.c_out, s.groups, s.kh, s.kw, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w}) < 1 ||
            std::min({s.pad_top, s.pad_bottom, s.pad_left, s.pad_right, s.weight, s.lines}) < 0 || s.c_in % s.groups ||
            s.c_out % s.groups)
          fail(l.text, "conv needs a geometry of positive sizes");
        if (std::max({s.kh, s.kw, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w, s.pad_top, s.pad_bottom,
                      s.pad_left, s.pad_right}) >= int64_t{1} << 31)
          fail(l.text, "conv needs a geometry of sizes less than 2^31");
        if (limit(s.in) > s.c_in || limit(s.out) > s.c_out) fail(l.text, "a prefix must not exceed the channels");
        if (s.lines > 0 ? s.row < 0 || limit(s.row) >= s.lines : s.row >= 0)
          fail(l.text, "conv needs a row within the lines of its tables, and only then");
        if (s.residual >= 0 && s.skip > 0) fail(l.text, "a tail cannot be skipped beside a residual");
        if (s.mean >= 0) write_vector(l, s.mean, s.c_out);
        break;
      case SegmentOp::kMaxPool:
        if (std::min({s.kh, s.kw, s.stride_h, s.stride_w}) < 1 || std::min(s.pad_top, s.pad_left) < 0 ||
            2 * s.pad_top > s.kh || 2 * s.pad_left > s.kw)
          fail(l.text, "max_pool needs a window and a padding of at most half of it");
        break;
      case SegmentOp::kAdd:
        break;
      case SegmentOp::kPrefix:
        if (s.actions < 1 || s.channels < 1 || limit(s.a) > s.actions) fail(l.text, "prefix needs a group up to k");
        write_index(l, s.result, s.channels);
        break;
      case SegmentOp::kLargest:
        write_index(l, s.result, std::max(limit(s.a), limit(s.b)));
        break;
      case SegmentOp::kDecide:
        if (std::min({s.feature_size, s.code, s.hidden, s.actions, s.channels}) < 1 || s.agent < 0 ||
            p_.vector_size[static_cast<size_t>(s.features)] != s.feature_size ||
            (s.hidden_in >= 0 && p_.vector_size[static_cast<size_t>(s.hidden_in)] != s.hidden) ||
            (s.previous >= 0 && limit(s.previous) > s.actions) ||
            (s.input != s.code && s.input != s.code + s.actions) || (s.previous >= 0 && s.input == s.code))
          fail(l.text, "decide needs sizes that agree");
        write_vector(l, s.hidden_out, s.hidden);
        write_index(l, s.action, s.actions);
        write_index(l, s.result, s.channels);
        break;
    }
  }

  SegmentProgram& p_;
};

}  // namespace

SegmentProgram::SegmentProgram(const std::string& text) {
  Parser parser(*this);
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = std::min(text.find('\n', at), text.size());
    if (end > at) parser.line(Line(text.substr(at, end - at)));
    at = end + 1;
  }
}

std::shared_ptr<const SegmentProgram> segment_program(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const SegmentProgram>> known;
  constexpr size_t kMost = 256;  // a process that converts networks without end must not keep all their programs
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  auto program = std::make_shared<const SegmentProgram>(text);
  if (known.size() >= kMost) known.clear();
  known.emplace(text, program);
  return program;
}

}  // namespace rnp::cpu
