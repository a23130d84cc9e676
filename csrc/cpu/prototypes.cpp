// The prototypical loss of a batch of episodes: class means, distances, softmax and loss, and the gradients of all three.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <tuple>

#define FASTDA_LOOPS "prototypes_loops.h"
#include "for_each_isa.h"

namespace fastda {
namespace {

using at::Tensor;

enum class Metric { sqeuclidean, euclidean, cosine };

Metric metric_of(c10::string_view name) {
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  if (name == "euclidean") return Metric::euclidean;
  TORCH_CHECK_VALUE(name == "cosine", "metric: expected 'sqeuclidean', 'euclidean' or 'cosine', got '", name, "'");
  return Metric::cosine;
}

struct Sizes {
  int64_t batch, support, queries, classes, features;
};

// The support samples of each class of each episode, in order: members[b, starts[b, c] ... starts[b, c + 1]].
struct Members {
  std::vector<int64_t> starts, members;
  const int64_t* of(const Sizes& n, int64_t b, int64_t c) const { return &members[b * n.support + starts[b * (n.classes + 1) + c]]; }
  int64_t count(const Sizes& n, int64_t b, int64_t c) const {
    const int64_t* start = &starts[b * (n.classes + 1) + c];
    return start[1] - start[0];
  }
};

void check_label(const char* name, int64_t label, int64_t classes) {
  TORCH_CHECK_INDEX(label >= 0 && label < classes, name, ": expected labels in 0 ... ", classes - 1, " (num_classes - 1), got ",
                    label, "; relabel the classes or raise num_classes");
}

Members members_of(const int64_t* labels, const Sizes& n) {
  Members result;
  result.starts.assign(n.batch * (n.classes + 1), 0);
  result.members.resize(n.batch * n.support + 1);  // never empty, so that of() may point at its end
  std::vector<int64_t> next(n.classes);
  for (int64_t b = 0; b < n.batch; ++b) {
    int64_t* start = &result.starts[b * (n.classes + 1)];
    for (int64_t s = 0; s < n.support; ++s) {
      check_label("support_labels", labels[b * n.support + s], n.classes);
      ++start[labels[b * n.support + s] + 1];
    }
    for (int64_t c = 0; c < n.classes; ++c) start[c + 1] += start[c];
    std::copy(start, start + n.classes, next.begin());
    for (int64_t s = 0; s < n.support; ++s) result.members[b * n.support + next[labels[b * n.support + s]]++] = s;
  }
  return result;
}

template <typename T>
bool all_nan(const T* x, int64_t count) {
  return count > 0 && std::all_of(x, x + count, [](T value) { return std::isnan(value); });
}

// (batch, rows, features) in the accumulation dtype, dense.
Tensor rows_of(const Tensor& x, at::ScalarType dtype, int64_t batch) {
  return x.to(dtype).reshape({batch, x.size(-2), x.size(-1)}).contiguous();
}

// The points that distances are taken between: the features themselves, or for the cosine their directions.
template <typename T>
struct Points {
  Points(const Tensor& x, Metric metric) : tensor(x), points(x.const_data_ptr<T>()), features(x.size(2)) {
    if (metric != Metric::cosine) return;
    tensor = at::empty_like(x);
    norms.resize(x.size(0) * x.size(1));
    T* to = tensor.mutable_data_ptr<T>();
    at::parallel_for(0, static_cast<int64_t>(norms.size()), grain(features), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        FASTDA_RUN(direction<T>(points + i * features, features, to + i * features, &norms[i]));
      }
    });
    points = to;
  }
  const T* row(int64_t i) const { return points + i * features; }

  Tensor tensor;
  const T* points;
  int64_t features;
  std::vector<T> norms;
};

template <typename T>
void distances_to(const T* query, const T* prototypes, Metric metric, int64_t classes, int64_t features, T* out) {
  if (metric == Metric::cosine) {
    FASTDA_RUN(products<T>(query, prototypes, classes, features, out));
    for (int64_t c = 0; c < classes; ++c) {
      const T distance = 1 - out[c];
      out[c] = distance < 0 ? T(0) : distance > 2 ? T(2) : distance;
    }
    return;
  }
  FASTDA_RUN(squared_distances<T>(query, prototypes, classes, features, out));
  if (metric == Metric::euclidean) {
    for (int64_t c = 0; c < classes; ++c) out[c] = std::sqrt(out[c]);
  }
}

