// Distances of queries to prototypes, the softmax over the classes, and the cross-entropy, which holds no more than a
// block of the queries × classes matrix: an online softmax forward, the block's distances once more backward, or both
// at once where the matrix is small enough for a fifth of it to be held.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <numeric>
#include <optional>
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

// In double, whatever T is.
template <typename T>
T sum_of(const T* x, int64_t count) {
  return static_cast<T>(std::accumulate(x, x + count, 0.0));
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
        data<T>(of_temperature)[b] = sum_of(slopes.data(), n.queries);
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

// The cross-entropy of one element of the batch, whose classes pass by in blocks.
template <typename T>
class QueryLosses {
 public:
  // The last three hold one value for each query; they are filled here, or were by the forward pass.
  QueryLosses(const Sizes& n, const Targets& options, int64_t b, T temperature, T* largest, T* log_sum, T* losses)
      : n_(n),
        options_(options),
        label_(options.of(b, n)),
        temperature_(temperature),
        largest_(largest),
        log_sum_(log_sum),
        losses_(losses),
        kept_(n.queries - std::count(label_, label_ + n.queries, options.ignore_index)) {}

  int64_t kept() const { return kept_; }  // queries that are not ignored
  T share() const { return options_.mean ? static_cast<T>(1.0 / static_cast<double>(kept_)) : T(1); }

  void begin() {
    std::fill(largest_, largest_ + n_.queries, -std::numeric_limits<T>::infinity());
    std::fill(log_sum_, log_sum_ + n_.queries, T(0));
    totals_.assign(n_.queries, 0);
  }

  // Takes the distances of some queries to some classes into account.
  void join(Range some, Range classes, const uint8_t* empty, const T* distances, int64_t stride) {
    for_queries<T>(some, classes.size(), [&](int64_t i, T* l) {
      FASTDA_RUN(logits(distances + (i - some.begin) * stride, empty, classes.size(), temperature_, l));
      FASTDA_RUN(join_softmax(l, classes.size(), largest_ + i, log_sum_ + i));
      if (options_.smoothing != 0) FASTDA_RUN(add_logits(l, empty, classes.size(), &totals_[i]));
      if (classes.has(label_[i])) losses_[i] = l[label_[i] - classes.begin];
    });
  }

  // The losses of some queries, of which `present` classes count.
  void finish(Range some, int64_t present) {
    for (int64_t i = some.begin; i < some.end; ++i) {
      log_sum_[i] = log_of_sum(largest_[i], log_sum_[i]);
      if (label_[i] == options_.ignore_index) {
        losses_[i] = 0;
        continue;
      }
      double loss = -static_cast<double>((losses_[i] - largest_[i]) - log_sum_[i]);
      if (options_.smoothing != 0) {
        const double normaliser = static_cast<double>(largest_[i]) + static_cast<double>(log_sum_[i]);
        const double others = totals_[i] / static_cast<double>(present) - normaliser;
        loss = (1 - options_.smoothing) * loss - options_.smoothing * others;
      }
      losses_[i] = static_cast<T>(loss);
      total_ += loss;
    }
  }

  T reduced() const { return static_cast<T>(options_.mean ? total_ / static_cast<double>(kept_) : total_); }

  // Distances become weights, by ∂L/∂loss of each query, one for all where the step is 0; adds ∂L/∂T to the slopes,
  // where they are not null.
  void weigh(Range some, Range classes, const uint8_t* empty, int64_t present, const T* of_losses, int64_t step,
             T* distances, int64_t stride, T* slopes) const {
    const T share = this->share(), on_target = static_cast<T>(1 - options_.smoothing);
    const T spread = options_.smoothing == 0 ? T(0) : static_cast<T>(options_.smoothing / static_cast<double>(present));
    for_queries<T>(some, classes.size(), [&](int64_t i, T* l) {
      T* row = distances + (i - some.begin) * stride;
      const T of_loss = label_[i] == options_.ignore_index ? T(0) : of_losses[i * step] * share;
      FASTDA_RUN(logits(row, empty, classes.size(), temperature_, l));
      FASTDA_RUN(through_cross_entropy(l, classes.size(), largest_[i], log_sum_[i], of_loss, spread));
      if (classes.has(label_[i])) l[label_[i] - classes.begin] -= of_loss * on_target;
      const T nearest = present < n_.classes ? T(0) : -largest_[i] * temperature_;
      FASTDA_RUN(weights_from_logits(row, empty, classes.size(), n_.metric, temperature_, nearest, l,
                                     slopes ? slopes + i : nullptr));
    });
  }

 private:
  const Sizes& n_;
  const Targets& options_;
  const int64_t* label_;
  const T temperature_;
  T *largest_, *log_sum_, *losses_;
  const int64_t kept_;
  std::vector<double> totals_;
  double total_ = 0;
};

// What the cross-entropy returns, as it is filled.
struct CrossEntropy {
  Tensor losses, loss, largest, log_sum, present, kept;

  CrossEntropy(const Tensor& queries, const Tensor& targets, const Sizes& n, const Targets& options) {
    const auto like = queries.options().dtype(accumulate_type(queries.scalar_type()));
    losses = at::empty(batched(queries, 2, {n.queries}), like);
    loss = options.reduces ? at::empty(batched(queries, 2, {}), like) : losses;
    largest = at::empty(losses.sizes(), like);
    log_sum = at::empty(losses.sizes(), like);
    present = at::empty(batched(queries, 2, {}), targets.options());
    kept = at::empty(present.sizes(), targets.options());
  }
  template <typename T>
  QueryLosses<T> of(int64_t b, const Sizes& n, const Targets& options, T temperature) const {
    const int64_t first = b * n.queries;
    return {n, options, b, temperature, data<T>(largest) + first, data<T>(log_sum) + first, data<T>(losses) + first};
  }
  template <typename T>
  void finish(int64_t b, const QueryLosses<T>& state, int64_t of_present, bool reduces) const {
    data<int64_t>(present)[b] = of_present;
    data<int64_t>(kept)[b] = state.kept();
    if (reduces) data<T>(loss)[b] = state.reduced();
  }
};

using CrossEntropyResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossEntropyResult prototype_cross_entropy(const Tensor& queries, const Tensor& prototypes, const Tensor& temperature,
                                           const Tensor& targets, int64_t ignore_index, double label_smoothing,
                                           c10::string_view metric, c10::string_view reduction) {
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const Targets options(targets, n, ignore_index, label_smoothing, reduction);
  const CrossEntropy result(queries, targets, n, options);
  const Tensor t = temperatures(temperature, n, accumulate_type(queries.scalar_type()));
  const Tensor q = matrices(queries, n.batch), p = matrices(prototypes, n.batch);
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric);
      auto state = result.of<T>(b, n, options, t.const_data_ptr<T>()[b]);
      const int64_t at_once = classes_at_once(n), stride = row_stride<T>(at_once);
      const Scratch<T> block(std::min(n.queries, most_queries) * stride);
      int64_t present = 0;
      state.begin();
      for_ranges(n.classes, at_once, [&](Range classes) {
        const auto to = Points<T>::prototypes(p, b, classes.begin, classes.end, n.metric);
        present += to.present();
        for_ranges(n.queries, most_queries, [&](Range some) {
          find_distances(from, some, to, n.metric, block.data(), stride);
          state.join(some, classes, to.empty(), block.data(), stride);
        });
      });
      state.finish({0, n.queries}, present);
      result.finish(b, state, present, options.reduces);
    });
  });
  return {result.loss, result.largest, result.log_sum, result.present, result.kept};
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
  const Tensor grad = grad_loss.to(dtype).contiguous(), existing = present.contiguous();
  const Tensor most = largest.to(dtype).contiguous(), log_sums = log_sum.to(dtype).contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric);
      const int64_t at_once = classes_at_once(n), stride = row_stride<T>(at_once);
      const QueryLosses<T> state(n, options, b, t.const_data_ptr<T>()[b], data<T>(most) + b * n.queries,
                                 data<T>(log_sums) + b * n.queries, nullptr);
      const T* incoming = grad.const_data_ptr<T>() + b * (options.reduces ? 1 : n.queries);
      T *grad_queries = results.of_queries<T>(n, need_queries, b),
        *grad_prototypes = results.of_prototypes<T>(n, need_prototypes, b);
      const Scratch<T> weights(std::min(n.queries, most_queries) * stride);
      std::vector<T> slopes(need_temperature ? n.queries : 0);
      for_ranges(n.classes, at_once, [&](Range classes) {
        const auto to = Points<T>::prototypes(p, b, classes.begin, classes.end, n.metric);
        T* of_block = need_prototypes ? grad_prototypes + classes.begin * n.features : nullptr;
        for_ranges(n.queries, most_queries, [&](Range some) {
          find_distances(from, some, to, n.metric, weights.data(), stride);
          state.weigh(some, classes, to.empty(), existing.const_data_ptr<int64_t>()[b], incoming,
                      options.reduces ? 0 : 1, weights.data(), stride, need_temperature ? slopes.data() : nullptr);
          gradients_from_weights(from, some, to, weights.data(), stride, n.metric, put_or_add(classes.begin > 0),
                                 grad_queries, put_or_add(some.begin > 0), of_block);
        });
        if (need_prototypes) finish_prototypes(to, of_block);
      });
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (need_temperature) data<T>(of_temperature)[b] = sum_of(slopes.data(), n.queries);
    });
  });
  return {gradient_like(results.queries, queries, need_queries),
          gradient_like(results.prototypes, prototypes, need_prototypes),
          gradient_like(of_temperature, temperature, need_temperature)};
}

