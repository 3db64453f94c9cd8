// One block walks the pack: each tile of 32 tokens per thread is read once, scanned, written.
//
// One block, because it needs no state that a second launch would have to zero (as decoupled
// look-back does), because its result cannot depend on which block came first, and because a pack
// is small: 128k ids are 1 MB and 4 tiles. Everything it shares with the CPU is in sequences.h.
#pragma once

#include "sequences.h"

namespace varlen_sft {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes

// The words of 1024 tokens from `first` on, one per lane. Lanes read side by side, so loads are
// whole lines wherever the ids begin. Loads past the end are moved onto the last id, not switched
// off: kRows of them are then under way at once, and not as many as there are predicates.
template <typename Id>
__device__ uint32_t warp_words(const Id* ids, int64_t first, int64_t total, int lane) {
  constexpr int kRows = 16;
  const int64_t last = total - 1, token = first + lane;
  uint32_t own = 0;
  Id edge = ids[first <= last ? first - (first > 0) : last];  // lane 0: the id before the row
#pragma unroll
  for (int half = 0; half < kWordTokens; half += kRows) {
    Id row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t wanted = token + (half + r) * 32;
      row[r] = ids[wanted < last ? wanted : last];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Turned by one lane: each gets its left neighbour, lane 0 what it needs for the next row.
      const Id turned = __shfl_sync(kWarp, row[r], (lane + 31) % 32);
      const Id previous = lane == 0 ? edge : turned;
      edge = turned;
      const uint32_t word = __ballot_sync(kWarp, starts_sequence(previous, row[r]));
      if (lane == half + r) own = word;
    }
  }
  const int64_t tokens = total - (first + lane * kWordTokens);
  return tokens >= kWordTokens ? own : tokens <= 0 ? 0 : own & ((1u << tokens) - 1);
}

__device__ inline Run run_of_lane(Run run, int lane) {
  return {__shfl_sync(kWarp, run.count, lane), __shfl_sync(kWarp, run.last, lane)};
}

// The runs of lanes 0 to `lane`, joined.
__device__ inline Run warp_scan(Run run, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Run left{__shfl_up_sync(kWarp, run.count, distance),
                   __shfl_up_sync(kWarp, run.last, distance)};
    if (lane >= distance) run = join(left, run);
  }
  return run;
}

// The runs of all threads before this one, joined, and in `all` those of the whole block.
// `exchange` must not be the one of the call before: its readers may be a barrier behind.
template <int kWarps>
__device__ Run block_scan(Run own, Run* exchange, Run& all, int lane, int warp) {
  const Run upto = warp_scan(own, lane);
  if (lane == 31) exchange[warp] = upto;
  __syncthreads();
  const Run warps = warp_scan(lane < kWarps ? exchange[lane] : Run{}, lane);
  all = run_of_lane(warps, 31);
  const Run warps_before = run_of_lane(warps, warp ? warp - 1 : 0);
  const Run lanes_before = run_of_lane(upto, lane ? lane - 1 : 0);
  return join(warp ? warps_before : Run{}, lane ? lanes_before : Run{});
}

template <int kWarps>
__device__ int32_t block_max(int32_t value, int32_t* exchange, int lane, int warp) {
  value = __reduce_max_sync(kWarp, value);
  if (lane == 0) exchange[warp] = value;
  __syncthreads();
  return __reduce_max_sync(kWarp, lane < kWarps ? exchange[lane] : 0);
}

// cu_seqlens (capacity + 1,) is padded with `total`; count and longest are those of all sequences,
// also where cu_seqlens cannot hold them. The 1 in the bounds gives a thread 64 registers: with the
// 32 that the compiler would choose, a few loads are under way instead of kRows.
template <typename Id, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    sequences_kernel(const Id* ids, int64_t total, int64_t capacity, int32_t* cu_seqlens,
                     int32_t* count, int32_t* longest) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Run exchange[2][kWarps];
  __shared__ int32_t exchange_max[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  Run done;  // the tiles so far, the same in every thread
  int32_t own_longest = 0;
  int parity = 0;
  for (int64_t tile = 0; tile < total; tile += kThreads * kWordTokens, parity ^= 1) {
    const int64_t first = tile + warp * 32 * kWordTokens, base = first + lane * kWordTokens;
    const uint32_t word = warp_words(ids, first, total, lane);
    Run all;
    const Run before =
        block_scan<kWarps>(run_of_word(word, base), exchange[parity], all, lane, warp);
    const int32_t ended = write_starts(word, base, join(done, before), capacity, cu_seqlens);
    own_longest = ended > own_longest ? ended : own_longest;
    done = join(done, all);
  }
  const int32_t ended = block_max<kWarps>(own_longest, exchange_max, lane, warp);
  if (thread == 0) {
    const int32_t open = static_cast<int32_t>(total) - done.last;
    *count = done.count;
    *longest = ended > open ? ended : open;
  }
  for (int64_t i = done.count + int64_t{thread}; i <= capacity; i += kThreads)
    cu_seqlens[i] = static_cast<int32_t>(total);
}

}  // namespace varlen_sft
