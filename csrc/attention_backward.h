// The backward of attention_kernels.h: scores are made again from the log-sum-exp of each query,
// and five products per block give the gradients.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// What a query's probabilities and their gradients are relative to.
template <typename T>
struct QueryStatistics {
  Vec<T> lse[2], delta[2];  // delta = sum of out * dout
};

template <typename T>
static QueryStatistics<T> statistics_of(const AttentionArgs& args, const Word<T>* out,
                                        const Word<T>* dout, int64_t head, int64_t row0, int64_t n,
                                        int64_t width) {
  using C = Compute<T>;
  constexpr int64_t W = kLanes<T>;
  const C* lse = static_cast<const C*>(args.lse) + head * args.tokens + row0;
  QueryStatistics<T> stats{};
  for (int64_t u = 0; u < 2; ++u) {
    if (n > u * W) stats.lse[u] = load_upto<C>(lse + u * W, n - u * W);
    for (int64_t d = 0; d < width / kPair; ++d) {
      const int64_t at = d * kQueries<T> + u * W;
      stats.delta[u] = add_products(stats.delta[u], out + at, dout + at);
    }
  }
  return stats;
}

// From products to probabilities P and gradients of the scores dS, as rows of A, `stride` apart, and
// for AMX dS as words of B. The scale between products and scores is left to the end, to dq and dk.
template <typename T>
static void gradient_strip(const AttentionArgs& args, const Sight<T>& sight, int64_t key0,
                           int64_t n, const QueryStatistics<T>& stats, Scratch<T>& s,
                           Packed<T>* p_rows, Packed<T>* ds_rows, int64_t stride) {
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
        p[r][u] = exp2_of(fma(x, factor, -stats.lse[u]));
        ds[r][u] = p[r][u] * (load(s.dscores + at) - stats.delta[u]);
        if (args.softcap != 0) ds[r][u] *= slope;
        if (everyone) continue;
        p[r][u] = sight.choose(key, u, p[r][u], Vec<T>{});
        ds[r][u] = sight.choose(key, u, ds[r][u], Vec<T>{});
      }
    }
    store_rows<T>(p_rows + row * stride, stride, p[0], p[1]);
    store_rows<T>(ds_rows + row * stride, stride, ds[0], ds[1]);
    if constexpr (kPair > 1) store_words<T>(s.words + row / kPair * Q, ds[0], ds[1]);
  }
}

// dq (width, queries) += K^T dS of one head; words hold dS for AMX, rows elsewhere.
template <typename T>
static void add_dq(Scratch<T>& s, Compute<T>* dq, const Geometry<T>& g, int64_t key, int64_t strip,
                   const Packed<T>* ds_rows, int64_t stride) {
  constexpr int64_t Q = kQueries<T>;
  const Packed<T>* keys = s.turned + key;
  if constexpr (kPair > 1)
    multiply(dq, Q, keys, g.turned_stride, s.words, Q, g.width, Q, strip, true);
  else
    multiply(dq, Q, keys, g.turned_stride, ds_rows, stride, g.width, Q, strip, true);
}

// The same block of queries of `heads` heads that share keys and values.
template <typename T>
static void backward_block(const AttentionArgs& args, const AttentionTask& task,
                           const Geometry<T>& g, Scratch<T>& s, int64_t head0, int64_t heads,
                           int64_t q0) {
  constexpr int64_t Q = kQueries<T>;
  const int64_t n = std::min(Q, g.queries - q0), row0 = task.q_begin + q0, w = g.width;
  const int64_t stride = heads * Q;
  QueryStatistics<T> stats[kStack];
  for (int64_t i = 0; i < heads; ++i) {
    s.q.read(i, args.q, head0 + i, row0, n, args.head_dim, true);
    s.dout.read(i, args.dout, head0 + i, row0, n, args.head_dim, true);
    s.out.read(0, args.out, head0 + i, row0, n, args.head_dim, false);
    stats[i] = statistics_of<T>(args, s.out.turned, s.dout.turned_of(i), head0 + i, row0, n, w);
  }
  std::memset(static_cast<void*>(s.sum_turned), 0, stride * w * sizeof(Compute<T>));
  const Sight<T> sight(args, g, q0);
  const KeyRange range = keys_seen<T>(args, g, q0);
  for (int64_t key = range.begin; key < range.end; key += kStrip) {
    const int64_t strip = std::min(kStrip, range.end - key);
    for (int64_t i = 0; i < heads; ++i) {
      Packed<T>*p_rows = s.p_rows + i * Q, *ds_rows = s.ds_rows + i * Q;
      multiply(s.scores, Q, s.k_rows + key * w, w, s.q.turned_of(i), Q, strip, Q, w, false);
      multiply(s.dscores, Q, s.v_rows + key * w, w, s.dout.turned_of(i), Q, strip, Q, w, false);
      gradient_strip<T>(args, sight, key, strip, stats[i], s, p_rows, ds_rows, stride);
      add_dq<T>(s, s.sum_turned + i * Q * w, g, key, strip, ds_rows, stride);
    }
    multiply(s.dv + key * w, w, s.p_rows, stride, s.dout.paired, w, strip, w, stride, true);
    multiply(s.dk + key * w, w, s.ds_rows, stride, s.q.paired, w, strip, w, stride, true);
  }
  for (int64_t i = 0; i < heads; ++i) {
    transpose(s.sum_rows, w, s.sum_turned + i * Q * w, Q, w, Q);
    unpack_rows<T>(args.dq, head0 + i, row0, s.sum_rows, n, args.head_dim, w, args.scale);
  }
}

template <typename T>
void attention_backward(const AttentionArgs& args, const AttentionTask& task, void* memory) {
  const Geometry<T> g(task.q_end - task.q_begin, task.k_end - task.k_begin, args.head_dim);
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  Scratch<T> s(arena, g, std::min(kStack, args.group));
  [[maybe_unused]] const Tiles tiles;
  pack_keys<T>(args, task, g, s, true);
  for (auto* sum : {s.dk, s.dv})
    std::memset(static_cast<void*>(sum), 0, g.keys_padded * g.width * sizeof(Compute<T>));
  for (int64_t first = 0; first < args.group; first += kStack)
    for (int64_t q0 = 0; q0 < g.queries; q0 += kQueries<T>)
      backward_block<T>(args, task, g, s, task.kv_head * args.group + first,
                        std::min(kStack, args.group - first), q0);
  const auto unpack = [&](const AttentionHeads& to, const Compute<T>* sum, double factor) {
    unpack_rows<T>(to, task.kv_head, task.k_begin, sum, g.keys, args.head_dim, g.width, factor);
  };
  unpack(args.dk, s.dk, args.scale);
  unpack(args.dv, s.dv, 1);
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
