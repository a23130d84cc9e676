// Distances of queries to prototypes, and the softmax over the classes.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <numeric>
#include <tuple>
#include <utility>

#include "metric.h"

#define FASTDA_LOOPS "prototypes_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "many_classes.h"

namespace fastda {
namespace {

// Queries of a block beside `classes` classes.
int64_t queries_at_once(const Sizes& n, int64_t classes) {
  constexpr int64_t fewest = 16;
  return std::min(n.queries, std::max(fewest, std::min(most_queries, block_values / std::max<int64_t>(classes, 1))));
}

Tensor pairwise_distance(const Tensor& queries, const Tensor& prototypes, c10::string_view metric) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Tensor result = at::empty(batched(queries, 2, {n.queries, n.classes}), queries.options().dtype(dtype));
  const Tensor q = points_of(queries, n.batch), p = points_of(prototypes, n.batch);
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      T* distances = data<T>(result) + b * n.queries * n.classes;
      find_distances(from, {0, n.queries}, to, n.metric, distances, n.classes);
      for (int64_t i = 0; to.empty() && i < n.queries * n.classes; ++i) {
        if (to.is_empty(i % n.classes)) distances[i] = std::numeric_limits<T>::quiet_NaN();
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> pairwise_distance_backward(const Tensor& grad_distances, const Tensor& queries,
                                                      const Tensor& prototypes, c10::string_view metric,
                                                      bool need_queries, bool need_prototypes) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  check_count("grad_distances", grad_distances, n.batch * n.queries * n.classes);
  const Results results(n, queries, prototypes, need_queries, need_prototypes);
  const Tensor q = points_of(queries, n.batch), p = points_of(prototypes, n.batch);
  const Tensor grad = grad_distances.to(accumulate_type(queries.scalar_type())).contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      const T* incoming = grad.const_data_ptr<T>() + b * n.queries * n.classes;
      T *grad_queries = results.of_queries<T>(n, need_queries, b),
        *grad_prototypes = results.of_prototypes<T>(n, need_prototypes, b);
      const int64_t at_once = queries_at_once(n, n.classes), stride = row_stride<T>(n.classes);
      const Scratch<T> weights(at_once * stride);
      for_ranges(n.queries, at_once, [&](Range block) {
        NearPairs<T> near(block.size(), n.classes);
        const bool packs = worth_summing_products(block.size(), n.classes, n.features);
        if (n.metric == Metric::euclidean || (n.metric == Metric::sqeuclidean && packs)) {
          near = find_distances_and_near(from, block, to, n.metric, weights.data(), stride);
        }
        for_queries<T>(block, 0, [&](int64_t i, T*) {
          const FlushToZero flush;
          T* row = weights.data() + (i - block.begin) * stride;
          FASTDA_RUN(weights_from_distances(row, to.empty(), n.classes, n.metric, incoming + i * n.classes));
        });
        near.take(weights.data(), stride);
        gradients_from_weights(from, block, to, weights.data(), stride, near, n.metric, Put::store, grad_queries,
                               put_or_add(block.begin > 0), grad_prototypes);
      });
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (need_prototypes) finish_prototypes(to, grad_prototypes);
    });
  });
  return {gradient_like(results.queries, queries, need_queries),
          gradient_like(results.prototypes, prototypes, need_prototypes)};
}

std::tuple<Tensor, Tensor, Tensor> prototype_softmax(const Tensor& queries, const Tensor& prototypes,
                                                     const Tensor& temperature, c10::string_view metric, bool log) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const auto options = queries.options().dtype(accumulate_type(queries.scalar_type()));
  const Tensor result = at::empty(batched(queries, 2, {n.queries, n.classes}), options);
  const Tensor most = at::empty(batched(queries, 2, {n.queries}), options), log_sums = at::empty(most.sizes(), options);
  const Tensor t = temperatures(temperature, n, options.dtype().toScalarType());
  const Tensor q = points_of(queries, n.batch), p = points_of(prototypes, n.batch);
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      T* rows = data<T>(result) + b * n.queries * n.classes;
      find_distances(from, {0, n.queries}, to, n.metric, rows, n.classes);
      const T temperature = t.const_data_ptr<T>()[b];
      T *largest = data<T>(most) + b * n.queries, *log_sum = data<T>(log_sums) + b * n.queries;
      if (n.classes <= few_classes) {
        for_lanes<T>(n.queries, n.classes, 0, [&](Range some, T* scratch) {
          FASTDA_RUN(softmax_of_queries(rows + some.begin * n.classes, to.empty(), some.size(), n.classes, temperature,
                                        log, scratch, largest + some.begin, log_sum + some.begin));
        });
        return;
      }
      for_queries<T>({0, n.queries}, n.classes, [&](int64_t i, T*) {
        T *row = rows + i * n.classes, sum = 0;
        largest[i] = -std::numeric_limits<T>::infinity();
        FASTDA_RUN(logits(row, to.empty(), n.classes, temperature, row));
        FASTDA_RUN(join_softmax(row, n.classes, largest + i, &sum));
        log_sum[i] = log_of_sum(largest[i], sum);
        FASTDA_RUN(probabilities(row, n.classes, largest[i], log_sum[i], log));
      });
    });
  });
  return {result, most, log_sums};
}

