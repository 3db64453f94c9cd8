// Vectors of one native width for the instruction set being compiled: loads and stores of every
// dtype with the arithmetic in fp32 (fp64 for fp64), rounding, sums. No include guard:
// each_isa.h includes this file once per instruction set. Contraction is off, so the only fused
// multiply-adds are those written as fma(); the kernels that promise HF's bits do not use it.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

using c10::BFloat16;
using c10::Half;

typedef float VecF __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(VARLEN_VECTOR_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(VARLEN_VECTOR_BYTES / 2)));
typedef float VecHalfF __attribute__((vector_size(VARLEN_VECTOR_BYTES / 2)));

#if VARLEN_VECTOR_BYTES == 64
// The maskz forms with every lane on are the plain instructions; the plain intrinsics warn in GCC
// 12.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
using Vec = std::conditional_t<std::is_same_v<T, double>, VecD, VecF>;
template <typename T>
constexpr int64_t kLanes = VARLEN_VECTOR_BYTES / sizeof(Compute<T>);

template <typename V, typename P>
VEC_FN V load_bits(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

VEC_FN VecF load(const float* p) { return load_bits<VecF>(p); }
VEC_FN VecD load(const double* p) { return load_bits<VecD>(p); }

// 16-bit lanes to 32-bit lanes and back; GCC 12 makes several shuffles of __builtin_convertvector
// here.
VEC_FN VecU widen(VecHalf v) {
#if VARLEN_VECTOR_BYTES == 64
  return (VecU)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)v);
#elif VARLEN_VECTOR_BYTES == 32
  return (VecU)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecU);
#endif
}
VEC_FN VecHalf narrow(VecU v) {
#if VARLEN_VECTOR_BYTES == 64
  return (VecHalf)_mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)v);
#elif VARLEN_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // per 128-bit half
  return (VecHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  return __builtin_convertvector(v, VecHalf);
#endif
}

VEC_FN VecF load(const BFloat16* p) { return (VecF)(widen(load_bits<VecHalf>(p)) << 16); }
VEC_FN VecF load(const Half* p) {
#if VARLEN_VECTOR_BYTES == 64
  return (VecF)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)load_bits<VecHalf>(p));
#elif VARLEN_VECTOR_BYTES == 32
  return (VecF)_mm256_cvtph_ps((__m128i)load_bits<VecHalf>(p));
#else
  VecF v;
  for (int64_t i = 0; i < kLanes<Half>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// bf16 of v in the upper half of each lane: nearest, ties to even; every NaN becomes the quiet
// 0x7fc0, as c10::BFloat16 makes it (rounding its bits like a number's could carry a NaN over into
// infinity).
VEC_FN VecU bf16_bits(VecF v) {
  const VecU bits = (VecU)v;
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (v != v) ? (VecU{} + 0x7fc00000u) : rounded;
}

VEC_FN void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
VEC_FN void store(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }
VEC_FN void store(BFloat16* p, VecF v) {
#if defined(VARLEN_AMX)
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)v);  // subnormals become 0
#else
  const VecHalf bits = narrow(bf16_bits(v) >> 16);
#endif
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
}
VEC_FN void store(Half* p, VecF v) {
#if VARLEN_VECTOR_BYTES == 64
  const __m256i bits = _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
#elif VARLEN_VECTOR_BYTES == 32
  const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
#else
  for (int64_t i = 0; i < kLanes<Half>; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// v rounded to T's precision, still in the compute type.
template <typename T>
VEC_FN Vec<T> round_to(Vec<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(VARLEN_AMX)
    const __m256bh bits = _mm512_cvtneps_pbh((__m512)v);
    return (VecF)(widen((VecHalf)bits) << 16);
#else
    return (VecF)(bf16_bits(v) & 0xffff0000u);
#endif
  } else if constexpr (std::is_same_v<T, Half>) {
    Half rounded[kLanes<T>];
    store(rounded, v);
    return load(rounded);
  } else {
    return v;
  }
}

// At most one vector: all lanes when n >= kLanes, else n values and `fill` in the other lanes.
template <typename T>
VEC_FN Vec<T> load_upto(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes<T>) [[likely]] return load(p);
  T padded[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i) padded[i] = i < n ? p[i] : static_cast<T>(fill);
  return load(padded);
}
template <typename T>
VEC_FN void store_upto(T* p, int64_t n, Vec<T> v) {
  if (n >= kLanes<T>) [[likely]] return store(p, v);
  T padded[kLanes<T>];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

template <typename T>
VEC_FN Vec<T> splat(Compute<T> x) {
  return x - Vec<T>{};  // a sum would turn -0 into +0
}

// a * b + c, in one rounding where the instruction set has it.
VEC_FN VecF fma(VecF a, VecF b, VecF c) {
#if VARLEN_VECTOR_BYTES == 64
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VARLEN_VECTOR_BYTES == 32
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

VEC_FN VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }

// The greater of a and b; a NaN in b stays, a NaN in a is dropped (what x86 max does).
VEC_FN VecF max_keep(VecF a, VecF b) {
#if VARLEN_VECTOR_BYTES == 64
  return (VecF)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif VARLEN_VECTOR_BYTES == 32
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
VEC_FN VecD max_keep(VecD a, VecD b) { return a > b ? a : b; }

// The smaller, with NaN as above.
VEC_FN VecF min_keep(VecF a, VecF b) {
#if VARLEN_VECTOR_BYTES == 64
  return (VecF)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
#elif VARLEN_VECTOR_BYTES == 32
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
VEC_FN VecD min_keep(VecD a, VecD b) { return a < b ? a : b; }

// A sum kept in double, one vector at a time.
struct DoubleSum {
  VecD low = {}, high = {};
  VEC_MEMBER void add(VecD v) { low += v; }
  VEC_MEMBER void add(VecF v) {
    VecHalfF halves[2];
    std::memcpy(halves, &v, sizeof v);
    low += __builtin_convertvector(halves[0], VecD);
    high += __builtin_convertvector(halves[1], VecD);
  }
  VEC_MEMBER double total() const {
    const VecD both = low + high;
    double sum = 0;
    for (int64_t i = 0; i < kLanes<double>; ++i) sum += both[i];
    return sum;
  }
};
template <typename T>
VEC_FN Compute<T> lane_max(Vec<T> v) {
  Compute<T> top = v[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft

#include "vec_functions.h"
