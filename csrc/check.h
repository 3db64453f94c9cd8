// Argument checks and dtype dispatch shared by the CPU ops. Every message names the argument, what
// was expected and what came; an op checks everything before it writes its first byte.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

// Not STD_TORCH_CHECK: that one puts the source path and line of the build machine into the
// message.
#define VARLEN_CHECK(condition, ...)                                        \
  do {                                                                      \
    if (!(condition)) [[unlikely]]                                          \
      throw std::runtime_error(::varlen_sft::message(__VA_ARGS__));         \
  } while (false)

namespace varlen_sft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis)
    text << (axis ? ", " : "") << tensor.size(axis);
  text << ')';
  return text.str();
}

inline void check_dim(const Tensor& tensor, const char* name, const char* axes, int64_t dim) {
  VARLEN_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  VARLEN_CHECK(tensor.dim() == dim, name, " must have shape ", axes, ", got ", shape_text(tensor));
}

inline void check_shape(const Tensor& tensor, const char* name, const char* axes,
                        std::initializer_list<int64_t> sizes) {
  check_dim(tensor, name, axes, static_cast<int64_t>(sizes.size()));
  std::ostringstream expected;
  bool same = true;
  int64_t axis = 0;
  for (int64_t size : sizes) {
    expected << (axis ? ", " : "") << size;
    same = same && tensor.size(axis++) == size;
  }
  VARLEN_CHECK(same, name, " must have shape ", axes, " = (", expected.str(), "), got ",
               shape_text(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  VARLEN_CHECK(tensor.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ",
               tensor.scalar_type());
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  VARLEN_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                   dtype == ScalarType::Float || dtype == ScalarType::Double,
               name, " must have dtype BFloat16, Half, Float or Double, got ", dtype);
}

inline void check_last_axis(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  VARLEN_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
               " must be contiguous in its last axis, got stride ", tensor.stride(last));
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  VARLEN_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Two rows of an output must not share memory, or two threads would write the same bytes.
inline void check_rows_apart(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  for (int64_t axis = 0; axis < last; ++axis)
    VARLEN_CHECK(tensor.size(axis) <= 1 || tensor.stride(axis) >= tensor.size(last), name,
                 " is written and must not overlap itself, got stride ", tensor.stride(axis),
                 " in axis ", axis);
}

// Statistics of a row are kept in fp32, or in fp64 when the data is fp64.
inline ScalarType statistics_dtype(ScalarType data) {
  return data == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f.operator()<T>() with the C++ type of a dtype that check_floating has accepted.
template <typename F>
void dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::BFloat16: return f.template operator()<c10::BFloat16>();
    case ScalarType::Half: return f.template operator()<c10::Half>();
    case ScalarType::Float: return f.template operator()<float>();
    default: return f.template operator()<double>();
  }
}

// data<const T> to read, data<T> to write: a copy-on-write tensor gets its own memory only for the
// latter.
template <typename T>
T* data(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace varlen_sft
