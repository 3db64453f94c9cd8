// RMSNorm and the SiLU gate of a Llama block, forward and backward, one pass over memory each:
// schemas, checks, dispatch. Arithmetic: elementwise_kernels.h.
#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

namespace varlen_sft {
namespace {

constexpr int64_t kBlockRows = 64;  // rows whose dweight is summed in one partial row
constexpr int64_t kGroupRows = 8;   // rows of a block taken together, small enough for the cache

// Row strides in elements. rstd and partial are fp32 (fp64 for fp64 data).
struct RmsNormArgs {
  const void *x, *weight;
  const void* dy;  // backward only
  void* out;       // y, or dx in the backward
  void* rstd_out;  // (T,), forward only
  const void* rstd;  // (T,), backward only
  void* partial;   // (blocks, C), backward only
  const void* residual;  // added to x before the norm, or null
  void* sum_out;         // (T, C) contiguous: x + residual, where there is a residual
  const void* dsum;      // gradient of that sum, or null; backward only
  int64_t rows, channels, x_stride, dy_stride, out_stride, residual_stride, dsum_stride;
  double eps;
};

struct SiluMulArgs {
  const void *gate, *up, *dout;  // (T, I); dout in the backward only
  void *out, *dup;               // (T, I): the product, or in the backward dgate and dup
  int64_t width, gate_stride, up_stride, dout_stride, out_stride, dup_stride;
};

}  // namespace
}  // namespace varlen_sft

#define VARLEN_WITH_AMX 1
#define VARLEN_KERNELS "elementwise_kernels.h"
#include "each_isa.h"