// Log of the sum of the exponentials of −d/T over the classes that are not empty, less the largest term.
template <typename T>
struct Normaliser {
  Normaliser(const T* distances, const uint8_t* empty, int64_t classes, T temperature) : temperature(temperature) {
    for (int64_t c = 0; c < classes; ++c) {
      if (!empty[c]) largest = std::max(largest, -distances[c] / temperature);
    }
    T sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      if (!empty[c]) sum += std::exp(-distances[c] / temperature - largest);
    }
    // Nothing to normalise: every class is empty or infinitely far.
    log_sum = std::isinf(largest) ? std::numeric_limits<T>::quiet_NaN() : std::log(sum);
  }
  T log_probability(T distance) const { return -distance / temperature - largest - log_sum; }

  T temperature, largest = -std::numeric_limits<T>::infinity(), log_sum;
};

template <typename T>
std::vector<uint8_t> empty_classes(const Tensor& prototypes, const Sizes& n) {
  std::vector<uint8_t> empty(n.batch * n.classes);
  const T* p = prototypes.const_data_ptr<T>();
  for (size_t i = 0; i < empty.size(); ++i) empty[i] = all_nan(p + i * n.features, n.features);
  return empty;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& support, const Tensor& queries, const Tensor& temperature,
                                           const Tensor& support_labels, const Tensor& query_labels, const Sizes& n,
                                           Metric metric) {
  const auto dtype = accumulate_type(support.scalar_type());
  const auto options = support.options().dtype(dtype);
  const Tensor s = rows_of(support, dtype, n.batch), q = rows_of(queries, dtype, n.batch);
  const Tensor t = temperature.to(dtype).reshape({n.batch}).contiguous(), query_label = query_labels.contiguous();
  const Tensor support_label = support_labels.contiguous();
  Tensor prototypes = at::empty({n.batch, n.classes, n.features}, options);  // first: refuses an absurd number of classes
  const Members members = members_of(support_label.const_data_ptr<int64_t>(), n);
  T* p = prototypes.mutable_data_ptr<T>();
  const T* x = s.const_data_ptr<T>();
  at::parallel_for(0, n.batch * n.classes, grain(n.support * n.features / n.classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.classes, c = i % n.classes, count = members.count(n, b, c);
      T* mean = p + i * n.features;
      FASTDA_RUN(sum_rows<T>(x + b * n.support * n.features, n.features, members.of(n, b, c), count, n.features, mean));
      for (int64_t d = 0; d < n.features; ++d) mean[d] /= static_cast<T>(count);  // 0/0: NaN marks the empty class
    }
  });

  const std::vector<uint8_t> empty = empty_classes<T>(prototypes, n);
  const Points<T> from(q, metric), to(prototypes, metric);
  Tensor losses = at::empty({n.batch, n.queries}, options), distances = at::empty({n.batch, n.queries, n.classes}, options);
  T *loss = losses.mutable_data_ptr<T>(), *distance = distances.mutable_data_ptr<T>();
  const T* temperatures = t.const_data_ptr<T>();
  const int64_t* labels = query_label.const_data_ptr<int64_t>();
  at::parallel_for(0, n.batch * n.queries, grain(2 * n.classes * n.features), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.queries, label = labels[i];
      check_label("query_labels", label, n.classes);
      T* row = distance + i * n.classes;
      distances_to(from.row(i), to.row(b * n.classes), metric, n.classes, n.features, row);
      const uint8_t* absent = &empty[b * n.classes];
      const Normaliser<T> softmax(row, absent, n.classes, temperatures[b]);
      loss[i] = absent[label] ? std::numeric_limits<T>::infinity() : -softmax.log_probability(row[label]);
      if (absent[label] && std::isnan(softmax.log_sum)) loss[i] = softmax.log_sum;
    }
  });
  return {losses.reshape(batched(queries, 2, {n.queries})),
          prototypes.reshape(batched(queries, 2, {n.classes, n.features})),
          distances.reshape(batched(queries, 2, {n.queries, n.classes}))};
}

