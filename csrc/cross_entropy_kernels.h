// Cross-entropy of one row of logits, included by each_isa.h once per instruction set. Two sweeps:
// the first goes block by block (a block stays in L1) and keeps the running max and the sums
// relative to it; the second writes the gradient over the logits. Four vectors are added in fp32,
// the rest in double, so a row's sums keep their last bits at any V and have no trace of its
// neighbours or of the threads.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// exp_sum = sum exp(x - max), dot = sum exp(x - max) * (x - max), total = sum x, over what was
// seen.
struct RowSums {
  double max, exp_sum, dot, total;
  int64_t max_block;  // where the block begins that first held max
};
// What the first sweep leaves for the second: exp(x - max) with the max of its block, so that the
// gradient needs no second exp. Without a gradient, or where it needs x itself, one block serves all.
template <typename T>
struct RowCache {
  Compute<T>* exps;
  double* max;  // one a block
  bool whole_row;
};
struct RunningSums {
  double max;
  int64_t max_block = 0;
  DoubleSum exp_sum = {}, dot = {}, total = {};
};

// What the model calls logits: scaled, then capped. slope becomes dx/dlogit without the scale.
template <typename T, bool Plain>
VEC_FN Vec<T> transform(Vec<T> logit, const CeOptions& options, Vec<T>& slope) {
  slope = splat<T>(1);
  using C = Compute<T>;
  const Vec<T> x = logit * static_cast<C>(options.logit_scale);
  if constexpr (!Plain)
    if (options.softcap > 0) {
      const C cap = static_cast<C>(options.softcap);
      return cap * tanh(x / cap, slope);
    }
  return x;
}
template <typename T, bool Plain>
VEC_FN Vec<T> transform(Vec<T> logit, const CeOptions& options) {
  Vec<T> slope;
  return transform<T, Plain>(logit, options, slope);
}

// One logit, with the same arithmetic as the vectors.
template <typename T, bool Plain>
VEC_FN Compute<T> transform_one(T logit, const CeOptions& options, Compute<T>& slope) {
  Vec<T> slopes;
  const Vec<T> x = transform<T, Plain>(load_upto(&logit, 1), options, slopes);
  slope = slopes[0];
  return x[0];
}

// Four vectors at `i`; only the last of a row may have fewer than 4 W logits left.
template <typename T, bool Plain, bool Whole>
VEC_FN void load_four(const T* logits, int64_t left, const CeOptions& options, Compute<T>* block,
                      DoubleSum& total, Vec<T>* top) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t j = 0; j < 4; ++j) {
    const int64_t at = j * W;
    Vec<T> x = Whole ? load(logits + at) : load_upto(logits + at, left - at);
    x = transform<T, Plain>(x, options);
    if constexpr (!Plain)
      if (options.label_smoothing > 0) total.add(x);  // lanes past the end are 0
    if constexpr (!Whole)
      if (left - at < W) {
        store(block + at, x);
        x = load_upto(block + at, left - at, -std::numeric_limits<float>::infinity());
      }
    store(block + at, x);
    top[j] = max_keep(x, top[j]);
  }
}

// Writes the block's x to `block`, -inf up to a multiple of four vectors, and returns the block's
// max. Four running maxima hide the latency of max.
template <typename T, bool Plain>
VEC_FN Compute<T> load_block(const T* logits, int64_t n, const CeOptions& options,
                             Compute<T>* block, DoubleSum& total) {
  constexpr int64_t kFour = 4 * kLanes<T>;
  const Vec<T> lowest = splat<T>(-std::numeric_limits<float>::infinity());
  Vec<T> top[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + kFour <= n; i += kFour)
    load_four<T, Plain, true>(logits + i, n - i, options, block + i, total, top);
  if (i < n) load_four<T, Plain, false>(logits + i, n - i, options, block + i, total, top);
  return lane_max<T>(max_keep(max_keep(top[0], top[1]), max_keep(top[2], top[3])));
}

