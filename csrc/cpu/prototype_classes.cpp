// Distances of queries to prototypes, the softmax over the classes, and the cross-entropy, which holds no more than a
// block of the queries × classes matrix: an online softmax forward, the block's distances once more backward.
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

namespace fastda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

struct Sizes {
  int64_t batch, queries, classes, features;
  Metric metric;
};

Sizes sizes_of(const Tensor& queries, const Tensor& prototypes, c10::string_view metric) {
  check_features("queries", queries);
  check_features("prototypes", prototypes);
  check_same("prototypes", prototypes, "queries", queries);
  return {batch_size(queries, 2), queries.size(-2), prototypes.size(-2), queries.size(-1), metric_of(metric)};
}

// One number for each batch element, dense.
Tensor temperatures(const Tensor& temperature, const Sizes& n, at::ScalarType dtype) {
  check_count("temperature", temperature, n.batch);
  return temperature.to(dtype).reshape({n.batch}).contiguous();
}

// Gradients in the accumulation dtype as they are filled, and in the inputs' dtypes when they are done.
struct Results {
  Tensor queries, prototypes, temperature;

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

// Queries of a block beside `classes` classes.
int64_t queries_at_once(const Sizes& n, int64_t classes) {
  constexpr int64_t fewest = 16;
  return std::min(n.queries, std::max(fewest, std::min(most_queries, block_values / std::max<int64_t>(classes, 1))));
}

// Classes of a block beside as many queries as may be.
int64_t classes_at_once(const Sizes& n) {
  return std::min(n.classes, block_values / std::max<int64_t>(1, std::min(n.queries, most_queries)));
}

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

Tensor pairwise_distance(const Tensor& queries, const Tensor& prototypes, c10::string_view metric) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Tensor result = at::empty(batched(queries, 2, {n.queries, n.classes}), queries.options().dtype(dtype));
  const Tensor q = matrices(queries, n.batch), p = matrices(prototypes, n.batch);
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
  const Tensor q = matrices(queries, n.batch), p = matrices(prototypes, n.batch);
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
        if (n.metric == Metric::euclidean) find_distances(from, block, to, n.metric, weights.data(), stride);
        for_queries<T>(block, 0, [&](int64_t i, T*) {
          T* row = weights.data() + (i - block.begin) * stride;
          FASTDA_RUN(weights_from_distances(row, to.empty(), n.classes, n.metric, incoming + i * n.classes));
        });
        gradients_from_weights(from, block, to, weights.data(), stride, n.metric, Put::store, grad_queries,
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
  const Tensor q = matrices(queries, n.batch), p = matrices(prototypes, n.batch);
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      T* rows = data<T>(result) + b * n.queries * n.classes;
      find_distances(from, {0, n.queries}, to, n.metric, rows, n.classes);
      const T temperature = t.const_data_ptr<T>()[b];
      T *largest = data<T>(most) + b * n.queries, *log_sum = data<T>(log_sums) + b * n.queries;
      if (n.classes <= few_classes) {
        for_lanes<T>(n.queries, n.classes, [&](Range some, T* scratch) {
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
  const Tensor t = temperatures(temperature, n, dtype), q = matrices(queries, n.batch),
               p = matrices(prototypes, n.batch);
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
      const Scratch<T> weights(at_once * stride), slopes(need_temperature ? n.queries : 0);
      for_ranges(n.queries, at_once, [&](Range block) {
        find_distances(from, block, to, n.metric, weights.data(), stride);
        for_queries<T>(block, n.classes, [&](int64_t i, T* l) {
          const int64_t at = b * n.queries + i;
          const T temperature = t.const_data_ptr<T>()[b];
          T* row = weights.data() + (i - block.begin) * stride;
          FASTDA_RUN(logits(row, to.empty(), n.classes, temperature, l));
          FASTDA_RUN(
              probabilities(l, n.classes, most.const_data_ptr<T>()[at], log_sums.const_data_ptr<T>()[at], false));
          FASTDA_RUN(through_softmax(l, incoming + i * n.classes, n.classes, log, l));
          const T nearest = to.empty() ? T(0) : -most.const_data_ptr<T>()[at] * temperature;
          T* slope = need_temperature ? slopes.data() + i : nullptr;
          if (slope) *slope = 0;
          FASTDA_RUN(weights_from_logits(row, to.empty(), n.classes, n.metric, temperature, nearest, l, slope));
        });
        gradients_from_weights(from, block, to, weights.data(), stride, n.metric, Put::store, grad_queries,
                               put_or_add(block.begin > 0), grad_prototypes);
      });
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (need_prototypes) finish_prototypes(to, grad_prototypes);
      if (need_temperature)
        data<T>(of_temperature)[b] = std::accumulate(slopes.data(), slopes.data() + n.queries, T(0));
    });
  });
  return {gradient_like(results.queries, queries, need_queries),
          gradient_like(results.prototypes, prototypes, need_prototypes),
          gradient_like(of_temperature, temperature, need_temperature)};
}

