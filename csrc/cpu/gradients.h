// The gradients of queries and prototypes, Σ_k w_k (x − y_k), from a block of weights: by products where there are
// many, else as sums of differences.
#pragma once

#include "near_pairs.h"
#include "points.h"

#include <vector>

namespace fastda {
namespace {

// Weights of rows x and samples y: of row r and sample k at data[r · row + k · step].
template <typename T>
struct Weights {
  const T* data;
  int64_t row, step;
};

// Σ_k w_k (x − y_k) = (x − c) Σ_k w_k − Σ_k w_k (y_k − c), for the cosine Σ_k w_k y_k, where there are many rows x and
// many samples y: some rows and columns. The samples pass by as deep as a panel. totals: Σ_k w_k of each row.
template <typename T>
void sum_packed(const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, const T* centre,
                const double* totals, Metric metric, bool add, Range columns, T* out) {
  const PanelShape shape = panel_shape_of(T());
  const bool product = metric == Metric::cosine;
  const int64_t panels = blocks(columns.size(), shape.columns);
  const int64_t at_once = std::min(shape.depth, blocks(samples.size(), shape.rows) * shape.rows);
  const int64_t panel_size = at_once * shape.columns;
  const int64_t some_rows = 2 * shape.rows;  // whose weights stay in the first cache
  const Scratch<T> weights(some_rows * shape.depth), packed(panels * panel_size);
  for (int64_t k = samples.begin; k < samples.end; k += at_once) {
    const int64_t some = std::min(at_once, samples.end - k);
    const bool last = k + some == samples.end;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t d = columns.begin + panel * shape.columns;
      const int64_t width = blocks(std::min(shape.columns, columns.end - d), shape.rows) * shape.rows;
      FASTDA_RUN(pack_below(y.row(k) + d, y.stride(), some, centre + d, width, packed.data() + panel * panel_size));
    }
    for (int64_t i = 0; i < rows.size(); i += some_rows) {
      const int64_t count = std::min(some_rows, rows.size() - i);
      for (int64_t block = 0; block < count; block += shape.rows) {
        FASTDA_RUN(pack_weights(w.data + (i + block) * w.row + (k - samples.begin) * w.step, w.row, w.step,
                                std::min(shape.rows, count - block), some, weights.data() + block * shape.depth));
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t d = columns.begin + panel * shape.columns, width = std::min(shape.columns, columns.end - d);
        FASTDA_RUN(weigh_panel(product, w.row != 1, weights.data(), count, packed.data() + panel * panel_size, some,
                               x.row(rows.begin + i) + d, x.stride(), last && !product ? totals + i : nullptr,
                               centre + d, width, add || k > samples.begin, out + i * x.features() + d, x.features()));
      }
    }
  }
}

// The same, on all threads: each takes some rows, or some columns where there are more samples to pack than rows.
template <typename T>
void sum_packed(const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, const T* centre,
                Metric metric, bool add, T* out) {
  std::vector<double> totals(rows.size(), 0);
  if (metric != Metric::cosine) {
    at::parallel_for(0, rows.size(), thread_grain(samples.size()), [&](int64_t begin, int64_t end) {
      FASTDA_RUN(totals_of_weights(w.data + begin * w.row, w.row, w.step, end - begin, samples.size(),
                                   totals.data() + begin));
    });
  }
  const int64_t lanes = panel_shape_of(T()).rows;
  const bool by_row = rows.size() > samples.size();
  const int64_t count = by_row ? rows.size() : x.features();
  const int64_t work = samples.size() * lanes * (by_row ? x.features() : rows.size());
  at::parallel_for(0, blocks(count, lanes), thread_grain(work), [&](int64_t begin, int64_t end) {
    const FlushToZero flush;
    const Range part{begin * lanes, std::min(end * lanes, count)};
    const Range some = by_row ? part : Range{0, rows.size()}, columns = by_row ? Range{0, x.features()} : part;
    sum_packed(x, {rows.begin + some.begin, rows.begin + some.end}, y, samples,
               {w.data + some.begin * w.row, w.row, w.step}, centre, totals.data() + some.begin, metric, add, columns,
               out + some.begin * x.features());
  });
}

// out = Σ_k w_k (x − y_k), for the cosine Σ_k w_k y_k, for some rows x and some samples y, or added to it. out is
// dense; where it goes past the caches, aligned to their lines, its rows whole lines.
template <typename T>
void sum_differences(const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, Metric metric,
                     Put put, T* out) {
  // Where rows outnumber samples, rows pass by and the samples stay; else the other way round.
  constexpr int64_t few_rows = 10, many_rows = 120;
  const bool by_row = rows.size() >= samples.size();
  const int64_t most_rows = by_row ? few_rows : many_rows, count = samples.size();
  const int64_t most_columns = by_row ? std::max<int64_t>(x.depth(), 1) : 8 * vector_bytes / sizeof(T);
  const int64_t row_blocks = blocks(rows.size(), most_rows), column_blocks = blocks(x.depth(), most_columns);
  const int64_t work = std::min(rows.size(), most_rows) * most_columns * count;
  at::parallel_for(0, row_blocks * column_blocks, thread_grain(work), [&](int64_t begin, int64_t end) {
    const FlushToZero flush;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % row_blocks * most_rows, column = i / row_blocks * most_columns;
      FASTDA_RUN(sum_samples_of(metric == Metric::cosine, x.row(rows.begin + row), x.stride(),
                                std::min(most_rows, rows.size() - row), w.data + row * w.row, w.row, w.step,
                                y.row(samples.begin), y.stride(), count, column,
                                std::min(column + most_columns, x.depth()), x.features(), put,
                                out + row * x.features(), x.features()));
    }
  });
}

