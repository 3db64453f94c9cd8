// Blocks of attention, packed and transposed for the instruction set being compiled. All products
// are C (m, n) += A (m, k) B (k, n) with C in the compute type, A by rows and B by rows of words; a
// word holds kPair neighbours of the contraction: two bf16 for AMX, one number elsewhere.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

#if defined(VARLEN_AMX)
template <typename T>
using Packed = uint16_t;  // bits of a bf16
template <typename T>
using Word = uint32_t;
constexpr int64_t kPair = 2;
#else
template <typename T>
using Packed = Compute<T>;
template <typename T>
using Word = Compute<T>;
constexpr int64_t kPair = 1;
#endif

// Queries go by two vectors of lanes, so that a row of scores is one key and its maxima, sums and
// masks need no step across lanes. Keys and head dims are padded with zeros to kTile.
template <typename T>
constexpr int64_t kQueries = 2 * kLanes<T>;
constexpr int64_t kTile = 32;
// Keys whose scores exist at a time: with kQueries lanes they stay in L1 and L2.
constexpr int64_t kStrip = 512;
// Heads whose queries the backward takes together: gradients of keys and values, which all of them
// add to, are then read and written once for all.
constexpr int64_t kStack = 4;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows [begin, begin + n) of one head, padded with zeros to (n_padded, width).
template <typename T>
static void pack_rows(Packed<T>* to, const AttentionHeads& from, int64_t head, int64_t begin,
                      int64_t n, int64_t n_padded, int64_t head_dim, int64_t width) {
  for (int64_t row = 0; row < n; ++row) {
    const T* source = from.row<const T>(begin + row, head);
    Packed<T>* target = to + row * width;
#if defined(VARLEN_AMX)
    std::memcpy(target, source, head_dim * sizeof(T));
    std::memset(target + head_dim, 0, (width - head_dim) * sizeof(T));
#else
    for (int64_t d = 0; d < width; d += kLanes<T>)
      store(target + d, d < head_dim ? load_upto(source + d, head_dim - d) : Vec<T>{});
#endif
  }
  std::memset(static_cast<void*>(to + n * width), 0, (n_padded - n) * width * sizeof(Packed<T>));
}

// Rows times factor written back in T; of a padded row of `width` numbers only the first head_dim
// are real.
template <typename T>
static void unpack_rows(const AttentionHeads& to, int64_t head, int64_t begin,
                        const Compute<T>* from, int64_t n, int64_t head_dim, int64_t width,
                        double factor) {
  const Vec<T> times = splat<T>(static_cast<Compute<T>>(factor));
  for (int64_t row = 0; row < n; ++row) {
    T* target = to.row<T>(begin + row, head);
    for (int64_t d = 0; d < head_dim; d += kLanes<T>)
      store_upto(target + d, head_dim - d, load(from + row * width + d) * times);
  }
}

// Words of `rows` packed rows: row pairs interleaved for AMX, into `to`; elsewhere the rows
// themselves.
template <typename T>
static const Word<T>* pair_rows(Word<T>* to, const Packed<T>* rows, int64_t n, int64_t width) {
#if defined(VARLEN_AMX)
  for (int64_t row = 0; row < n; row += 2)
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      const VecU even = widen(load_bits<VecHalf>(rows + row * width + d));
      const VecU odd = widen(load_bits<VecHalf>(rows + (row + 1) * width + d));
      const VecU both = even | (odd << 16);
      std::memcpy(to + row / 2 * width + d, &both, sizeof both);
    }
  return to;
#else
  (void)to, (void)n, (void)width;
  return rows;
#endif
}

// A square of one vector of words.
template <typename W>
struct Turn {
  typedef W Row __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
  typedef std::conditional_t<sizeof(W) == 8, int64_t, int32_t> Lane;
  typedef Lane Index __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
  static constexpr int64_t kSize = VARLEN_VECTOR_BYTES / sizeof(W);

  // Swaps the off-diagonal quarters of every block of 2 * step rows and lanes.
  template <int64_t step>
  VEC_MEMBER static void swap(Row* rows) {
    Index low, high;
    for (int64_t lane = 0; lane < kSize; ++lane) {
      const bool far = lane & step;
      low[lane] = static_cast<Lane>(far ? kSize + lane - step : lane);
      high[lane] = static_cast<Lane>(far ? kSize + lane : lane + step);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSize; ++i)
      if (!(i & step)) {
        const Row a = rows[i], b = rows[i + step];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + step] = __builtin_shuffle(a, b, high);
      }
  }
};

// to (columns, rows) = from (rows, columns) transposed, in squares of one vector; both sizes are
// multiples of the lanes.
template <typename W>
static void transpose(W* to, int64_t to_stride, const W* from, int64_t from_stride, int64_t rows,
                      int64_t columns) {
  using Square = Turn<W>;
  constexpr int64_t N = Square::kSize;
  for (int64_t i = 0; i < rows; i += N)
    for (int64_t j = 0; j < columns; j += N) {
      typename Square::Row square[N];
#pragma GCC unroll 16
      for (int64_t r = 0; r < N; ++r)
        std::memcpy(&square[r], from + (i + r) * from_stride + j, sizeof square[r]);
      if constexpr (N >= 16) Square::template swap<8>(square);
      if constexpr (N >= 8) Square::template swap<4>(square);
      if constexpr (N >= 4) Square::template swap<2>(square);
      Square::template swap<1>(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < N; ++r)
        std::memcpy(to + (j + r) * to_stride + i, &square[r], sizeof square[r]);
    }
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
