// What a run of position ids tells about sequences: the one rule, and how runs join. CPU and CUDA
// compile these same lines.
//
// 32 tokens become a word with a bit for each token that starts a sequence. From there on only
// words are needed: ids are read once, and the second half of the work costs as much as there are
// sequences, not tokens.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define VARLEN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VARLEN_HOST_DEVICE inline
#endif

namespace varlen_sft {

constexpr int kWordTokens = 32;

// Unsigned, because torch's `position_ids[i - 1] + 1` wraps. Token 0 is asked with itself as its
// predecessor, and so always starts a sequence.
template <typename Id>
VARLEN_HOST_DEVICE bool starts_sequence(Id previous, Id id) {
  using Unsigned = std::make_unsigned_t<Id>;
  return static_cast<Unsigned>(id) - static_cast<Unsigned>(previous) != Unsigned{1};
}

// What tokens contribute to those after them. Run{} is nothing at all.
struct Run {
  int32_t count = 0;  // sequences that start here
  int32_t last = 0;   // the token that starts the last of them
};

// Associative, so that runs may be joined in any grouping; `last` is the greater one because
// tokens ascend.
VARLEN_HOST_DEVICE Run join(Run before, Run after) {
  return {before.count + after.count, before.last > after.last ? before.last : after.last};
}

VARLEN_HOST_DEVICE int lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#else
  return std::countr_zero(word);
#endif
}

// Of the word of tokens `base` to `base + 31`.
VARLEN_HOST_DEVICE Run run_of_word(uint32_t word, int64_t base) {
#if defined(__CUDA_ARCH__)
  const int count = __popc(word), highest = 31 - __clz(static_cast<int>(word));
#else
  const int count = std::popcount(word), highest = 31 - std::countl_zero(word);
#endif
  return {count, word ? static_cast<int32_t>(base + highest) : 0};
}

// Writes where the sequences of a word start, except those for which cu_seqlens (capacity + 1,) has
// no place; `before` is all that precedes the word. Returns the longest sequence that ends in it.
VARLEN_HOST_DEVICE int32_t write_starts(uint32_t word, int64_t base, Run before, int64_t capacity,
                                        int32_t* cu_seqlens) {
  int32_t longest = 0;
  for (; word; word &= word - 1) {
    const int32_t start = static_cast<int32_t>(base + lowest_bit(word));
    if (before.count <= capacity) cu_seqlens[before.count] = start;
    if (start - before.last > longest) longest = start - before.last;
    before = join(before, {1, start});
  }
  return longest;
}

}  // namespace varlen_sft
