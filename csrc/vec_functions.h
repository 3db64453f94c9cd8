// Exponentials, reciprocal and tanh of vectors, included by vec_math.h once per instruction set.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// Below this exp_nonpositive is exactly 0 (in fp32 it would be subnormal), so that e * d stays
// finite.
template <typename T>
constexpr Compute<T> kExpFloor = std::is_same_v<T, double> ? -745.2 : -87.33f;

// exp(d - n ln2) for |d - n ln2| <= ln2 / 2.
VEC_FN VecF exp_remainder(VecF d, VecF n) {
  // ln2 in two parts; the first has 10 bits, so that n * part is exact without fma too.
  VecF r = fma(n, VecF{} - 0.693359375f, d);
  r = fma(n, VecF{} + 2.12194440e-4f, r);
  VecF p = fma(r, VecF{} + 1.3814584e-3f, VecF{} + 8.3687239e-3f);
  p = fma(r, p, VecF{} + 4.1668389e-2f);
  p = fma(r, p, VecF{} + 1.6666521e-1f);
  p = fma(r, p, VecF{} + 4.9999993e-1f);
  return fma(r * r, p, r) + 1.0f;
}

// exp(d) for d <= 0 that has been clamped to kExpFloor; NaN stays NaN. Range reduction to |r| <=
// ln2/2 and a degree-6 minimax polynomial; within 1 ulp.
VEC_FN VecF exp_nonpositive(VecF d) {
#if VARLEN_VECTOR_BYTES == 64
  // Here one instruction rounds to an integer and one multiplies by its power of two, if d is above
  // the floor (or NaN).
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)d, _mm512_set1_ps(kExpFloor<float>),
                                             _CMP_NLE_UQ);
  const VecF n = (VecF)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)(d * 1.44269504f),
                                                  _MM_FROUND_TO_NEAREST_INT);
  return (VecF)_mm512_maskz_scalef_ps(above, (__m512)exp_remainder(d, n), (__m512)n);
#else
  // 1.5 * 2^23: adding it leaves the value, rounded to an integer, in the low bits.
  const VecF shift = VecF{} + 12582912.0f;
  const VecF shifted = fma(d, VecF{} + 1.44269504f, shift);
  const VecF p = exp_remainder(d, shifted - shift);
  const VecF scaled = (VecF)((VecU)p + ((VecU)shifted << 23));
  return d <= kExpFloor<float> ? VecF{} : scaled;
#endif
}
VEC_FN VecD exp_nonpositive(VecD d) {
  for (int64_t i = 0; i < kLanes<double>; ++i)
    d[i] = d[i] <= kExpFloor<double> ? 0.0 : std::exp(d[i]);
  return d;
}

// 2^t; exactly 0 up to kExp2Floor, right up to kExp2Ceiling; NaN stays NaN. The polynomial of exp_remainder in
// units of log2: within 2 ulp, and two instructions less where t comes out of an fma.
constexpr float kExp2Floor = -126.0f;
template <typename V>
constexpr float kExp2Ceiling = std::is_same_v<V, VecD> ? 1000.0f : 126.0f;
VEC_FN VecF exp2_remainder(VecF r) {
  VecF p = fma(r, VecF{} + 1.5320728e-4f, VecF{} + 1.3390364e-3f);
  p = fma(r, p, VecF{} + 9.6186501e-3f);
  p = fma(r, p, VecF{} + 5.5503289e-2f);
  p = fma(r, p, VecF{} + 2.4022647e-1f);
  return fma(r * r, p, fma(r, VecF{} + 0.69314718f, VecF{} + 1.0f));
}
VEC_FN VecF exp2_of(VecF t) {
#if VARLEN_VECTOR_BYTES == 64
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(kExp2Floor), _CMP_NLE_UQ);
  const VecF n = (VecF)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)t, _MM_FROUND_TO_NEAREST_INT);
  return (VecF)_mm512_maskz_scalef_ps(above, (__m512)exp2_remainder(t - n), (__m512)n);
#else
  const VecF floored = max_keep(VecF{} + kExp2Floor, t);
  const VecF shift = VecF{} + 12582912.0f;  // as in exp_nonpositive
  const VecF shifted = floored + shift;
  const VecF p = exp2_remainder(floored - (shifted - shift));
  return t <= kExp2Floor ? VecF{} : (VecF)((VecU)p + ((VecU)shifted << 23));
#endif
}
VEC_FN VecD exp2_of(VecD t) {
  for (int64_t i = 0; i < kLanes<double>; ++i) t[i] = std::exp2(t[i]);
  return t;
}

// 1 / v for v in [1, 2^126], within 1 ulp: a division takes a third of the time of a SiLU.
VEC_FN VecF reciprocal(VecF v) {
#if VARLEN_VECTOR_BYTES == 64
  const VecF guess = (VecF)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)v);
  return fma(guess, fma(-v, guess, VecF{} + 1.0f), guess);
#else
  return 1.0f / v;
#endif
}
VEC_FN VecD reciprocal(VecD v) { return 1.0 / v; }

VEC_FN VecF absolute(VecF v) { return (VecF)((VecU)v & 0x7fffffffu); }
VEC_FN VecD absolute(VecD v) { return v < 0 ? -v : v; }
VEC_FN VecF copy_sign(VecF magnitude, VecF sign) {
  return (VecF)((VecU)magnitude | ((VecU)sign & 0x80000000u));
}

// tanh, within 1 ulp, and its slope 1 - tanh^2. Below 1 an odd minimax polynomial; above, 1 - q
// with q = 1 - tanh itself at hand, so that the slope q * (2 - q) does not cancel where tanh
// saturates.
VEC_FN VecF tanh(VecF v, VecF& slope) {
  const VecF a = absolute(v), z = v * v;
  VecF p = fma(z, VecF{} - 3.5845178e-4f, VecF{} + 2.3013638e-3f);
  p = fma(z, p, VecF{} - 7.9461052e-3f);
  p = fma(z, p, VecF{} + 2.1486657e-2f);
  p = fma(z, p, VecF{} - 5.3879802e-2f);
  p = fma(z, p, VecF{} + 1.3332345e-1f);
  p = fma(z, p, VecF{} - 3.3333295e-1f);
  const VecF small = fma(z * v, p, v);
  const VecF e = exp_nonpositive(max_keep(VecF{} + kExpFloor<float>, -2.0f * a));
  const VecF q = 2.0f * e / (1.0f + e);
  slope = a < 1.0f ? 1.0f - small * small : q * (2.0f - q);
  return a < 1.0f ? small : copy_sign(1.0f - q, v);
}
VEC_FN VecD tanh(VecD v, VecD& slope) {
  for (int64_t i = 0; i < kLanes<double>; ++i) v[i] = std::tanh(v[i]);
  slope = (1.0 - v) * (1.0 + v);
  return v;
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