// Adds a block to the sums and leaves exp(x - max) in its place.
template <typename T>
VEC_FN void add_block(Compute<T>* block, int64_t n, RunningSums& sums) {
  constexpr int64_t W = kLanes<T>;
  const Vec<T> max = splat<T>(static_cast<Compute<T>>(sums.max)), floor = splat<T>(kExpFloor<T>);
  for (int64_t i = 0; i < n; i += 4 * W) {
    Vec<T> exp_sum = {}, dot = {};
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<T> d = max_keep(floor, load(block + i + j * W) - max);
      const Vec<T> e = exp_nonpositive(d);
      store(block + i + j * W, e);
      exp_sum += e;
      dot = fma(e, d, dot);
    }
    sums.exp_sum.add(exp_sum);
    sums.dot.add(dot);
  }
}

// Moves the sums from the old max to a greater one. The bound on lift keeps 0 * lift at 0.
VEC_FN void raise_max(RunningSums& sums, double max, int64_t block) {
  const double lift = std::fmax(-1e300, sums.max - max), factor = std::exp(lift);
  sums.dot.low = (sums.dot.low + sums.exp_sum.low * lift) * factor;
  sums.dot.high = (sums.dot.high + sums.exp_sum.high * lift) * factor;
  sums.exp_sum.low *= factor;
  sums.exp_sum.high *= factor;
  sums.max = max;
  sums.max_block = block;
}

// A finite starting max keeps leading blocks of -inf at exp_sum 0 (with -inf they would be NaN).
template <typename T, bool Plain>
VEC_FN RowSums sum_row(const T* logits, const CeOptions& options, const RowCache<T>& cache) {
  using C = Compute<T>;
  RunningSums sums{-static_cast<double>(std::numeric_limits<C>::max())};
  for (int64_t begin = 0; begin < options.vocab; begin += kBlock) {
    C* block = cache.exps + (cache.whole_row ? begin : 0);
    const int64_t n = options.vocab - begin < kBlock ? options.vocab - begin : kBlock;
    const double top = load_block<T, Plain>(logits + begin, n, options, block, sums.total);
    if (top > sums.max) raise_max(sums, top, begin);
    add_block<T>(block, n, sums);
    if (cache.whole_row) cache.max[begin / kBlock] = sums.max;
  }
  return {sums.max, sums.exp_sum.total(), sums.dot.total(), sums.total.total(), sums.max_block};
}

// The label is the argmax if its x is the max and no earlier x equals it; earlier ones can only be
// in the block that raised the max last. A row with a NaN is never correct.
template <typename T, bool Plain>
VEC_FN bool is_first_max(const T* logits, int64_t label, const RowSums& sums,
                         const CeOptions& options) {
  if (std::isnan(sums.exp_sum)) return false;
  Compute<T> slope;
  if (transform_one<T, Plain>(logits[label], options, slope) != sums.max) return false;
  const Vec<T> max = splat<T>(static_cast<Compute<T>>(sums.max));
  auto earlier = max != max;
  for (int64_t i = sums.max_block; i < label; i += kLanes<T>) {
    const Vec<T> x = load_upto(logits + i, label - i, std::numeric_limits<float>::quiet_NaN());
    earlier |= transform<T, Plain>(x, options) == max;
  }
  for (int64_t i = 0; i < kLanes<T>; ++i)
    if (earlier[i]) return false;
  return true;
}

// logits = exp(x - max) * peak, from what the first sweep kept.
template <typename T>
VEC_FN void scale_exps(T* logits, double peak, double max, const RowCache<T>& cache, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const double lift = std::exp(cache.max[begin / kBlock] - max);
    const Vec<T> factor = splat<T>(static_cast<Compute<T>>(peak * lift));
    const int64_t end = std::min(n, begin + kBlock);
    int64_t i = begin;
    for (; i + kLanes<T> <= end; i += kLanes<T>) store(logits + i, load(cache.exps + i) * factor);
    if (i < end) store_upto(logits + i, end - i, load(cache.exps + i) * factor);
  }
}

// logits = (exp(x - max) * peak - offset) * slope.
template <typename T, bool Plain>
VEC_FN void write_probabilities(T* logits, Compute<T> peak, Compute<T> offset, double row_max,
                                const CeOptions& options) {
  using C = Compute<T>;
  const Vec<T> max = splat<T>(static_cast<C>(row_max)), floor = splat<T>(kExpFloor<T>);
  for (int64_t i = 0; i < options.vocab; i += kLanes<T>) {
    const int64_t left = options.vocab - i;
    Vec<T> slopes;
    const Vec<T> x = transform<T, Plain>(load_upto(logits + i, left), options, slopes);
    const Vec<T> p = exp_nonpositive(max_keep(floor, x - max)) * peak;
    store_upto(logits + i, left, (p - offset) * slopes);
  }
}

