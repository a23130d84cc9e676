// What the prototype ops share: points, the distances between a block of queries and a block of classes, and the
// gradients that follow from what a loss makes of them. Include after for_each_isa.h with the loops of
// prototypes_loops.h.
//
// A block of distances is the largest thing that is ever held: the classes pass by in blocks, and gradients take the
// distances again. Each result has one thread that writes it, in one order, so that results do not depend on the number
// of threads.
#pragma once

#include "matrix.h"
#include "metric.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace fastda {
namespace {

constexpr int64_t vector_bytes = 64;         // of the widest vectors
constexpr int64_t block_values = 1 << 18;    // distances held at a time
constexpr int64_t most_queries = 512;        // of a block
constexpr int64_t worth_a_thread = 1 << 19;  // multiplications, a few times what starting a thread costs

// Items that a thread should at least be given, each of `work` multiplications.
inline int64_t thread_grain(int64_t work) { return std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work)); }

// While it lives, numbers too small to be normal count as 0 on this thread: a softmax that is sure of its answers has
// many, over which x86 takes a hundred times as long. Other threads keep their own mode: one is to live in each, inside
// of what they run, or results would depend on how many there are.
class FlushToZero {
 public:
#if FASTDA_X86
  FlushToZero() {
    asm volatile("stmxcsr %0" : "=m"(before_)::"memory");
    set(before_ | 0x8040);  // results, and what is read
  }
  ~FlushToZero() { set(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  static void set(uint32_t control) { asm volatile("ldmxcsr %0" ::"m"(control) : "memory"); }
  uint32_t before_;
#else
  FlushToZero() {}
#endif
};

template <typename F>
void visit_rows(const Tensor& x, const F& visit) {
  switch (x.scalar_type()) {
    case at::kHalf: return visit(x.const_data_ptr<at::Half>());
    case at::kBFloat16: return visit(x.const_data_ptr<at::BFloat16>());
    case at::kDouble: return visit(x.const_data_ptr<double>());
    default: return visit(x.const_data_ptr<float>());
  }
}

// (batch, rows, columns), the columns dense.
inline Tensor matrices(const Tensor& x, int64_t batch) { return matrices(x, x.scalar_type(), batch); }

// A range of rows.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  bool has(int64_t i) const { return begin <= i && i < end; }
};

// Rows of x[b], ready for the loops: in dtype T, each a whole number of vectors. An empty prototype is replaced by
// zeros, so that its NaN reaches nobody; for the cosine the directions stand in for the points.
template <typename T>
class Points {
 public:
  static Points queries(const Tensor& x, int64_t b, Metric metric) { return Points(x, b, 0, x.size(1), metric, false); }
  static Points prototypes(const Tensor& x, int64_t b, int64_t begin, int64_t end, Metric metric) {
    return Points(x, b, begin, end, metric, true);
  }
  // Prototypes none of which is taken to be empty.
  static Points present_prototypes(const Tensor& x, int64_t b, Range rows, Metric metric) {
    return Points(x, b, rows.begin, rows.end, metric, false);
  }
  // Whether rows of x serve as they are, without a copy, if none is empty.
  static bool serves(const Tensor& x, Metric metric) {
    return x.scalar_type() == c10::CppTypeToScalarType<T>::value && metric != Metric::cosine &&
           x.size(2) % (vector_bytes / static_cast<int64_t>(sizeof(T))) == 0;
  }

  const T* row(int64_t i) const { return data_ + i * stride_; }
  int64_t stride() const { return stride_; }
  int64_t count() const { return count_; }
  int64_t features() const { return features_; }
  int64_t depth() const { return depth_; }  // the features and what fills up the last vector
  const uint8_t* empty() const { return has_empty_ ? empty_.data() : nullptr; }
  bool is_empty(int64_t i) const { return has_empty_ && empty_[i]; }
  int64_t present() const { return has_empty_ ? std::count(empty_.begin(), empty_.end(), 0) : count_; }

