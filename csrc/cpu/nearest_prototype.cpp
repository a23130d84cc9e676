// The nearest prototypes of each query: the classes pass by in blocks, and the k best of those seen so far stay.
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

struct Search {
  int64_t batch, queries, classes, features, k;
  Metric metric;
};

Search search_of(const Tensor& queries, const Tensor& prototypes, int64_t k, c10::string_view metric) {
  check_features("queries", queries);
  check_features("prototypes", prototypes);
  check_same("prototypes", prototypes, "queries", queries);
  TORCH_CHECK_VALUE(k >= 1 && k <= prototypes.size(-2), "k: expected 1 ... ", prototypes.size(-2),
                    " (the number of prototypes), got ", k);
  return {batch_size(queries, 2), queries.size(-2), prototypes.size(-2), queries.size(-1), k, metric_of(metric)};
}

// Runs over the prototypes of an element of the batch in blocks.
template <typename T, typename F>
void for_blocks(const Tensor& p, int64_t b, const Search& n, const F& each) {
  const int64_t at_once = block_values / std::max<int64_t>(1, std::min(n.queries, most_queries));
  for (int64_t first = 0; first < n.classes; first += at_once) {
    each(first, Points<T>::prototypes(p, b, first, std::min(first + at_once, n.classes), n.metric));
  }
}

// Runs over the queries in blocks.
template <typename F>
void for_blocks(const Search& n, const F& each) {
  for (int64_t begin = 0; begin < n.queries; begin += most_queries) {
    each(Range{begin, std::min(begin + most_queries, n.queries)});
  }
}

std::tuple<Tensor, Tensor> nearest_prototype(const Tensor& queries, const Tensor& prototypes, int64_t k,
                                             c10::string_view metric) {
  const KernelGuard guard;
  const Search n = search_of(queries, prototypes, k, metric);
  const auto options = queries.options().dtype(accumulate_type(queries.scalar_type()));
  const Tensor best = at::empty(batched(queries, 2, {n.queries, k}), options),
               index = at::empty(best.sizes(), options.dtype(at::kLong));
  const Tensor q = points_of(queries, n.batch), p = points_of(prototypes, n.batch);
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric);
      const Scratch<T> block(block_values + most_queries);
      T* nearest = data<T>(best) + b * n.queries * k;
      int64_t* which = data<int64_t>(index) + b * n.queries * k;
      std::vector<int64_t> kept(n.queries), last;  // last: the first empty classes
      for_blocks<T>(p, b, n, [&](int64_t first, const Points<T>& to) {
        for (int64_t c = 0; to.empty() && c < to.count() && static_cast<int64_t>(last.size()) < k; ++c) {
          if (to.is_empty(c)) last.push_back(first + c);
        }
        for_blocks(n, [&](Range some) {
          find_distances(from, some, to, n.metric, block.data(), to.count());
          at::parallel_for(some.begin, some.end, thread_grain(to.count() * 4), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              FASTDA_RUN(keep_nearest(block.data() + (i - some.begin) * to.count(), to.empty(), to.count(), first, k,
                                      nearest + i * k, which + i * k, &kept[i]));
            }
          });
        });
      });
      for (int64_t i = 0; i < n.queries; ++i) {
        for (int64_t j = kept[i]; j < k; ++j) {
          nearest[i * k + j] = std::numeric_limits<T>::quiet_NaN();
          which[i * k + j] = last[j - kept[i]];
        }
      }
    });
  });
  return {best, index};
}

// The neighbours of all queries, by class: order[starts[c]] ... of class c, as query · k + rank.
std::tuple<std::vector<int64_t>, std::vector<int64_t>> by_class(const int64_t* index, const Search& n) {
  std::vector<int64_t> order(n.queries * n.k), starts;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
  for (size_t i = 0; i < order.size(); ++i) {
    if (i == 0 || index[order[i]] != index[order[i - 1]]) starts.push_back(i);
  }
  starts.push_back(order.size());
  return {order, starts};
}

