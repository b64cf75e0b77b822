// Included by translation units of one instruction set, inside their flags: internal linkage, as in microkernel_tile.h.
#pragma once

#include <utility>

namespace rnp::cpu {
namespace {

// Every second element of two vectors of type V::T.
template <class V, int... l>
inline __attribute__((always_inline)) typename V::T evens(typename V::T a, typename V::T b,
                                                          std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, (2 * l)...);
}

}  // namespace
}  // namespace rnp::cpu
