// The distances between a block of queries and a block of classes: by products of packed points where there are many,
// else each from its own differences.
#pragma once

#include "near_pairs.h"
#include "points.h"

#include <atomic>
#include <vector>

namespace fastda {
namespace {

// Queries as blocks of rows for products, less a point near them, and their squared norms. What a product rounds
// depends on that point: queries that are split among threads share one.
template <typename T>
class PackedQueries {
 public:
  PackedQueries(const Points<T>& q, Range queries, Metric metric)
      : PackedQueries(q, queries, metric, centre_for(q, queries, metric)) {}

  PackedQueries(const Points<T>& q, Range queries, Metric metric, const std::vector<T>& centre)
      : q_(q),
        queries_(queries),
        metric_(metric),
        shape_(panel_shape_of(T())),
        centre_(centre),
        rows_(row_blocks() * shape_.rows * q.depth()),
        norms_(row_blocks() * shape_.rows) {
    at::parallel_for(0, row_blocks(), thread_grain(shape_.rows * q.depth() * 16), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * shape_.rows; first < std::min(end * shape_.rows, queries_.size());
           first += shape_.rows) {
        FASTDA_RUN(pack_across<T>(q_.row(queries_.begin + first), q_.stride(),
                                  std::min(shape_.rows, queries_.size() - first), q_.depth(), centre_.data(),
                                  shape_.rows, rows_.data() + first * q_.depth(), norms_.data() + first, nullptr));
      }
    });
  }

  // out[(q − queries.begin) · stride + c]: the distance from query q to class c of p. Whether there are near pairs,
  // whose distances are negated then, where that is asked for.
  bool find_distances(const Points<T>& p, T* out, int64_t stride, bool ask_near) const {
    std::atomic<bool> near{false};
    const int64_t panels = blocks(p.count(), shape_.columns), panel_size = (q_.depth() + 2) * shape_.columns;
    if (panels > row_blocks()) {
      const int64_t work = shape_.columns * queries_.size() * q_.depth();
      at::parallel_for(0, panels, thread_grain(work), [&](int64_t begin, int64_t end) {
        const Scratch<T> packed(panel_size), products(queries_.size() * shape_.columns);
        bool any = false;
        for (int64_t panel = begin; panel < end; ++panel) {
          pack(p, panel, packed.data());
          multiply({0, queries_.size()}, p, panel, packed.data(), products.data(), out + panel * shape_.columns,
                   stride, ask_near ? &any : nullptr);
        }
        if (any) near = true;
      });
      return near;
    }
    const Scratch<T> packed(panels * panel_size);
    at::parallel_for(0, panels, thread_grain(shape_.columns * q_.depth() * 16), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack(p, panel, packed.data() + panel * panel_size);
    });
    const int64_t work = shape_.rows * p.count() * q_.depth();
    at::parallel_for(0, row_blocks(), thread_grain(work), [&](int64_t begin, int64_t end) {
      const Range some{begin * shape_.rows, std::min(end * shape_.rows, queries_.size())};
      const Scratch<T> products(some.size() * shape_.columns);
      bool any = false;
      for (int64_t panel = 0; panel < panels; ++panel) {
        multiply(some, p, panel, packed.data() + panel * panel_size, products.data(),
                 out + some.begin * stride + panel * shape_.columns, stride, ask_near ? &any : nullptr);
      }
      if (any) near = true;
    });
    return near;
  }

  // The distances to some panels of p in tiles as wide as a panel, tile(panel) from the first query on: a few queries
  // at a time meet all of them. found(panel, queries, near) is told what has just been found, and whether there are
  // near pairs, whose distances are negated.
  template <typename Tile, typename Found>
  void find_tiles(const Points<T>& p, const Tile& tile, const Found& found) const {
    constexpr int64_t at_once = 128;  // queries, which stay in the second cache
    const int64_t panels = blocks(p.count(), shape_.columns), panel_size = (q_.depth() + 2) * shape_.columns;
    const Scratch<T> packed(panels * panel_size), products(at_once * shape_.columns);
    for (int64_t panel = 0; panel < panels; ++panel) pack(p, panel, packed.data() + panel * panel_size);
    for (int64_t first = 0; first < queries_.size(); first += at_once) {
      const Range some{first, std::min(first + at_once, queries_.size())};
      for (int64_t panel = 0; panel < panels; ++panel) {
        bool near = false;
        multiply(some, p, panel, packed.data() + panel * panel_size, products.data(),
                 tile(panel) + first * shape_.columns, shape_.columns, &near);
        found(panel, Range{queries_.begin + some.begin, queries_.begin + some.end}, near);
      }
    }
  }

 private:
  int64_t row_blocks() const { return blocks(queries_.size(), shape_.rows); }
  int64_t width(const Points<T>& p, int64_t panel) const {
    return std::min(shape_.columns, p.count() - panel * shape_.columns);
  }

  // A panel of classes; their squared norms and what these were rounded by after it.
  void pack(const Points<T>& p, int64_t panel, T* packed) const {
    const int64_t whole = blocks(width(p, panel), shape_.rows) * shape_.rows;
    T* norms = packed + shape_.columns * p.depth();
    FASTDA_RUN(pack_across(p.row(panel * shape_.columns), p.stride(), width(p, panel), p.depth(), centre_.data(), whole,
                           packed, norms, norms + shape_.columns));
  }

  // The products stay near until they are distances, and are written where they belong once.
  void multiply(Range some, const Points<T>& p, int64_t panel, const T* packed, T* products, T* to, int64_t stride,
                bool* near) const {
    const int64_t first = panel * shape_.columns, columns = width(p, panel), depth = q_.depth(), count = some.size();
    FASTDA_RUN(products_with_panel(rows_.data() + some.begin * depth, count, packed, depth, columns, products,
                                   shape_.columns));
    FASTDA_RUN(distances_from_products(metric_, products, shape_.columns, q_.row(queries_.begin + some.begin),
                                       q_.stride(), norms_.data() + some.begin, count, p.row(first), p.stride(),
                                       packed + shape_.columns * depth, packed + shape_.columns * (depth + 1), columns,
                                       depth, to, stride, near));
  }

  const Points<T>& q_;
  const Range queries_;
  const Metric metric_;
  const PanelShape shape_;
  const std::vector<T> centre_;
  const Scratch<T> rows_, norms_;
};