namespace varlen_sft {
namespace {

constexpr int64_t kGrain = 32768;  // values that make a task worth a thread

void check_rows(const Tensor& tensor, const char* name, const char* axes, int64_t rows,
                int64_t columns, ScalarType dtype) {
  check_shape(tensor, name, axes, {rows, columns});
  check_dtype(tensor, name, dtype);
  check_last_axis(tensor, name);
}

void check_norm(const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_dim(x, "x", "(T, C)", 2);
  check_floating(x, "x");
  check_last_axis(x, "x");
  check_shape(weight, "weight", "(C,)", {x.size(1)});
  check_dtype(weight, "weight", x.scalar_type());
  check_contiguous(weight, "weight");
  check_shape(rstd, "rstd", "(T,)", {x.size(0)});
  check_dtype(rstd, "rstd", statistics_dtype(x.scalar_type()));
  check_contiguous(rstd, "rstd");
}

RmsNormArgs norm_args(const Tensor& out, const Tensor& x, const Tensor& weight) {
  RmsNormArgs args{};
  args.x = data<const void>(x);
  args.weight = data<const void>(weight);
  args.out = data<void>(out);
  args.rows = x.size(0);
  args.channels = x.size(1);
  args.x_stride = x.stride(0);
  args.out_stride = out.stride(0);
  return args;
}

void rms_norm_forward(const Tensor& out, const Tensor& rstd, const Tensor& x, const Tensor& weight,
                      double eps, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& sum) {
  check_norm(x, weight, rstd);
  check_rows(out, "out", "(T, C)", x.size(0), x.size(1), x.scalar_type());
  check_rows_apart(out, "out");
  RmsNormArgs args = norm_args(out, x, weight);
  args.rstd_out = data<void>(rstd);
  args.eps = eps;
  VARLEN_CHECK(residual.has_value() == sum.has_value(), "sum must be given with residual");
  if (residual) {
    check_rows(*residual, "residual", "(T, C)", x.size(0), x.size(1), x.scalar_type());
    check_rows(*sum, "sum", "(T, C)", x.size(0), x.size(1), x.scalar_type());
    check_contiguous(*sum, "sum");
    args.residual = data<const void>(*residual);
    args.residual_stride = residual->stride(0);
    args.sum_out = data<void>(*sum);
  }
  dispatch_floating(x.scalar_type(), [&]<typename T>() {
    auto kernel = VARLEN_BEST_FOR(T, rms_norm_rows<T>);
    torch::stable::parallel_for(0, args.rows, kGrain / (args.channels + 1) + 1,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

// dweight[c] = the sum of the blocks' partial sums, in block order, in double.
template <typename C>
void reduce_partials(const C* partial, int64_t blocks, int64_t channels, C* dweight) {
  std::vector<double> sums(channels, 0.0);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t c = 0; c < channels; ++c) sums[c] += partial[block * channels + c];
  for (int64_t c = 0; c < channels; ++c) dweight[c] = static_cast<C>(sums[c]);
}

template <typename T>
void run_norm_backward(RmsNormArgs args, const Tensor& dweight) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  std::vector<C> partial(blocks * args.channels);
  args.partial = partial.data();
  auto kernel = VARLEN_BEST_FOR(T, rms_norm_backward_blocks<T>);
  torch::stable::parallel_for(0, blocks, kGrain / (args.channels * kBlockRows + 1) + 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  reduce_partials(partial.data(), blocks, args.channels, data<C>(dweight));
}

void rms_norm_backward(const Tensor& dx, const Tensor& dweight, const Tensor& dy, const Tensor& x,
                       const Tensor& weight, const Tensor& rstd,
                       const std::optional<Tensor>& dsum) {
  check_norm(x, weight, rstd);
  check_rows(dy, "dy", "(T, C)", x.size(0), x.size(1), x.scalar_type());
  check_rows(dx, "dx", "(T, C)", x.size(0), x.size(1), x.scalar_type());
  check_rows_apart(dx, "dx");
  check_shape(dweight, "dweight_f32", "(C,)", {x.size(1)});
  check_dtype(dweight, "dweight_f32", statistics_dtype(x.scalar_type()));
  check_contiguous(dweight, "dweight_f32");
  RmsNormArgs args = norm_args(dx, x, weight);
  args.rstd = data<const void>(rstd);
  args.dy = data<const void>(dy);
  args.dy_stride = dy.stride(0);
  if (dsum) {
    check_rows(*dsum, "dsum", "(T, C)", x.size(0), x.size(1), x.scalar_type());
    args.dsum = data<const void>(*dsum);
    args.dsum_stride = dsum->stride(0);
  }
  dispatch_floating(x.scalar_type(), [&]<typename T>() { run_norm_backward<T>(args, dweight); });
}

SiluMulArgs silu_mul_args(const Tensor& gate, const Tensor& up) {
  check_dim(gate, "gate", "(T, I)", 2);
  check_floating(gate, "gate");
  check_last_axis(gate, "gate");
  check_rows(up, "up", "(T, I)", gate.size(0), gate.size(1), gate.scalar_type());
  SiluMulArgs args{};
  args.gate = data<const void>(gate);
  args.up = data<const void>(up);
  args.width = gate.size(1);
  args.gate_stride = gate.stride(0);
  args.up_stride = up.stride(0);
  return args;
}

// A gradient or product that is written, (T, I) of gate's dtype.
void* written_like(const Tensor& gate, const Tensor& out, const char* name) {
  check_rows(out, name, "(T, I)", gate.size(0), gate.size(1), gate.scalar_type());
  check_rows_apart(out, name);
  return data<void>(out);
}

void silu_mul_forward(const Tensor& out, const Tensor& gate, const Tensor& up) {
  SiluMulArgs args = silu_mul_args(gate, up);
  args.out = written_like(gate, out, "out");
  args.out_stride = out.stride(0);
  dispatch_floating(gate.scalar_type(), [&]<typename T>() {
    auto kernel = VARLEN_BEST_FOR(T, silu_mul_rows<T>);
    torch::stable::parallel_for(0, gate.size(0), kGrain / (2 * args.width + 1) + 1,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

void silu_mul_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dout,
                       const Tensor& gate, const Tensor& up) {
  SiluMulArgs args = silu_mul_args(gate, up);
  check_rows(dout, "dout", "(T, I)", gate.size(0), gate.size(1), gate.scalar_type());
  args.dout = data<const void>(dout);
  args.dout_stride = dout.stride(0);
  args.out = written_like(gate, dgate, "dgate");
  args.out_stride = dgate.stride(0);
  args.dup = written_like(gate, dup, "dup");
  args.dup_stride = dup.stride(0);
  dispatch_floating(gate.scalar_type(), [&]<typename T>() {
    auto kernel = VARLEN_BEST_FOR(T, silu_mul_backward_rows<T>);
    torch::stable::parallel_for(0, gate.size(0), kGrain / (2 * args.width + 1) + 1,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

}  // namespace
}  // namespace varlen_sft

STABLE_TORCH_LIBRARY_FRAGMENT(varlen_sft_c, m) {
  m.def(
      "rms_norm_forward(Tensor(a!) out, Tensor(b!) rstd, Tensor x, Tensor weight, float eps, "
      "Tensor? residual, Tensor(c!)? sum) -> ()");
  m.def(
      "rms_norm_backward(Tensor(a!) dx, Tensor(b!) dweight_f32, Tensor dy, Tensor x, "
      "Tensor weight, Tensor rstd, Tensor? dsum) -> ()");
  m.def("silu_mul_forward(Tensor(a!) out, Tensor gate, Tensor up) -> ()");
  m.def(
      "silu_mul_backward(Tensor(a!) dgate, Tensor(b!) dup, Tensor dout, Tensor gate, Tensor up) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(varlen_sft_c, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&varlen_sft::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&varlen_sft::rms_norm_backward));
  m.impl("silu_mul_forward", TORCH_BOX(&varlen_sft::silu_mul_forward));
  m.impl("silu_mul_backward", TORCH_BOX(&varlen_sft::silu_mul_backward));
}