// The options of a cross-entropy.
struct Targets {
  const Tensor labels;
  int64_t ignore_index;
  double smoothing;
  bool reduces, mean;

  Targets(const Tensor& targets, const Sizes& n, int64_t ignore_index, double smoothing, c10::string_view reduction)
      : labels(targets.contiguous()),
        ignore_index(ignore_index),
        smoothing(smoothing),
        reduces(reduction != "none"),
        mean(reduction == "mean") {
    check_labels("targets", targets, n.batch * n.queries);
    TORCH_CHECK_VALUE(reduction == "none" || reduction == "mean" || reduction == "sum",
                      "reduction: expected 'none', 'mean' or 'sum', got '", reduction, "'");
    const int64_t* label = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < labels.numel(); ++i) {
      if (label[i] != ignore_index) check_label("targets", label[i], n.classes);
    }
  }
  const int64_t* of(int64_t b, const Sizes& n) const { return labels.const_data_ptr<int64_t>() + b * n.queries; }
};

using CrossEntropy = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossEntropy prototype_cross_entropy(const Tensor& queries, const Tensor& prototypes, const Tensor& temperature,
                                     const Tensor& targets, int64_t ignore_index, double label_smoothing,
                                     c10::string_view metric, c10::string_view reduction) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const Targets options(targets, n, ignore_index, label_smoothing, reduction);
  const auto like = queries.options().dtype(accumulate_type(queries.scalar_type()));
  const Tensor losses = at::empty(batched(queries, 2, {n.queries}), like);
  const Tensor loss = options.reduces ? at::empty(batched(queries, 2, {}), like) : losses;
  const Tensor most = at::empty(losses.sizes(), like), log_sums = at::empty(losses.sizes(), like);
  const Tensor present = at::empty(batched(queries, 2, {}), targets.options()),
               kept = at::empty(present.sizes(), targets.options());
  const Tensor t = temperatures(temperature, n, like.dtype().toScalarType());
  const Tensor q = matrices(queries, n.batch), p = matrices(prototypes, n.batch);
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric);
      const int64_t *label = options.of(b, n), at_once = classes_at_once(n),
                    most_at_once = std::min(n.queries, most_queries);
      T *largest = data<T>(most) + b * n.queries, *sum = data<T>(log_sums) + b * n.queries,
        *each = data<T>(losses) + b * n.queries;
      std::fill(largest, largest + n.queries, -std::numeric_limits<T>::infinity());
      std::fill(sum, sum + n.queries, T(0));
      std::vector<double> totals(n.queries, 0);
      const int64_t stride = row_stride<T>(at_once);
      const Scratch<T> block(most_at_once * stride);
      int64_t of_present = 0;
      for_ranges(n.classes, at_once, [&](Range classes) {
        const auto to = Points<T>::prototypes(p, b, classes.begin, classes.end, n.metric);
        of_present += to.present();
        for_ranges(n.queries, most_queries, [&](Range some) {
          find_distances(from, some, to, n.metric, block.data(), stride);
          for_queries<T>(some, to.count(), [&](int64_t i, T*) {
            T* l = block.data() + (i - some.begin) * stride;
            FASTDA_RUN(logits(l, to.empty(), to.count(), t.const_data_ptr<T>()[b], l));
            FASTDA_RUN(join_softmax(l, to.count(), largest + i, sum + i));
            if (options.smoothing != 0) FASTDA_RUN(add_logits(l, to.empty(), to.count(), &totals[i]));
            if (classes.begin <= label[i] && label[i] < classes.end) each[i] = l[label[i] - classes.begin];
          });
        });
      });
      int64_t of_kept = 0;
      double total = 0;
      for (int64_t i = 0; i < n.queries; ++i) {
        sum[i] = log_of_sum(largest[i], sum[i]);
        if (label[i] == options.ignore_index) {
          each[i] = 0;
          continue;
        }
        double of_query = -static_cast<double>((each[i] - largest[i]) - sum[i]);
        if (options.smoothing != 0) {
          const double normaliser = static_cast<double>(largest[i]) + static_cast<double>(sum[i]);
          const double others = totals[i] / static_cast<double>(of_present) - normaliser;
          of_query = (1 - options.smoothing) * of_query - options.smoothing * others;
        }
        each[i] = static_cast<T>(of_query);
        total += of_query;
        ++of_kept;
      }
      data<int64_t>(present)[b] = of_present;
      data<int64_t>(kept)[b] = of_kept;
      if (options.reduces)
        data<T>(loss)[b] = static_cast<T>(options.mean ? total / static_cast<double>(of_kept) : total);
    });
  });
  return {loss, most, log_sums, present, kept};
}

