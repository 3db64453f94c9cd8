// RMSNorm and SiLU-gate rows, forward and backward, included by each_isa.h once per instruction
// set. Sums take four vectors in fp32, the rest in double. The forwards round where HF's modules
// round; the backwards round each result once.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// Sum of squares of a row; with `add`, of the rounded sum of x and add, which goes to sum.
template <typename T>
VEC_FN double row_squares(const T* x, const T* add, T* sum, int64_t n) {
  constexpr int64_t W = kLanes<T>;
  DoubleSum squares;
  for (int64_t i = 0; i < n; i += 4 * W) {
    Vec<T> part = {};
    for (int64_t at = i; at < i + 4 * W; at += W) {
      Vec<T> value = load_upto(x + at, n - at);
      if (add) {
        value = round_to<T>(value + load_upto(add + at, n - at));
        store_upto(sum + at, n - at, value);
      }
      part += value * value;
    }
    squares.add(part);
  }
  return squares.total();
}

// y = round(weight * round(x * rstd)), rstd = 1 / sqrt(mean(x^2) + eps); x is the sum with
// `residual` where there is one.
template <typename T>
void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int64_t W = kLanes<T>;
  const int64_t n = args.channels;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    const T* residual = static_cast<const T*>(args.residual);
    T* sum = static_cast<T*>(args.sum_out) + row * n;
    const double squares =
        residual ? row_squares(x, residual + row * args.residual_stride, sum, n)
                 : row_squares<T>(x, nullptr, nullptr, n);
    if (residual) x = sum;
    const C rstd = static_cast<C>(1 / std::sqrt(squares / n + args.eps));
    static_cast<C*>(args.rstd_out)[row] = rstd;
    for (int64_t i = 0; i < n; i += W) {
      const Vec<T> normed = round_to<T>(load_upto(x + i, n - i) * rstd);
      store_upto(out + i, n - i, load_upto(weight + i, n - i) * normed);
    }
  }
}

// dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dy * weight, plus dsum where there is one.
template <typename T>
VEC_FN void norm_dx_row(const RmsNormArgs& args, int64_t row, Compute<T> rstd) {
  using C = Compute<T>;
  constexpr int64_t W = kLanes<T>;
  const int64_t n = args.channels;
  const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* weight = static_cast<const T*>(args.weight);
  T* dx = static_cast<T*>(args.out) + row * args.out_stride;
  const T* dsum = static_cast<const T*>(args.dsum);
  if (dsum) dsum += row * args.dsum_stride;
  DoubleSum dot;
  for (int64_t i = 0; i < n; i += 4 * W) {
    Vec<T> part = {};
    for (int64_t at = i; at < i + 4 * W; at += W)
      part += load_upto(dy + at, n - at) * load_upto(weight + at, n - at) *
              load_upto(x + at, n - at);
    dot.add(part);
  }
  const C pull = static_cast<C>(dot.total() / n * rstd * rstd);
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> g = load_upto(dy + i, n - i) * load_upto(weight + i, n - i);
    Vec<T> grad = (g - load_upto(x + i, n - i) * pull) * rstd;
    if (dsum) grad += load_upto(dsum + i, n - i);
    store_upto(dx + i, n - i, grad);
  }
}

// dweight += the sum of dy * x * rstd over rows [first, last).
template <typename T>
VEC_FN void add_dweight(const RmsNormArgs& args, int64_t first, int64_t last,
                        Compute<T>* dweight) {
  const Compute<T>* rstd = static_cast<const Compute<T>*>(args.rstd);
  for (int64_t i = 0; i < args.channels; i += kLanes<T>) {
    const int64_t left = args.channels - i;
    Vec<T> part = {};
    for (int64_t row = first; row < last; ++row) {
      const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride + i;
      const T* x = static_cast<const T*>(args.x) + row * args.x_stride + i;
      part += load_upto(dy, left) * (load_upto(x, left) * rstd[row]);
    }
    store_upto(dweight + i, left, load_upto(dweight + i, left) + part);
  }
}

// Blocks of kBlockRows rows, a few rows at a time so that they are still in cache when dweight
// reads them again (and dx may be dy: dweight goes first). Each block sums dweight into a row of
// its own in `partial`, so that the result depends neither on the thread count nor on who ran
// first.
template <typename T>
void rms_norm_backward_blocks(const RmsNormArgs& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t block = begin; block < end; ++block) {
    C* dweight = static_cast<C*>(args.partial) + block * args.channels;
    std::memset(dweight, 0, args.channels * sizeof(C));
    const int64_t stop = std::min(args.rows, (block + 1) * kBlockRows);
    for (int64_t first = block * kBlockRows; first < stop; first += kGroupRows) {
      const int64_t last = std::min(stop, first + kGroupRows);
      add_dweight<T>(args, first, last, dweight);
      for (int64_t row = first; row < last; ++row)
        norm_dx_row<T>(args, row, static_cast<const C*>(args.rstd)[row]);
    }
  }
}

template <typename V>
constexpr std::conditional_t<std::is_same_v<V, VecD>, double, float> kMinusLog2E =
    -1.4426950408889634;

// sigmoid(v) = 1 / (1 + e) and sigmoid(-v) = e / (1 + e) with e = exp(-v), held below infinity;
// neither by a cancelling subtraction.
template <typename V>
VEC_FN void sigmoids(V v, V& of_v, V& of_minus_v) {
  const V e = exp2_of(min_keep(V{} + kExp2Ceiling<V>, v * kMinusLog2E<V>));
  of_v = reciprocal(1 + e);
  of_minus_v = e * of_v;
}

// out = round(round(silu(gate)) * up).
template <typename T>
void silu_mul_rows(const SiluMulArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride;
    const T* ups = static_cast<const T*>(args.up) + row * args.up_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> g = load_upto(gate + i, n - i), up = load_upto(ups + i, n - i);
      Vec<T> sigmoid, complement;
      sigmoids(g, sigmoid, complement);
      store_upto(out + i, n - i, round_to<T>(g * sigmoid) * up);
    }
  }
}

// dup = dout * round(silu(gate)); dgate = dout * up * silu'(gate), silu' = s * (1 + gate * (1 -
// s)).
template <typename T>
void silu_mul_backward_rows(const SiluMulArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride;
    const T* ups = static_cast<const T*>(args.up) + row * args.up_stride;
    const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride;
    T* dgate = static_cast<T*>(args.out) + row * args.out_stride;
    T* dup = static_cast<T*>(args.dup) + row * args.dup_stride;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> g = load_upto(gate + i, n - i), up = load_upto(ups + i, n - i);
      const Vec<T> grad = load_upto(dout + i, n - i);
      Vec<T> sigmoid, complement;
      sigmoids(g, sigmoid, complement);
      store_upto(dgate + i, n - i, grad * up * (sigmoid * (1 + g * complement)));
      store_upto(dup + i, n - i, grad * round_to<T>(g * sigmoid));
    }
  }
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
