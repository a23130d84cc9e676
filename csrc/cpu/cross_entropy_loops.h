// Inner loops of the cross-entropy over many classes; compiled once for each instruction set by for_each_isa.h.
#include "prototypes_loops.h"

// Adds the logits that count.
template <typename T>
void add_logits(const T* l, const uint8_t* empty, int64_t classes, double* total) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < classes; ++c) sum += empty && empty[c] ? 0.0 : static_cast<double>(l[c]);
  *total += sum;
}

// −d/T; a division costs as much as the rest.
template <typename T>
FASTDA_INLINE T logit(T distance, T temperature) {
  return temperature == 1 ? -distance : -distance / temperature;
}

// The largest logit m of a query and Σ exp(l − m).
template <typename T>
FASTDA_INLINE void softmax_of_query(const T* distances, int64_t classes, T temperature, T* largest, T* sum) {
  T nearest = std::numeric_limits<T>::infinity(), total = 0;
#pragma omp simd reduction(min : nearest)
  for (int64_t c = 0; c < classes; ++c) nearest = distances[c] < nearest ? distances[c] : nearest;
  const T most = logit(nearest, temperature);
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < classes; ++c) total += exponential(logit(distances[c], temperature) - most);
  *largest = most;
  *sum = total;
}

// The largest lane of each vector, for as many vectors as there are lanes.
template <typename T>
FASTDA_INLINE typename Grid<T>::Vector largest_lanes(const T* x) {
  typename Grid<T>::Vector rows[Grid<T>::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Grid<T>::lanes; ++i) rows[i] = Grid<T>::load(x + i * Grid<T>::lanes);
  turn<1, Grid<T>::lanes>(rows, std::make_index_sequence<Grid<T>::lanes>{});
#pragma GCC unroll 16
  for (int i = 1; i < Grid<T>::lanes; ++i) rows[0] = rows[i] > rows[0] ? rows[i] : rows[0];
  return rows[0];
}

// The sum of the lanes of each vector, for as many vectors as there are lanes.
template <typename T>
FASTDA_INLINE void sum_of_lanes(const T* x, T* sums) {
  typename Grid<T>::Vector rows[Grid<T>::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Grid<T>::lanes; ++i) rows[i] = Grid<T>::load(x + i * Grid<T>::lanes);
  sum_lanes<T, Grid<T>::lanes>(rows, sums);
}

// The largest logit m and Σ exp(l − m) of up to as many queries of a tile as there are lanes: what is summed or
// compared within a vector is so for all of them at once.
template <typename T>
FASTDA_INLINE void softmax_of_lanes(const T* tile, int64_t queries, T temperature, T* all_largest, T* all_sums) {
  constexpr int64_t columns = Panel<T>::columns, lanes = Panel<T>::lanes;
  T parts[lanes * lanes], largest[lanes], sums[lanes];
  for (int64_t i = 0; i < lanes; ++i) {
    const T* d = tile + least(i, queries - 1) * columns;
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      T nearest = d[j];
      for (int64_t v = lanes; v < columns; v += lanes) nearest = d[v + j] < nearest ? d[v + j] : nearest;
      parts[i * lanes + j] = -nearest;
    }
  }
  Grid<T>::store(largest, largest_lanes(parts));
  for (int64_t i = 0; i < lanes; ++i) {
    const T* d = tile + least(i, queries - 1) * columns;
    const T most = largest[i] = logit(-largest[i], temperature);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      T sum = 0;
      for (int64_t v = 0; v < columns; v += lanes) sum += exponential(logit(d[v + j], temperature) - most);
      parts[i * lanes + j] = sum;
    }
  }
  sum_of_lanes(parts, sums);
  for (int64_t i = 0; i < queries; ++i) all_largest[i] = largest[i], all_sums[i] = sums[i];
}

// The same of each query of a tile of finite distances.
template <typename T>
void softmax_of_tile(const T* tile, int64_t queries, int64_t classes, T temperature, T* largest, T* sums) {
  constexpr int64_t columns = Panel<T>::columns, lanes = Panel<T>::lanes;
  if (classes == columns) {
    for (int64_t q = 0; q < queries; q += lanes) {
      softmax_of_lanes(tile + q * columns, least(lanes, queries - q), temperature, largest + q, sums + q);
    }
  } else {
    for (int64_t q = 0; q < queries; ++q) {
      softmax_of_query(tile + q * columns, classes, temperature, largest + q, sums + q);
    }
  }
}