// ∂L/∂d for every query and class, as the weight of (q − p) or of the direction in the gradient; and ∂L/∂T of each query.
template <typename T>
void distance_weights(const T* distances, const uint8_t* empty, int64_t classes, int64_t label, T temperature, T grad,
                      Metric metric, T* weights, T* temperature_grad) {
  const Normaliser<T> softmax(distances, empty, classes, temperature);
  T of_temperature = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const T distance = distances[c];
    if (empty[c]) {
      weights[c] = 0;
      continue;
    }
    const T of_logit = grad * (std::exp(softmax.log_probability(distance)) - (c == label ? T(1) : T(0)));
    of_temperature += of_logit * distance / (temperature * temperature);
    const T of_distance = -of_logit / temperature;
    switch (metric) {
      case Metric::sqeuclidean: weights[c] = 2 * of_distance; break;
      case Metric::euclidean: weights[c] = distance == 0 ? T(0) : of_distance / distance; break;
      case Metric::cosine: weights[c] = -of_distance;
    }
  }
  *temperature_grad = of_temperature;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& support, const Tensor& queries,
                                            const Tensor& temperature, const Tensor& support_labels,
                                            const Tensor& query_labels, const Tensor& prototypes, const Tensor& distances,
                                            const Sizes& n, Metric metric, bool need_support, bool need_queries,
                                            bool need_temperature) {
  const auto dtype = accumulate_type(support.scalar_type());
  const auto options = support.options().dtype(dtype);
  const Tensor q = rows_of(queries, dtype, n.batch), p = rows_of(prototypes, dtype, n.batch);
  const Tensor d = rows_of(distances, dtype, n.batch), t = temperature.to(dtype).reshape({n.batch}).contiguous();
  const Tensor g = grad.to(dtype).reshape({n.batch, n.queries}).contiguous();
  const Tensor query_label = query_labels.contiguous(), support_label = support_labels.contiguous();
  const std::vector<uint8_t> empty = empty_classes<T>(p, n);
  const Points<T> from(q, metric), to(p, metric);
  const bool cosine = metric == Metric::cosine;

  Tensor weights = at::empty({n.batch, n.queries, n.classes}, options);
  Tensor temperature_grads = at::empty({n.batch, n.queries}, options);
  Tensor grad_queries = at::empty({need_queries ? n.batch : 0, n.queries, n.features}, options);
  Tensor grad_support = at::empty({need_support ? n.batch : 0, n.support, n.features}, options);
  T *weight = weights.mutable_data_ptr<T>(), *of_temperature = temperature_grads.mutable_data_ptr<T>();
  T *of_query = grad_queries.mutable_data_ptr<T>(), *of_support = grad_support.mutable_data_ptr<T>();
  const T *incoming = g.const_data_ptr<T>(), *distance = d.const_data_ptr<T>(), *temperatures = t.const_data_ptr<T>();
  const int64_t* labels = query_label.const_data_ptr<int64_t>();

  at::parallel_for(0, n.batch * n.queries, grain(2 * n.classes * n.features), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.queries;
      distance_weights(distance + i * n.classes, &empty[b * n.classes], n.classes, labels[i], temperatures[b], incoming[i],
                       metric, weight + i * n.classes, of_temperature + i);
      if (!need_queries) continue;
      T* out = of_query + i * n.features;
      FASTDA_RUN(weighted_sum<T>(cosine ? nullptr : from.row(i), to.row(b * n.classes), weight + i * n.classes, 1, &empty[b * n.classes],
                                 n.classes, n.features, out));
      if (cosine) FASTDA_RUN(through_direction<T>(from.row(i), from.norms[i], n.features, out));
    }
  });

  if (need_support) {
    const Members members = members_of(support_label.const_data_ptr<int64_t>(), n);
    at::parallel_for(0, n.batch * n.classes, grain(2 * n.queries * n.features), [&](int64_t begin, int64_t end) {
      std::vector<T> of_prototype(n.features);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n.classes, c = i % n.classes, count = members.count(n, b, c);
        if (count == 0) continue;
        if (empty[i]) {
          std::fill(of_prototype.begin(), of_prototype.end(), T(0));
        } else {
          FASTDA_RUN(weighted_sum<T>(cosine ? nullptr : to.row(i), from.row(b * n.queries),
                                     weight + b * n.queries * n.classes + c, n.classes, nullptr, n.queries,
                                     n.features, of_prototype.data()));
          if (cosine) FASTDA_RUN(through_direction<T>(to.row(i), to.norms[i], n.features, of_prototype.data()));
        }
        for (T& value : of_prototype) value /= static_cast<T>(count);
        const int64_t* member = members.of(n, b, c);
        for (int64_t m = 0; m < count; ++m) {
          std::copy(of_prototype.begin(), of_prototype.end(), of_support + (b * n.support + member[m]) * n.features);
        }
      }
    });
  }

  const auto finish = [](const Tensor& result, const Tensor& like, bool needed) {
    return needed ? result.reshape(like.sizes()).to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {finish(grad_support, support, need_support), finish(grad_queries, queries, need_queries),
          finish(need_temperature ? temperature_grads.sum(-1) : temperature_grads, temperature, need_temperature)};
}

