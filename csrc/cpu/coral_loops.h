// Inner loops of CORAL; compiled once for each instruction set by for_each_isa.h.

// Centre `width` columns of x (rows × columns, row stride `stride`) into `centred`, and leave their means in `means`.
// The sum runs in float64 and the mean is subtracted in two parts, so that features far from zero lose nothing.
template <typename T>
void centre_columns(const T* x, int64_t rows, int64_t stride, int64_t width, T* centred, int64_t centred_stride, double* means) {
  constexpr int64_t block = 64;
  for (int64_t begin = 0; begin < width; begin += block) {
    const int64_t columns = width - begin < block ? width - begin : block;
    double sum[block] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const T* values = x + row * stride + begin;
#pragma omp simd
      for (int64_t column = 0; column < columns; ++column) sum[column] += static_cast<double>(values[column]);
    }
    const double divisor = static_cast<double>(rows);
    T mean[block], rest[block];  // the rest is what lies below the last digit of T
#pragma omp simd
    for (int64_t column = 0; column < columns; ++column) {
      const double exact = sum[column] / divisor;
      mean[column] = static_cast<T>(exact);
      rest[column] = static_cast<T>(exact - static_cast<double>(mean[column]));
    }
    if (sizeof(T) == sizeof(double)) {  // float64 has no wider sum to take it from
      for (int64_t row = 0; row < rows; ++row) {
        const T* values = x + row * stride + begin;
#pragma omp simd
        for (int64_t column = 0; column < columns; ++column) rest[column] += values[column] - mean[column];
      }
      for (int64_t column = 0; column < columns; ++column) rest[column] /= static_cast<T>(rows);
    }
    for (int64_t column = 0; column < columns; ++column) {
      means[begin + column] = static_cast<double>(mean[column]) + static_cast<double>(rest[column]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const T* values = x + row * stride + begin;
      T* to = centred + row * centred_stride + begin;
#pragma omp simd
      for (int64_t column = 0; column < columns; ++column) to[column] = (values[column] - mean[column]) - rest[column];
    }
  }
}

// Sum of squares in float64 of a rows × columns block.
template <typename T>
void sum_of_squares(const T* x, int64_t rows, int64_t columns, int64_t stride, double* result) {
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* values = x + row * stride;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t column = 0; column < columns; ++column) {
      const double value = static_cast<double>(values[column]);
      sum += value * value;
    }
    total += sum;
  }
  *result = total;
}
