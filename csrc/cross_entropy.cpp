// Cross-entropy rows with the gradient written over the logits: schema, checks, dispatch.
// Arithmetic: cross_entropy_kernels.h.
#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>

namespace varlen_sft {
namespace {

constexpr int64_t kIgnoreIndex = -100;

struct CeOptions {
  int64_t vocab;
  double softcap, logit_scale, label_smoothing, z_loss;
};

// loss, lse, entropy, counted and weights are fp32 (fp64 for fp64 logits), contiguous, one value
// per row. With cu_seqlens (else null) labels and weights are unshifted.
struct CeArgs {
  void* logits;
  int64_t rows, row_stride;
  const int64_t* labels;
  const void* weights;
  const int32_t* cu_seqlens;
  int64_t edges;
  void *loss, *lse, *entropy, *counted;
  uint8_t* correct;
  CeOptions options;
  bool write_grad;
};

// Whether a sequence ends before `position`.
bool is_edge(const CeArgs& args, int64_t position) {
  return std::binary_search(args.cu_seqlens, args.cu_seqlens + args.edges, position);
}

constexpr int64_t kBlock = 2048;  // logits that are summed together: 8 kB of fp32

constexpr int64_t padded_vocab(int64_t vocab) { return (vocab + kBlock - 1) / kBlock * kBlock; }

}  // namespace
}  // namespace varlen_sft

#define VARLEN_WITH_AMX 1
#define VARLEN_KERNELS "cross_entropy_kernels.h"
#include "each_isa.h"

namespace varlen_sft {
namespace {

constexpr int64_t kGrain = 32768;  // logits that make a task worth a thread

void check_row_vector(const Tensor& tensor, const char* name, int64_t rows, ScalarType dtype) {
  check_shape(tensor, name, "(n,)", {rows});
  check_dtype(tensor, name, dtype);
  check_contiguous(tensor, name);
}

void check_labels(const int64_t* labels, int64_t rows, int64_t vocab) {
  for (int64_t i = 0; i < rows; ++i)
    VARLEN_CHECK(labels[i] == kIgnoreIndex || (labels[i] >= 0 && labels[i] < vocab),
                 "labels must be -100 or in [0, ", vocab, "), got ", labels[i], " at row ", i);
}

void check_options(const CeOptions& options) {
  VARLEN_CHECK(options.softcap >= 0, "softcap must be >= 0 (0 is off), got ", options.softcap);
  VARLEN_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1,
               "label_smoothing must be in [0, 1], got ", options.label_smoothing);
}

using Kernel = void (*)(const CeArgs&, void*, int64_t, int64_t);

// A row of exps (fp64 at most) and the maxima of its blocks.
std::unique_ptr<double[]> row_memory(int64_t vocab) {
  const int64_t padded = padded_vocab(vocab);
  return std::make_unique_for_overwrite<double[]>(padded + padded / kBlock);
}

template <typename T>
void run_ce_rows(const CeArgs& args) {
  const CeOptions& options = args.options;
  const bool plain =
      options.softcap == 0 && options.label_smoothing == 0 && options.z_loss == 0;
  const Kernel kernel = plain ? VARLEN_BEST_FOR(T, ce_rows_range<T, true>)
                              : VARLEN_BEST_FOR(T, ce_rows_range<T, false>);
  torch::stable::parallel_for(0, args.rows, kGrain / (options.vocab + 1) + 1,
                              [&](int64_t begin, int64_t end) {
                                kernel(args, row_memory(options.vocab).get(), begin, end);
                              });
}

void ce_rows(const Tensor& logits, const Tensor& labels, const Tensor& weights,
             const std::optional<Tensor>& cu_seqlens, const Tensor& loss, const Tensor& lse,
             const Tensor& correct, const Tensor& entropy, const Tensor& counted, double softcap,
             double logit_scale, double label_smoothing, double z_loss, bool write_grad) {
  check_dim(logits, "logits", "(n, V)", 2);
  check_floating(logits, "logits");
  check_last_axis(logits, "logits");
  if (write_grad) check_rows_apart(logits, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const ScalarType statistics = statistics_dtype(logits.scalar_type());
  check_row_vector(labels, "labels", rows, ScalarType::Long);
  check_row_vector(weights, "weights", rows, statistics);
  check_row_vector(loss, "loss", rows, statistics);
  check_row_vector(lse, "lse", rows, statistics);
  check_row_vector(entropy, "entropy", rows, statistics);
  check_row_vector(counted, "counted", rows, statistics);
  if (cu_seqlens) {
    check_dim(*cu_seqlens, "cu_seqlens", "(B + 1,)", 1);
    check_dtype(*cu_seqlens, "cu_seqlens", ScalarType::Int);
    check_contiguous(*cu_seqlens, "cu_seqlens");
  }
  const ScalarType flag = correct.scalar_type();
  VARLEN_CHECK(flag == ScalarType::Byte || flag == ScalarType::Bool,
               "correct must have dtype Byte or Bool, got ", flag);
  check_row_vector(correct, "correct", rows, flag);
  const CeOptions options{vocab, softcap, logit_scale, label_smoothing, z_loss};
  check_options(options);
  check_labels(data<const int64_t>(labels), rows, vocab);
  const void* read_only = data<const void>(logits);  // written through only with write_grad
  const CeArgs args{write_grad ? data<void>(logits) : const_cast<void*>(read_only),
                    rows,
                    logits.stride(0),
                    data<const int64_t>(labels),
                    data<const void>(weights),
                    cu_seqlens ? data<const int32_t>(*cu_seqlens) : nullptr,
                    cu_seqlens ? cu_seqlens->size(0) : 0,
                    data<void>(loss),
                    data<void>(lse),
                    data<void>(entropy),
                    data<void>(counted),
                    data<uint8_t>(correct),
                    options,
                    write_grad};
  dispatch_floating(logits.scalar_type(), [&]<typename T>() { run_ce_rows<T>(args); });
}

}  // namespace
}  // namespace varlen_sft

STABLE_TORCH_LIBRARY_FRAGMENT(varlen_sft_c, m) {
  m.def(
      "ce_rows(Tensor(a!) logits, Tensor labels, Tensor weights, Tensor? cu_seqlens, "
      "Tensor(b!) loss, Tensor(c!) lse, Tensor(d!) correct, Tensor(e!) entropy, "
      "Tensor(f!) counted, float softcap, float logit_scale, float label_smoothing, "
      "float z_loss, bool write_grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(varlen_sft_c, CPU, m) {
  m.impl("ce_rows", TORCH_BOX(&varlen_sft::ce_rows));
}
