// Causal attention of one sequence and one kv head, forward and backward, included once per
// instruction set (see attention.cpp). The algorithm is flash attention's (Dao 2307.08691): scores
// exist for a strip of keys and a block of queries at a time. They are kept transposed, keys by
// rows and queries by lanes. A task reads and writes its own sequence alone, in a fixed order:
// neither neighbours nor threads can change a bit.
#include "attention_blocks.h"
#include "attention_products.h"
#include "attention_scratch.h"

namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// Keys that some query of the block at q0 may see, as multiples of kTile.
struct KeyRange {
  int64_t begin, end;
};
template <typename T>
static KeyRange keys_seen(const AttentionArgs& args, const Geometry<T>& g, int64_t q0) {
  const int64_t offset = g.keys - g.queries;
  const int64_t end = std::min(g.keys, q0 + kQueries<T> + offset);
  const int64_t begin = args.window ? std::max<int64_t>(0, q0 + offset - args.window + 1) : 0;
  return {begin / kTile * kTile, end <= 0 ? 0 : round_up(end, kTile)};
}

// Of the row of scores of one key: lanes [first, past) are queries that see the key.
template <typename T>
struct Sight {
  Vec<T> lane[2];
  int64_t shift, window;

  Sight(const AttentionArgs& args, const Geometry<T>& g, int64_t q0)
      : shift(g.queries - g.keys - q0), window(args.window) {
    for (int64_t i = 0; i < kQueries<T>; ++i)
      lane[i / kLanes<T>][i % kLanes<T>] = static_cast<Compute<T>>(i);
  }
  VEC_MEMBER bool everyone(int64_t key) const {
    const int64_t first = key + shift;
    return first <= 0 && (!window || first + window >= kQueries<T>);
  }
  // v where the query sees the key, else `hidden`.
  VEC_MEMBER Vec<T> choose(int64_t key, int64_t u, Vec<T> v, Vec<T> hidden) const {
    const int64_t first = std::clamp<int64_t>(key + shift, -1, kQueries<T>);
    const int64_t past = window ? std::clamp<int64_t>(key + shift + window, -1, kQueries<T>)
                                : kQueries<T>;
    using C = Compute<T>;
    v = lane[u] >= splat<T>(static_cast<C>(first)) ? v : hidden;
    return lane[u] < splat<T>(static_cast<C>(past)) ? v : hidden;
  }
};

// Scores in units of log2, so that a probability is 2^(factor * product - maximum) by one fma. With
// a softcap they are made by `capped` first, and factor is 1.
constexpr double kLog2E = 1.4426950408889634;

template <typename T>
VEC_FN Vec<T> log2_factor(const AttentionArgs& args) {
  return splat<T>(static_cast<Compute<T>>(args.softcap == 0 ? args.scale * kLog2E : 1.0));
}
// slope: the derivative of the capped score by the one before it.
template <typename T>
VEC_FN Vec<T> capped(Vec<T> product, const AttentionArgs& args, Vec<T>& slope) {
  using C = Compute<T>;
  const Vec<T> x = product * static_cast<C>(args.scale / args.softcap);
  return tanh(x, slope) * static_cast<C>(args.softcap * kLog2E);
}

// Below every score, and where it is the maximum of a query, 2^(score - it) overflows nothing: such
// a query has seen no key yet.
constexpr float kLowest = -1e30f;

template <typename T>
struct RunningSoftmax {
  Vec<T> top[2], sum[2], shrink[2];
};

// From products to probabilities relative to the running maximum, in the form of B.
template <typename T>
static void softmax_strip(const AttentionArgs& args, const Sight<T>& sight, int64_t key0, int64_t n,
                          Compute<T>* scores, Word<T>* words, RunningSoftmax<T>& state) {
  constexpr int64_t W = kLanes<T>, Q = kQueries<T>;
  const Vec<T> factor = log2_factor<T>(args), lowest = splat<T>(kLowest);
  Vec<T> top[2] = {state.top[0], state.top[1]}, slope;
  for (int64_t row = 0; row < n; ++row) {
    const bool everyone = sight.everyone(key0 + row);
    for (int64_t u = 0; u < 2; ++u) {
      Compute<T>* place = scores + row * Q + u * W;
      if (args.softcap != 0) store(place, capped<T>(load(place), args, slope));
      Vec<T> s = load(place) * factor;
      if (!everyone) s = sight.choose(key0 + row, u, s, lowest);
      top[u] = max_keep(top[u], s);
    }
  }
  Vec<T> sum[2] = {};
  for (int64_t row = 0; row < n; row += 2) {
    Vec<T> p[2][2];
    for (int64_t r = 0; r < 2; ++r) {
      const bool everyone = sight.everyone(key0 + row + r);
      for (int64_t u = 0; u < 2; ++u) {
        p[r][u] = exp2_of(fma(load(scores + (row + r) * Q + u * W), factor, -top[u]));
        if (!everyone) p[r][u] = sight.choose(key0 + row + r, u, p[r][u], Vec<T>{});
        sum[u] += p[r][u];
      }
    }
    store_words<T>(words + row / kPair * Q, p[0], p[1]);
  }
  for (int64_t u = 0; u < 2; ++u) {
    state.shrink[u] = exp2_of(state.top[u] - top[u]);
    state.sum[u] = state.sum[u] * state.shrink[u] + sum[u];
    state.top[u] = top[u];
  }
}