  // Whether all rows are finite; found when it is first asked for.
  bool is_finite() const {
    if (finite_ < 0) {
      std::atomic<bool> finite{true};
      at::parallel_for(0, count_, grain(features_), [&](int64_t begin, int64_t end) {
        bool part = true;
        for (int64_t i = begin; i < end && part; ++i) FASTDA_RUN(all_finite(row(i), features_, &part));
        if (!part) finite = false;
      });
      finite_ = finite;
    }
    return finite_ == 1;
  }

  // The gradient of row i through x/‖x‖, in place.
  void through_directions(int64_t begin, int64_t end, T* grad) const {
    for (int64_t i = begin; i < end && metric_ == Metric::cosine; ++i) {
      FASTDA_RUN(through_direction(row(i), norms_[i], features_, grad + (i - begin) * features_));
    }
  }

 private:
  Points(const Tensor& x, int64_t b, int64_t begin, int64_t end, Metric metric, bool may_be_empty)
      : metric_(metric), count_(end - begin), features_(x.size(2)), stride_(x.stride(1)) {
    constexpr int64_t width = vector_bytes / sizeof(T);
    depth_ = blocks(features_, width) * width;
    visit_rows(
        x, [&](const auto* rows) { fill(rows + b * x.stride(0) + begin * x.stride(1), x.stride(1), may_be_empty); });
  }

  template <typename From>
  void fill(const From* rows, int64_t stride, bool may_be_empty) {
    if (may_be_empty && features_ > 0) find_empty(rows, stride);
    if constexpr (std::is_same_v<From, T>) {
      if (!has_empty_ && metric_ != Metric::cosine && depth_ == features_) {
        data_ = rows;
        return;
      }
    }
    copy_ = Scratch<T>(count_ * depth_);
    T* to = copy_.data();
    if (metric_ == Metric::cosine) norms_.resize(count_);
    at::parallel_for(0, count_, grain(features_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) copy_row(rows + i * stride, i, to + i * depth_);
    });
    data_ = to;
    stride_ = depth_;
  }

  template <typename From>
  void find_empty(const From* rows, int64_t stride) {
    const auto is_nan = [](From value) { return std::isnan(static_cast<T>(value)); };
    for (int64_t i = 0; i < count_; ++i) {
      const From* row = rows + i * stride;
      if (!is_nan(*row) || !std::all_of(row, row + features_, is_nan)) continue;
      if (!has_empty_) empty_.assign(count_, 0);
      has_empty_ = true;
      empty_[i] = 1;
    }
  }

  template <typename From>
  void copy_row(const From* from, int64_t i, T* to) {
    if (is_empty(i)) {
      std::fill(to, to + depth_, T(0));
    } else {
      for (int64_t d = 0; d < features_; ++d) to[d] = static_cast<T>(from[d]);
      std::fill(to + features_, to + depth_, T(0));
    }
    if (metric_ == Metric::cosine) FASTDA_RUN(direction<T>(to, features_, to, &norms_[i]));
  }

  Metric metric_;
  int64_t count_, features_, stride_, depth_;
  const T* data_ = nullptr;
  Scratch<T> copy_{0};
  bool has_empty_ = false;
  std::vector<uint8_t> empty_;
  std::vector<T> norms_;
  mutable int finite_ = -1;  // not known yet
};

// A point near some rows of x: what cancels in products of theirs is less without it. 0 if there is none, and for the
// cosine, whose products do not cancel.
template <typename T>
std::vector<T> centre_for(const Points<T>& x, Range rows, Metric metric) {
  constexpr int64_t at_most = 16;  // rows that are enough: near is all it has to be
  std::vector<T> centre(x.depth());
  if (metric == Metric::cosine) return centre;
  const int64_t count = std::min(at_most, rows.size());
  for (int64_t i = 0; i < count; ++i) {
    FASTDA_RUN(add_share(x.row(rows.begin + i * rows.size() / count), 1 / static_cast<T>(count), x.depth(),
                         centre.data()));
  }
  const auto is_finite = [](T value) { return std::isfinite(value); };
  if (!std::all_of(centre.begin(), centre.end(), is_finite)) std::fill(centre.begin(), centre.end(), T(0));
  return centre;
}

