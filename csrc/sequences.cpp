// Sequences of a pack from its position ids, in two passes over tiles: ids to words (the only one
// that reads ids), then words to cu_seqlens. The rule and how tiles join: sequences.h.
//
// Not compiled per instruction set: the portable loop is as fast as memory delivers int64 ids.
#include "check.h"
#include "sequences.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace varlen_sft {
namespace {

constexpr int64_t kTileWords = 512;  // 16,384 tokens: some 6 us, enough to be worth a thread

struct Tile {
  Run run;               // first its own, then of all the tiles before it
  int32_t longest = 0;   // of the sequences that end in it
};

template <typename Id>
uint32_t word_of(const Id* ids, int64_t base, int64_t total) {
  uint32_t word = starts_sequence(ids[base - (base > 0)], ids[base]);
  const int64_t tokens = std::min<int64_t>(kWordTokens, total - base);
  if (tokens == kWordTokens) {  // a constant count of steps is unrolled
    for (int64_t j = 1; j < kWordTokens; ++j)
      word |= uint32_t{starts_sequence(ids[base + j - 1], ids[base + j])} << j;
  } else {
    for (int64_t j = 1; j < tokens; ++j)
      word |= uint32_t{starts_sequence(ids[base + j - 1], ids[base + j])} << j;
  }
  return word;
}

class Words {
 public:
  explicit Words(int64_t total)
      : words_((total + kWordTokens - 1) / kWordTokens),
        tiles_((words_.size() + kTileWords - 1) / kTileWords) {}

  template <typename Id>
  void read(const Id* ids, int64_t total) {
    for_tiles([&](Tile& tile, int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        words_[w] = word_of(ids, w * kWordTokens, total);
        tile.run = join(tile.run, run_of_word(words_[w], w * kWordTokens));
      }
    });
  }

  // Turns the run of each tile into that of all tiles before it; returns that of all of them.
  Run scan() {
    Run done;
    for (Tile& tile : tiles_) {
      const Run own = tile.run;
      tile.run = done;
      done = join(done, own);
    }
    return done;
  }

  // Returns the longest sequence that ends before the pack does.
  int32_t write(int64_t capacity, int32_t* cu_seqlens) {
    for_tiles([&](Tile& tile, int64_t begin, int64_t end) {
      Run before = tile.run;
      for (int64_t w = begin; w < end; ++w) {
        if (!words_[w]) continue;
        const int64_t base = w * kWordTokens;
        tile.longest =
            std::max(tile.longest, write_starts(words_[w], base, before, capacity, cu_seqlens));
        before = join(before, run_of_word(words_[w], base));
      }
    });
    int32_t longest = 0;
    for (const Tile& tile : tiles_) longest = std::max(longest, tile.longest);
    return longest;
  }

 private:
  template <typename F>
  void for_tiles(const F& work) {
    const int64_t tiles = tiles_.size(), words = words_.size();
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        work(tiles_[t], t * kTileWords, std::min(words, (t + 1) * kTileWords));
    });
  }

  std::vector<uint32_t> words_;
  std::vector<Tile> tiles_;
};

void check_int32(const Tensor& tensor, const char* name, const char* axes, int64_t dim) {
  check_dim(tensor, name, axes, dim);
  check_dtype(tensor, name, ScalarType::Int);
  check_contiguous(tensor, name);
}

void sequences(const Tensor& cu_seqlens, const Tensor& count, const Tensor& longest,
               const Tensor& position_ids) {
  check_dim(position_ids, "position_ids", "(T,)", 1);
  check_contiguous(position_ids, "position_ids");
  const int64_t total = position_ids.size(0), capacity = cu_seqlens.size(0) - 1;
  VARLEN_CHECK(total < int64_t{1} << 31, "position_ids must have fewer than 2^31 tokens, got ",
               total);
  check_int32(cu_seqlens, "cu_seqlens", "(capacity + 1,)", 1);
  VARLEN_CHECK(capacity >= 1, "cu_seqlens must have capacity + 1 >= 2 entries, got ",
               capacity + 1);
  check_int32(count, "count", "()", 0);
  check_int32(longest, "longest", "()", 0);

  Words words(total);
  if (position_ids.scalar_type() == ScalarType::Int) {
    words.read(data<const int32_t>(position_ids), total);
  } else {
    check_dtype(position_ids, "position_ids", ScalarType::Long);
    words.read(data<const int64_t>(position_ids), total);
  }
  const Run all = words.scan();
  int32_t* starts = data<int32_t>(cu_seqlens);
  const int32_t ended = words.write(capacity, starts), end = static_cast<int32_t>(total);
  for (int64_t i = all.count; i <= capacity; ++i) starts[i] = end;
  *data<int32_t>(count) = all.count;
  *data<int32_t>(longest) = std::max(ended, end - all.last);
}

}  // namespace
}  // namespace varlen_sft

STABLE_TORCH_LIBRARY_FRAGMENT(varlen_sft_c, m) {
  // cu_seqlens is padded with T; count and longest are those of all sequences, also where
  // cu_seqlens cannot hold them.
  m.def(
      "sequences(Tensor(a!) cu_seqlens, Tensor(b!) count, Tensor(c!) longest, "
      "Tensor position_ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(varlen_sft_c, CPU, m) {
  m.impl("sequences", TORCH_BOX(&varlen_sft::sequences));
}
