// The prototypical loss of a batch of episodes: means, distances, softmax and loss in one pass over the queries, and
// the gradients, of queries and prototypes together, and of the support from those of the prototypes. These are taken
// from the weights that the loss leaves behind: found with the loss, they would have to be scaled by what comes in.
#include "../autograd.h"
#include "../common.h"
#include "../prototypes.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "metric.h"

#define FASTDA_LOOPS "episode_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "class_means.h"
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

// A result of which each row is the gradient of some class's prototype, classes[row], divided by counts[class] if there
// are counts: the gradient of the support, say.
template <typename T>
struct RowsOfClasses {
  const int64_t *counts, *classes;
  int64_t rows, features;
  T* grad;

  // Divides some columns of the prototypes' gradients, the first of which is at `prototypes`; the rows are still to be
  // copied from them.
  RowCopies<T> divide_and_copy(T* prototypes, int64_t stride, int64_t num_classes, Range columns) const {
    if (counts) FASTDA_RUN(divide_by_counts(prototypes, stride, columns.size(), counts, num_classes));
    return {prototypes, classes, stride, grad + columns.begin, features, rows, 0, 0};
  }
};

// As gradients_in_one_pass, of many classes, by products: a thread packs what belongs to its columns alone, and reads a
// query's for its own gradient and the prototypes' together. Whole panels of rows are copied from the prototypes'
// gradients during the products of the next panel, which finishes them. False where differences have to be taken one by
// one: of many near pairs, or of what is not finite (where queries are not, their weights are not either).
template <typename T>
bool gradients_by_columns(const Points<T>& q, const Points<T>& p, const T* weights, int64_t stride,
                          const NearPairs<T>& near, Metric metric, T* grad_queries, const RowsOfClasses<T>& rows) {
  if (near.too_many() || !p.is_finite()) return false;
  int64_t part = 0;
  bool many_parts = false;
  FASTDA_RUN(queries_of_part<T>(q.count(), &part, &many_parts));
  std::vector<double> of_queries(q.count(), 0), of_classes(blocks(q.count(), part) * p.count(), 0);
  FASTDA_RUN(totals_of_weights(weights, stride, 1, q.count(), p.count(), of_queries.data()));
  const int64_t class_stride = row_stride<T>(q.count()), lanes = panel_shape_of(T()).rows;
  const Scratch<T> by_class((blocks(p.count(), lanes) * lanes + class_panel_rows) * class_stride);
  FASTDA_RUN(turn_rows(weights, stride, q.count(), p.count(), by_class.data(), class_stride));
  for (int64_t i = 0; i < q.count(); i += part) {
    FASTDA_RUN(totals_of_weights(by_class.data() + i, class_stride, 1, p.count(), std::min(part, q.count() - i),
                                 of_classes.data() + i / part * p.count()));
  }
  const auto is_finite = [](double total) { return std::isfinite(total); };
  if (!std::all_of(of_queries.begin(), of_queries.end(), is_finite)) return false;
  const auto centre = centre_for(q, {0, q.count()}, metric);
  const PanelShape shape = class_panel_shape_of(T());
  const int64_t threads = at::get_num_threads();
  const int64_t width = std::min(shape.columns, blocks(q.features(), threads * lanes) * lanes);
  const int64_t work = 2 * q.count() * p.count() * width;
  threads_in_turn(blocks(q.features(), width), thread_grain(work), [&](const auto& take) {
    const FlushToZero flush;
    const int64_t block = (p.count() + shape.rows) * width;
    const Scratch<T> scratch(shape.depth * width + block), found(2 * block);
    const Scratch<double> sums(many_parts ? block : 0);
    RowCopies<T> copies{};
    int64_t turn = 0;
    for (int64_t begin, end; take(&begin, &end);) {
      for (int64_t d = begin * width; d < std::min(end * width, q.features()); d += width) {
        const EpisodeWeights<T> of{q.row(0) + d, p.row(0) + d, weights, by_class.data(), centre.data() + d,
                                   of_queries.data(), of_classes.data(), q.count(), p.count(),
                                   q.stride(), p.stride(), stride, class_stride, part, metric == Metric::cosine};
        const Range columns{d, std::min(d + width, q.features())};
        T* prototypes = found.data() + turn++ % 2 * block;
        if (columns.end == q.features()) copies.ahead = width;  // after the last products, rows are only copied
        FASTDA_RUN(gradients_of_panel(of, columns.size(), &copies, grad_queries + d, q.features(), prototypes, width,
                                      scratch.data(), sums.data()));
        near.add(q, {0, q.count()}, p, columns, grad_queries + d, prototypes, width);
        clear_empty(p, columns.size(), prototypes, width);
        copies = rows.divide_and_copy(prototypes, width, p.count(), columns);
        if (columns.size() < shape.columns) FASTDA_RUN(copy_rest(&copies, columns.size()));
      }
    }
    FASTDA_RUN(copy_rest(&copies, width));
  });
  return true;
}

