// The gradients of the prototypical loss, from the weights that the loss leaves behind: of queries and prototypes
// together, and of the support from those of the prototypes.
#include "../common.h"

#include <ATen/ops/empty.h>

#include <cstring>
#include <tuple>

#include "metric.h"

#define FASTDA_LOOPS "episode_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "episodes.h"
#include "packed_classes.h"

namespace fastda {
namespace {

constexpr int64_t most_groups = 2;  // of classes: beyond, the queries' gradients are better summed in registers

// Gradients of all queries and prototypes from the weights, in one pass over the queries for each group of classes.
// Each thread takes some columns.
template <typename T>
void gradients_in_one_pass(const Points<T>& q, const Points<T>& p, const T* weights, int64_t stride, Metric metric,
                           Put put, T* grad_queries, T* grad_prototypes) {
  constexpr int64_t lanes = vector_bytes / sizeof(T);
  const int64_t work = q.count() * p.count() * lanes;
  at::parallel_for(0, q.depth() / lanes, thread_grain(2 * work), [&](int64_t begin, int64_t end) {
    const FlushToZero flush;
    for (int64_t c = 0; c < p.count(); c += classes_of_group) {
      FASTDA_RUN(gradients_of_group(metric == Metric::cosine, q.row(0), q.stride(), q.count(), p.row(c), p.stride(),
                                    std::min(classes_of_group, p.count() - c), weights + c, stride, begin * lanes,
                                    end * lanes, q.features(), c == 0 ? put : Put::add, grad_queries,
                                    grad_prototypes + c * q.features(), q.features()));
    }
  });
}

// The gradients of the support's samples: those of their classes' prototypes, divided by how many a class has.
template <typename T>
struct SampleGradients {
  const int64_t *counts, *labels;
  int64_t classes, samples, features;
  T* grad;

