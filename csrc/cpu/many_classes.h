// What the ops share that compare queries with many classes. Include after prototypes.h.
#pragma once

#include <numeric>
#include <tuple>

namespace fastda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

struct Sizes {
  int64_t batch, queries, classes, features;
  Metric metric;
};

inline Sizes sizes_of(const Tensor& queries, const Tensor& prototypes, c10::string_view metric) {
  check_features("queries", queries);
  check_features("prototypes", prototypes);
  check_same("prototypes", prototypes, "queries", queries);
  return {batch_size(queries, 2), queries.size(-2), prototypes.size(-2), queries.size(-1), metric_of(metric)};
}

// One number for each batch element, dense.
inline Tensor temperatures(const Tensor& temperature, const Sizes& n, at::ScalarType dtype) {
  check_count("temperature", temperature, n.batch);
  return temperature.to(dtype).reshape({n.batch}).contiguous();
}

// Gradients in the accumulation dtype as they are filled, and in the inputs' dtypes when they are done.
struct Results {
  Tensor queries, prototypes;

  Results(const Sizes& n, const Tensor& q, const Tensor& p, bool need_queries, bool need_prototypes)
      : queries(empty_gradient(need_queries, q.sizes(), q, accumulate_type(q.scalar_type()))),
        prototypes(empty_gradient(need_prototypes, p.sizes(), p, accumulate_type(p.scalar_type()))) {
    if (n.queries > 0 && n.classes > 0) return;  // else nothing is going to fill them
    queries.zero_();
    prototypes.zero_();
  }
  template <typename T>
  T* of_queries(const Sizes& n, bool needed, int64_t b) const {
    return needed ? data<T>(queries) + b * n.queries * n.features : nullptr;
  }
  template <typename T>
  T* of_prototypes(const Sizes& n, bool needed, int64_t b) const {
    return needed ? data<T>(prototypes) + b * n.classes * n.features : nullptr;
  }
};

inline double sum_of(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

template <typename F>
void for_ranges(int64_t count, int64_t at_once, const F& each) {
  for (int64_t begin = 0; begin < count; begin += at_once) each(Range{begin, std::min(begin + at_once, count)});
}

// Runs over the queries of a block on all threads, with scratch for one row of `classes` values.
template <typename T, typename F>
void for_queries(Range queries, int64_t classes, const F& each) {
  at::parallel_for(queries.begin, queries.end, thread_grain(classes * 32), [&](int64_t begin, int64_t end) {
    const Scratch<T> row(classes);
    for (int64_t q = begin; q < end; ++q) each(q, row.data());
  });
}

}  // namespace
}  // namespace fastda
