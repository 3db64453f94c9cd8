// The CUDA implementation of the op whose schema is in sequences.cpp: checks, and one launch on the
// current stream for a short pack, two for a long one. Kernels: sequences.cuh.
#include "check.h"
#include "sequences.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace varlen_sft {
namespace {

constexpr int kShortThreads = 1024;                      // of the one block
constexpr int64_t kShort = kShortThreads * kWordTokens;  // tokens: one round of that block
// Of a block in a long pack. Rounds of 8192 tokens are 122 blocks at a million, one for nearly
// every SM, and the Runs of 1024 tiles are 8 KB, four for each thread.
constexpr int kThreads = 256;
constexpr int kMostTiles = 1024;

void check_int32(const Tensor& tensor, const char* name, int64_t dim, const Tensor& ids) {
  VARLEN_CHECK(tensor.is_cuda() && tensor.get_device_index() == ids.get_device_index(), name,
               " must be on the device of position_ids");
  VARLEN_CHECK(tensor.dim() == dim, name, " must have ", dim, " axes, got shape ",
               shape_text(tensor));
  check_dtype(tensor, name, ScalarType::Int);
  check_contiguous(tensor, name);
}

template <typename Id>
void launch_short(const Tensor& ids, const Tensor& cu_seqlens, const Tensor& count,
                  const Tensor& longest, cudaStream_t stream) {
  sequences_kernel<Id, kShortThreads><<<1, kShortThreads, 0, stream>>>(
      data<const Id>(ids), ids.size(0), cu_seqlens.size(0) - 1, data<int32_t>(cu_seqlens),
      data<int32_t>(count), data<int32_t>(longest));
}

template <typename Id>
void launch_long(const Tensor& ids, const Tensor& cu_seqlens, const Tensor& count,
                 const Tensor& longest, cudaStream_t stream) {
  const int64_t total = ids.size(0);
  const auto [tiles, rounds] = cut(total, kThreads, kMostTiles);
  // Freed when this returns, and reused on this stream alone: after both launches.
  const int64_t size = tiles * (2 + int64_t{rounds} * kThreads);
  const Tensor scratch = torch::stable::new_empty(ids, {size}, ScalarType::Int);
  Run* runs = reinterpret_cast<Run*>(data<int32_t>(scratch));
  uint32_t* words = reinterpret_cast<uint32_t*>(runs + tiles);
  words_kernel<Id, kThreads><<<tiles, kThreads, 0, stream>>>(
      data<const Id>(ids), total, rounds, runs, words, data<int32_t>(longest));
  starts_kernel<kThreads><<<tiles, kThreads, 0, stream>>>(
      runs, words, total, rounds, cu_seqlens.size(0) - 1, data<int32_t>(cu_seqlens),
      data<int32_t>(count), data<int32_t>(longest));
}

template <typename Id>
void launch(const Tensor& ids, const Tensor& cu_seqlens, const Tensor& count,
            const Tensor& longest) {
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(ids.get_device_index(), &stream));
  const auto start = ids.size(0) <= kShort ? launch_short<Id> : launch_long<Id>;
  start(ids, cu_seqlens, count, longest, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  VARLEN_CHECK(status == cudaSuccess, "sequences did not start: ", cudaGetErrorString(status));
}

void sequences(const Tensor& cu_seqlens, const Tensor& count, const Tensor& longest,
               const Tensor& position_ids) {
  VARLEN_CHECK(position_ids.dim() == 1 && position_ids.size(0) < int64_t{1} << 31,
               "position_ids must have shape (T,) and fewer than 2^31 tokens, got ",
               shape_text(position_ids));
  check_contiguous(position_ids, "position_ids");
  check_int32(cu_seqlens, "cu_seqlens", 1, position_ids);
  VARLEN_CHECK(cu_seqlens.size(0) >= 2, "cu_seqlens must have capacity + 1 >= 2 entries, got ",
               cu_seqlens.size(0));
  check_int32(count, "count", 0, position_ids);
  check_int32(longest, "longest", 0, position_ids);
  if (position_ids.scalar_type() == ScalarType::Int) {
    launch<int32_t>(position_ids, cu_seqlens, count, longest);
  } else {
    check_dtype(position_ids, "position_ids", ScalarType::Long);
    launch<int64_t>(position_ids, cu_seqlens, count, longest);
  }
}

}  // namespace
}  // namespace varlen_sft

STABLE_TORCH_LIBRARY_IMPL(varlen_sft_c, CUDA, m) {
  m.impl("sequences", TORCH_BOX(&varlen_sft::sequences));
}