  // In some columns, from those of the prototypes, which are divided for it.
  void find(T* grad_prototypes, Range columns) const {
    FASTDA_RUN(gradients_of_samples(grad_prototypes + columns.begin, counts, classes, labels, samples, columns.size(),
                                    features, grad + columns.begin));
  }
};

// The same for many classes, by products: a thread packs only what belongs to its columns, and reads the queries' once
// for both. Those of the samples follow while the prototypes' are near, unless they are null. False where differences
// have to be taken one by one: of few, or of what is not finite (where queries are not, their weights are not either).
template <typename T>
bool gradients_by_columns(const Points<T>& q, const Points<T>& p, const T* weights, int64_t stride,
                          const NearPairs<T>& near, Metric metric, T* grad_queries, T* grad_prototypes,
                          const SampleGradients<T>* samples) {
  if (!worth_summing_products(q.count(), p.count(), q.features()) || near.too_many()) return false;
  if (!p.is_finite()) return false;
  std::vector<double> of_queries(q.count(), 0), of_classes(p.count(), 0);
  FASTDA_RUN(totals_of_weights(weights, stride, 1, q.count(), p.count(), of_queries.data()));
  FASTDA_RUN(totals_of_weights(weights, 1, stride, p.count(), q.count(), of_classes.data()));
  const auto is_finite = [](double total) { return std::isfinite(total); };
  if (!std::all_of(of_queries.begin(), of_queries.end(), is_finite)) return false;
  const auto centre = centre_for(q, {0, q.count()}, metric);
  const PanelShape shape = class_panel_shape_of(T());
  const int64_t lanes = panel_shape_of(T()).rows, threads = at::get_num_threads();
  const int64_t width = std::min(shape.columns, blocks(q.features(), threads * lanes) * lanes);
  const int64_t work = 2 * q.count() * p.count() * width;
  parallel_in_turn(blocks(q.features(), width), thread_grain(work), [&](int64_t begin, int64_t end) {
    const FlushToZero flush;
    const Scratch<T> scratch((shape.depth + 2 * p.count() + shape.rows) * width);
    for (int64_t d = begin * width; d < std::min(end * width, q.features()); d += width) {
      const EpisodeWeights<T> of{q.row(0) + d,
                                 p.row(0) + d,
                                 weights,
                                 centre.data() + d,
                                 of_queries.data(),
                                 of_classes.data(),
                                 q.count(),
                                 p.count(),
                                 q.stride(),
                                 p.stride(),
                                 stride,
                                 metric == Metric::cosine,
                                 samples ? samples->grad + d : nullptr,
                                 samples ? samples->samples : 0};
      const Range columns{d, std::min(d + width, q.features())};
      FASTDA_RUN(gradients_of_panel(of, columns.size(), grad_queries + d, grad_prototypes + d, q.features(),
                                    scratch.data()));
      near.add(q, {0, q.count()}, p, columns, grad_queries, grad_prototypes);
      if (!samples) continue;
      clear_empty(p, columns, grad_prototypes);
      samples->find(grad_prototypes, columns);
    }
  });
  return true;
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss_backward(
    const Tensor& grad_loss, const Tensor& support, const Tensor& queries, const Tensor& temperature,
    const Tensor& support_labels, const Tensor& query_labels, const Tensor& prototypes, const Tensor& counts,
    const Tensor& weights, const Tensor& slopes, const Tensor& near, int64_t num_classes, c10::string_view metric,
    c10::string_view reduction, bool need_support, bool need_queries, bool need_temperature) {
  const KernelGuard guard;
  const Episodes n =
      episodes_of(support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction);
  const int64_t distances = n.queries * n.classes;
  check_count("grad_loss", grad_loss, n.batch * (n.reduces ? 1 : n.queries));
  check_count("prototypes", prototypes, n.batch * n.classes * n.features);
  check_count("counts", counts, n.batch * n.classes);
  check_count("weights", weights, n.batch * distances);
  check_count("slopes", slopes, n.batch * n.queries);
  check_count("near", near, n.batch * distances);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Tensor of_support = empty_gradient(need_support, support.sizes(), support, dtype);
  const Tensor of_queries = empty_gradient(need_queries, queries.sizes(), queries, dtype);
  const Tensor of_temperature = empty_gradient(need_temperature, temperature.sizes(), temperature, dtype);
  const Tensor grad = grad_loss.to(dtype).contiguous(), q = matrices(queries, n.batch),
               p = matrices(prototypes, n.batch);
  const Tensor w = weights.to(dtype).contiguous(), slope = slopes.to(dtype).contiguous(), count = counts.contiguous();
  const Tensor label = support_labels.contiguous(), marks = near.contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    const T share = static_cast<T>(n.share()), *incoming = grad.const_data_ptr<T>();
    for_batch(n.batch, [&](int64_t b) {
      const auto grad_of = [&](int64_t i) { return n.reduces ? incoming[b] * share : incoming[b * n.queries + i]; };
      if (need_temperature) {
        double total = 0;
        for (int64_t i = 0; i < n.queries; ++i) {
          total += static_cast<double>(grad_of(i) * slope.const_data_ptr<T>()[b * n.queries + i]);
        }
        data<T>(of_temperature)[b] = static_cast<T>(total);
      }
      if (!need_support && !need_queries) return;
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      const int64_t stride = row_stride<T>(n.classes);
      const Scratch<T> scaled((n.queries + class_panel_rows) * stride),
          of_prototypes(need_support ? n.classes * n.features : 0);
      {
        const FlushToZero flush;
        FASTDA_RUN(scale_rows(w.const_data_ptr<T>() + b * distances, n.queries, n.classes,
                              incoming + b * (n.reduces ? 1 : n.queries), n.reduces ? 0 : 1, n.reduces ? share : T(1),
                              scaled.data(), stride));
      }
      T* grad_queries = need_queries ? data<T>(of_queries) + b * n.queries * n.features : nullptr;
      const bool one_pass = need_queries && need_support && n.classes <= most_groups * classes_of_group;
      const bool once = need_queries && n.metric != Metric::cosine && (!one_pass || n.classes <= classes_of_group);
      const Put put = once ? put_once(of_queries, grad_queries) : Put::store;
      T* prototype = need_support ? of_prototypes.data() : nullptr;
      const int64_t* labels = label.const_data_ptr<int64_t>() + b * n.support;
      for (int64_t s = 0; s < n.support; ++s) check_label("support_labels", labels[s], n.classes);
      const SampleGradients<T> samples{count.const_data_ptr<int64_t>() + b * n.classes, labels, n.classes, n.support,
                                       n.features,
                                       need_support ? data<T>(of_support) + b * n.support * n.features : nullptr};
      const bool directions = n.metric == Metric::cosine;  // whose gradients go on by whole rows
      NearPairs<T> pairs(n.queries, n.classes);
      const bool *first = marks.const_data_ptr<bool>() + b * distances, *end = first + distances;
      for (const bool* mark = first;
           !one_pass && (mark = static_cast<const bool*>(std::memchr(mark, true, end - mark))); ++mark) {
        pairs.keep((mark - first) / n.classes, (mark - first) % n.classes);
      }
      pairs.take(scaled.data(), stride);
      bool samples_found = !need_support;
      if (one_pass) {
        gradients_in_one_pass(from, to, scaled.data(), stride, n.metric, put, grad_queries, prototype);
      } else if (need_queries && need_support &&
                 gradients_by_columns(from, to, scaled.data(), stride, pairs, n.metric, grad_queries, prototype,
                                      directions ? nullptr : &samples)) {
        samples_found = !directions;
      } else {
        gradients_from_weights(from, {0, n.queries}, to, scaled.data(), stride, pairs, n.metric, put, grad_queries,
                               Put::store, prototype);
      }
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (samples_found) return;
      finish_prototypes(to, prototype);
      constexpr int64_t lanes = vector_bytes / sizeof(T);
      at::parallel_for(0, blocks(n.features, lanes), grain(n.support * lanes), [&](int64_t begin, int64_t end) {
        samples.find(prototype, {begin * lanes, std::min(end * lanes, n.features)});
      });
    });
  });
  return {gradient_like(of_support, support, need_support), gradient_like(of_queries, queries, need_queries),
          gradient_like(of_temperature, temperature, need_temperature)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) { m.impl("prototypical_loss_backward", &prototypical_loss_backward); }

}  // namespace fastda
