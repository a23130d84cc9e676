// Inner loops of the prototype ops; compiled once for each instruction set by for_each_isa.h.
//
// A row holds one value for each class of a block: sums over features, then distances, logits l = −d/T or what a loss
// makes of them. `empty` marks the classes that do not count; it is null where there are none.
#include "matrix_loops.h"

#include "distance_loops.h"

// e^x for x ≤ 0, to the last digit or two; 0 and numbers too small to be normal included, NaN kept.
inline float exponential(float x) {
  const float bounded = x < -104.0f ? -104.0f : x;
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5·2²³ rounds to a whole number
  const float whole = shifted - 12582912.0f;
  const float r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  const int32_t power = bits - 0x4B400000,
                half = power >> 1;  // 2^power in two factors: it may be below the normal numbers
  const uint32_t first_bits = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t second_bits = static_cast<uint32_t>(power - half + 127) << 23;
  float first, second;
  __builtin_memcpy(&first, &first_bits, sizeof(first));
  __builtin_memcpy(&second, &second_bits, sizeof(second));
  return y * first * second;
}

inline double exponential(double x) { return std::exp(x); }

// −d/T, −Inf for an empty class.
template <typename T>
void logits(const T* distances, const uint8_t* empty, int64_t classes, T temperature, T* out) {
  if (temperature == 1) {  // a division costs as much as the rest
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) out[c] = -distances[c];
  } else {
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) out[c] = -distances[c] / temperature;
  }
  for (int64_t c = 0; empty && c < classes; ++c) {
    if (empty[c]) out[c] = -std::numeric_limits<T>::infinity();
  }
}

// The largest logit m and Σ exp(l − m), of a row and of what was seen before it: begin with −Inf and 0.
template <typename T>
void join_softmax(const T* l, int64_t classes, T* largest, T* sum) {
  const T before = *largest, lowest = -std::numeric_limits<T>::infinity();
  T most = before;
#pragma omp simd reduction(max : most)
  for (int64_t c = 0; c < classes; ++c) most = l[c] > most ? l[c] : most;
  const T shift = most == lowest ? T(0) : most;  // nothing yet but −Inf: exp gives 0
  T more = 0;
#pragma omp simd reduction(+ : more)
  for (int64_t c = 0; c < classes; ++c) more += exponential(l[c] - shift);
  *sum = *sum * exponential(before - shift) + more;
  *largest = most;
}

// Logits become log-probabilities or probabilities.
template <typename T>
void probabilities(T* l, int64_t classes, T largest, T log_sum, bool log) {
  if (log) {
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) l[c] = (l[c] - largest) - log_sum;
  } else {
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) l[c] = exponential((l[c] - largest) - log_sum);
  }
}

// What a query's difference q − p (or the prototype's direction) is multiplied by in the gradient, where `of_distance`
// is ∂L/∂d.
template <typename T>
T weight(T of_distance, T distance, Metric metric) {
  if (metric == Metric::sqeuclidean) return 2 * of_distance;
  if (metric == Metric::cosine) return -of_distance;
  return distance == 0 ? T(0) : of_distance / distance;
}

// ∂L/∂T of a query, by ∂L/∂l. `nearest` may be taken off the distances where the ∂L/∂l add up to 0: less is left to
// cancel.
template <typename T>
double slope_of_query(const T* distances, int64_t classes, T temperature, T nearest, const T* of_logits) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < classes; ++c)
    total += static_cast<double>(of_logits[c]) * static_cast<double>(distances[c] - nearest);
  return total / (static_cast<double>(temperature) * static_cast<double>(temperature));
}

// Distances become weights, by ∂L/∂l; ∂L/∂T is stored in the slope, where it is not null.
template <typename T>
void weights_from_logits(T* row, const uint8_t* empty, int64_t classes, Metric metric, T temperature, T nearest,
                         T* of_logit, double* slope) {
  for (int64_t c = 0; empty && c < classes; ++c) {
    if (empty[c]) of_logit[c] = 0;
  }
  if (slope) *slope = slope_of_query(row, classes, temperature, nearest, of_logit);
  const T scale = -1 / temperature;
#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) row[c] = weight(of_logit[c] * scale, row[c], metric);
}

