// Blocks of attention: packing, transposing and multiplying, for the instruction set being
// compiled. All products here are C (m, n) += A (m, k) B (k, n) with C in the compute type, A by
// rows and B by rows of words; a word holds kPair neighbours of the contraction, which is what
// AMX multiplies (two bf16) and one number elsewhere.
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
constexpr int64_t kStrip = 256;
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

// Rows times factor written back in T; of a padded row of `width` numbers only the first head_dim are real.
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

#if defined(VARLEN_AMX)

// Eight tiles of 16 rows by 64 bytes, for the lifetime of a task.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// In blocks of 32 x 32: four tiles of C, two of A, two of B. The empty asm keeps the compiler from
// moving stores to A and B behind the tile loads, whose intrinsics do not say that they read.
static __attribute__((noinline)) void multiply(float* c, int64_t c_stride, const uint16_t* a,
                                               int64_t a_stride, const uint32_t* b,
                                               int64_t b_stride, int64_t m, int64_t n, int64_t k,
                                               bool accumulate) {
  asm volatile("" ::: "memory");
  for (int64_t i = 0; i < m; i += 32)
    for (int64_t j = 0; j < n; j += 32) {
      float* block = c + i * c_stride + j;
      float* below = block + 16 * c_stride;
      if (accumulate) {
        _tile_loadd(0, block, c_stride * 4);
        _tile_loadd(1, block + 16, c_stride * 4);
        _tile_loadd(2, below, c_stride * 4);
        _tile_loadd(3, below + 16, c_stride * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t p = 0; p < k; p += 32) {
        const uint16_t* left = a + i * a_stride + p;
        const uint32_t* right = b + p / 2 * b_stride + j;
        _tile_loadd(4, left, a_stride * 2);
        _tile_loadd(6, right, b_stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 16, b_stride * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * a_stride, a_stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, block, c_stride * 4);
      _tile_stored(1, block + 16, c_stride * 4);
      _tile_stored(2, below, c_stride * 4);
      _tile_stored(3, below + 16, c_stride * 4);
    }
  asm volatile("" ::: "memory");
}

// Two neighbouring rows of one block of scores: as rows of A, and as a row of words of B.
VEC_FN __m512i bf16_row(const VecF* row) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)row[1], (__m512)row[0]);
}
template <typename T>
VEC_FN void store_rows(uint16_t* to, int64_t stride, const VecF* even, const VecF* odd) {
  _mm512_storeu_si512(to, bf16_row(even));
  _mm512_storeu_si512(to + stride, bf16_row(odd));
}
template <typename T>
VEC_FN void store_words(uint32_t* to, const VecF* even, const VecF* odd) {
  typedef uint16_t Row __attribute__((vector_size(64)));
  const Row a = (Row)bf16_row(even), b = (Row)bf16_row(odd);
  Row low, high;
  for (int i = 0; i < 32; ++i) {
    low[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
    high[i] = static_cast<uint16_t>(16 + i / 2 + (i % 2) * 32);
  }
  const Row words[2] = {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high)};
  std::memcpy(to, words, sizeof words);
}

// Sum of products of two bf16 pairs, added to c.
VEC_FN VecF add_products(VecF c, const uint32_t* a, const uint32_t* b) {
  return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)load_bits<__m512i>(a),
                                (__m512bh)load_bits<__m512i>(b));
}

#else

struct Tiles {};

// Eight rows of A against two vectors of B: sixteen sums in registers hide the latency of fma. They
// begin at 0, also to accumulate: sums of blocks round less than one long chain.
template <typename C>
static __attribute__((noinline)) void multiply(C* c, int64_t c_stride, const C* a,
                                               int64_t a_stride, const C* b, int64_t b_stride,
                                               int64_t m, int64_t n, int64_t k, bool accumulate) {
  constexpr int64_t W = kLanes<C>, kRows = VARLEN_VECTOR_BYTES == 64 ? 8 : 4;
  for (int64_t j = 0; j < n; j += 2 * W)
    for (int64_t i = 0; i < m; i += kRows) {
      Vec<C> sum[kRows][2] = {};
      const C* left = a + i * a_stride;
      C* block = c + i * c_stride + j;
      for (int64_t p = 0; p < k; ++p) {
        const Vec<C> right[2] = {load(b + p * b_stride + j), load(b + p * b_stride + j + W)};
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) {
          const Vec<C> x = splat<C>(left[r * a_stride + p]);
          sum[r][0] = fma(x, right[0], sum[r][0]);
          sum[r][1] = fma(x, right[1], sum[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t u = 0; u < 2; ++u) {
          C* place = block + r * c_stride + u * W;
          store(place, accumulate ? load(place) + sum[r][u] : sum[r][u]);
        }
    }
}

template <typename T>
VEC_FN void store_rows(Compute<T>* to, int64_t stride, const Vec<T>* even, const Vec<T>* odd) {
  for (int64_t u = 0; u < 2; ++u) {
    store(to + u * kLanes<T>, even[u]);
    store(to + stride + u * kLanes<T>, odd[u]);
  }
}
template <typename T>
VEC_FN void store_words(Compute<T>* to, const Vec<T>* even, const Vec<T>* odd) {
  store_rows<T>(to, kQueries<T>, even, odd);
}
template <typename C>
VEC_FN Vec<C> add_products(Vec<C> c, const C* a, const C* b) {
  return fma(load(a), load(b), c);
}

#endif

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