Gradients prototype_softmax_backward(const Tensor& grad_probabilities, const Tensor& queries, const Tensor& prototypes,
                                     const Tensor& temperature, const Tensor& largest, const Tensor& log_sum,
                                     c10::string_view metric, bool log, bool need_queries, bool need_prototypes,
                                     bool need_temperature) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  check_count("grad_probabilities", grad_probabilities, n.batch * n.queries * n.classes);
  check_count("largest", largest, n.batch * n.queries);
  check_count("log_sum", log_sum, n.batch * n.queries);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Results results(n, queries, prototypes, need_queries, need_prototypes);
  const Tensor of_temperature = empty_gradient(need_temperature, temperature.sizes(), temperature, dtype);
  const Tensor t = temperatures(temperature, n, dtype), q = points_of(queries, n.batch),
               p = points_of(prototypes, n.batch);
  const Tensor grad = grad_probabilities.to(dtype).contiguous();
  const Tensor most = largest.to(dtype).contiguous(), log_sums = log_sum.to(dtype).contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      const T* incoming = grad.const_data_ptr<T>() + b * n.queries * n.classes;
      T *grad_queries = results.of_queries<T>(n, need_queries, b),
        *grad_prototypes = results.of_prototypes<T>(n, need_prototypes, b);
      const int64_t at_once = queries_at_once(n, n.classes), stride = row_stride<T>(n.classes);
      const Scratch<T> weights(at_once * stride);
      std::vector<double> slopes(need_temperature ? n.queries : 0);
      for_ranges(n.queries, at_once, [&](Range block) {
        NearPairs<T> near = find_distances_and_near(from, block, to, n.metric, weights.data(), stride);
        for_queries<T>(block, n.classes, [&](int64_t i, T* l) {
          const FlushToZero flush;
          const int64_t at = b * n.queries + i;
          const T temperature = t.const_data_ptr<T>()[b];
          T* row = weights.data() + (i - block.begin) * stride;
          FASTDA_RUN(logits(row, to.empty(), n.classes, temperature, l));
          FASTDA_RUN(
              probabilities(l, n.classes, most.const_data_ptr<T>()[at], log_sums.const_data_ptr<T>()[at], false));
          FASTDA_RUN(through_softmax(l, incoming + i * n.classes, n.classes, log, l));
          const T nearest = to.empty() ? T(0) : -most.const_data_ptr<T>()[at] * temperature;
          double* slope = need_temperature ? &slopes[i] : nullptr;
          FASTDA_RUN(weights_from_logits(row, to.empty(), n.classes, n.metric, temperature, nearest, l, slope));
        });
        near.take(weights.data(), stride);
        gradients_from_weights(from, block, to, weights.data(), stride, near, n.metric, Put::store, grad_queries,
                               put_or_add(block.begin > 0), grad_prototypes);
      });
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (need_prototypes) finish_prototypes(to, grad_prototypes);
      if (need_temperature) data<T>(of_temperature)[b] = static_cast<T>(sum_of(slopes));
    });
  });
  return {gradient_like(results.queries, queries, need_queries),
          gradient_like(results.prototypes, prototypes, need_prototypes),
          gradient_like(of_temperature, temperature, need_temperature)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("pairwise_distance", &pairwise_distance);
  m.impl("pairwise_distance_backward", &pairwise_distance_backward);
  m.impl("prototype_softmax", &prototype_softmax);
  m.impl("prototype_softmax_backward", &prototype_softmax_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) {
  differentiable(m, "pairwise_distance");
  differentiable(m, "prototype_softmax");
}

}  // namespace fastda
