// The backward of attention_kernels.h: scores are made again from the log-sum-exp of each query,
// and five products per block give the gradients.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// What a query's probabilities and their gradients are relative to.
template <typename T>
struct QueryStatistics {
  Vec<T> lse[2], delta[2];  // lse in units of log2; delta = sum of out * dout
};

template <typename T>
static QueryStatistics<T> statistics_of(const AttentionArgs& args, const Scratch<T>& s,
                                        int64_t head, int64_t row0, int64_t n, int64_t width) {
  using C = Compute<T>;
  constexpr int64_t W = kLanes<T>;
  const C* lse = static_cast<const C*>(args.lse) + head * args.tokens + row0;
  QueryStatistics<T> stats{};
  for (int64_t u = 0; u < 2; ++u) {
    if (n > u * W)
      stats.lse[u] = load_upto<C>(lse + u * W, n - u * W) * static_cast<C>(kLog2E);
    for (int64_t d = 0; d < width / kPair; ++d) {
      const int64_t at = d * kQueries<T> + u * W;
      stats.delta[u] = add_products(stats.delta[u], s.out.turned + at, s.dout.turned + at);
    }
  }
  return stats;
}

// From products to probabilities P and gradients of the scores dS, in the forms of A and of B. The
// scale between products and scores is left to the end, to dq and dk.
template <typename T>
static void gradient_strip(const AttentionArgs& args, const Sight<T>& sight, int64_t key0,
                           int64_t n, const QueryStatistics<T>& stats, Scratch<T>& s) {
  constexpr int64_t W = kLanes<T>, Q = kQueries<T>;
  const Vec<T> factor = log2_factor<T>(args);
  for (int64_t row = 0; row < n; row += 2) {
    Vec<T> p[2][2], ds[2][2];
    for (int64_t r = 0; r < 2; ++r) {
      const int64_t key = key0 + row + r;
      const bool everyone = sight.everyone(key);
      for (int64_t u = 0; u < 2; ++u) {
        const int64_t at = (row + r) * Q + u * W;
        Vec<T> x = load(s.scores + at), slope = {};
        if (args.softcap != 0) x = capped<T>(x, args, slope);
        p[r][u] = exp2_nonpositive(fma(x, factor, -stats.lse[u]));
        ds[r][u] = p[r][u] * (load(s.dscores + at) - stats.delta[u]);
        if (args.softcap != 0) ds[r][u] *= slope;
        if (everyone) continue;
        p[r][u] = sight.choose(key, u, p[r][u], Vec<T>{});
        ds[r][u] = sight.choose(key, u, ds[r][u], Vec<T>{});
      }
    }
    store_rows<T>(s.p_rows + row * Q, p[0], p[1]);
    store_rows<T>(s.ds_rows + row * Q, ds[0], ds[1]);
    if constexpr (kPair > 1) store_words<T>(s.words + row / kPair * Q, ds[0], ds[1]);
  }
}

template <typename T>
static const Word<T>* gradient_words(const Scratch<T>& s) {
  if constexpr (kPair > 1)
    return s.words;
  else
    return s.ds_rows;
}

template <typename T>
static void backward_block(const AttentionArgs& args, const AttentionTask& task,
                           const Geometry<T>& g, Scratch<T>& s, int64_t head, int64_t q0) {
  constexpr int64_t Q = kQueries<T>;
  const int64_t n = std::min(Q, g.queries - q0), row0 = task.q_begin + q0, w = g.width;
  s.q.read(args.q, head, row0, n, args.head_dim, w, true);
  s.dout.read(args.dout, head, row0, n, args.head_dim, w, true);
  s.out.read(args.out, head, row0, n, args.head_dim, w, false);
  const QueryStatistics<T> stats = statistics_of<T>(args, s, head, row0, n, w);
  std::memset(static_cast<void*>(s.sum_turned), 0, Q * w * sizeof(Compute<T>));
  const Sight<T> sight(args, g, q0);
  const KeyRange range = keys_seen<T>(args, g, q0);
  for (int64_t key = range.begin; key < range.end; key += kStrip) {
    const int64_t strip = std::min(kStrip, range.end - key);
    multiply(s.scores, Q, s.k_rows + key * w, w, s.q.turned, Q, strip, Q, w, false);
    multiply(s.dscores, Q, s.v_rows + key * w, w, s.dout.turned, Q, strip, Q, w, false);
    gradient_strip<T>(args, sight, key, strip, stats, s);
    multiply(s.dv + key * w, w, s.p_rows, Q, s.dout.words, w, strip, w, Q, true);
    multiply(s.dk + key * w, w, s.ds_rows, Q, s.q.words, w, strip, w, Q, true);
    multiply(s.sum_turned, Q, s.turned + key, g.turned_stride, gradient_words<T>(s), Q, w, Q, strip,
             true);
  }
  transpose(s.sum_rows, w, s.sum_turned, Q, w, Q);
  unpack_rows<T>(args.dq, head, row0, s.sum_rows, n, args.head_dim, w, args.scale);
}

template <typename T>
void attention_backward(const AttentionArgs& args, const AttentionTask& task, void* memory) {
  const Geometry<T> g(task.q_end - task.q_begin, task.k_end - task.k_begin, args.head_dim);
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  Scratch<T> s(arena, g, true);
  [[maybe_unused]] const Tiles tiles;
  pack_keys<T>(args, task, g, s, true);
  for (auto* sum : {s.dk, s.dv})
    std::memset(static_cast<void*>(sum), 0, g.keys_padded * g.width * sizeof(Compute<T>));
  for (int64_t head = task.kv_head * args.group; head < (task.kv_head + 1) * args.group; ++head)
    for (int64_t q0 = 0; q0 < g.queries; q0 += kQueries<T>)
      backward_block<T>(args, task, g, s, head, q0);
  const auto unpack = [&](const AttentionHeads& to, const Compute<T>* sum, double factor) {
    unpack_rows<T>(to, task.kv_head, task.k_begin, sum, g.keys, args.head_dim, g.width, factor);
  };
  unpack(args.dk, s.dk, args.scale);
  unpack(args.dv, s.dv, 1);
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
