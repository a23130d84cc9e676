// Near pairs: what they add to gradients is taken from their differences. Their weights leave the block of weights of
// which products are taken.
#pragma once

#include "points.h"

#include <cstring>
#include <utility>
#include <vector>

namespace fastda {
namespace {

// Whether gradients of so many are found by way of products, so that near pairs are to be known.
inline bool worth_summing_products(int64_t queries, int64_t classes, int64_t features) {
  constexpr int64_t worth_packing = 40;
  return std::min({queries, classes, features}) >= worth_packing;
}

// The same pairs with what was a row as the sample; ordered by the rows, then by the samples.
template <typename T>
std::vector<NearPair<T>> turned(std::vector<NearPair<T>> pairs) {
  for (NearPair<T>& pair : pairs) std::swap(pair.row, pair.sample);
  std::sort(pairs.begin(), pairs.end(), [](const NearPair<T>& a, const NearPair<T>& b) {
    return std::pair(a.row, a.sample) < std::pair(b.row, b.sample);
  });
  return pairs;
}

// Which of some pairs, ordered by their rows, have one of these rows.
template <typename T>
Range those_of(const std::vector<NearPair<T>>& pairs, Range rows) {
  const auto before = [&](int64_t end) {
    return std::partition_point(pairs.begin(), pairs.end(), [&](const auto& pair) { return pair.row < end; }) -
           pairs.begin();
  };
  return {before(rows.begin), before(rows.end)};
}

// Adds the differences of some pairs to the gradients of their rows x, out, in some columns.
template <typename T>
void add_near(const std::vector<NearPair<T>>& pairs, Range some, const Points<T>& x, int64_t first_x,
              const Points<T>& y, int64_t first_y, Range columns, T* out) {
  FASTDA_RUN(add_near_pairs(pairs.data() + some.begin, some.size(), x.row(first_x), x.stride(), y.row(first_y),
                            y.stride(), columns.begin, columns.end, out, x.features()));
}

// Those of a block of queries and classes.
template <typename T>
class NearPairs {
 public:
  // Those whose distances are negated, distances[q · stride + c], which they then are no longer. The first query and
  // class have these numbers.
  void find(T* distances, int64_t stride, int64_t queries, int64_t classes, int64_t first_query = 0,
            int64_t first_class = 0) {
    for (int64_t i = 0; i < queries; ++i, distances += stride) {
      bool any = false;
      FASTDA_RUN(has_near(distances, classes, &any));
      for (int64_t c = 0; any && c < classes; ++c) {
        if (!std::signbit(distances[c])) continue;
        distances[c] = -distances[c];
        by_query_.push_back({first_query + i, first_class + c, 0});
      }
    }
  }

  // Those that are marked, marks[q · classes + c].
  void find_marked(const bool* marks, int64_t queries, int64_t classes) {
    const bool *mark = marks, *end = marks + queries * classes;
    while ((mark = static_cast<const bool*>(std::memchr(mark, true, end - mark)))) {
      by_query_.push_back({(mark - marks) / classes, (mark - marks) % classes, 0});
      ++mark;
    }
  }

  // Their weights, weights[q · stride + c], which are 0 then.
  void take(T* weights, int64_t stride) {
    for (NearPair<T>& pair : by_query_) pair.weight = std::exchange(weights[pair.row * stride + pair.sample], T(0));
    by_prototype_ = turned(by_query_);
  }

  // Adds their differences to gradients, null for one that is not needed, in some columns.
  void add(const Points<T>& q, Range queries, const Points<T>& p, Range columns, T* grad_queries,
           T* grad_prototypes) const {
    const Range all{0, static_cast<int64_t>(by_query_.size())};
    if (grad_queries) add_near(by_query_, all, q, queries.begin, p, 0, columns, grad_queries);
    if (grad_prototypes) add_near(by_prototype_, all, p, 0, q, queries.begin, columns, grad_prototypes);
  }

  // In all columns, on all threads.
  void add(const Points<T>& q, Range queries, const Points<T>& p, T* grad_queries, T* grad_prototypes) const {
    if (by_query_.empty()) return;
    constexpr int64_t lanes = vector_bytes / sizeof(T);
    const int64_t work = static_cast<int64_t>(by_query_.size()) * lanes * 4;
    at::parallel_for(0, blocks(q.features(), lanes), thread_grain(work), [&](int64_t begin, int64_t end) {
      const FlushToZero flush;
      add(q, queries, p, {begin * lanes, std::min(end * lanes, q.features())}, grad_queries, grad_prototypes);
    });
  }

  const std::vector<NearPair<T>>& by_query() const { return by_query_; }

 private:
  std::vector<NearPair<T>> by_query_, by_prototype_;
};

}  // namespace
}  // namespace fastda
