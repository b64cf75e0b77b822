// A str argument of an operator. Use it in place of std::string in boxed functions: torch's own conversion (2.10
// to 2.13, ToImpl<std::string>) makes a string with new and never deletes it, 48 bytes a call and, worse, crumbs of the
// heap that nothing can merge across.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace rnp {

struct Text {
  std::string value;
};

}  // namespace rnp

namespace torch::stable::detail {

template <>
struct ToImpl<rnp::Text> {
  static rnp::Text call(StableIValue from, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(from);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    rnp::Text text{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
