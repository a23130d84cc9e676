// Inner loops of CORAL; compiled once for each instruction set by for_each_isa.h.
#include "matrix_loops.h"

// Panels first to last of the samples of both domains, one above the other, turned over: a sample is a column.
template <typename T>
void pack_stacked_rows(const T* source, int64_t source_rows, int64_t source_stride, const double* source_mean,
                       const T* target, int64_t target_rows, int64_t target_stride, const double* target_mean,
                       int64_t depth, int64_t first, int64_t last, T* packed) {
  constexpr int64_t width = Tile<T>::columns;
  const int64_t samples = source_rows + target_rows, begin = first * width, end = least(last * width, samples);
  const int64_t end_of_source = least(end, source_rows), begin_of_target = begin < source_rows ? source_rows : begin;
  if (begin < end_of_source) {
    pack_rows<T>(source + begin * source_stride, source_stride, end_of_source - begin, depth, source_mean, packed,
                 begin);
  }
  if (begin_of_target < end) {
    pack_rows<T>(target + (begin_of_target - source_rows) * target_stride, target_stride, end - begin_of_target, depth,
                 target_mean, packed, begin_of_target);
  }
  if (first < last && end == samples) fill_last_panel<T>(packed, depth, samples);
}

// A domain's rows of the Gram matrix, in panels for multiply_panels.
template <typename T>
void pack_gram(const T* gram, int64_t samples, int64_t first, int64_t rows, T* packed) {
  pack_columns<T, Tile<T>::rows>(gram + first, samples, samples, rows, nullptr, T(1), packed, samples, 0);
}

// Some columns of the gradient: those of weight · G V Z for the rows of a domain, where V is the diagonal of
// source_weight and −target_weight. gram_of_source and gram_of_target are packed, null where no gradient is needed.
template <typename T>
void gram_gradient(const T* source, int64_t source_rows, int64_t source_stride, const double* source_mean,
                   double source_weight, const T* target, int64_t target_rows, int64_t target_stride,
                   const double* target_mean, double target_weight, const T* gram_of_source, const T* gram_of_target,
                   double coefficient, int64_t columns, int64_t depth, T* scratch, T* grad_source, T* grad_target,
                   int64_t grad_stride) {
  const int64_t samples = source_rows + target_rows;
  for (int64_t k = 0; k < samples; k += depth) {
    const int64_t count = least(depth, samples - k), of_source = k < source_rows ? least(count, source_rows - k) : 0;
    if (of_source > 0) {
      pack_columns<T>(source + k * source_stride, source_stride, of_source, columns, source_mean,
                      static_cast<T>(source_weight), scratch, count, 0);
    }
    if (of_source < count) {
      pack_columns<T>(target + (k + of_source - source_rows) * target_stride, target_stride, count - of_source, columns,
                      target_mean, static_cast<T>(-target_weight), scratch, count, of_source);
    }
    if (gram_of_source) {
      multiply_panels(gram_of_source + k * Tile<T>::rows, samples, source_rows, scratch, columns, count,
                      static_cast<T>(coefficient * source_weight), k > 0, grad_source, grad_stride);
    }
    if (gram_of_target) {
      multiply_panels(gram_of_target + k * Tile<T>::rows, samples, target_rows, scratch, columns, count,
                      static_cast<T>(-coefficient * target_weight), k > 0, grad_target, grad_stride);
    }
  }
}
