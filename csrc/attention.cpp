// Causal varlen attention on the CPU: schema, checks, the list of tasks and their division among
// threads. Arithmetic: attention_kernels.h; bf16 runs on AMX tiles where the CPU has them, anything
// else in fp32 (fp64 for fp64) on vectors.
#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <vector>

namespace varlen_sft {
namespace {

// A tensor (T, heads, D); strides in elements, last axis contiguous.
struct AttentionHeads {
  void* data;
  int64_t token_stride, head_stride;
  template <typename T>
  T* row(int64_t token, int64_t head) const {
    return static_cast<T*>(data) + token * token_stride + head * head_stride;
  }
};

struct AttentionArgs {
  AttentionHeads q, k, v, out, dout, dq, dk, dv;
  void* lse;                       // (H, tokens), to the base 2
  int64_t tokens, group, head_dim;  // group: query heads of a kv head
  int64_t window;                  // keys that a query sees, itself counted; 0: all before it
  double scale, softcap;           // softcap 0: none
};

// One sequence and one kv head, with all its query heads.
struct AttentionTask {
  int64_t q_begin, q_end, k_begin, k_end, kv_head;
  int64_t cost() const { return (q_end - q_begin) * (k_end - k_begin); }
};

}  // namespace
}  // namespace varlen_sft

#define VARLEN_WITH_AMX 1
#define VARLEN_KERNELS "attention_kernels.h"
#include "each_isa.h"

namespace varlen_sft {
namespace {

using Kernel = void (*)(const AttentionArgs&, const AttentionTask&, void*);

// Dearest first, and each thread takes the next when it is free: sequences differ in length.
void run_tasks(const AttentionArgs& args, std::vector<AttentionTask> tasks, Kernel kernel,
               int64_t scratch) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const auto& a, const auto& b) { return a.cost() > b.cost(); });
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, scratch),
                                                             &std::free);
    if (!memory) throw std::bad_alloc();
    for (int64_t i; (i = next.fetch_add(1)) < count;) kernel(args, tasks[i], memory.get());
  });
}

void check_edges(const Tensor& cu_seqlens, const char* name, int64_t tokens) {
  check_dim(cu_seqlens, name, "(B + 1,)", 1);
  check_dtype(cu_seqlens, name, ScalarType::Int);
  check_contiguous(cu_seqlens, name);
  const auto* edges = data<const int32_t>(cu_seqlens);
  for (int64_t i = 0; i < cu_seqlens.size(0); ++i)
    VARLEN_CHECK(edges[i] >= (i ? edges[i - 1] : 0) && edges[i] <= tokens, name,
                 " must rise from 0 to at most ", tokens, ", got ", edges[i], " at index ", i);
}

std::vector<AttentionTask> tasks_of(const Tensor& cu_seqlens, const Tensor& k_cu_seqlens,
                                    int64_t kv_heads) {
  const auto *q = data<const int32_t>(cu_seqlens), *k = data<const int32_t>(k_cu_seqlens);
  std::vector<AttentionTask> tasks;
  for (int64_t b = 0; b + 1 < cu_seqlens.size(0); ++b)
    for (int64_t head = 0; head < kv_heads; ++head)
      if (q[b + 1] > q[b] || k[b + 1] > k[b])
        tasks.push_back({q[b], q[b + 1], k[b], k[b + 1], head});
  return tasks;
}

