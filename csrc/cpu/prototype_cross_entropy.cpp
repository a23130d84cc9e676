// The cross-entropy of queries against many classes, which holds no more than a block of the queries × classes matrix:
// an online softmax forward, the block's distances once more backward, or both at once where the distances can be held.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "metric.h"

#define FASTDA_LOOPS "cross_entropy_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "held_distances.h"
#include "many_classes.h"

namespace fastda {
namespace {

// Classes of a block beside as many queries as may be.
int64_t classes_at_once(const Sizes& n) {
  return std::min(n.classes, block_values / std::max<int64_t>(1, std::min(n.queries, most_queries)));
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

  T temperature() const { return temperature_; }
  int64_t kept() const { return kept_; }  // queries that are not ignored
  void begin() {
    std::fill(largest_, largest_ + n_.queries, -std::numeric_limits<T>::infinity());
    std::fill(log_sum_, log_sum_ + n_.queries, T(0));
    totals_.assign(n_.queries, 0);
  }

  // Takes the distances of some queries to some classes into account.
  void join(Range some, Range classes, const uint8_t* empty, const T* distances, int64_t stride) {
    for_queries<T>(some, classes.size(), [&](int64_t i, T* l) {
      const FlushToZero flush;
      FASTDA_RUN(logits(distances + (i - some.begin) * stride, empty, classes.size(), temperature_, l));
      FASTDA_RUN(join_softmax(l, classes.size(), largest_ + i, log_sum_ + i));
      if (options_.smoothing != 0) FASTDA_RUN(add_logits(l, empty, classes.size(), &totals_[i]));
      if (classes.has(label_[i])) losses_[i] = l[label_[i] - classes.begin];
    });
  }

  // Takes the distances of some queries to all classes into account: largest and sums are those of each panel.
  void join(const HeldDistances<T>& held, const T* largest, const T* sums) {
    const Range some = held.queries();
    FASTDA_RUN(join_parts(largest, sums, held.panels(), some.size(), some.size(), largest_ + some.begin,
                          log_sum_ + some.begin));
    for (int64_t i = some.begin; i < some.end; ++i) {
      if (label_[i] != options_.ignore_index) losses_[i] = -held.distance(i, label_[i]) / temperature_;
    }
    if (options_.smoothing == 0) return;
    for_queries<T>(some, held.panels() * held.columns(), [&](int64_t i, T* l) {
      for (int64_t panel = 0; panel < held.panels(); ++panel) {
        const int64_t classes = held.classes(panel).size();
        FASTDA_RUN(logits<T>(held.row(panel, i), nullptr, classes, temperature_, l));
        FASTDA_RUN(add_logits<T>(l, nullptr, classes, &totals_[i]));
      }
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

  // ∂L/∂loss of each query, from that of the result: one for all where the step is 0.
  std::vector<T> of_losses(const T* of_result, int64_t step) const {
    const T share = options_.mean ? static_cast<T>(1.0 / static_cast<double>(kept_)) : T(1);
    std::vector<T> result(n_.queries);
    for (int64_t i = 0; i < n_.queries; ++i) {
      result[i] = label_[i] == options_.ignore_index ? T(0) : of_result[i * step] * share;
    }
    return result;
  }

  LossGradient<T> gradient(const std::vector<T>& of_losses, int64_t present) const {
    const auto classes = static_cast<double>(present);
    const T spread = options_.smoothing == 0 ? T(0) : static_cast<T>(options_.smoothing / classes);
    const double on_target = 1 - classes * static_cast<double>(spread);  // of what was rounded: together they are 1
    return {label_,
            largest_,
            log_sum_,
            of_losses.data(),
            temperature_,
            static_cast<T>(on_target),
            spread,
            present == n_.classes,
            n_.metric};
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
  const Tensor q = points_of(queries, n.batch), p = points_of(prototypes, n.batch);
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

// Distances of some queries to some classes become weights; adds ∂L/∂T to the slopes, where there are any.
template <typename T>
void weigh(const LossGradient<T>& gradient, Range some, Range classes, const uint8_t* empty, T* distances,
           int64_t stride, std::vector<double>& slopes) {
  for_queries<T>(some, classes.size(), [&](int64_t i, T* scratch) {
    const FlushToZero flush;
    T* row = distances + (i - some.begin) * stride;
    FASTDA_RUN(weigh_row<T>(gradient, i, classes.begin, classes.size(), empty, row, scratch,
                            slopes.empty() ? nullptr : &slopes[i]));
  });
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
  const Tensor t = temperatures(temperature, n, dtype), q = points_of(queries, n.batch),
               p = points_of(prototypes, n.batch);
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
      const auto of_losses = state.of_losses(incoming, options.reduces ? 0 : 1);
      const auto gradient = state.gradient(of_losses, existing.const_data_ptr<int64_t>()[b]);
      const Scratch<T> weights(std::min(n.queries, most_queries) * stride);
      std::vector<double> slopes(need_temperature ? n.queries : 0);
      for_ranges(n.classes, at_once, [&](Range classes) {
        const auto to = Points<T>::prototypes(p, b, classes.begin, classes.end, n.metric);
        T* of_block = need_prototypes ? grad_prototypes + classes.begin * n.features : nullptr;
        for_ranges(n.queries, most_queries, [&](Range some) {
          NearPairs<T> near = find_distances_and_near(from, some, to, n.metric, weights.data(), stride);
          weigh(gradient, some, classes, to.empty(), weights.data(), stride, slopes);
          near.take(weights.data(), stride);
          gradients_from_weights(from, some, to, weights.data(), stride, near, n.metric, put_or_add(classes.begin > 0),
                                 grad_queries, put_or_add(some.begin > 0), of_block);
        });
        if (need_prototypes) finish_prototypes(to, of_block);
      });
      if (need_queries) from.through_directions(0, n.queries, grad_queries);
      if (need_temperature) data<T>(of_temperature)[b] = static_cast<T>(sum_of(slopes));
    });
  });
  return {gradient_like(results.queries, queries, need_queries),
          gradient_like(results.prototypes, prototypes, need_prototypes),
          gradient_like(of_temperature, temperature, need_temperature)};
}

// How many queries' distances to all classes are held until the gradients have been taken from them: all where the
// gradient of the prototypes has room for them until it is written; else a fifth, or as many as take little. 0 where
// that is too much, or so little that products are not the way to the gradients.
int64_t queries_held(const Sizes& n, bool in_gradient) {
  constexpr int64_t parts = 5, rows = 8, few = 64, little = 1 << 19, most = 1 << 22;  // the last two in distances
  if (!worth_summing_products(n.queries, n.classes, n.features)) return 0;
  if (in_gradient) return n.queries;
  const int64_t held = std::min(n.queries, std::max(blocks(blocks(n.queries, parts), rows) * rows, little / n.classes));
  return held * n.classes <= most && (held >= few || held == n.queries) ? held : 0;
}

// The cross-entropy of one element of the batch and its gradients, null for one that is not needed, in one pass.
template <typename T>
class LossAndGradients {
 public:
  LossAndGradients(const Sizes& n, const Tensor& q, const Tensor& p, int64_t b, QueryLosses<T>& state, T* grad_queries,
                   T* grad_prototypes, bool need_slopes)
      : n_(n),
        p_(p),
        b_(b),
        from_(Points<T>::queries(q, b, n.metric)),
        state_(state),
        of_losses_(state.of_losses(&one, 0)),
        grad_queries_(grad_queries),
        grad_prototypes_(grad_prototypes),
        centre_(centre_for(from_, {0, n.queries}, n.metric)),
        of_queries_(n.queries),
        of_classes_(n.classes),
        slopes_(need_slopes ? n.queries : 0) {}

  // Holds the distances of so many queries at once, of all where the gradient of the prototypes is to hold them. Of
  // finite points and not too many near pairs; false where there are others.
  bool run(int64_t at_once, bool in_gradient) {
    if (!from_.is_finite()) return false;
    const Scratch<T> memory(in_gradient ? 0 : at_once * n_.classes);
    bool served = true;
    state_.begin();
    for_ranges(n_.queries, at_once, [&](Range some) {
      T* distances = in_gradient ? grad_prototypes_ : memory.data();
      const HeldDistances<T> held(some, n_.classes, distances, in_gradient ? n_.features : at_once);
      served = served && find_losses(held);
      if (served) take_gradients(held);
    });
    if (served && grad_queries_) from_.through_directions(0, n_.queries, grad_queries_);
    return served;
  }

  T of_temperature() const { return static_cast<T>(sum_of(slopes_)); }

 private:
  static constexpr T one = 1;
  static constexpr int64_t classes_at_once = 480;  // whole panels of any width
  static constexpr int64_t rows_at_once = 8;       // of a sum
  static constexpr int64_t most_near = 1 << 17;    // pairs, which take 24 bytes each, three times over

  // What the gradients of a block of queries and a block of classes are taken from.
  struct Terms {
    const HeldDistances<T>& held;
    const LossGradient<T> gradient;
    const PackedSamples<T> queries, classes;
    const Scratch<T> memory;
    int64_t size;  // of a tile

    T* weights(int64_t panel) const { return memory.data() + panel * size; }
  };

  Points<T> prototypes(Range classes) const { return Points<T>::present_prototypes(p_, b_, classes, n_.metric); }

  bool find_losses(const HeldDistances<T>& held) {
    const int64_t queries = held.queries().size();
    const Scratch<T> largest(held.panels() * queries), sums(held.panels() * queries);
    std::atomic<bool> served{true};
    near_count_ = 0;
    held.find(
        from_, n_.metric, centre_, [&](Range classes) { return prototypes(classes); },
        [&](int64_t panel, Range some, bool near) {
          if (near && !keep_near(held, panel, some)) served = false;
          const FlushToZero flush;
          const T* tile = held.row(panel, some.begin);
          const int64_t classes = held.classes(panel).size(), at = panel * queries + some.begin - held.queries().begin;
          bool part = true;
          FASTDA_RUN(all_finite(tile, classes, &part));  // no query is at a finite distance from what is not
          if (!part) served = false;
          FASTDA_RUN(softmax_of_tile(tile, some.size(), classes, state_.temperature(), largest.data() + at,
                                     sums.data() + at));
        });
    if (!served) return false;
    state_.join(held, largest.data(), sums.data());
    state_.finish(held.queries(), n_.classes);
    near_ = all_near();
    return true;
  }

  // The near pairs of some queries and a panel, which were found on any thread; false where they take too much room.
  bool keep_near(const HeldDistances<T>& held, int64_t panel, Range some) {
    const Range classes = held.classes(panel);
    std::vector<NearPair<T>> near;
    find_near(held.tile(panel) + (some.begin - held.queries().begin) * held.columns(), held.columns(), some.size(),
              classes.size(), [&](int64_t i, int64_t c) { near.push_back({some.begin + i, classes.begin + c, 0}); });
    const std::lock_guard<std::mutex> lock(mutex_);
    near_count_ += static_cast<int64_t>(near.size());
    if (near_count_ > most_near) return false;
    found_near_.push_back(std::move(near));
    return true;
  }

  // All of them, by prototype, in the same order whoever found them.
  std::vector<NearPair<T>> all_near() {
    const auto none = [](const auto& near) { return near.empty(); };
    found_near_.erase(std::remove_if(found_near_.begin(), found_near_.end(), none), found_near_.end());
    std::sort(found_near_.begin(), found_near_.end(),
              [](const auto& a, const auto& b) { return a.front().row < b.front().row; });
    std::vector<NearPair<T>> all;
    for (const auto& near : found_near_) all.insert(all.end(), near.begin(), near.end());
    found_near_.clear();
    return turned(all);
  }

  // Those of a block of classes, by query; classes are counted from its first one.
  std::vector<NearPair<T>> near_of(Range classes) const {
    const Range its = those_of(near_, classes);
    std::vector<NearPair<T>> pairs(near_.begin() + its.begin, near_.begin() + its.end);
    for (NearPair<T>& pair : pairs) pair.row -= classes.begin;
    return turned(pairs);
  }

  void take_gradients(const HeldDistances<T>& held) {
    const Range all = held.queries();
    const int64_t depth = from_.depth(), size = all.size() * held.columns();
    const int64_t some_classes = blocks(std::min(n_.classes, classes_at_once), held.columns()) * held.columns();
    const Terms terms{held,
                      state_.gradient(of_losses_, n_.classes),
                      {grad_prototypes_ ? all.size() * depth : 0, centre_},
                      {grad_queries_ ? some_classes * depth : 0, centre_},
                      Scratch<T>((all.size() + rows_at_once) * some_classes),  // the last rows are read eight at once
                      size};
    if (grad_prototypes_) {
      for_shares(all.size() * depth * 8, [&](Share share) {
        terms.queries.pack(from_, all, share.of(all, rows_at_once));
      });
    }
    for_ranges(n_.classes, classes_at_once, [&](Range classes) {
      const Points<T> to = prototypes(classes);
      std::vector<NearPair<T>> near = near_of(classes);
      for_shares(all.size() * classes.size() * 32, [&](Share share) {
        const FlushToZero flush;
        weigh(terms, classes, near, share);
        if (grad_queries_) terms.classes.pack(to, {0, classes.size()}, share.of({0, classes.size()}, rows_at_once));
      });
      const std::vector<NearPair<T>> near_by_class = turned(near);
      for_shares(all.size() * classes.size() * n_.features * 2, [&](Share share) {
        const FlushToZero flush;
        if (grad_queries_) {
          sum_over_classes(terms, classes, share);
          add_near(near, those_of(near, share.of(all, rows_at_once)), from_, 0, to, 0, {0, n_.features}, grad_queries_,
                   n_.features);
        }
        if (grad_prototypes_) sum_over_queries(terms, classes, to, near_by_class, share);
      });
    });
  }

  // Distances of some queries become weights, and these add up; those of near pairs are put aside.
  void weigh(const Terms& terms, Range classes, std::vector<NearPair<T>>& near, Share share) {
    const Range all = terms.held.queries(), some = share.of(all, rows_at_once);
    const int64_t columns = terms.held.columns(), first = classes.begin / columns;
    const Range panels{first, blocks(classes.end, columns)};
    const auto weights = [&](int64_t panel, int64_t query) {
      return terms.weights(panel - first) + (query - all.begin) * columns;
    };
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const Range its = terms.held.classes(panel);
      FASTDA_RUN(weigh_tile(terms.gradient, some.begin, some.size(), its.begin, its.size(),
                            terms.held.row(panel, some.begin), slopes_.empty() ? nullptr : slopes_.data(),
                            weights(panel, some.begin)));
    }
    const Range its_near = those_of(near, some);
    for (int64_t i = its_near.begin; i < its_near.end; ++i) {
      T* row = weights(first + near[i].sample / columns, near[i].row);
      near[i].weight = std::exchange(row[near[i].sample % columns], T(0));
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      FASTDA_RUN(add_totals_of_tile(weights(panel, some.begin), some.size(), terms.held.classes(panel).size(),
                                    of_queries_.data() + some.begin));
    }
  }

  // Some queries' part.
  void sum_over_classes(const Terms& terms, Range classes, Share share) {
    const Range all = terms.held.queries(), some = share.of(all, rows_at_once);
    const int64_t columns = terms.held.columns();
    const double* totals = classes.end == n_.classes ? of_queries_.data() + some.begin : nullptr;
    for (int64_t d = 0; d < n_.features; d += columns) {
      FASTDA_RUN(sum_over_classes(n_.metric == Metric::cosine,
                                  terms.weights(0) + (some.begin - all.begin) * columns, terms.size, some.size(),
                                  terms.classes.panel(d, n_.features, classes.size(), 0), classes.size(),
                                  from_.row(some.begin) + d, from_.stride(), totals, centre_.data() + d,
                                  std::min(columns, n_.features - d), classes.begin > 0,
                                  grad_queries_ + some.begin * n_.features + d, n_.features));
    }
  }

  // Some classes' part. Each begins in one tile, and may end in another.
  void sum_over_queries(const Terms& terms, Range classes, const Points<T>& to, const std::vector<NearPair<T>>& near,
                        Share share) {
    const Range some = share.of({0, classes.size()}, rows_at_once);
    const int64_t columns = terms.held.columns();
    for (int64_t c = some.begin; c < some.end; c = (c / columns + 1) * columns) {
      sum_over_queries(terms, classes, to, c, std::min(some.end, (c / columns + 1) * columns) - c);
    }
    add_near(near, those_of(near, some), to, 0, from_, 0, {0, n_.features},
             grad_prototypes_ + classes.begin * n_.features, n_.features);
    if (terms.held.queries().end == n_.queries) {
      to.through_directions(some.begin, some.end, grad_prototypes_ + (classes.begin + some.begin) * n_.features);
    }
  }

  // Of so many classes of one tile, the first of which is `c` of the block.
  void sum_over_queries(const Terms& terms, Range classes, const Points<T>& to, int64_t c, int64_t count) {
    constexpr int64_t at_once = 512;  // queries, whose panel stays in the second cache
    const Range all = terms.held.queries();
    const int64_t columns = terms.held.columns();
    const T* weights = terms.weights(c / columns) + c % columns;
    double* totals = of_classes_.data() + classes.begin + c;
    FASTDA_RUN(totals_of_weights(weights, 1, columns, count, all.size(), totals));
    for_ranges(all.size(), at_once, [&](Range some) {
      const bool last = all.begin + some.end == n_.queries;
      for (int64_t d = 0; d < n_.features; d += columns) {
        FASTDA_RUN(sum_over_queries(n_.metric == Metric::cosine, weights + some.begin * columns, count,
                                    terms.queries.panel(d, n_.features, all.size(), some.begin), some.size(),
                                    to.row(c) + d, to.stride(), last ? totals : nullptr, centre_.data() + d,
                                    std::min(columns, n_.features - d), all.begin + some.begin > 0,
                                    grad_prototypes_ + (classes.begin + c) * n_.features + d, n_.features));
      }
    });
  }

  const Sizes& n_;
  const Tensor& p_;
  const int64_t b_;
  const Points<T> from_;
  QueryLosses<T>& state_;
  const std::vector<T> of_losses_;
  T *grad_queries_, *grad_prototypes_;
  const std::vector<T> centre_;
  std::vector<double> of_queries_, of_classes_, slopes_;
  std::mutex mutex_;
  int64_t near_count_ = 0;
  std::vector<std::vector<NearPair<T>>> found_near_;  // of a panel and some queries each
  std::vector<NearPair<T>> near_;                     // of the queries whose distances are held, by prototype
};

// The cross-entropy and its gradients in one pass.
std::optional<WithGradients> prototype_cross_entropy_with_gradients(const c10::IValue* arguments,
                                                                    const std::vector<bool>& needs) {
  const Tensor &queries = arguments[0].toTensor(), &prototypes = arguments[1].toTensor(),
               &temperature = arguments[2].toTensor(), &targets = arguments[3].toTensor();
  const auto metric = arguments[6].toStringView(), reduction = arguments[7].toStringView();
  if (reduction == "none" || !(needs[0] || needs[1])) return std::nullopt;
  const KernelGuard guard;
  const Sizes n = sizes_of(queries, prototypes, metric);
  const bool in_gradient = needs[1] && n.queries <= n.features;
  const int64_t held = queries_held(n, in_gradient);
  if (held == 0) return std::nullopt;
  const Targets options(targets, n, arguments[4].toInt(), arguments[5].toDouble(), reduction);
  const auto dtype = accumulate_type(queries.scalar_type());
  const CrossEntropy result(queries, targets, n, options);
  const Results gradients(n, queries, prototypes, needs[0], needs[1]);
  const Tensor of_temperature = empty_gradient(needs[2], temperature.sizes(), temperature, dtype);
  const Tensor t = temperatures(temperature, n, dtype), q = points_of(queries, n.batch),
               p = points_of(prototypes, n.batch);
  std::atomic<bool> served{true};
  accumulate_as(queries, [&](auto zero) {
    using T = decltype(zero);
    for_batch(n.batch, [&](int64_t b) {
      if (!served) return;
      auto state = result.of<T>(b, n, options, t.const_data_ptr<T>()[b]);
      LossAndGradients<T> pass(n, q, p, b, state, gradients.of_queries<T>(n, needs[0], b),
                               gradients.of_prototypes<T>(n, needs[1], b), needs[2]);
      if (!pass.run(held, in_gradient)) served = false;
      if (needs[2]) data<T>(of_temperature)[b] = pass.of_temperature();
      result.finish(b, state, n.classes, true);
    });
  });
  if (!served) return std::nullopt;
  return WithGradients{{result.loss, result.largest, result.log_sum, result.present, result.kept},
                       {gradients.queries, gradients.prototypes, of_temperature}};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("prototype_cross_entropy", &prototype_cross_entropy);
  m.impl("prototype_cross_entropy_backward", &prototype_cross_entropy_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) {
  differentiable(m, "prototype_cross_entropy", &prototype_cross_entropy_with_gradients);
}

}  // namespace fastda