// The same of all classes from those of some parts of them, which lie `stride` apart.
template <typename T>
void join_parts(const T* largest, const T* sums, int64_t parts, int64_t stride, int64_t queries, T* all_largest,
                T* all_sums) {
  for (int64_t q = 0; q < queries; ++q) all_largest[q] = largest[q], all_sums[q] = 0;
  for (int64_t i = 1; i < parts; ++i) {
    const T* more = largest + i * stride;
#pragma omp simd
    for (int64_t q = 0; q < queries; ++q) all_largest[q] = more[q] > all_largest[q] ? more[q] : all_largest[q];
  }
  for (int64_t i = 0; i < parts; ++i, largest += stride, sums += stride) {
#pragma omp simd
    for (int64_t q = 0; q < queries; ++q) all_sums[q] += sums[q] * exponential(largest[q] - all_largest[q]);
  }
}

// Weights from the distances of query i to some classes, from `first` on. Adds ∂L/∂T to the slope, where it is not
// null.
template <typename T>
FASTDA_INLINE void weigh_query(const LossGradient<T>& of, int64_t i, int64_t first, int64_t classes,
                               const uint8_t* empty, const T* distances, T* of_logits, double* slope, T* weights) {
  const T largest = of.largest[i], log_sum = of.log_sum[i], of_loss = of.of_losses[i], spread = of.spread;
  const T temperature = of.temperature, scale = -1 / temperature;
#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) {
    of_logits[c] = of_loss * (exponential((logit(distances[c], temperature) - largest) - log_sum) - spread);
  }
  const int64_t label = of.labels[i] - first;
  if (label >= 0 && label < classes) {  // from the start again: 0 where the probability is what it should be
    const T p = exponential((logit(distances[label], temperature) - largest) - log_sum);
    of_logits[label] = of_loss * ((p - spread) - of.on_target);
  }
  for (int64_t c = 0; empty && c < classes; ++c) {
    if (empty[c]) of_logits[c] = 0;
  }
  const T nearest = of.all_present ? -largest * temperature : T(0);
  if (slope) *slope += slope_of_query(distances, classes, temperature, nearest, of_logits);
#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) weights[c] = weight(of_logits[c] * scale, distances[c], of.metric);
}

// The distances of a query become weights.
template <typename T>
void weigh_row(const LossGradient<T>& of, int64_t i, int64_t first, int64_t classes, const uint8_t* empty, T* row,
               T* scratch, double* slope) {
  weigh_query(of, i, first, classes, empty, row, scratch, slope, row);
}

// Weights from some queries of a tile, in another tile.
template <typename T>
void weigh_tile(const LossGradient<T>& of, int64_t query, int64_t queries, int64_t first, int64_t classes,
                const T* tile, double* slopes, T* weights) {
  constexpr int64_t columns = Panel<T>::columns;
  T of_logits[columns];
  for (int64_t i = 0; i < queries; ++i) {
    double* slope = slopes ? slopes + query + i : nullptr;
    const T* distances = tile + i * columns;
    if (classes == columns) {  // known to the compiler, the rows need no loop
      weigh_query<T>(of, query + i, first, columns, nullptr, distances, of_logits, slope, weights + i * columns);
    } else {
      weigh_query<T>(of, query + i, first, classes, nullptr, distances, of_logits, slope, weights + i * columns);
    }
  }
}

// Adds the weights of some queries of a tile to their totals.
template <typename T>
void add_totals_of_tile(const T* weights, int64_t queries, int64_t classes, double* totals) {
  constexpr int64_t columns = Panel<T>::columns, lanes = Panel<T>::lanes;
  if (classes != columns) return totals_of_weights(weights, columns, 1, queries, classes, totals);
  for (int64_t i = 0; i < queries; i += lanes) {
    T parts[lanes * lanes], sums[lanes];
    for (int64_t r = 0; r < lanes; ++r) {
      const T* w = weights + least(i + r, queries - 1) * columns;
#pragma omp simd
      for (int64_t j = 0; j < lanes; ++j) {
        T sum = 0;
        for (int64_t v = 0; v < columns; v += lanes) sum += w[v + j];
        parts[r * lanes + j] = sum;
      }
    }
    sum_of_lanes(parts, sums);
    for (int64_t r = 0; r < least(lanes, queries - i); ++r) totals[i + r] += static_cast<double>(sums[r]);
  }
}