// d(weight * loss)/dlogit = (peak * exp(x - max) - shift - [label] * (1 - eps)) * weight * scale *
// slope.
template <typename T, bool Plain>
VEC_FN void write_gradient(T* logits, const RowSums& sums, double lse, double weight,
                           int64_t label, const CeOptions& options, const RowCache<T>& cache) {
  using C = Compute<T>;
  const double eps = options.label_smoothing, scale = weight * options.logit_scale;
  const double lse_slope = 1 + 2 * options.z_loss * lse, shift = eps / options.vocab;
  C slope;
  const C x_label = transform_one<T, Plain>(logits[label], options, slope);
  // expm1: exp - 1 would cancel where the label's probability is near 1.
  const double from_label = x_label - sums.max - std::log(sums.exp_sum);
  const double label_gradient = std::expm1(from_label) + (lse_slope - 1) * std::exp(from_label) +
                                (eps - shift);
  const double peak = scale * lse_slope / sums.exp_sum;
  if (cache.whole_row)
    scale_exps<T>(logits, peak, sums.max, cache, options.vocab);
  else
    write_probabilities<T, Plain>(logits, static_cast<C>(peak), static_cast<C>(scale * shift),
                                  sums.max, options);
  logits[label] = static_cast<T>(static_cast<C>(label_gradient * scale * slope));
}

// A row that is not supervised: every output 0.
template <typename T>
VEC_FN void clear_row(const CeArgs& args, int64_t row, T* logits) {
  static_cast<Compute<T>*>(args.loss)[row] = 0;
  static_cast<Compute<T>*>(args.lse)[row] = 0;
  static_cast<Compute<T>*>(args.entropy)[row] = 0;
  args.correct[row] = 0;
  if (args.write_grad)
    std::memset(static_cast<void*>(logits), 0, args.options.vocab * sizeof(T));
}

struct Target {
  int64_t label;
  double weight;  // 0: the row learns nothing
};

// Unshifted, a row learns what the next one holds, if both are of one sequence.
template <typename T>
VEC_FN Target find_target(const CeArgs& args, int64_t row) {
  const int32_t* edges = args.cu_seqlens;
  const int64_t at = edges ? row + 1 : row;
  if (at >= args.rows) return {kIgnoreIndex, 0};
  const Target target{args.labels[at], static_cast<const Compute<T>*>(args.weights)[at]};
  const bool last = edges && is_edge(args, at);
  return last || target.label == kIgnoreIndex ? Target{kIgnoreIndex, 0} : target;
}

template <typename T, bool Plain>
void ce_rows_range(const CeArgs& args, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const CeOptions& options = args.options;
  C* exps = static_cast<C*>(memory);
  const RowCache<T> cache{exps, reinterpret_cast<double*>(exps + padded_vocab(options.vocab)),
                          Plain && args.write_grad};
  const double eps = options.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    T* logits = static_cast<T*>(args.logits) + row * args.row_stride;
    const auto [label, weight] = find_target<T>(args, row);
    static_cast<C*>(args.counted)[row] = static_cast<C>(weight);
    if (weight == 0) {
      clear_row<T>(args, row, logits);
      continue;
    }
    const RowSums sums = sum_row<T, Plain>(logits, options, cache);
    const double log_sum = std::log(sums.exp_sum), lse = sums.max + log_sum;
    C slope;
    const double x_label = transform_one<T, Plain>(logits[label], options, slope);
    double loss = (sums.max - x_label) + log_sum;
    if (eps > 0) loss = (1 - eps) * loss + eps * (lse - sums.total / options.vocab);
    loss += options.z_loss * lse * lse;
    static_cast<C*>(args.loss)[row] = static_cast<C>(loss);
    static_cast<C*>(args.lse)[row] = static_cast<C>(lse);
    static_cast<C*>(args.entropy)[row] = static_cast<C>(log_sum - sums.dot / sums.exp_sum);
    args.correct[row] = is_first_max<T, Plain>(logits, label, sums, options);
    if (args.write_grad)
      write_gradient<T, Plain>(logits, sums, lse, weight, label, options, cache);
  }
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
