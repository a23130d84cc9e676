// Class means, and the prototypical loss of a batch of episodes: means, distances, softmax and loss in one pass over
// the queries, the gradients in two more from the weights that the first leaves behind.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <utility>

#include "metric.h"

#define FASTDA_LOOPS "episode_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "packed_classes.h"

namespace fastda {
namespace {

constexpr int64_t values_at_once = 1 << 19;  // of a gradient, before they are rounded to half precision

// The samples of each class, in their order: of(c) ... of(c) + count(c).
class Members {
 public:
  Members(const char* name, const int64_t* labels, int64_t samples, int64_t classes)
      : starts_(classes + 1), members_(samples) {
    for (int64_t s = 0; s < samples; ++s) {
      check_label(name, labels[s], classes);
      ++starts_[labels[s] + 1];
    }
    for (int64_t c = 0; c < classes; ++c) starts_[c + 1] += starts_[c];
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t s = 0; s < samples; ++s) members_[next[labels[s]]++] = s;
  }
  const int64_t* of(int64_t c) const { return members_.data() + starts_[c]; }
  int64_t count(int64_t c) const { return starts_[c + 1] - starts_[c]; }

 private:
  std::vector<int64_t> starts_, members_;
};

// Means of the rows of x (dense, `features` wide), `absent` for a class without any, and the classes' counts.
template <typename T>
void find_means(const Members& members, const T* x, int64_t samples, int64_t classes, int64_t features, T absent,
                T* means, int64_t* counts) {
  const int64_t work = samples * features / std::max<int64_t>(classes, 1);
  at::parallel_for(0, classes, thread_grain(work * 4), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T* mean = means + c * features;
      counts[c] = members.count(c);
      if (counts[c] == 0) {
        std::fill(mean, mean + features, absent);
      } else {
        FASTDA_RUN(mean_of_rows(x, features, members.of(c), counts[c], features, mean));
      }
    }
  });
}

// (batch, rows, features) in the accumulation dtype, dense.
Tensor rows_of(const Tensor& x, int64_t batch) {
  return x.to(accumulate_type(x.scalar_type())).reshape({batch, x.size(-2), x.size(-1)}).contiguous();
}

std::tuple<Tensor, Tensor> class_means(const Tensor& support, const Tensor& labels, int64_t num_classes,
                                       c10::string_view empty) {
  const KernelGuard guard;
  check_features("support", support);
  const int64_t batch = batch_size(support, 2), samples = support.size(-2), features = support.size(-1);
  check_labels("labels", labels, batch * samples);
  TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
  TORCH_CHECK_VALUE(empty == "nan" || empty == "zero", "empty: expected 'nan' or 'zero', got '", empty, "'");
  const auto options = support.options().dtype(accumulate_type(support.scalar_type()));
  const Tensor means = at::empty(batched(support, 2, {num_classes, features}), options);
  const Tensor counts = at::empty(batched(support, 2, {num_classes}), labels.options());
  const Tensor x = rows_of(support, batch), label = labels.contiguous();
  accumulate_as(support, [&](auto zero) {
    using T = decltype(zero);
    const T absent = empty == "zero" ? T(0) : std::numeric_limits<T>::quiet_NaN();
    for_batch(batch, [&](int64_t b) {
      const Members members("labels", label.const_data_ptr<int64_t>() + b * samples, samples, num_classes);
      find_means(members, x.const_data_ptr<T>() + b * samples * features, samples, num_classes, features, absent,
                 data<T>(means) + b * num_classes * features, data<int64_t>(counts) + b * num_classes);
    });
  });
  return {means, counts};
}

Tensor class_means_backward(const Tensor& grad_means, const Tensor& support, const Tensor& labels, const Tensor& counts,
                            int64_t num_classes, c10::string_view, bool need_support) {
  const KernelGuard guard;
  check_features("support", support);
  const int64_t batch = batch_size(support, 2), samples = support.size(-2), features = support.size(-1);
  check_labels("labels", labels, batch * samples);
  check_count("counts", counts, batch * num_classes);
  check_count("grad_means", grad_means, batch * num_classes * features);
  if (!need_support) return at::empty({0}, support.options());
  const auto dtype = accumulate_type(support.scalar_type());
  const Tensor grad = grad_means.to(dtype).contiguous(), label = labels.contiguous(), count = counts.contiguous();
  const int64_t *label_of = label.const_data_ptr<int64_t>(), *count_of = count.const_data_ptr<int64_t>();
  const int64_t rows = batch * samples;
  const Tensor result = at::empty({rows, features}, support.options());
  // Half precision is rounded block by block: a gradient held in float32 would take twice the memory of the result.
  const bool rounds = dtype != support.scalar_type();
  const int64_t at_once = rounds ? std::max<int64_t>(1, values_at_once / std::max<int64_t>(1, features)) : rows;
  const Tensor exact = rounds ? at::empty({std::min(at_once, rows), features}, grad.options()) : result;
  accumulate_as(support, [&](auto zero) {
    using T = decltype(zero);
    const T* from = grad.const_data_ptr<T>();
    T* to = data<T>(exact);
    for (int64_t first = 0; first < rows; first += at_once) {
      const int64_t some = std::min(at_once, rows - first);
      at::parallel_for(0, some, grain(features), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t s = first + i;
          check_label("labels", label_of[s], num_classes);
          const int64_t c = s / samples * num_classes + label_of[s];
          FASTDA_RUN(divide(from + c * features, static_cast<T>(count_of[c]), features, to + i * features));
        }
      });
      if (rounds) result.narrow(0, first, some).copy_(exact.narrow(0, 0, some));
    }
  });
  return result.reshape(support.sizes());
}

