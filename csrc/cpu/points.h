// Points of a batch element, ready for the loops. Include after for_each_isa.h with the loops of prototypes_loops.h.
#pragma once

#include "matrix.h"
#include "metric.h"

#include <atomic>
#include <vector>

namespace fastda {
namespace {

constexpr int64_t vector_bytes = 64;         // of the widest vectors
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

// (batch, rows, columns), the columns dense; a single matrix may stay (rows, columns), for a view of it would take
// longer than the distances of a small one.
inline Tensor points_of(const Tensor& x, int64_t batch) {
  return x.dim() == 2 && x.stride(1) == 1 ? x : matrices(x, x.scalar_type(), batch);
}

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
  static Points queries(const Tensor& x, int64_t b, Metric metric) {
    return Points(x, b, 0, x.size(-2), metric, false);
  }
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
           x.size(-1) % (vector_bytes / static_cast<int64_t>(sizeof(T))) == 0;
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
      : metric_(metric), count_(end - begin), features_(x.size(-1)), stride_(x.stride(-2)) {
    constexpr int64_t width = vector_bytes / sizeof(T);
    depth_ = blocks(features_, width) * width;
    const int64_t start = (x.dim() == 3 ? b * x.stride(0) : 0) + begin * stride_;
    visit_rows(x, [&](const auto* rows) { fill(rows + start, x.stride(-2), may_be_empty); });
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

}  // namespace
}  // namespace fastda
