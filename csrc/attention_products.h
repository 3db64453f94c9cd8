// Products of attention_kernels.h, and the forms in which it stores their operands: on AMX tiles, or
// on vectors. The letters and layouts are those of attention_blocks.h.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

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
