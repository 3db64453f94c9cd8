// RoPE over a range of tokens, included by each_isa.h once per instruction set. Products and sums
// are separate roundings here (no fma()): the hf mode has to give HF's bits.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// W values of an fp32 table in the compute type of T; lanes beyond n are 0.
template <typename T>
VEC_FN Vec<T> load_table(const float* p, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    float padded[kLanes<T>] = {};
    for (int64_t i = 0; i < kLanes<T> && i < n; ++i) padded[i] = p[i];
    return __builtin_convertvector(load_bits<VecHalfF>(padded), VecD);
  } else {
    return load_upto(p, n);
  }
}

// Splits 2W consecutive values into the even (first of each pair) and the odd ones, and back. The
// baseline is also what compilers without __builtin_shuffle build.
template <typename V>
VEC_FN void deinterleave(V low, V high, V& even, V& odd) {
  constexpr int64_t lanes = sizeof(V) / sizeof(low[0]);
#if VARLEN_VECTOR_BYTES > 16
  std::conditional_t<std::is_same_v<V, VecD>, VecL, VecI> take = {};
  for (int64_t i = 0; i < lanes; ++i) take[i] = 2 * i;
  even = __builtin_shuffle(low, high, take);
  odd = __builtin_shuffle(low, high, take + 1);
#else
  for (int64_t i = 0; i < lanes; ++i) {
    even[i] = 2 * i < lanes ? low[2 * i] : high[2 * i - lanes];
    odd[i] = 2 * i < lanes ? low[2 * i + 1] : high[2 * i + 1 - lanes];
  }
#endif
}
template <typename V>
VEC_FN void interleave(V even, V odd, V& low, V& high) {
  constexpr int64_t lanes = sizeof(V) / sizeof(even[0]);
#if VARLEN_VECTOR_BYTES > 16
  std::conditional_t<std::is_same_v<V, VecD>, VecL, VecI> take = {};
  for (int64_t i = 0; i < lanes; ++i) take[i] = i / 2 + (i % 2) * lanes;
  low = __builtin_shuffle(even, odd, take);
  high = __builtin_shuffle(even, odd, take + lanes / 2);
#else
  for (int64_t i = 0; i < lanes; ++i) {
    low[i] = i % 2 ? odd[i / 2] : even[i / 2];
    high[i] = i % 2 ? odd[(i + lanes) / 2] : even[(i + lanes) / 2];
  }
#endif
}

template <typename T, bool Interleaved>
VEC_FN void load_pair(const T* row, int64_t i, int64_t half, Vec<T>& x1, Vec<T>& x2) {
  const int64_t n = half - i;
  if constexpr (Interleaved) {
    const T* pairs = row + 2 * i;
    deinterleave(load_upto(pairs, 2 * n), load_upto(pairs + kLanes<T>, 2 * n - kLanes<T>), x1, x2);
  } else {
    x1 = load_upto(row + i, n);
    x2 = load_upto(row + half + i, n);
  }
}
template <typename T, bool Interleaved>
VEC_FN void store_pair(T* row, int64_t i, int64_t half, Vec<T> y1, Vec<T> y2) {
  const int64_t n = half - i;
  if constexpr (Interleaved) {
    T* pairs = row + 2 * i;
    Vec<T> low, high;
    interleave(y1, y2, low, high);
    store_upto(pairs, 2 * n, low);
    store_upto(pairs + kLanes<T>, 2 * n - kLanes<T>, high);
  } else {
    store_upto(row + i, n, y1);
    store_upto(row + half + i, n, y2);
  }
}

// W pairs of every head of one tensor at one token, with the table values held in registers. zero
// is +0 in HF's backward, where autograd adds the zero padding of the two slices (that turns -0
// into +0), and -0, which changes nothing, everywhere else.
template <typename T, bool Interleaved, bool Hf>
VEC_FN void rotate_heads(const RopeHeads& x, int64_t token, int64_t i, int64_t half, Vec<T> c,
                         Vec<T> s, Vec<T> zero) {
  const T* in = static_cast<const T*>(x.in) + token * x.in_token_stride;
  T* out = static_cast<T*>(x.out) + token * x.out_token_stride;
  for (int64_t head = 0; head < x.heads; ++head) {
    Vec<T> x1, x2;
    load_pair<T, Interleaved>(in, i, half, x1, x2);
    if constexpr (Hf) {
      const Vec<T> y1 = round_to<T>(x1 * c) - round_to<T>(x2 * s);
      const Vec<T> y2 = round_to<T>(x2 * c) + round_to<T>(x1 * s);
      store_pair<T, Interleaved>(out, i, half, round_to<T>(y1) + zero, round_to<T>(y2) + zero);
    } else {
      store_pair<T, Interleaved>(out, i, half, x1 * c - x2 * s, x2 * c + x1 * s);
    }
    in += x.in_head_stride;
    out += x.out_head_stride;
  }
}

// The values past the rotary part pass unchanged.
template <typename T>
VEC_FN void copy_rest(const RopeHeads& x, int64_t token, int64_t begin, int64_t end) {
  if (x.in == x.out || begin == end) return;
  const T* in = static_cast<const T*>(x.in) + token * x.in_token_stride;
  T* out = static_cast<T*>(x.out) + token * x.out_token_stride;
  for (int64_t head = 0; head < x.heads; ++head)
    std::memcpy(static_cast<void*>(out + head * x.out_head_stride + begin),
                in + head * x.in_head_stride + begin, (end - begin) * sizeof(T));
}

template <typename T, bool Interleaved, bool Hf>
void rope_tokens(const RopeArgs& args, int64_t begin, int64_t end) {
  const Vec<T> zero = splat<T>(Hf && args.inverse ? 0.0f : -0.0f);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = args.position(token) * args.half;
    for (int64_t i = 0; i < args.half; i += kLanes<T>) {
      Vec<T> c = load_table<T>(args.cos + row + i, args.half - i);
      Vec<T> s = load_table<T>(args.sin + row + i, args.half - i);
      if constexpr (Hf) c = round_to<T>(c), s = round_to<T>(s);
      if (args.inverse) s = -s;
      rotate_heads<T, Interleaved, Hf>(args.q, token, i, args.half, c, s, zero);
      rotate_heads<T, Interleaved, Hf>(args.k, token, i, args.half, c, s, zero);
    }
    copy_rest<T>(args.q, token, 2 * args.half, args.head_dim);
    copy_rest<T>(args.k, token, 2 * args.half, args.head_dim);
  }
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