// The gradients by way of all classes: where features are not finite, a class that is no neighbour gets 0 · Inf.
template <typename T>
void gradients_of_all(const Points<T>& from, const Tensor& p, int64_t b, const Search& n, const T* incoming,
                      const int64_t* which, T* grad_queries, T* grad_prototypes) {
  const Scratch<T> weights(block_values + most_queries), grads(block_values + most_queries);
  for_blocks<T>(p, b, n, [&](int64_t first, const Points<T>& to) {
    T* of_block = grad_prototypes ? grad_prototypes + first * n.features : nullptr;
    for_blocks(n, [&](Range some) {
      NearPairs<T> near = find_distances_and_near(from, some, to, n.metric, weights.data(), to.count());
      std::fill(grads.data(), grads.data() + some.size() * to.count(), T(0));
      for (int64_t i = some.begin; i < some.end; ++i) {
        T* grad = grads.data() + (i - some.begin) * to.count();
        for (int64_t j = i * n.k; j < (i + 1) * n.k; ++j) {
          if (first <= which[j] && which[j] < first + to.count()) grad[which[j] - first] = incoming[j];
        }
        T* row = weights.data() + (i - some.begin) * to.count();
        FASTDA_RUN(weights_from_distances(row, to.empty(), to.count(), n.metric, grad));
      }
      near.take(weights.data(), to.count());
      gradients_from_weights(from, some, to, weights.data(), to.count(), near, n.metric, put_or_add(first > 0),
                             grad_queries, put_or_add(some.begin > 0), of_block);
    });
    if (of_block) finish_prototypes(to, of_block);
  });
  if (grad_queries) from.through_directions(0, n.queries, grad_queries);
}

std::tuple<Tensor, Tensor> nearest_prototype_backward(const Tensor& grad_distances, const Tensor& queries,
                                                      const Tensor& prototypes, const Tensor& indices, int64_t k,
                                                      c10::string_view metric, bool need_queries,
                                                      bool need_prototypes) {
  const KernelGuard guard;
  const Search n = search_of(queries, prototypes, k, metric);
  check_count("grad_distances", grad_distances, n.batch * n.queries * k);
  check_labels("indices", indices, n.batch * n.queries * k);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Tensor of_queries = empty_gradient(need_queries, queries.sizes(), queries, dtype).zero_();
  const Tensor of_prototypes = empty_gradient(need_prototypes, prototypes.sizes(), prototypes, dtype).zero_();
  const Tensor q = points_of(queries, n.batch), p = points_of(prototypes, n.batch);
  const Tensor grad = grad_distances.to(dtype).contiguous(), index = indices.contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const auto from = Points<T>::queries(q, b, n.metric);
      const T* incoming = grad.const_data_ptr<T>() + b * n.queries * k;
      const int64_t* which = index.const_data_ptr<int64_t>() + b * n.queries * k;
      for (int64_t i = 0; i < n.queries * k; ++i) check_label("indices", which[i], n.classes);
      T* grad_queries = need_queries ? data<T>(of_queries) + b * n.queries * n.features : nullptr;
      T* grad_prototypes = need_prototypes ? data<T>(of_prototypes) + b * n.classes * n.features : nullptr;
      bool finite = from.is_finite();
      for_blocks<T>(p, b, n, [&](int64_t, const Points<T>& to) { finite = finite && to.is_finite(); });
      if (!finite) return gradients_of_all(from, p, b, n, incoming, which, grad_queries, grad_prototypes);
      const auto neighbour = [&](int64_t i) { return Points<T>::prototypes(p, b, which[i], which[i] + 1, n.metric); };
      const Scratch<T> weights(n.queries * k);
      at::parallel_for(0, n.queries, thread_grain(k * n.features * 4), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * k; i < end * k; ++i) {
          const auto to = neighbour(i);
          T* weight = weights.data() + i;
          const Range query{i / k, i / k + 1};
          find_distances(from, query, to, n.metric, weight, 1);
          FASTDA_RUN(weights_from_distances(weight, to.empty(), 1, n.metric, incoming + i));
          if (!need_queries) continue;
          T* out = grad_queries + i / k * n.features;
          sum_differences(from, query, to, {0, 1}, {weight, 1, 1}, n.metric, Put::add, out);
          if (i % k == k - 1) from.through_directions(i / k, i / k + 1, out);
        }
      });
      if (!need_prototypes) return;
      const auto [order, starts] = by_class(which, n);
      const int64_t classes = static_cast<int64_t>(starts.size()) - 1;
      at::parallel_for(0, classes, thread_grain(n.queries * k * n.features / std::max<int64_t>(classes, 1)),
                       [&, &order = order, &starts = starts](int64_t begin, int64_t end) {
                         for (int64_t c = begin; c < end; ++c) {
                           const auto to = neighbour(order[starts[c]]);
                           T* out = grad_prototypes + which[order[starts[c]]] * n.features;
                           for (int64_t i = starts[c]; i < starts[c + 1]; ++i) {
                             const int64_t query = order[i] / k;
                             sum_differences(to, {0, 1}, from, {query, query + 1}, {weights.data() + order[i], 1, 1},
                                             n.metric, Put::add, out);
                           }
                           finish_prototypes(to, out);
                         }
                       });
    });
  });
  return {gradient_like(of_queries, queries, need_queries), gradient_like(of_prototypes, prototypes, need_prototypes)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("nearest_prototype", &nearest_prototype);
  m.impl("nearest_prototype_backward", &nearest_prototype_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "nearest_prototype"); }

}  // namespace fastda