inline PanelShape panel_shape_of(double) {
  PanelShape shape{};
  FASTDA_RUN(panel_shape<double>(&shape));
  return shape;
}

inline PanelShape panel_shape_of(float) {
  PanelShape shape{};
  FASTDA_RUN(panel_shape<float>(&shape));
  return shape;
}

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

  // out[(q − queries.begin) · stride + c]: the distance from query q to class c of p. Whether there are near pairs, whose
  // distances are negated then, where that is asked for.
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

constexpr int64_t worth_packing = 40;  // rows, samples and features of a sum, each

// Whether gradients of so many are found by way of products.
inline bool worth_summing_products(int64_t queries, int64_t classes, int64_t features) {
  return std::min({queries, classes, features}) >= worth_packing;
}

}  // namespace
}  // namespace fastda

#include "near_pairs.h"

namespace fastda {
namespace {

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
  NearPairs<T> near;
  if (!worth_summing_products(queries.size(), p.count(), q.features())) {
    find_distances(q, queries, p, metric, out, stride);
  } else if (PackedQueries<T>(q, queries, metric).find_distances(p, out, stride, true)) {
    near.find(out, stride, queries.size(), p.count());
  }
  return near;
}

// Weights of rows x and samples y: of row r and sample k at data[r · row + k · step].
template <typename T>
struct Weights {
  const T* data;
  int64_t row, step;
};

constexpr int64_t rows_at_once = 120;  // of a sum over samples


// Σ_k w_k (x − y_k) = (x − c) Σ_k w_k − Σ_k w_k (y_k − c), for the cosine Σ_k w_k y_k, where there are many rows x and
// many samples y: some rows and columns. The samples pass by as deep as a panel. totals: Σ_k w_k of each row.
template <typename T>
void sum_packed(const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, const T* centre,
                const double* totals, Metric metric, bool add, Range columns, T* out) {
  const PanelShape shape = panel_shape_of(T());
  const bool product = metric == Metric::cosine;
  const int64_t panels = blocks(columns.size(), shape.columns);
  const int64_t at_once = std::min(shape.depth, blocks(samples.size(), shape.rows) * shape.rows);
  const int64_t panel_size = at_once * shape.columns;
  const int64_t some_rows = 2 * shape.rows;  // whose weights stay in the first cache
  const Scratch<T> weights(some_rows * shape.depth), packed(panels * panel_size);
  for (int64_t k = samples.begin; k < samples.end; k += at_once) {
    const int64_t some = std::min(at_once, samples.end - k);
    const bool last = k + some == samples.end;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t d = columns.begin + panel * shape.columns;
      const int64_t width = blocks(std::min(shape.columns, columns.end - d), shape.rows) * shape.rows;
      FASTDA_RUN(pack_below(y.row(k) + d, y.stride(), some, centre + d, width, packed.data() + panel * panel_size));
    }
    for (int64_t i = 0; i < rows.size(); i += some_rows) {
      const int64_t count = std::min(some_rows, rows.size() - i);
      for (int64_t block = 0; block < count; block += shape.rows) {
        FASTDA_RUN(pack_weights(w.data + (i + block) * w.row + (k - samples.begin) * w.step, w.row, w.step,
                                std::min(shape.rows, count - block), some, weights.data() + block * shape.depth));
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t d = columns.begin + panel * shape.columns, width = std::min(shape.columns, columns.end - d);
        FASTDA_RUN(weigh_panel(product, w.row != 1, weights.data(), count, packed.data() + panel * panel_size, some,
                               x.row(rows.begin + i) + d, x.stride(), last && !product ? totals + i : nullptr,
                               centre + d, width, add || k > samples.begin, out + i * x.features() + d, x.features()));
      }
    }
  }
}