// Few classes: a lane holds one query, and a vector the same class of several.
template <typename T>
struct Lanes {
  static constexpr int64_t count = Grid<T>::lanes;
  static constexpr T infinity = std::numeric_limits<T>::infinity();

  using Vector = typename Grid<T>::Vector;

  // Rows of up to `count` queries turned over, and back: as many classes at once as there are lanes, the rest of them
  // one by one.
  static void turn_over(const T* rows, int64_t queries, int64_t classes, T* turned) {
    int64_t c = 0;
    for (; c + count <= classes; c += count) {
      Vector x[count];
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) x[i] = Grid<T>::load(rows + least(i, queries - 1) * classes + c);
      turn<1, count>(x, std::make_index_sequence<count>{});
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) Grid<T>::store(turned + (c + i) * count, x[i]);
    }
    for (; c < classes; ++c) {
      for (int64_t i = 0; i < count; ++i) turned[c * count + i] = rows[least(i, queries - 1) * classes + c];
    }
  }
  static void turn_back(const T* turned, int64_t queries, int64_t classes, T* rows) {
    int64_t c = 0;
    for (; c + count <= classes; c += count) {
      Vector x[count];
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) x[i] = Grid<T>::load(turned + (c + i) * count);
      turn<1, count>(x, std::make_index_sequence<count>{});
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) {
        if (i < queries) Grid<T>::store(rows + i * classes + c, x[i]);
      }
    }
    for (; c < classes; ++c) {
      for (int64_t i = 0; i < queries; ++i) rows[i * classes + c] = turned[c * count + i];
    }
  }

  // The distances of up to `count` queries turned over, exp(l − largest) of their logits, and its sum.
  static void exponentials(const T* rows, int64_t queries, const uint8_t* empty, int64_t classes, T temperature,
                           T* distances, T* l, T* largest, T* sum) {
    T shift[count];
    for (int64_t i = 0; i < count; ++i) largest[i] = -infinity, sum[i] = 0;
    turn_over(rows, queries, classes, distances);
    for (int64_t c = 0; c < classes; ++c) {
      T *d = distances + c * count, *of_class = l + c * count;
      logits<T>(d, nullptr, count, temperature, of_class);
      for (int64_t i = 0; empty && empty[c] && i < count; ++i) of_class[i] = -infinity;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) largest[i] = of_class[i] > largest[i] ? of_class[i] : largest[i];
    }
    for (int64_t i = 0; i < count; ++i) shift[i] = largest[i] == -infinity ? T(0) : largest[i];
    constexpr int64_t block = 8;  // of classes: sums of sums round less than one long sum
    for (int64_t first = 0; first < classes; first += block) {
      T part[count] = {};
      for (int64_t c = first; c < least(first + block, classes); ++c) {
        T* of_class = l + c * count;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) of_class[i] = exponential(of_class[i] - shift[i]);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) part[i] += of_class[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
    }
  }

  // log Σ exp(l − largest), NaN where there is nothing to normalise.
  static T log_of_sum(T largest, T sum) {
    return std::abs(largest) == infinity ? std::numeric_limits<T>::quiet_NaN() : std::log(sum);
  }
};

// Distances of some queries to few classes become log-probabilities or probabilities, in place. Scratch holds
// 2 · classes vectors.
template <typename T>
void softmax_of_queries(T* rows, const uint8_t* empty, int64_t queries, int64_t classes, T temperature, bool log,
                        T* scratch, T* most, T* log_sums) {
  constexpr int64_t lanes = Lanes<T>::count;
  T* distances = scratch + classes * lanes;
  for (int64_t first = 0; first < queries; first += lanes, rows += lanes * classes) {
    const int64_t count = least(lanes, queries - first);
    T largest[lanes], sum[lanes], log_sum[lanes] = {}, share[lanes];
    Lanes<T>::exponentials(rows, count, empty, classes, temperature, distances, scratch, largest, sum);
    for (int64_t i = 0; i < count; ++i) {
      most[first + i] = largest[i];
      log_sums[first + i] = log_sum[i] = Lanes<T>::log_of_sum(largest[i], sum[i]);
    }
    for (int64_t i = 0; i < lanes; ++i) share[i] = log_sum[i] == log_sum[i] ? 1 / sum[i] : log_sum[i];
    for (int64_t c = 0; c < classes; ++c) {
      T *p = scratch + c * lanes, *d = distances + c * lanes;
      if (log) {
        logits<T>(d, nullptr, lanes, temperature, p);
        for (int64_t i = 0; empty && empty[c] && i < lanes; ++i) p[i] = -Lanes<T>::infinity;
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) p[i] = (p[i] - largest[i]) - log_sum[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) p[i] *= share[i];
      }
    }
    Lanes<T>::turn_back(scratch, count, classes, rows);
  }
}