// One episode, whose prototypes are known.
template <typename T>
class Episode {
 public:
  Episode(const Episodes& n, const Tensor& queries, const Tensor& prototypes, int64_t b)
      : n_(n),
        from_(Points<T>::queries(queries, b, n.metric)),
        to_(Points<T>::prototypes(prototypes, b, 0, n.classes, n.metric)) {}

  // The losses of all queries, what their gradients are taken from, and which pairs are near.
  void find_losses(T temperature, const int64_t* labels, T* losses, T* weights, T* slopes, bool* near) {
    const bool products = worth_products(n_.queries, n_.classes, n_.features);
    const bool ask_near = worth_summing_products(n_.queries, n_.classes, n_.features);
    std::optional<PackedClasses<T>> packed;
    const auto centre = products ? centre_for(from_, {0, n_.queries}, n_.metric) : std::vector<T>();
    if (products) packed.emplace(to_, n_.metric, centre);
    for_lanes<T>(n_.queries, n_.classes, n_.features, [&](Range some, T* scratch) {
      T* distances = weights + some.begin * n_.classes;
      bool* marks = near + some.begin * n_.classes;
      std::fill(marks, marks + some.size() * n_.classes, false);
      if (!products) {
        find_distances_one_by_one(from_, some, to_, n_.metric, distances, n_.classes);
      } else if (packed->find_distances(from_, some, distances, n_.classes, ask_near)) {
        find_near(distances, n_.classes, some.size(), n_.classes,
                  [&](int64_t i, int64_t c) { marks[i * n_.classes + c] = true; });
      }
      const FlushToZero flush;
      FASTDA_RUN(losses_of_queries(distances, to_.empty(), some.size(), n_.classes, n_.metric, temperature,
                                   labels + some.begin, scratch, losses + some.begin, slopes + some.begin));
    });
  }