Sizes sizes_of(const Tensor& support, const Tensor& queries, int64_t num_classes) {
  TORCH_CHECK_VALUE(support.dim() >= 2 && queries.dim() >= 2, "support, queries: expected shape (..., samples, features)");
  return {batch_size(support, 2), support.size(-2), queries.size(-2), num_classes, support.size(-1)};
}

void check(const Tensor& support, const Tensor& queries, const Tensor& temperature, const Tensor& support_labels,
           const Tensor& query_labels, const Sizes& n) {
  check_features("support", support);
  check_features("queries", queries);
  check_same("queries", queries, "support", support);
  TORCH_CHECK_VALUE(n.classes >= 1, "num_classes: expected at least 1, got ", n.classes);
  check_count("temperature", temperature, n.batch);
  check_count("support_labels", support_labels, n.batch * n.support);
  check_count("query_labels", query_labels, n.batch * n.queries);
  for (const Tensor& labels : {support_labels, query_labels}) {
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels: expected int64, got ", labels.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss(const Tensor& support, const Tensor& queries, const Tensor& temperature,
                                                     const Tensor& support_labels, const Tensor& query_labels,
                                                     int64_t num_classes, c10::string_view metric) {
  const KernelGuard guard;
  const Sizes n = sizes_of(support, queries, num_classes);
  check(support, queries, temperature, support_labels, query_labels, n);
  const auto run = accumulate_type(support.scalar_type()) == at::kDouble ? &forward<double> : &forward<float>;
  return run(support, queries, temperature, support_labels, query_labels, n, metric_of(metric));
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss_backward(
    const Tensor& grad_losses, const Tensor& support, const Tensor& queries, const Tensor& temperature,
    const Tensor& support_labels, const Tensor& query_labels, const Tensor& prototypes, const Tensor& distances,
    int64_t num_classes, c10::string_view metric, bool need_support, bool need_queries, bool need_temperature) {
  const KernelGuard guard;
  const Sizes n = sizes_of(support, queries, num_classes);
  check(support, queries, temperature, support_labels, query_labels, n);
  check_count("grad_losses", grad_losses, n.batch * n.queries);
  check_count("prototypes", prototypes, n.batch * n.classes * n.features);
  check_count("distances", distances, n.batch * n.queries * n.classes);
  const auto run = accumulate_type(support.scalar_type()) == at::kDouble ? &backward<double> : &backward<float>;
  return run(grad_losses, support, queries, temperature, support_labels, query_labels, prototypes, distances, n,
             metric_of(metric), need_support, need_queries, need_temperature);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("prototypical_loss", &prototypical_loss);
  m.impl("prototypical_loss_backward", &prototypical_loss_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "prototypical_loss"); }

}  // namespace fastda