inline Put put_or_add(bool add) { return add ? Put::add : Put::store; }

// Where a result goes that is written once.
template <typename T>
Put put_once(const Tensor& result, const T* first) {
  constexpr int64_t large = 8 << 20;  // bytes, more than a core has of the caches near it
  const bool lines = result.size(-1) * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(first) % 64 == 0;
  return lines && result.numel() * static_cast<int64_t>(sizeof(T)) >= large ? Put::stream : Put::store;
}

// Between the rows of a block of distances to so many classes: an odd number of cache lines, so that the columns of a
// block do not fall into the same sets of the first cache.
template <typename T>
int64_t row_stride(int64_t classes) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = blocks(classes, line);
  return (lines + 1 - lines % 2) * line;
}

// Gradients from a block of weights, weights[(q − queries.begin) · stride + c], and its near pairs, whose weights are
// left out of it; null for one that is not needed. Where each is too little for several threads, but both are enough,
// they are found side by side.
template <typename T>
void gradients_from_weights(const Points<T>& q, Range queries, const Points<T>& p, const T* weights, int64_t stride,
                            const NearPairs<T>& near, Metric metric, Put put_queries, T* grad_queries,
                            Put put_prototypes, T* grad_prototypes) {
  const int64_t classes = p.count(), work = queries.size() * classes * q.depth();
  const bool packed = worth_summing_products(queries.size(), classes, q.features()) && !near.too_many() &&
                      q.is_finite() && p.is_finite();
  const std::vector<T> centre = packed ? centre_for(q, queries, metric) : std::vector<T>();
  const auto sum = [&](const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, Put put,
                       T* out) {
    if (packed) {
      sum_packed(x, rows, y, samples, w, centre.data(), metric, put == Put::add, out);
    } else {
      sum_differences(x, rows, y, samples, w, metric, put, out);
    }
  };
  T* of_queries = grad_queries ? grad_queries + queries.begin * q.features() : nullptr;
  const bool side_by_side = grad_queries && grad_prototypes && work < worth_a_thread && 2 * work >= worth_a_thread;
  at::parallel_for(0, 2, side_by_side ? 1 : 2, [&](int64_t begin, int64_t end) {
    if (begin == 0 && grad_queries) sum(q, queries, p, {0, classes}, {weights, stride, 1}, put_queries, of_queries);
    if (end == 2 && grad_prototypes) {
      sum(p, {0, classes}, q, queries, {weights, 1, stride}, put_prototypes, grad_prototypes);
    }
  });
  near.add(q, queries, p, of_queries, grad_prototypes);
}

}  // namespace
}  // namespace fastda