// The losses of some queries from their distances to few classes, and the weights that follow, in place. Scratch holds
// 2 · classes vectors.
template <typename T>
void losses_of_queries(T* rows, const uint8_t* empty, int64_t queries, int64_t classes, Metric metric, T temperature,
                       const int64_t* labels, T* scratch, T* losses, T* slopes) {
  constexpr int64_t lanes = Lanes<T>::count;
  const double squared = static_cast<double>(temperature) * static_cast<double>(temperature);
  const T scale = -1 / temperature;
  T* distances = scratch + classes * lanes;
  for (int64_t first = 0; first < queries; first += lanes, rows += lanes * classes) {
    const int64_t count = least(lanes, queries - first);
    T largest[lanes], sum[lanes], share[lanes], nearest[lanes];
    double slope[lanes] = {};
    Lanes<T>::exponentials(rows, count, empty, classes, temperature, distances, scratch, largest, sum);
    for (int64_t i = 0; i < lanes; ++i) {
      const T log_sum = Lanes<T>::log_of_sum(largest[i], sum[i]);
      share[i] = log_sum == log_sum ? 1 / sum[i] : log_sum;
      nearest[i] = empty ? T(0) : -largest[i] * temperature;
      if (i >= count) continue;
      const int64_t label = labels[first + i];
      const T of_label = empty && empty[label] ? -Lanes<T>::infinity : -distances[label * lanes + i] / temperature;
      losses[first + i] = -((of_label - largest[i]) - log_sum);
    }
    for (int64_t c = 0; c < classes; ++c) {
      T* p = scratch + c * lanes;
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) p[i] *= share[i];
    }
    for (int64_t i = 0; i < count; ++i) scratch[labels[first + i] * lanes + i] -= 1;
    for (int64_t c = 0; c < classes; ++c) {
      T *w = scratch + c * lanes, *d = distances + c * lanes;
      for (int64_t i = 0; empty && empty[c] && i < lanes; ++i) w[i] = 0;
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        slope[i] += static_cast<double>(w[i]) * static_cast<double>(d[i] - nearest[i]);
        w[i] = weight(w[i] * scale, d[i], metric);
      }
    }
    Lanes<T>::turn_back(scratch, count, classes, rows);
    for (int64_t i = 0; i < count; ++i) slopes[first + i] = static_cast<T>(slope[i] / squared);
  }
}

// Distances become weights, by ∂L/∂d.
template <typename T>
void weights_from_distances(T* row, const uint8_t* empty, int64_t classes, Metric metric, const T* of_distance) {
#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) row[c] = weight(of_distance[c], row[c], metric);
  for (int64_t c = 0; empty && c < classes; ++c) {
    if (empty[c]) row[c] = 0;
  }
}

// ∂L/∂l of a softmax (or its logarithm) from its probabilities and ∂L/∂p (∂L/∂log p). What the probabilities add up to
// is 1 but for what their common factor was rounded by, which falls out.
template <typename T>
void through_softmax(const T* p, const T* grad, int64_t classes, bool log, T* of_logit) {
  double products = 0, sum = 0;
#pragma omp simd reduction(+ : products, sum)
  for (int64_t c = 0; c < classes; ++c) {
    products += static_cast<double>(log ? grad[c] : grad[c] * p[c]);
    sum += static_cast<double>(p[c]);
  }
  const T total = static_cast<T>(products / sum);
#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) of_logit[c] = log ? grad[c] - p[c] * total : p[c] * (grad[c] - total);
}

