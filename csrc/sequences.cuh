// A short pack is walked by one block, in one launch. A long one is cut into tiles of a block each
// and takes two launches: ids to words and the Run of each tile (the only one that reads ids), then
// words to cu_seqlens, behind the joined Runs of the tiles before.
//
// Two launches and not one with decoupled look-back: nothing has to be zeroed beforehand, no block
// waits for another, and no result depends on which block came first. Words wait in memory since
// they are 1/64 of int64 ids. Everything that is shared with the CPU is in sequences.h.
#pragma once

#include "sequences.h"

namespace varlen_sft {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes

// How a long pack is cut: each tile is `rounds` words of every thread of its block.
struct Cut {
  int tiles;
  int rounds;
};

// No more than `most` tiles, because every block of the second launch reads all of their Runs.
inline Cut cut(int64_t total, int threads, int most) {
  const int64_t round = int64_t{threads} * kWordTokens;
  const int64_t rounds = (total + round * most - 1) / (round * most);
  const int64_t tiles = (total + round * rounds - 1) / (round * rounds);
  return {static_cast<int>(tiles), static_cast<int>(rounds)};
}

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

// Writes the sequences that start in tokens `first` to `end`; returns the longest that ends there.
// word_at gives each thread its word of the round that begins at a token. `done` is all that
// precedes the round, the same in every thread, and is taken up to the end.
template <int kThreads, typename WordAt>
__device__ int32_t write_rounds(int64_t first, int64_t end, Run& done, int64_t capacity,
                                int32_t* cu_seqlens, const WordAt& word_at) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Run exchange[2][kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int32_t longest = 0;
  int parity = 0;
  for (; first < end; first += kThreads * kWordTokens, parity ^= 1) {
    const int64_t base = first + thread * kWordTokens;
    const uint32_t word = word_at(first);
    Run all;
    const Run before =
        block_scan<kWarps>(run_of_word(word, base), exchange[parity], all, lane, warp);
    const int32_t ended = write_starts(word, base, join(done, before), capacity, cu_seqlens);
    longest = ended > longest ? ended : longest;
    done = join(done, all);
  }
  return longest;
}

// All blocks together fill cu_seqlens (capacity + 1,) with `total` from the last edge on.
template <int kThreads>
__device__ void pad(int64_t count, int64_t total, int64_t capacity, int32_t* cu_seqlens) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = count + thread; i <= capacity; i += int64_t{gridDim.x} * kThreads)
    cu_seqlens[i] = static_cast<int32_t>(total);
}

// count and longest are those of all sequences, also where cu_seqlens cannot hold them. The 1 in
// the bounds gives a thread 64 registers: with the 32 that the compiler would choose, a few loads
// are under way instead of kRows.
template <typename Id, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    sequences_kernel(const Id* ids, int64_t total, int64_t capacity, int32_t* cu_seqlens,
                     int32_t* count, int32_t* longest) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int32_t exchange[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  Run done;
  const auto word_at = [=](int64_t first) {
    return warp_words(ids, first + warp * 32 * kWordTokens, total, lane);
  };
  const int32_t own = write_rounds<kThreads>(0, total, done, capacity, cu_seqlens, word_at);
  const int32_t ended = block_max<kWarps>(own, exchange, lane, warp);
  if (thread == 0) {
    const int32_t open = static_cast<int32_t>(total) - done.last;
    *count = done.count;
    *longest = ended > open ? ended : open;
  }
  pad<kThreads>(done.count, total, capacity, cu_seqlens);
}

// First launch of a long pack: `words` has one for each thread and round, those past the end 0.
template <typename Id, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    words_kernel(const Id* ids, int64_t total, int rounds, Run* runs, uint32_t* words,
                 int32_t* longest) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Run exchange[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  Run own;
  for (int round = 0; round < rounds; ++round) {
    const int64_t row = (int64_t{blockIdx.x} * rounds + round) * kThreads;  // of words
    const uint32_t word = warp_words(ids, (row + warp * 32) * kWordTokens, total, lane);
    words[row + thread] = word;
    own = join(own, run_of_word(word, (row + thread) * kWordTokens));
  }
  Run all;
  block_scan<kWarps>(own, exchange, all, lane, warp);
  if (thread == 0) runs[blockIdx.x] = all;
  if (thread == 0 && blockIdx.x == 0) *longest = 0;  // where the second launch takes maxima
}

// Second launch, of as many blocks. Each joins the Runs before its tile, to know where it writes,
// and all of them, to know what the pads follow. The longest is a maximum of integers, which no
// order of blocks changes.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    starts_kernel(const Run* runs, const uint32_t* words, int64_t total, int rounds,
                  int64_t capacity, int32_t* cu_seqlens, int32_t* count, int32_t* longest) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Run exchange[2][kWarps];
  __shared__ int32_t exchange_max[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x), tiles = static_cast<int>(gridDim.x);
  Run own_done, own_all, done, all;
  for (int i = thread; i < tiles; i += kThreads) {
    const Run run = runs[i];
    own_done = join(own_done, i < tile ? run : Run{});
    own_all = join(own_all, run);
  }
  block_scan<kWarps>(own_done, exchange[0], done, lane, warp);
  block_scan<kWarps>(own_all, exchange[1], all, lane, warp);
  const int64_t tokens = int64_t{rounds} * kThreads * kWordTokens, first = tile * tokens;
  const int64_t end = first + tokens < total ? first + tokens : total;
  const auto word_at = [=](int64_t token) { return words[token / kWordTokens + thread]; };
  const int32_t own = write_rounds<kThreads>(first, end, done, capacity, cu_seqlens, word_at);
  const int32_t ended = block_max<kWarps>(own, exchange_max, lane, warp);
  if (thread == 0) {
    const int32_t open = static_cast<int32_t>(total) - all.last;
    atomicMax(longest, ended > open ? ended : open);
    if (tile == 0) *count = all.count;
  }
  pad<kThreads>(all.count, total, capacity, cu_seqlens);
}

}  // namespace varlen_sft