// Whether the distances of so many are found by way of products.
inline bool worth_products(int64_t queries, int64_t classes, int64_t features) {
  return queries >= 32 && classes >= 16 && features >= 32;
}

// Distances as find_distances gives them, each from its own differences.
template <typename T>
void find_distances_one_by_one(const Points<T>& q, Range queries, const Points<T>& p, Metric metric, T* out,
                               int64_t stride) {
  constexpr int64_t classes_at_once = 20, queries_at_once = 32;
  const auto run = [&](Range some, Range classes) {
    T* to = out + (some.begin - queries.begin) * stride + classes.begin;
    FASTDA_RUN(sum_features_of(metric == Metric::cosine, q.row(some.begin), q.stride(), some.size(),
                               p.row(classes.begin), p.stride(), classes.size(), q.depth(), to, stride));
    for (int64_t i = 0; i < some.size(); ++i) {
      FASTDA_RUN(distances_from_sums(to + i * stride, classes.size(), metric));
    }
  };
  if (p.count() >= queries.size()) {
    const int64_t work = classes_at_once * queries.size() * q.depth();
    at::parallel_for(0, blocks(p.count(), classes_at_once), thread_grain(work), [&](int64_t begin, int64_t end) {
      run(queries, {begin * classes_at_once, std::min(end * classes_at_once, p.count())});
    });
  } else {
    const int64_t work = queries_at_once * p.count() * q.depth();
    at::parallel_for(0, blocks(queries.size(), queries_at_once), thread_grain(work), [&](int64_t begin, int64_t end) {
      run({queries.begin + begin * queries_at_once, std::min(queries.begin + end * queries_at_once, queries.end)},
          {0, p.count()});
    });
  }
}

// out[(q − queries.begin) · stride + c]: the distance from query q to class c of p.
template <typename T>
void find_distances(const Points<T>& q, Range queries, const Points<T>& p, Metric metric, T* out, int64_t stride) {
  if (worth_products(queries.size(), p.count(), q.features())) {
    PackedQueries<T>(q, queries, metric).find_distances(p, out, stride, false);
  } else {
    find_distances_one_by_one(q, queries, p, metric, out, stride);
  }
}

// The same, and the near pairs where gradients by products would suffer from them.
template <typename T>
NearPairs<T> find_distances_and_near(const Points<T>& q, Range queries, const Points<T>& p, Metric metric, T* out,
                                     int64_t stride) {
  NearPairs<T> near(queries.size(), p.count());
  if (!worth_summing_products(queries.size(), p.count(), q.features())) {
    find_distances(q, queries, p, metric, out, stride);
  } else if (PackedQueries<T>(q, queries, metric).find_distances(p, out, stride, true)) {
    find_near(out, stride, queries.size(), p.count(), [&](int64_t i, int64_t c) { near.keep(i, c); });
  }
  return near;
}

}  // namespace
}  // namespace fastda