  // Gradients from what find_losses left and ∂L/∂loss, one of all queries or one of each; null for one that is not
  // needed. The classes have so many samples.
  void find_gradients(const T* of_losses, const T* weights, const bool* near, const int64_t* counts,
                      const int64_t* support_labels, T* grad_support, T* grad_queries, Put put_queries) {
    const int64_t stride = row_stride<T>(n_.classes);
    const Scratch<T> scaled((n_.queries + class_panel_rows) * stride);
    {
      const FlushToZero flush;
      FASTDA_RUN(scale_rows(weights, n_.queries, n_.classes, of_losses, n_.reduces ? 0 : 1,
                            n_.reduces ? static_cast<T>(n_.share()) : T(1), scaled.data(), stride));
    }
    const bool both = grad_queries && grad_support, directions = n_.metric == Metric::cosine;
    const bool one_pass = both && n_.classes <= most_groups * classes_of_group;
    const bool once = !directions && (!one_pass || n_.classes <= classes_of_group);
    const Put put = once ? put_queries : Put::store;
    const RowsOfClasses<T> samples{counts, support_labels, n_.support, n_.features, grad_support};
    NearPairs<T> pairs(n_.queries, n_.classes);
    const bool* const end = near + n_.queries * n_.classes;
    for (const bool* mark = near; !one_pass && mark < end; ++mark) {
      mark = static_cast<const bool*>(std::memchr(mark, true, end - mark));
      if (!mark) break;
      pairs.keep((mark - near) / n_.classes, (mark - near) % n_.classes);
    }
    pairs.take(scaled.data(), stride);
    const bool by_columns = both && !one_pass && worth_summing_products(n_.queries, n_.classes, n_.features);
    const auto take_by_columns = [&](const RowsOfClasses<T>& rows) {
      return by_columns &&
             gradients_by_columns(from_, to_, scaled.data(), stride, pairs, n_.metric, grad_queries, rows);
    };
    if (!directions && take_by_columns(samples)) return;
    const Scratch<T> of_prototypes(grad_support ? n_.classes * n_.features : 0);
    T* prototypes = grad_support ? of_prototypes.data() : nullptr;
    std::vector<int64_t> each(directions ? n_.classes : 0);
    std::iota(each.begin(), each.end(), 0);
    if (one_pass) {
      gradients_in_one_pass(from_, to_, scaled.data(), stride, n_.metric, put, grad_queries, prototypes);
    } else if (!directions || !take_by_columns({nullptr, each.data(), n_.classes, n_.features, prototypes})) {
      gradients_from_weights(from_, {0, n_.queries}, to_, scaled.data(), stride, pairs, n_.metric, put, grad_queries,
                             Put::store, prototypes);
    }
    if (grad_queries) from_.through_directions(0, n_.queries, grad_queries);
    if (!grad_support) return;
    finish_prototypes(to_, prototypes);
    constexpr int64_t lanes = vector_bytes / sizeof(T);
    at::parallel_for(0, blocks(n_.features, lanes), grain(n_.support * lanes), [&](int64_t begin, int64_t end) {
      const Range columns{begin * lanes, std::min(end * lanes, n_.features)};
      RowCopies<T> copies = samples.divide_and_copy(prototypes + columns.begin, n_.features, n_.classes, columns);
      FASTDA_RUN(copy_rest(&copies, columns.size()));
    });
  }

 private:
  const Episodes& n_;
  const Points<T> from_, to_;
};

// Of an episode's shape, for the whole batch; past the dispatcher, which takes longer than a small episode.
Tensor result(const Tensor& queries, std::initializer_list<int64_t> shape,
              std::optional<at::ScalarType> dtype = std::nullopt) {
  return Tensor(
      at::detail::empty_cpu(batched(queries, 2, shape), dtype ? *dtype : accumulate_type(queries.scalar_type())));
}

// Finds the loss of each episode.
template <typename T>
void find_losses(const Episodes& n, const Tensor& support, const Tensor& queries, const Tensor& temperature,
                 const Tensor& support_labels, const Tensor& query_labels, const Tensor& loss, const Tensor& losses,
                 const EpisodeState& found) {
  const Tensor x = rows_of(support), q = points_of(queries, n.batch), p = points_of(found.prototypes, n.batch);
  const Tensor t = as_type(temperature, losses.scalar_type()).contiguous();
  const Tensor support_label = support_labels.contiguous(), query_label = query_labels.contiguous();
  for_batch(n.batch, [&](int64_t b) {
    const int64_t* labels = query_label.const_data_ptr<int64_t>() + b * n.queries;
    const Members members("support_labels", support_label.const_data_ptr<int64_t>() + b * n.support, n.support,
                          n.classes);
    for (int64_t i = 0; i < n.queries; ++i) check_label("query_labels", labels[i], n.classes);
    find_means(members, x.const_data_ptr<T>() + b * n.support * n.features, n.support, n.classes, n.features,
               std::numeric_limits<T>::quiet_NaN(), data<T>(found.prototypes) + b * n.classes * n.features,
               data<int64_t>(found.counts) + b * n.classes);
    Episode<T> episode(n, q, p, b);
    const int64_t first = b * n.queries;
    T* of_queries = data<T>(losses) + first;
    episode.find_losses(t.const_data_ptr<T>()[b], labels, of_queries, data<T>(found.weights) + first * n.classes,
                        data<T>(found.slopes) + first, data<bool>(found.near) + first * n.classes);
    if (n.reduces) {
      double sum = 0;
      for (int64_t i = 0; i < n.queries; ++i) sum += static_cast<double>(of_queries[i]);
      data<T>(loss)[b] = static_cast<T>(n.mean ? sum / static_cast<double>(n.queries) : sum);
    }
  });
}