struct Episodes {
  int64_t batch, support, queries, classes, features;
  Metric metric;
  bool reduces, mean;  // over the queries of an episode

  double share() const { return mean ? 1.0 / static_cast<double>(queries) : 1.0; }
};

Episodes episodes_of(const Tensor& support, const Tensor& queries, const Tensor& temperature,
                     const Tensor& support_labels, const Tensor& query_labels, int64_t num_classes,
                     c10::string_view metric, c10::string_view reduction) {
  check_features("support", support);
  check_features("queries", queries);
  check_same("queries", queries, "support", support);
  TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
  TORCH_CHECK_VALUE(reduction == "none" || reduction == "mean" || reduction == "sum",
                    "reduction: expected 'none', 'mean' or 'sum', got '", reduction, "'");
  const int64_t batch = batch_size(support, 2);
  check_count("temperature", temperature, batch);
  check_labels("support_labels", support_labels, batch * support.size(-2));
  check_labels("query_labels", query_labels, batch * queries.size(-2));
  return {batch,
          support.size(-2),
          queries.size(-2),
          num_classes,
          support.size(-1),
          metric_of(metric),
          reduction != "none",
          reduction == "mean"};
}

using Episode = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Episode prototypical_loss(const Tensor& support, const Tensor& queries, const Tensor& temperature,
                          const Tensor& support_labels, const Tensor& query_labels, int64_t num_classes,
                          c10::string_view metric, c10::string_view reduction) {
  const KernelGuard guard;
  const Episodes n =
      episodes_of(support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction);
  const auto options = queries.options().dtype(accumulate_type(queries.scalar_type()));
  const Tensor prototypes = at::empty(batched(queries, 2, {n.classes, n.features}), options);
  const Tensor counts = at::empty(batched(queries, 2, {n.classes}), support_labels.options());
  const Tensor weights = at::empty(batched(queries, 2, {n.queries, n.classes}), options);
  const Tensor losses = at::empty(batched(queries, 2, {n.queries}), options);
  const Tensor loss = n.reduces ? at::empty(batched(queries, 2, {}), options) : losses;
  const Tensor slopes = at::empty(batched(queries, 2, {n.queries}), options);
  const Tensor near = at::empty(weights.sizes(), options.dtype(at::kBool));
  const Tensor x = rows_of(support, n.batch), q = matrices(queries, n.batch), p = matrices(prototypes, n.batch);
  const Tensor t = temperature.to(options.dtype()).reshape({n.batch}).contiguous();
  const Tensor support_label = support_labels.contiguous(), query_label = query_labels.contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const int64_t* labels = query_label.const_data_ptr<int64_t>() + b * n.queries;
      const Members members("support_labels", support_label.const_data_ptr<int64_t>() + b * n.support, n.support,
                            n.classes);
      for (int64_t i = 0; i < n.queries; ++i) check_label("query_labels", labels[i], n.classes);
      find_means(members, x.const_data_ptr<T>() + b * n.support * n.features, n.support, n.classes, n.features,
                 std::numeric_limits<T>::quiet_NaN(), data<T>(prototypes) + b * n.classes * n.features,
                 data<int64_t>(counts) + b * n.classes);
      const auto from = Points<T>::queries(q, b, n.metric), to = Points<T>::prototypes(p, b, 0, n.classes, n.metric);
      T *weight = data<T>(weights) + b * n.queries * n.classes, *each = data<T>(losses) + b * n.queries;
      bool* near_pairs = data<bool>(near) + b * n.queries * n.classes;
      const bool products = worth_products(n.queries, n.classes, n.features);
      const bool ask_near = worth_summing_products(n.queries, n.classes, n.features);
      const auto centre = products ? centre_for(from, {0, n.queries}, n.metric) : std::vector<T>();
      std::optional<PackedClasses<T>> packed;
      if (products) packed.emplace(to, n.metric, centre);
      for_lanes<T>(n.queries, n.classes, n.features, [&](Range some, T* scratch) {
        T* distances = weight + some.begin * n.classes;
        bool* mark = near_pairs + some.begin * n.classes;
        std::fill(mark, mark + some.size() * n.classes, false);
        if (!products) {
          find_distances_one_by_one(from, some, to, n.metric, distances, n.classes);
        } else if (packed->find_distances(from, some, distances, n.classes, ask_near)) {
          NearPairs<T> found;
          found.find(distances, n.classes, some.size(), n.classes);
          for (const NearPair<T>& pair : found.by_query()) mark[pair.row * n.classes + pair.sample] = true;
        }
        const FlushToZero flush;
        FASTDA_RUN(losses_of_queries(distances, to.empty(), some.size(), n.classes, n.metric,
                                     t.const_data_ptr<T>()[b], labels + some.begin, scratch, each + some.begin,
                                     data<T>(slopes) + b * n.queries + some.begin));
      });
      if (!n.reduces) return;
      double sum = 0;
      for (int64_t i = 0; i < n.queries; ++i) sum += static_cast<double>(each[i]);
      data<T>(loss)[b] = static_cast<T>(n.mean ? sum / static_cast<double>(n.queries) : sum);
    });
  });
  return {loss, prototypes, counts, weights, slopes, near};
}

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