template <typename T>
void all_finite(const T* x, int64_t count, bool* result) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * 0;
  *result = sum == 0;
}

// a comes before b: numbers in order, NaN last.
template <typename T>
bool nearer(T a, T b) {
  return a < b || (b != b && a == a);
}

// Keeps the k nearest classes of those seen so far, in order, `kept` of them until there are k. Of equals the first one
// stays.
template <typename T>
void keep_nearest(const T* distances, const uint8_t* empty, int64_t classes, int64_t first, int64_t k, T* best,
                  int64_t* index, int64_t* kept) {
  constexpr int64_t block = 64 / sizeof(T);
  for (int64_t begin = 0; begin < classes; begin += block) {
    const int64_t end = least(begin + block, classes);
    if (*kept == k && end - begin == block) {
      const T worst = best[k - 1];
      int none = 1;
#pragma omp simd reduction(& : none)
      for (int64_t c = 0; c < block; ++c) none &= distances[begin + c] >= worst;
      if (none) continue;
    }
    for (int64_t c = begin; c < end; ++c) {
      if ((empty && empty[c]) || (*kept == k && !nearer(distances[c], best[k - 1]))) continue;
      int64_t at = *kept < k ? (*kept)++ : k - 1;
      for (; at > 0 && nearer(distances[c], best[at - 1]); --at) best[at] = best[at - 1], index[at] = index[at - 1];
      best[at] = distances[c];
      index[at] = first + c;
    }
  }
}

// out = the mean of the chosen rows of x, summed in their order.
template <typename T>
void mean_of_rows(const T* x, int64_t stride, const int64_t* rows, int64_t count, int64_t columns, T* out) {
  using G = Grid<T>;
  constexpr int64_t vectors = 8;
  const T divisor = static_cast<T>(count);
  int64_t d = 0;
  for (; d + vectors * G::lanes <= columns; d += vectors * G::lanes) {
    typename G::Vector sum[vectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) sum[v] = G::load(x + rows[0] * stride + d + v * G::lanes);
    for (int64_t r = 1; r < count; ++r) {
      const T* from = x + rows[r] * stride + d;
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) sum[v] += G::load(from + v * G::lanes);
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) G::store(out + d + v * G::lanes, sum[v] / divisor);
  }
  for (int64_t c = d; c < columns; ++c) out[c] = x[rows[0] * stride + c];
  for (int64_t r = 1; r < count; ++r) {
    for (int64_t c = d; c < columns; ++c) out[c] += x[rows[r] * stride + c];
  }
  for (int64_t c = d; c < columns; ++c) out[c] /= divisor;
}

template <typename T>
void add_share(const T* x, T share, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += x[i] * share;
}

template <typename T>
void divide(const T* x, T divisor, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] / divisor;
}

// Rows of x, each times a factor of its own (factor_step 1) or all times one (0).
template <typename T>
void scale_rows(const T* x, int64_t rows, int64_t columns, const T* factors, int64_t factor_step, T share, T* out,
                int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, x += columns, out += out_stride) {
    const T factor = factors[r * factor_step] * share;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) out[c] = x[c] * factor;
  }
}

// y = x/‖x‖ and its norm; 0 for the zero vector. Divided by the largest component first, which neither overflows nor
// underflows when squared.
template <typename T>
void direction(const T* x, int64_t D, T* y, T* norm) {
  T largest = 0;
  for (int64_t d = 0; d < D; ++d) largest = std::abs(x[d]) > largest || std::isnan(x[d]) ? std::abs(x[d]) : largest;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += (x[d] / largest) * (x[d] / largest);
  const T length = largest == 0 ? T(0) : std::sqrt(sum);
  for (int64_t d = 0; d < D; ++d) y[d] = length == 0 ? T(0) : x[d] / largest / length;
  *norm = length * largest;
}

// The gradient through x/‖x‖: g becomes (g − (g·y) y)/‖x‖, 0 at the zero vector.
template <typename T>
void through_direction(const T* y, T norm, int64_t D, T* g) {
  T along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t d = 0; d < D; ++d) along += g[d] * y[d];
  for (int64_t d = 0; d < D; ++d) g[d] = norm == 0 ? T(0) : (g[d] - along * y[d]) / norm;
}