Gradients prototype_cross_entropy_backward(const Tensor& grad_loss, const Tensor& queries, const Tensor& prototypes,
                                           const Tensor& temperature, const Tensor& targets, const Tensor& largest,
                                           const Tensor& log_sum, const Tensor& present, const Tensor& kept,
                                           int64_t ignore_index, double label_smoothing, c10::string_view metric,
                                           c10::string_view reduction, bool need_queries, bool need_prototypes,
                                           bool need_temperature) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const Targets options(targets, n, ignore_index, label_smoothing, reduction);
  check_count("grad_loss", grad_loss, n.batch * (options.reduces ? 1 : n.queries));
  check_count("largest", largest, n.batch * n.queries);
  check_count("log_sum", log_sum, n.batch * n.queries);
  check_count("present", present, n.batch);
  check_count("kept", kept, n.batch);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Results results(n, queries, prototypes, need_queries, need_prototypes);
  const Tensor of_temperature = empty_gradient(need_temperature, temperature.sizes(), temperature, dtype);
  const Tensor t = temperatures(temperature, n, dtype), q = matrices(queries, n.batch),
               p = matrices(prototypes, n.batch);
  const Tensor grad = grad_loss.to(dtype).contiguous(), number = kept.contiguous(), existing = present.contiguous();
  const Tensor most = largest.to(dtype).contiguous(), log_sums = log_sum.to(dtype).contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric);
      const int64_t *label = options.of(b, n), at_once = classes_at_once(n),
                    most_at_once = std::min(n.queries, most_queries);
      const T temperature = t.const_data_ptr<T>()[b],
              *incoming = grad.const_data_ptr<T>() + b * (options.reduces ? 1 : n.queries);
      const T share =
          options.mean ? static_cast<T>(1.0 / static_cast<double>(number.const_data_ptr<int64_t>()[b])) : T(1);
      const double present_classes = static_cast<double>(existing.const_data_ptr<int64_t>()[b]);
      const T spread = static_cast<T>(options.smoothing == 0 ? 0 : options.smoothing / present_classes);
      const T on_target = static_cast<T>(1 - options.smoothing);
      T *grad_queries = results.of_queries<T>(n, need_queries, b),
        *grad_prototypes = results.of_prototypes<T>(n, need_prototypes, b);
      const int64_t stride = row_stride<T>(at_once);
      const Scratch<T> weights(most_at_once * stride);
      std::vector<T> slopes(need_temperature ? n.queries : 0);
      for_ranges(n.classes, at_once, [&](Range classes) {
        const auto to = Points<T>::prototypes(p, b, classes.begin, classes.end, n.metric);
        T* of_block = need_prototypes ? grad_prototypes + classes.begin * n.features : nullptr;
        for_ranges(n.queries, most_queries, [&](Range some) {
          find_distances(from, some, to, n.metric, weights.data(), stride);
          for_queries<T>(some, to.count(), [&](int64_t i, T* l) {
            T* row = weights.data() + (i - some.begin) * stride;
            const T of_loss = label[i] == options.ignore_index ? T(0) : incoming[options.reduces ? 0 : i] * share;
            const int64_t at = b * n.queries + i;
            FASTDA_RUN(logits(row, to.empty(), to.count(), temperature, l));
            FASTDA_RUN(through_cross_entropy(l, to.count(), most.const_data_ptr<T>()[at],
                                             log_sums.const_data_ptr<T>()[at], of_loss, spread));
            if (classes.begin <= label[i] && label[i] < classes.end) l[label[i] - classes.begin] -= of_loss * on_target;
            const T nearest = present_classes < n.classes ? T(0) : -most.const_data_ptr<T>()[at] * temperature;
            FASTDA_RUN(weights_from_logits(row, to.empty(), to.count(), n.metric, temperature, nearest, l,
                                           need_temperature ? &slopes[i] : nullptr));
          });
          gradients_from_weights(from, some, to, weights.data(), stride, n.metric,
                                 put_or_add(classes.begin > 0), grad_queries, put_or_add(some.begin > 0), of_block);
        });
        if (need_prototypes) finish_prototypes(to, of_block);
      });
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (need_temperature) data<T>(of_temperature)[b] = std::accumulate(slopes.begin(), slopes.end(), T(0));
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
  m.impl("prototype_cross_entropy", &prototype_cross_entropy);
  m.impl("prototype_cross_entropy_backward", &prototype_cross_entropy_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) {
  for (const char* name : {"pairwise_distance", "prototype_softmax", "prototype_cross_entropy"})
    differentiable(m, name);
}

}  // namespace fastda