// The same, on all threads: each takes some rows, or some columns where there are more samples to pack than rows.
template <typename T>
void sum_packed(const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, const T* centre,
                Metric metric, bool add, T* out) {
  std::vector<double> totals(rows.size(), 0);
  if (metric != Metric::cosine) {
    at::parallel_for(0, rows.size(), thread_grain(samples.size()), [&](int64_t begin, int64_t end) {
      FASTDA_RUN(totals_of_weights(w.data + begin * w.row, w.row, w.step, end - begin, samples.size(),
                                   totals.data() + begin));
    });
  }
  const int64_t lanes = panel_shape_of(T()).rows;
  const bool by_row = rows.size() > samples.size();
  const int64_t count = by_row ? rows.size() : x.features();
  const int64_t work = samples.size() * lanes * (by_row ? x.features() : rows.size());
  at::parallel_for(0, blocks(count, lanes), thread_grain(work), [&](int64_t begin, int64_t end) {
    const FlushToZero flush;
    const Range part{begin * lanes, std::min(end * lanes, count)};
    const Range some = by_row ? part : Range{0, rows.size()}, columns = by_row ? Range{0, x.features()} : part;
    sum_packed(x, {rows.begin + some.begin, rows.begin + some.end}, y, samples,
               {w.data + some.begin * w.row, w.row, w.step}, centre, totals.data() + some.begin, metric, add, columns,
               out + some.begin * x.features());
  });
}

// out = Σ_k w_k (x − y_k), for the cosine Σ_k w_k y_k, for some rows x and some samples y, or added to it. out is
// dense; where it goes past the caches, aligned to their lines, its rows whole lines.
template <typename T>
void sum_differences(const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, Metric metric,
                     Put put, T* out) {
  // Where rows outnumber samples, rows pass by and the samples stay; else the other way round.
  constexpr int64_t few_rows = 10;
  const bool by_row = rows.size() >= samples.size();
  const int64_t most_rows = by_row ? few_rows : rows_at_once, count = samples.size();
  const int64_t most_columns = by_row ? std::max<int64_t>(x.depth(), 1) : 8 * vector_bytes / sizeof(T);
  const int64_t row_blocks = blocks(rows.size(), most_rows), column_blocks = blocks(x.depth(), most_columns);
  const int64_t work = std::min(rows.size(), most_rows) * most_columns * count;
  at::parallel_for(0, row_blocks * column_blocks, thread_grain(work), [&](int64_t begin, int64_t end) {
    const FlushToZero flush;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % row_blocks * most_rows, column = i / row_blocks * most_columns;
      FASTDA_RUN(sum_samples_of(metric == Metric::cosine, x.row(rows.begin + row), x.stride(),
                                std::min(most_rows, rows.size() - row), w.data + row * w.row, w.row, w.step,
                                y.row(samples.begin), y.stride(), count, column,
                                std::min(column + most_columns, x.depth()), x.features(), put,
                                out + row * x.features(), x.features()));
    }
  });
}

inline Put put_or_add(bool add) { return add ? Put::add : Put::store; }

// Where a result goes that is written once.
template <typename T>
Put put_once(const Tensor& result, const T* first) {
  constexpr int64_t large = 8 << 20;  // bytes, more than a core has of the caches near it
  const bool lines = result.size(-1) * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(first) % 64 == 0;
  return lines && result.numel() * static_cast<int64_t>(sizeof(T)) >= large ? Put::stream : Put::store;
}

// Between the rows of a block of distances to so many classes: an odd number of cache lines, so that the columns of a
// block do not fall into the same sets of the first cache.
template <typename T>
int64_t row_stride(int64_t classes) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = blocks(classes, line);
  return (lines + 1 - lines % 2) * line;
}

