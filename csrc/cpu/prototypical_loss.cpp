// The prototypical loss of a batch of episodes: means, distances, softmax and loss in one pass over the queries. It
// leaves behind the weights that its gradients are taken from.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "metric.h"

#define FASTDA_LOOPS "episode_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "class_means.h"
#include "episodes.h"
#include "packed_classes.h"

namespace fastda {
namespace {

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
          find_near(distances, n.classes, some.size(), n.classes,
                    [&](int64_t i, int64_t c) { mark[i * n.classes + c] = true; });
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

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) { m.impl("prototypical_loss", &prototypical_loss); }

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "prototypical_loss"); }

}  // namespace fastda