AttentionHeads heads_of(const Tensor& x, const char* name, const Tensor& like, bool written) {
  check_dim(x, name, "(T, heads, D)", 3);
  check_shape(x, name, "(T, heads, D)", {like.size(0), like.size(1), like.size(2)});
  check_dtype(x, name, like.scalar_type());
  check_last_axis(x, name);
  if (written) check_rows_apart(x, name);
  void* pointer = written ? data<void>(x) : const_cast<void*>(data<const void>(x));
  return {pointer, x.stride(0), x.stride(1)};
}

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                        const Tensor& cu_seqlens, const Tensor& k_cu_seqlens, double scale,
                        int64_t window, double softcap) {
  AttentionArgs args{};
  args.q = heads_of(q, "q", q, false);
  args.k = heads_of(k, "k", k, false);
  args.v = heads_of(v, "v", k, false);
  check_floating(q, "q");
  check_dtype(k, "k", q.scalar_type());
  VARLEN_CHECK(k.size(2) == q.size(2), "k must have the head_dim of q, ", q.size(2), ", got ",
               k.size(2));
  VARLEN_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q must have a multiple of K=",
               k.size(1), " heads, got H=", q.size(1));
  check_shape(lse, "lse", "(H, T)", {q.size(1), q.size(0)});
  check_dtype(lse, "lse", statistics_dtype(q.scalar_type()));
  check_contiguous(lse, "lse");
  check_edges(cu_seqlens, "cu_seqlens", q.size(0));
  check_edges(k_cu_seqlens, "k_cu_seqlens", k.size(0));
  check_shape(k_cu_seqlens, "k_cu_seqlens", "(B + 1,)", {cu_seqlens.size(0)});
  args.tokens = q.size(0);
  args.group = q.size(1) / k.size(1);
  args.head_dim = q.size(2);
  args.scale = scale, args.window = window, args.softcap = softcap;
  return args;
}

void run(const AttentionArgs& args, const Tensor& q, const Tensor& k, const Tensor& cu_seqlens,
         const Tensor& k_cu_seqlens, bool backward) {
  auto tasks = tasks_of(cu_seqlens, k_cu_seqlens, k.size(1));
  int64_t longest = 0;
  for (const auto& task : tasks) longest = std::max(longest, task.k_end - task.k_begin);
  dispatch_floating(q.scalar_type(), [&]<typename T>() {
    const Kernel kernel = backward ? VARLEN_BEST_FOR(T, attention_backward<T>)
                                   : VARLEN_BEST_FOR(T, attention_forward<T>);
    const auto scratch = VARLEN_BEST_FOR(T, attention_scratch<T>);
    run_tasks(args, std::move(tasks), kernel, scratch(longest, args.head_dim, backward ? args.group : 0));
  });
}

void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                       const Tensor& v, const Tensor& cu_seqlens, const Tensor& k_cu_seqlens,
                       double scale, int64_t window, double softcap) {
  AttentionArgs args = arguments(q, k, v, lse, cu_seqlens, k_cu_seqlens, scale, window, softcap);
  args.out = heads_of(out, "out", q, true);
  args.lse = data<void>(lse);
  run(args, q, k, cu_seqlens, k_cu_seqlens, false);
}

void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& cu_seqlens, const Tensor& k_cu_seqlens,
                        double scale, int64_t window, double softcap) {
  AttentionArgs args = arguments(q, k, v, lse, cu_seqlens, k_cu_seqlens, scale, window, softcap);
  args.out = heads_of(out, "out", q, false);
  args.dout = heads_of(dout, "dout", q, false);
  args.dq = heads_of(dq, "dq", q, true);
  args.dk = heads_of(dk, "dk", k, true);
  args.dv = heads_of(dv, "dv", k, true);
  args.lse = const_cast<void*>(data<const void>(lse));
  run(args, q, k, cu_seqlens, k_cu_seqlens, true);
}

}  // namespace
}  // namespace varlen_sft

STABLE_TORCH_LIBRARY_FRAGMENT(varlen_sft_c, m) {
  m.def(
      "attention_forward(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, "
      "Tensor cu_seqlens, Tensor k_cu_seqlens, float scale, int window, float softcap) -> ()");
  m.def(
      "attention_backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor q, "
      "Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, Tensor k_cu_seqlens, "
      "float scale, int window, float softcap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(varlen_sft_c, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&varlen_sft::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&varlen_sft::attention_backward));
}