// Gradients from a block of weights, weights[(q − queries.begin) · stride + c], and its near pairs, whose weights are
// left out of it; null for one that is not needed. Where each is too little for several threads, but both are enough,
// they are found side by side.
template <typename T>
void gradients_from_weights(const Points<T>& q, Range queries, const Points<T>& p, const T* weights, int64_t stride,
                            const NearPairs<T>& near, Metric metric, Put put_queries, T* grad_queries,
                            Put put_prototypes, T* grad_prototypes) {
  const int64_t classes = p.count(), work = queries.size() * classes * q.depth();
  const bool packed = worth_summing_products(queries.size(), classes, q.features()) && q.is_finite() && p.is_finite();
  const std::vector<T> centre = packed ? centre_for(q, queries, metric) : std::vector<T>();
  const auto sum = [&](const Points<T>& x, Range rows, const Points<T>& y, Range samples, Weights<T> w, Put put,
                       T* out) {
    if (packed) {
      sum_packed(x, rows, y, samples, w, centre.data(), metric, put == Put::add, out);
    } else {
      sum_differences(x, rows, y, samples, w, metric, put, out);
    }
  };
  T* of_queries = grad_queries ? grad_queries + queries.begin * q.features() : nullptr;
  const bool side_by_side = grad_queries && grad_prototypes && work < worth_a_thread && 2 * work >= worth_a_thread;
  at::parallel_for(0, 2, side_by_side ? 1 : 2, [&](int64_t begin, int64_t end) {
    if (begin == 0 && grad_queries) sum(q, queries, p, {0, classes}, {weights, stride, 1}, put_queries, of_queries);
    if (end == 2 && grad_prototypes) {
      sum(p, {0, classes}, q, queries, {weights, 1, stride}, put_prototypes, grad_prototypes);
    }
  });
  near.add(q, queries, p, of_queries, grad_prototypes);
}

constexpr int64_t few_classes = 256;  // up to which a lane holds one query, and their vectors stay in the first caches

// Runs over queries, as many as there are lanes or some times more, on all threads, with scratch for two vectors a
// class. Each distance takes so many operations, beside those of the softmax.
template <typename T, typename F>
void for_lanes(int64_t queries, int64_t classes, int64_t operations, const F& each) {
  constexpr int64_t lanes = vector_bytes / sizeof(T), of_softmax = 32;
  at::parallel_for(0, blocks(queries, lanes), thread_grain(lanes * classes * (operations + of_softmax)),
                   [&](int64_t begin, int64_t end) {
                     const Scratch<T> scratch(2 * classes * lanes);
                     each(Range{begin * lanes, std::min(end * lanes, queries)}, scratch.data());
                   });
}

// log Σ exp(l − m). There is nothing to normalise where every class is empty or infinitely far.
template <typename T>
T log_of_sum(T largest, T sum) {
  return std::isinf(largest) ? std::numeric_limits<T>::quiet_NaN() : std::log(sum);
}

// What completes the gradient of prototypes: through the directions, and nothing for empty classes.
template <typename T>
void finish_prototypes(const Points<T>& p, T* grad) {
  p.through_directions(0, p.count(), grad);
  for (int64_t c = 0; p.empty() && c < p.count(); ++c) {
    if (p.is_empty(c)) std::fill(grad + c * p.features(), grad + (c + 1) * p.features(), T(0));
  }
}

inline void check_label(const char* name, int64_t label, int64_t classes) {
  TORCH_CHECK_INDEX(label >= 0 && label < classes, name, ": expected labels in 0 ... ", classes - 1,
                    " (num_classes - 1), got ", label, "; relabel the classes or raise num_classes");
}

inline void check_labels(const char* name, const Tensor& labels, int64_t count) {
  check_count(name, labels, count);
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, name, ": expected int64, got ", labels.scalar_type());
}

template <typename F>
auto accumulate_as(const Tensor& x, const F& run) {
  return accumulate_type(x.scalar_type()) == at::kDouble ? run(double()) : run(float());
}

// A gradient in the shape and dtype of its input; empty where it was not needed.
inline Tensor gradient_like(const Tensor& result, const Tensor& input, bool needed) {
  return needed ? result.reshape(input.sizes()).to(input.scalar_type()) : result;
}

inline Tensor empty_gradient(bool needed, at::IntArrayRef shape, const Tensor& input, at::ScalarType dtype) {
  return needed ? at::empty(shape, input.options().dtype(dtype)) : at::empty({0}, input.options());
}

}  // namespace
}  // namespace fastda
