// Rotary position embedding of q and k in one pass: schema, checks, dispatch. Arithmetic:
// rope_kernels.h.
#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace varlen_sft {
namespace {

// One tensor (T, heads, D) read and one written; strides in elements, last axis contiguous.
struct RopeHeads {
  const void* in;
  void* out;
  int64_t heads, in_token_stride, in_head_stride, out_token_stride, out_head_stride;
};

struct RopeArgs {
  RopeHeads q, k;
  const float *cos, *sin;  // (P, half)
  const void* position_ids;
  bool wide_positions;  // int64, else int32
  bool inverse;         // rotate by -angle: the backward
  int64_t half, head_dim;

  int64_t position(int64_t token) const {
    return wide_positions ? static_cast<const int64_t*>(position_ids)[token]
                          : static_cast<const int32_t*>(position_ids)[token];
  }
};

}  // namespace
}  // namespace varlen_sft

#define VARLEN_KERNELS "rope_kernels.h"
#include "each_isa.h"

namespace varlen_sft {
namespace {

// Values that make a task worth a thread: about 10 us of work.
constexpr int64_t kGrain = 32768;

void check_heads(const Tensor& out, const char* out_name, const Tensor& in, const char* name,
                 const char* axes) {
  check_dim(in, name, axes, 3);
  check_last_axis(in, name);
  check_shape(out, out_name, axes, {in.size(0), in.size(1), in.size(2)});
  check_dtype(out, out_name, in.scalar_type());
  check_last_axis(out, out_name);
  check_rows_apart(out, out_name);
}

void check_tables(const Tensor& cos, const Tensor& sin, int64_t head_dim) {
  check_dim(cos, "cos", "(P, R/2)", 2);
  check_shape(sin, "sin", "(P, R/2)", {cos.size(0), cos.size(1)});
  check_dtype(cos, "cos", ScalarType::Float);
  check_dtype(sin, "sin", ScalarType::Float);
  check_contiguous(cos, "cos");
  check_contiguous(sin, "sin");
  VARLEN_CHECK(2 * cos.size(1) <= head_dim, "cos must have at most D/2 = ", head_dim / 2,
               " columns, got ", cos.size(1));
}

void check_positions(const RopeArgs& args, int64_t tokens, int64_t table_rows) {
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t position = args.position(i);
    VARLEN_CHECK(position >= 0 && position < table_rows, "position_ids must be in [0, ", table_rows,
                 "), got ", position, " at row ", i);
  }
}

RopeHeads heads_of(const Tensor& in, const Tensor& out) {
  return {data<const void>(in), data<void>(out), in.size(1), in.stride(0), in.stride(1),
          out.stride(0), out.stride(1)};
}

template <typename T>
void run_rope(const RopeArgs& args, int64_t tokens, bool interleaved, bool hf) {
  auto kernel = interleaved ? (hf ? VARLEN_BEST(rope_tokens<T, true, true>)
                                  : VARLEN_BEST(rope_tokens<T, true, false>))
                            : (hf ? VARLEN_BEST(rope_tokens<T, false, true>)
                                  : VARLEN_BEST(rope_tokens<T, false, false>));
  const int64_t per_token = (args.q.heads + args.k.heads) * args.head_dim + 1;
  torch::stable::parallel_for(0, tokens, kGrain / per_token + 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void rope(const Tensor& q_out, const Tensor& k_out, const Tensor& q, const Tensor& k,
          const Tensor& cos, const Tensor& sin, const Tensor& position_ids, bool interleaved,
          bool hf, bool inverse) {
  check_heads(q_out, "q_out", q, "q", "(T, H, D)");
  check_heads(k_out, "k_out", k, "k", "(T, K, D)");
  check_floating(q, "q");
  check_dtype(k, "k", q.scalar_type());
  const int64_t tokens = q.size(0), head_dim = q.size(2);
  check_shape(k, "k", "(T, K, D)", {tokens, k.size(1), head_dim});
  check_tables(cos, sin, head_dim);
  check_shape(position_ids, "position_ids", "(T,)", {tokens});
  check_contiguous(position_ids, "position_ids");
  const ScalarType id_dtype = position_ids.scalar_type();
  VARLEN_CHECK(id_dtype == ScalarType::Int || id_dtype == ScalarType::Long,
               "position_ids must have dtype Int or Long, got ", id_dtype);
  const RopeArgs args{heads_of(q, q_out), heads_of(k, k_out), data<const float>(cos),
                      data<const float>(sin), data<const void>(position_ids),
                      id_dtype == ScalarType::Long, inverse, cos.size(1), head_dim};
  check_positions(args, tokens, cos.size(0));
  dispatch_floating(q.scalar_type(),
                    [&]<typename T>() { run_rope<T>(args, tokens, interleaved, hf); });
}

}  // namespace
}  // namespace varlen_sft

STABLE_TORCH_LIBRARY_FRAGMENT(varlen_sft_c, m) {
  m.def(
      "rope(Tensor(a!) q_out, Tensor(b!) k_out, Tensor q, Tensor k, Tensor cos, Tensor sin, "
      "Tensor position_ids, bool interleaved, bool hf, bool inverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(varlen_sft_c, CPU, m) {
  m.impl("rope", TORCH_BOX(&varlen_sft::rope));
}