// The gradients, in the accumulation dtype, of what needs them.
struct EpisodeGradients {
  EpisodeGradients(const Tensor& support, const Tensor& queries, const Tensor& temperature, bool need_support,
                   bool need_queries, bool need_temperature)
      : need_support(need_support),
        need_queries(need_queries),
        need_temperature(need_temperature),
        support(gradient(need_support, support, queries)),
        queries(gradient(need_queries, queries, queries)),
        temperature(gradient(need_temperature, temperature, queries)) {}

  static Tensor gradient(bool needed, const Tensor& of, const Tensor& queries) {
    if (!needed) return Tensor();
    return Tensor(at::detail::empty_cpu(of.sizes(), accumulate_type(queries.scalar_type())));
  }

  bool of_points() const { return need_support || need_queries; }

  // Of episode b; of_losses: ∂L/∂loss of its loss, or of each of its queries.
  template <typename T>
  void find_of_temperature(const Episodes& n, int64_t b, const T* of_losses, const Tensor& slopes) const {
    if (!need_temperature) return;
    const T share = static_cast<T>(n.share()), *slope = slopes.const_data_ptr<T>() + b * n.queries;
    double total = 0;
    for (int64_t i = 0; i < n.queries; ++i) {
      total += static_cast<double>((n.reduces ? of_losses[0] * share : of_losses[i]) * slope[i]);
    }
    data<T>(temperature)[b] = static_cast<T>(total);
  }

  template <typename T>
  void find_of_points(const Episodes& n, int64_t b, Episode<T>& episode, const T* of_losses, const Tensor& weights,
                      const Tensor& near, const Tensor& counts, const int64_t* support_labels) const {
    const int64_t distances = b * n.queries * n.classes;
    T* of_queries = need_queries ? data<T>(queries) + b * n.queries * n.features : nullptr;
    episode.find_gradients(of_losses, weights.const_data_ptr<T>() + distances, near.const_data_ptr<bool>() + distances,
                           counts.const_data_ptr<int64_t>() + b * n.classes, support_labels,
                           need_support ? data<T>(support) + b * n.support * n.features : nullptr, of_queries,
                           need_queries ? put_once(queries, of_queries) : Put::store);
  }

  const bool need_support, need_queries, need_temperature;
  const Tensor support, queries, temperature;
};

}  // namespace

