// Near pairs: what they add to gradients is taken from their differences. Their weights leave the block of weights of
// which products are taken.
#pragma once

#include "points.h"

#include <utility>
#include <vector>

namespace fastda {
namespace {

// Whether gradients of so many are found by way of products, so that near pairs are to be known.
inline bool worth_summing_products(int64_t queries, int64_t classes, int64_t features) {
  constexpr int64_t worth_packing = 40;
  return std::min({queries, classes, features}) >= worth_packing;
}

// The same pairs with what was a row as the sample; ordered by the rows, then by the samples, if those that had one
// sample were ordered by their rows.
template <typename T>
std::vector<NearPair<T>> turned(const std::vector<NearPair<T>>& pairs) {
  std::vector<int64_t> place;
  for (const NearPair<T>& pair : pairs) {
    if (pair.sample + 1 >= static_cast<int64_t>(place.size())) place.resize(pair.sample + 2);
    ++place[pair.sample + 1];
  }
  for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
  std::vector<NearPair<T>> result(pairs.size());
  for (const NearPair<T>& pair : pairs) result[place[pair.sample]++] = {pair.sample, pair.row, pair.weight};
  return result;
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

// Adds the differences of some pairs to the gradients of their rows x in some columns, the first of which is at out.
template <typename T>
void add_near(const std::vector<NearPair<T>>& pairs, Range some, const Points<T>& x, int64_t first_x,
              const Points<T>& y, int64_t first_y, Range columns, T* out, int64_t out_stride) {
  FASTDA_RUN(add_near_pairs(pairs.data() + some.begin, some.size(), x.row(first_x) + columns.begin, x.stride(),
                            y.row(first_y) + columns.begin, y.stride(), columns.size(), out, out_stride));
}

// Calls found(query, class) for the pairs whose distances are negated, distances[q · stride + c], which they then are
// no longer.
template <typename T, typename Found>
void find_near(T* distances, int64_t stride, int64_t queries, int64_t classes, const Found& found) {
  for (int64_t i = 0; i < queries; ++i, distances += stride) {
    bool any = false;
    FASTDA_RUN(has_near(distances, classes, &any));
    for (int64_t c = 0; any && c < classes; ++c) {
      if (!std::signbit(distances[c]) || std::isnan(distances[c])) continue;
      distances[c] = -distances[c];
      found(i, c);
    }
  }
}

// Those of a block of queries and classes. Where these are too many, none are told apart: then all differences are
// taken one by one.
template <typename T>
class NearPairs {
 public:
  NearPairs() = default;
  NearPairs(int64_t queries, int64_t classes) : most_(blocks(queries * classes, 4)) {}

  void keep(int64_t query, int64_t c) {
    too_many_ = too_many_ || static_cast<int64_t>(by_query_.size()) == most_;
    if (too_many_) {
      by_query_ = {};
    } else {
      by_query_.push_back({query, c, 0});
    }
  }
  bool too_many() const { return too_many_; }

  // Their weights, weights[q · stride + c], which are 0 then.
  void take(T* weights, int64_t stride) {
    for (NearPair<T>& pair : by_query_) pair.weight = std::exchange(weights[pair.row * stride + pair.sample], T(0));
    by_prototype_ = turned(by_query_);
  }

  // Adds their differences to gradients in some columns, the first of which is at grad_queries and grad_prototypes:
  // null for one that is not needed.
  void add(const Points<T>& q, Range queries, const Points<T>& p, Range columns, T* grad_queries, T* grad_prototypes,
           int64_t prototypes_stride) const {
    const Range all{0, static_cast<int64_t>(by_query_.size())};
    if (grad_queries) add_near(by_query_, all, q, queries.begin, p, 0, columns, grad_queries, q.features());
    if (grad_prototypes) {
      add_near(by_prototype_, all, p, 0, q, queries.begin, columns, grad_prototypes, prototypes_stride);
    }
  }

  // In all columns, on all threads.
  void add(const Points<T>& q, Range queries, const Points<T>& p, T* grad_queries, T* grad_prototypes) const {
    if (by_query_.empty()) return;
    constexpr int64_t lanes = vector_bytes / sizeof(T);
    const int64_t work = static_cast<int64_t>(by_query_.size()) * lanes * 4;
    at::parallel_for(0, blocks(q.features(), lanes), thread_grain(work), [&](int64_t begin, int64_t end) {
      const FlushToZero flush;
      const Range columns{begin * lanes, std::min(end * lanes, q.features())};
      add(q, queries, p, columns, grad_queries ? grad_queries + columns.begin : nullptr,
          grad_prototypes ? grad_prototypes + columns.begin : nullptr, p.features());
    });
  }

 private:
  int64_t most_ = 0;
  bool too_many_ = false;
  std::vector<NearPair<T>> by_query_, by_prototype_;
};

}  // namespace
}  // namespace fastda
