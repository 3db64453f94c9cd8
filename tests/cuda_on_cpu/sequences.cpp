// The CUDA kernels of csrc/sequences.cuh on the CPU, in blocks of 64 threads: 2048 tokens a round.
#include "cuda_on_cpu.h"

#include "sequences.cuh"

namespace varlen_sft {
namespace {

constexpr int kThreads = 64;

// As csrc/sequences.cu launches them. `most` tiles; 0 is the one launch of a short pack.
template <typename Id>
void run(const Id* ids, int64_t total, int64_t capacity, int most, int32_t* scratch,
         int32_t* cu_seqlens, int32_t* count, int32_t* longest) {
  if (most == 0) {
    cuda_on_cpu::launch(1, kThreads, [=] {
      sequences_kernel<Id, kThreads>(ids, total, capacity, cu_seqlens, count, longest);
    });
    return;
  }
  const Cut here = cut(total, kThreads, most);
  Run* runs = reinterpret_cast<Run*>(scratch);
  uint32_t* words = reinterpret_cast<uint32_t*>(runs + here.tiles);
  cuda_on_cpu::launch(here.tiles, kThreads, [=] {
    words_kernel<Id, kThreads>(ids, total, here.rounds, runs, words, longest);
  });
  cuda_on_cpu::launch(here.tiles, kThreads, [=] {
    starts_kernel<kThreads>(runs, words, total, here.rounds, capacity, cu_seqlens, count, longest);
  });
}

}  // namespace
}  // namespace varlen_sft

extern "C" {

void sequences_i32(const int32_t* ids, int64_t total, int64_t capacity, int most, int32_t* scratch,
                   int32_t* cu_seqlens, int32_t* count, int32_t* longest) {
  varlen_sft::run(ids, total, capacity, most, scratch, cu_seqlens, count, longest);
}

void sequences_i64(const int64_t* ids, int64_t total, int64_t capacity, int most, int32_t* scratch,
                   int32_t* cu_seqlens, int32_t* count, int32_t* longest) {
  varlen_sft::run(ids, total, capacity, most, scratch, cu_seqlens, count, longest);
}

void cut(int64_t total, int threads, int most, int* tiles, int* rounds) {
  const varlen_sft::Cut result = varlen_sft::cut(total, threads, most);
  *tiles = result.tiles;
  *rounds = result.rounds;
}

}
