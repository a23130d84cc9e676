// What the loops of the prototype ops and their callers both know: metrics, shapes of panels, and what gradients are
// taken from.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

namespace fastda {

enum class Metric { sqeuclidean, euclidean, cosine };

// What is packed for products: blocks of rows that are `rows` wide and panels of columns that are `columns` wide, of
// which `depth` stays in the first cache.
struct PanelShape {
  int64_t rows, columns, depth;
};

// A row x and a sample y that are near each other, beside how far they are from the centre of products, which would
// cancel; and what x − y is multiplied by in the gradient of x.
template <typename T>
struct NearPair {
  int64_t row, sample;
  T weight;
};

constexpr int64_t class_panel_rows = 12;  // the most that are multiplied at once with a panel of an episode's classes
constexpr int64_t classes_of_group = 5;  // whose gradients are found together with those of queries, in one pass

// Where sums go: over what is there, onto it, or past the caches, which a large result would only empty.
enum class Put { store, add, stream };

// What the gradient of a cross-entropy follows from. Of each query its label, the softmax over the classes and
// ∂L/∂loss, 0 where it is ignored; ∂L/∂l is that times p − spread, and for the label times on_target less.
template <typename T>
struct LossGradient {
  const int64_t* labels;
  const T *largest, *log_sum, *of_losses;
  T temperature, on_target, spread;
  bool all_present;  // no class is empty
  Metric metric;
};

// What the gradients of an episode are taken from: points and one in their middle, weights w(q, c) at
// w[q · w_stride + c] and at by_class[c · class_stride + q], and the weights' sums over the classes, and over the
// queries of each part, so many, of them. Weights are read up to class_panel_rows rows further.
template <typename T>
struct EpisodeWeights {
  const T *q, *p, *w, *by_class, *centre;
  const double *of_queries, *of_classes;
  int64_t queries, classes, q_stride, p_stride, w_stride, class_stride, part;
  bool product;
};

// Rows to be copied, a few at a time while something else is computed: row i of `to` is row source[i] of `from`. `done`
// of them are. copy_rows copies as many columns as a whole panel has, copy_rest any number.
template <typename T>
struct RowCopies {
  const T* from;
  const int64_t* source;
  int64_t from_stride;
  T* to;
  int64_t to_stride, rows, done;
  int64_t ahead;  // how far from here are rows that will be written soon, to be fetched meanwhile; 0 for none
};

inline Metric metric_of(c10::string_view name) {
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  if (name == "euclidean") return Metric::euclidean;
  TORCH_CHECK_VALUE(name == "cosine", "metric: expected 'sqeuclidean', 'euclidean' or 'cosine', got '", name, "'");
  return Metric::cosine;
}

}  // namespace fastda