// Rows of `values` (width, kQueries) times one factor per query.
template <typename T>
static void scale_lanes(Compute<T>* values, int64_t width, const Vec<T>* factor) {
  for (int64_t d = 0; d < width; ++d)
    for (int64_t u = 0; u < 2; ++u) {
      Compute<T>* p = values + d * kQueries<T> + u * kLanes<T>;
      store(p, load(p) * factor[u]);
    }
}

template <typename T>
static void forward_block(const AttentionArgs& args, const AttentionTask& task,
                          const Geometry<T>& g, Scratch<T>& s, int64_t head, int64_t q0) {
  constexpr int64_t W = kLanes<T>, Q = kQueries<T>;
  using C = Compute<T>;
  const int64_t n = std::min(Q, g.queries - q0), row0 = task.q_begin + q0;
  s.q.read(0, args.q, head, row0, n, args.head_dim, false);
  std::memset(static_cast<void*>(s.sum_turned), 0, Q * g.width * sizeof(C));
  const Sight<T> sight(args, g, q0);
  const Vec<T> lowest = splat<T>(kLowest);
  RunningSoftmax<T> state{{lowest, lowest}, {}, {}};
  const KeyRange range = keys_seen<T>(args, g, q0);
  for (int64_t key = range.begin; key < range.end; key += kStrip) {
    const int64_t strip = std::min(kStrip, range.end - key);
    multiply(s.scores, Q, s.k_rows + key * g.width, g.width, s.q.turned, Q, strip, Q, g.width,
             false);
    softmax_strip<T>(args, sight, key, strip, s.scores, s.words, state);
    if (key > range.begin) scale_lanes<T>(s.sum_turned, g.width, state.shrink);
    multiply(s.sum_turned, Q, s.turned + key, g.turned_stride, s.words, Q, g.width, Q, strip, true);
  }
  C* lse = static_cast<C*>(args.lse) + head * args.tokens + row0;
  Vec<T> inverse[2];
  for (int64_t u = 0; u < 2; ++u) {
    inverse[u] = state.sum[u] > 0 ? 1 / state.sum[u] : Vec<T>{};  // a query without keys gives 0
    for (int64_t i = 0; i < W && u * W + i < n; ++i)
      lse[u * W + i] = state.sum[u][i] > 0 ? state.top[u][i] + std::log2(state.sum[u][i]) : 0;
  }
  scale_lanes<T>(s.sum_turned, g.width, inverse);
  transpose(s.sum_rows, g.width, s.sum_turned, Q, g.width, Q);
  unpack_rows<T>(args.out, head, row0, s.sum_rows, n, args.head_dim, g.width, 1);
}

// Keys by rows; values transposed, or for the backward keys transposed and values by rows.
template <typename T>
static void pack_keys(const AttentionArgs& args, const AttentionTask& task, const Geometry<T>& g,
                      Scratch<T>& s, bool backward) {
  const auto pack = [&](Packed<T>* to, const AttentionHeads& from) {
    pack_rows<T>(to, from, task.kv_head, task.k_begin, g.keys, g.keys_padded, args.head_dim,
                 g.width);
  };
  pack(s.k_rows, args.k);
  pack(s.v_rows, args.v);
  const Packed<T>* rows = backward ? s.k_rows : s.v_rows;
  const Word<T>* words = pair_rows<T>(s.paired, rows, g.keys_padded, g.width);
  transpose(reinterpret_cast<Word<T>*>(s.turned), g.turned_stride / kPair, words, g.width,
            g.keys_padded / kPair, g.width);
}

template <typename T>
void attention_forward(const AttentionArgs& args, const AttentionTask& task, void* memory) {
  const Geometry<T> g(task.q_end - task.q_begin, task.k_end - task.k_begin, args.head_dim);
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  Scratch<T> s(arena, g, 0);
  [[maybe_unused]] const Tiles tiles;
  pack_keys<T>(args, task, g, s, false);
  for (int64_t head = task.kv_head * args.group; head < (task.kv_head + 1) * args.group; ++head)
    for (int64_t q0 = 0; q0 < g.queries; q0 += kQueries<T>)
      forward_block<T>(args, task, g, s, head, q0);
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft

#include "attention_backward.h"
