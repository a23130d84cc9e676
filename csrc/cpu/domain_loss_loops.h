// Inner loops of the domain-adversarial loss; compiled once for each instruction set by for_each_isa.h.
//
// The loss of a logit u is softplus(u) = max(u, 0) + log(1 + e), its derivative σ(u), both from the one e = exp(−|u|),
// which never overflows. exp and log are series without a branch, so that they run in vectors; both err by about 1 ulp.

template <typename T>
struct Float;

template <>
struct Float<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int exp_terms = 7, log_terms = 7;
  static constexpr float rounder = 12582912.0f;  // 1.5·2^23: adding it rounds to a whole number, kept in the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float most = 110.0f;  // exp(−110) is 0
};

template <>
struct Float<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int exp_terms = 13, log_terms = 15;
  static constexpr double rounder = 6755399441055744.0;  // 1.5·2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double most = 750.0;
};

// 2^n, where n was rounded by adding the rounder.
template <typename T>
inline T power_of_two(T rounded) {
  typename Float<T>::Bits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + Float<T>::bias) << Float<T>::mantissa;
  T power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// 1 + r/k·(1 + r/(k + 1)·(…)) up to the last term. Recursion, so that no loop stands in the way of vectors.
template <int k, typename T>
inline T exp_series(T r) {
  if constexpr (k > Float<T>::exp_terms) return 1;
  else return 1 + r * (T(1) / k) * exp_series<k + 1>(r);
}

// 1/(2k + 1) + s/(2k + 3) + …
template <int k, typename T>
inline T log_series(T square) {
  if constexpr (k > Float<T>::log_terms) return 0;
  else return T(1) / (2 * k + 1) + square * log_series<k + 1>(square);
}

// exp(−a) for a ≥ 0: 2^n times the Taylor series of exp(r), |r| ≤ ln 2 / 2. NaN stays NaN.
template <typename T>
inline T exp_of_negative(T a) {
  using F = Float<T>;
  a = a > F::most ? F::most : a;
  const T n = (a * T(-1.4426950408889634) + F::rounder) - F::rounder;
  const T r = (-a - n * F::ln2_high) - n * F::ln2_low;
  const T half = n * T(0.5) + F::rounder;  // in two steps, so that 2^n may be subnormal
  return exp_series<1>(r) * power_of_two(half) * power_of_two((n - (half - F::rounder)) + F::rounder);
}

// log(1 + e) for 0 ≤ e ≤ 1: 2·artanh(z), z = e/(2 + e) ≤ 1/3.
template <typename T>
inline T log_one_plus(T e) {
  const T z = e / (2 + e), square = z * z;
  return 2 * z * log_series<0>(square);
}

// softplus(u), and σ(u) as the slope.
template <typename T>
inline T softplus(T u, T& slope) {
  const T e = exp_of_negative(std::abs(u));
  slope = (u < 0 ? e : T(1)) / (1 + e);
  return (u < 0 ? T(0) : u) + log_one_plus(e);
}

// slope = sign·w·σ(sign·x), Σ w·softplus(sign·x) and Σ w; w is 1 where it is null.
template <typename T>
void domain_terms(const T* x, const T* w, int64_t count, T sign, T* slope, double* loss, double* weight) {
  T loss_sum = 0, weight_sum = 0;
  if (w) {
#pragma omp simd reduction(+ : loss_sum, weight_sum)
    for (int64_t i = 0; i < count; ++i) {
      T likely;
      loss_sum += w[i] * softplus(sign * x[i], likely);
      slope[i] = sign * w[i] * likely;
      weight_sum += w[i];
    }
  } else {
    weight_sum = count;
#pragma omp simd reduction(+ : loss_sum)
    for (int64_t i = 0; i < count; ++i) {
      T likely;
      loss_sum += softplus(sign * x[i], likely);
      slope[i] = sign * likely;
    }
  }
  *loss = loss_sum;
  *weight = weight_sum;
}

// out = factor·slope.
template <typename T>
void scaled(const T* slope, int64_t count, T factor, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = factor * slope[i];
}
