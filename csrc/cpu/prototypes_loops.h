// Inner loops of the prototypical loss; compiled once for each instruction set by for_each_isa.h.
//
// Distances and their gradients are taken from the differences q − p, four classes at a time: exact where the expansion
// ‖q‖² − 2q·p + ‖p‖² would cancel, and one load of q serves four sums.

constexpr int64_t classes_at_a_time = 4;

// Rows c ... c + 3 of p; past the end the last one again, whose sum is dropped.
#define FASTDA_FOUR_ROWS(p, c, C, D)                                                       \
  const T* p0 = (p) + (c) * (D);                                                           \
  const T* p1 = (p) + std::min((c) + 1, (C)-1) * (D);                                      \
  const T* p2 = (p) + std::min((c) + 2, (C)-1) * (D);                                      \
  const T* p3 = (p) + std::min((c) + 3, (C)-1) * (D);

// Σ(q − p)² of one query and all classes.
template <typename T>
void squared_distances(const T* q, const T* p, int64_t C, int64_t D, T* out) {
  for (int64_t c = 0; c < C; c += classes_at_a_time) {
    FASTDA_FOUR_ROWS(p, c, C, D)
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t d = 0; d < D; ++d) {
      const T x0 = q[d] - p0[d], x1 = q[d] - p1[d], x2 = q[d] - p2[d], x3 = q[d] - p3[d];
      s0 += x0 * x0;
      s1 += x1 * x1;
      s2 += x2 * x2;
      s3 += x3 * x3;
    }
    const T sums[classes_at_a_time] = {s0, s1, s2, s3};
    for (int64_t i = 0; i < std::min(classes_at_a_time, C - c); ++i) out[c + i] = sums[i];
  }
}

// q·p of one query and all classes.
template <typename T>
void products(const T* q, const T* p, int64_t C, int64_t D, T* out) {
  for (int64_t c = 0; c < C; c += classes_at_a_time) {
    FASTDA_FOUR_ROWS(p, c, C, D)
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t d = 0; d < D; ++d) {
      s0 += q[d] * p0[d];
      s1 += q[d] * p1[d];
      s2 += q[d] * p2[d];
      s3 += q[d] * p3[d];
    }
    const T sums[classes_at_a_time] = {s0, s1, s2, s3};
    for (int64_t i = 0; i < std::min(classes_at_a_time, C - c); ++i) out[c + i] = sums[i];
  }
}

// out = Σ_r w_r (x − y_r), or Σ_r w_r y_r where x is null; the weights lie `stride` apart. Rows that `skip` marks are left out,
// so that the NaN of an empty class reaches nobody; null skips none.
template <typename T>
void weighted_sum(const T* x, const T* y, const T* weights, int64_t stride, const uint8_t* skip, int64_t rows, int64_t D,
                  T* out) {
  for (int64_t d = 0; d < D; ++d) out[d] = 0;
  int64_t row[classes_at_a_time];
  for (int64_t r = 0; r < rows;) {
    int64_t found = 0;
    for (; r < rows && found < classes_at_a_time; ++r) {
      if (!skip || !skip[r]) row[found++] = r;
    }
    if (found == 0) break;
    T w[classes_at_a_time];
    const T* from[classes_at_a_time];
    for (int64_t i = 0; i < classes_at_a_time; ++i) {
      w[i] = weights[row[i < found ? i : 0] * stride];
      from[i] = y + row[i < found ? i : 0] * D;
    }
    if (found < classes_at_a_time) {
      for (int64_t i = 0; i < found; ++i) {
        const T wi = w[i];
        const T* yi = from[i];
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) out[d] += wi * (x ? x[d] - yi[d] : yi[d]);
      }
      continue;
    }
    const T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    const T *y0 = from[0], *y1 = from[1], *y2 = from[2], *y3 = from[3];
    if (x) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        out[d] += (w0 * (x[d] - y0[d]) + w1 * (x[d] - y1[d])) + (w2 * (x[d] - y2[d]) + w3 * (x[d] - y3[d]));
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[d] += (w0 * y0[d] + w1 * y1[d]) + (w2 * y2[d] + w3 * y3[d]);
    }
  }
}

// out = Σ of the chosen rows of x.
template <typename T>
void sum_rows(const T* x, int64_t stride, const int64_t* rows, int64_t count, int64_t D, T* out) {
  for (int64_t d = 0; d < D; ++d) out[d] = 0;
  for (int64_t r = 0; r < count; ++r) {
    const T* from = x + rows[r] * stride;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[d] += from[d];
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

#undef FASTDA_FOUR_ROWS