EpisodeLoss prototypical_loss_on_cpu(const Tensor& support, const Tensor& queries, const Tensor& temperature,
                                     const Tensor& support_labels, const Tensor& query_labels, int64_t num_classes,
                                     c10::string_view metric, c10::string_view reduction) {
  const KernelGuard guard;
  const Episodes n =
      episodes_of(support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction);
  const Tensor losses = result(queries, {n.queries});
  EpisodeLoss found{n.reduces ? result(queries, {}) : losses,
                    {result(queries, {n.classes, n.features}), result(queries, {n.classes}, at::kLong),
                     result(queries, {n.queries, n.classes}), result(queries, {n.queries}),
                     result(queries, {n.queries, n.classes}, at::kBool)}};
  accumulate_as(queries, [&](auto zero) {
    find_losses<decltype(zero)>(n, support, queries, temperature, support_labels, query_labels, found.loss, losses,
                                found.state);
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss_gradients_on_cpu(
    const Tensor& grad_loss, const Tensor& support, const Tensor& queries, const Tensor& temperature,
    const Tensor& support_labels, const Tensor& query_labels, const EpisodeState& found, int64_t num_classes,
    c10::string_view metric, c10::string_view reduction, bool need_support, bool need_queries, bool need_temperature) {
  const KernelGuard guard;
  const Episodes n =
      episodes_of(support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction);
  const int64_t distances = n.queries * n.classes;
  check_count("grad_loss", grad_loss, n.batch * (n.reduces ? 1 : n.queries));
  check_count("prototypes", found.prototypes, n.batch * n.classes * n.features);
  check_count("counts", found.counts, n.batch * n.classes);
  check_count("weights", found.weights, n.batch * distances);
  check_count("slopes", found.slopes, n.batch * n.queries);
  check_count("near", found.near, n.batch * distances);
  const EpisodeGradients gradients(support, queries, temperature, need_support, need_queries, need_temperature);
  const auto dtype = accumulate_type(queries.scalar_type());
  const Tensor grad = as_type(grad_loss, dtype).contiguous(), q = points_of(queries, n.batch),
               p = points_of(found.prototypes, n.batch);
  const Tensor w = as_type(found.weights, dtype).contiguous(), slope = as_type(found.slopes, dtype).contiguous();
  const Tensor label = support_labels.contiguous(), count = found.counts.contiguous(), near = found.near.contiguous();
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      const int64_t* labels = label.const_data_ptr<int64_t>() + b * n.support;
      for (int64_t s = 0; s < n.support; ++s) check_label("support_labels", labels[s], n.classes);
      const T* of_losses = grad.const_data_ptr<T>() + b * (n.reduces ? 1 : n.queries);
      gradients.find_of_temperature(n, b, of_losses, slope);
      if (!gradients.of_points()) return;
      Episode<T> episode(n, q, p, b);
      gradients.find_of_points(n, b, episode, of_losses, w, near, count, labels);
    });
  });
  const auto as_input = [](const Tensor& gradient, const Tensor& input) {
    return gradient.defined() ? as_type(gradient, input.scalar_type()) : gradient;
  };
  return {as_input(gradients.support, support), as_input(gradients.queries, queries),
          as_input(gradients.temperature, temperature)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> episode_loss(
    const Tensor& support, const Tensor& queries, const Tensor& temperature, const Tensor& support_labels,
    const Tensor& query_labels, int64_t num_classes, c10::string_view metric, c10::string_view reduction) {
  const auto [loss, state] = prototypical_loss_on_cpu(support, queries, temperature, support_labels, query_labels,
                                                      num_classes, metric, reduction);
  return {loss, state.prototypes, state.counts, state.weights, state.slopes, state.near};
}

std::tuple<Tensor, Tensor, Tensor> episode_loss_backward(
    const Tensor& grad_loss, const Tensor& support, const Tensor& queries, const Tensor& temperature,
    const Tensor& support_labels, const Tensor& query_labels, const Tensor& prototypes, const Tensor& counts,
    const Tensor& weights, const Tensor& slopes, const Tensor& near, int64_t num_classes, c10::string_view metric,
    c10::string_view reduction, bool need_support, bool need_queries, bool need_temperature) {
  const auto [of_support, of_queries, of_temperature] = prototypical_loss_gradients_on_cpu(
      grad_loss, support, queries, temperature, support_labels, query_labels,
      {prototypes, counts, weights, slopes, near}, num_classes, metric, reduction, need_support, need_queries,
      need_temperature);
  const auto defined = [&](const Tensor& gradient) {
    return gradient.defined() ? gradient : at::empty({0}, queries.options());
  };
  return {defined(of_support), defined(of_queries), defined(of_temperature)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("prototypical_loss", &episode_loss);
  m.impl("prototypical_loss_backward", &episode_loss_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "prototypical_loss"); }

}  // namespace fastda