// The same for many classes, by products: a thread packs only what belongs to its columns, and reads the queries' once
// for both. False where differences have to be taken one by one: of few, or of what is not finite (where queries are
// not, their weights are not either).
template <typename T>
bool gradients_by_columns(const Points<T>& q, const Points<T>& p, const T* weights, int64_t stride,
                          const NearPairs<T>& near, Metric metric, T* grad_queries, T* grad_prototypes) {
  if (!worth_summing_products(q.count(), p.count(), q.features()) || !p.is_finite()) return false;
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
      const EpisodeWeights<T> of{
          q.row(0) + d, p.row(0) + d, weights,   centre.data() + d, of_queries.data(), of_classes.data(), q.count(),
          p.count(),    q.stride(),   p.stride(), stride,           metric == Metric::cosine};
      const Range columns{d, std::min(d + width, q.features())};
      FASTDA_RUN(gradients_of_panel(of, columns.size(), grad_queries + d, grad_prototypes + d, q.features(),
                                    scratch.data()));
      near.add(q, {0, q.count()}, p, columns, grad_queries, grad_prototypes);
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
      NearPairs<T> pairs;
      if (worth_summing_products(n.queries, n.classes, n.features)) {
        pairs.find_marked(marks.const_data_ptr<bool>() + b * distances, n.queries, n.classes);
        pairs.take(scaled.data(), stride);
      }
      T* grad_queries = need_queries ? data<T>(of_queries) + b * n.queries * n.features : nullptr;
      const bool one_pass = need_queries && need_support && n.classes <= most_groups * classes_of_group;
      const bool once = need_queries && n.metric != Metric::cosine && (!one_pass || n.classes <= classes_of_group);
      const Put put = once ? put_once(of_queries, grad_queries) : Put::store;
      T* prototype = need_support ? of_prototypes.data() : nullptr;
      if (one_pass) {
        gradients_in_one_pass(from, to, scaled.data(), stride, n.metric, put, grad_queries, prototype);
      } else if (!need_queries || !need_support ||
                 !gradients_by_columns(from, to, scaled.data(), stride, pairs, n.metric, grad_queries, prototype)) {
        gradients_from_weights(from, {0, n.queries}, to, scaled.data(), stride, pairs, n.metric, put, grad_queries,
                               Put::store, prototype);
      }
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (!need_support) return;
      finish_prototypes(to, of_prototypes.data());
      const int64_t *labels = label.const_data_ptr<int64_t>() + b * n.support,
                    *of_class = count.const_data_ptr<int64_t>() + b * n.classes;
      // A class is divided once, then copied to its samples: a division takes longer than memory does.
      at::parallel_for(0, n.classes, grain(n.features), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          if (of_class[c] == 0) continue;
          T* row = of_prototypes.data() + c * n.features;
          FASTDA_RUN(divide(row, static_cast<T>(of_class[c]), n.features, row));
        }
      });
      at::parallel_for(0, n.support, grain(n.features), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          check_label("support_labels", labels[s], n.classes);
          const T* row = of_prototypes.data() + labels[s] * n.features;
          std::copy(row, row + n.features, data<T>(of_support) + (b * n.support + s) * n.features);
        }
      });
    });
  });
  return {gradient_like(of_support, support, need_support), gradient_like(of_queries, queries, need_queries),
          gradient_like(of_temperature, temperature, need_temperature)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("class_means", &class_means);
  m.impl("class_means_backward", &class_means_backward);
  m.impl("prototypical_loss", &prototypical_loss);
  m.impl("prototypical_loss_backward", &prototypical_loss_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) {
  differentiable(m, "class_means");
  differentiable(m, "prototypical_loss");
}

}  // namespace fastda
