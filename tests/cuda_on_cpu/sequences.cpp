// The CUDA kernel of csrc/sequences.cuh on the CPU, with a block of 64 threads: tiles of 2048.
#include "cuda_on_cpu.h"

#include "sequences.cuh"

extern "C" {

constexpr int kThreads = 64;

void sequences_i32(const int32_t* ids, int64_t total, int64_t capacity, int32_t* cu_seqlens,
                   int32_t* count, int32_t* longest) {
  cuda_on_cpu::launch(kThreads, [=] {
    varlen_sft::sequences_kernel<int32_t, kThreads>(ids, total, capacity, cu_seqlens, count,
                                                    longest);
  });
}

void sequences_i64(const int64_t* ids, int64_t total, int64_t capacity, int32_t* cu_seqlens,
                   int32_t* count, int32_t* longest) {
  cuda_on_cpu::launch(kThreads, [=] {
    varlen_sft::sequences_kernel<int64_t, kThreads>(ids, total, capacity, cu_seqlens, count,
                                                    longest);
  });
}

}