// How many queries' distances to all classes are held until the gradients have been taken from them: a fifth of all,
// or as many as take little. 0 where that is too much, or so little that products are not the way to the gradients.
int64_t queries_held(const Sizes& n) {
  constexpr int64_t parts = 5, rows = 8, few = 64, little = 1 << 19, most = 1 << 22;  // the last two in distances
  if (std::min({n.queries, n.classes, n.features}) < worth_packing) return 0;
  const int64_t held = std::min(n.queries, std::max(blocks(blocks(n.queries, parts), rows) * rows, little / n.classes));
  return held * n.classes <= most && (held >= few || held == n.queries) ? held : 0;
}

// The cross-entropy and its gradients in one pass: the distances of a block of queries are found once, where a backward
// pass would have to find them again. Of finite points only.
std::optional<WithGradients> prototype_cross_entropy_with_gradients(const c10::IValue* arguments,
                                                                    const std::vector<bool>& needs) {
  const Tensor &queries = arguments[0].toTensor(), &prototypes = arguments[1].toTensor(),
               &temperature = arguments[2].toTensor(), &targets = arguments[3].toTensor();
  const auto metric = arguments[6].toStringView(), reduction = arguments[7].toStringView();
  if (reduction == "none" || !(needs[0] || needs[1])) return std::nullopt;
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const int64_t held = queries_held(n);
  if (held == 0) return std::nullopt;
  const Targets options(targets, n, arguments[4].toInt(), arguments[5].toDouble(), reduction);
  const auto dtype = accumulate_type(queries.scalar_type());
  const CrossEntropy result(queries, targets, n, options);
  const Results gradients(n, queries, prototypes, needs[0], needs[1]);
  const Tensor of_temperature = empty_gradient(needs[2], temperature.sizes(), temperature, dtype);
  const Tensor t = temperatures(temperature, n, dtype), q = matrices(queries, n.batch),
               p = matrices(prototypes, n.batch);
  std::atomic<bool> finite{true};
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    const bool serves = Points<T>::serves(p, n.metric);
    for_batch(n.batch, [&](int64_t b) {
      constexpr int64_t copied = 480;  // classes at once
      const auto from = Points<T>::queries(q, b, n.metric);
      const auto all = Points<T>::present_prototypes(p, b, {0, serves ? n.classes : 0}, n.metric);
      const auto for_classes = [&](const auto& each) {
        if (serves) return each(Range{0, n.classes}, all);
        for_ranges(n.classes, copied, [&](Range classes) {
          each(classes, Points<T>::present_prototypes(p, b, classes, n.metric));
        });
      };
      bool finite_here = from.is_finite();
      for_classes([&](Range, const Points<T>& to) { finite_here = finite_here && to.is_finite(); });
      if (!finite_here) finite = false;
      if (!finite) return;
      auto state = result.of<T>(b, n, options, t.const_data_ptr<T>()[b]);
      T *grad_queries = gradients.of_queries<T>(n, needs[0], b),
        *grad_prototypes = gradients.of_prototypes<T>(n, needs[1], b);
      const int64_t stride = row_stride<T>(n.classes);
      const Scratch<T> block(held * stride);
      std::vector<T> slopes(needs[2] ? n.queries : 0);
      std::vector<double> of_prototypes(n.classes, 0);
      const auto near_queries = centre_for(from, {0, n.queries}, n.metric);
      const Range first{0, std::min<int64_t>(n.classes, 16)};
      const auto near_classes = centre_for(Points<T>::present_prototypes(p, b, first, n.metric), first, n.metric);
      const T one = 1;
      state.begin();
      for_ranges(n.queries, held, [&](Range some) {
        const PackedQueries<T> packed(from, some, n.metric);
        for_classes([&](Range classes, const Points<T>& to) {
          packed.find_distances(to, block.data() + classes.begin, stride);
        });
        state.join(some, {0, n.classes}, nullptr, block.data(), stride);
        state.finish(some, n.classes);
        state.weigh(some, {0, n.classes}, nullptr, n.classes, &one, 0, block.data(), stride,
                    needs[2] ? slopes.data() : nullptr);
        std::vector<double> of_queries(some.size(), 0);
        add_totals<T>({block.data(), stride, 1}, some.size(), n.classes, of_queries.data());
        add_totals<T>({block.data(), 1, stride}, n.classes, some.size(), of_prototypes.data());
        for_classes([&](Range classes, const Points<T>& to) {
          const T* weights = block.data() + classes.begin;
          const Range its{0, classes.size()};
          if (needs[0]) {
            const double* totals = classes.end == n.classes ? of_queries.data() : nullptr;
            sum_packed(from, some, to, its, {weights, stride, 1}, {near_classes.data(), totals, classes.begin > 0},
                       n.metric, grad_queries + some.begin * n.features);
          }
          if (!needs[1]) return;
          const bool last = some.end == n.queries;
          const double* totals = last ? of_prototypes.data() + classes.begin : nullptr;
          T* of_block = grad_prototypes + classes.begin * n.features;
          sum_packed(to, its, from, some, {weights, 1, stride}, {near_queries.data(), totals, some.begin > 0}, n.metric,
                     of_block);
          if (last) finish_prototypes(to, of_block);
        });
      });
      if (needs[0]) from.through_directions(0, n.queries, grad_queries);
      if (needs[2]) data<T>(of_temperature)[b] = sum_of(slopes.data(), n.queries);
      result.finish(b, state, n.classes, true);
    });
  });
  if (!finite) return std::nullopt;
  return WithGradients{{result.loss, result.largest, result.log_sum, result.present, result.kept},
                       {gradients.queries, gradients.prototypes, of_temperature}};
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
  differentiable(m, "pairwise_distance");
  differentiable(m, "prototype_softmax");
  differentiable(m, "prototype_cross_entropy", &prototype_cross_entropy_with_gradients);
}

}  // namespace fastda
