// What the prototype ops share: points, the distances between a block of queries and a block of classes, and the
// gradients that follow from what a loss makes of them. Include after for_each_isa.h with the loops of
// prototypes_loops.h.
//
// A block of distances is the largest thing that is ever held: the classes pass by in blocks, and gradients take the
// distances again. Each result has one thread that writes it, in one order, so that results do not depend on the number
// of threads.
#pragma once

#include "distances.h"
#include "gradients.h"
#include "points.h"

#include <limits>
#include <string_view>
#include <vector>

namespace fastda {
namespace {

constexpr int64_t block_values = 1 << 18;  // distances held at a time
constexpr int64_t most_queries = 512;      // of a block
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

// Empty classes have no gradient, also where weights are NaN; in so many columns.
template <typename T>
void clear_empty(const Points<T>& p, int64_t width, T* grad, int64_t stride) {
  for (int64_t c = 0; p.empty() && c < p.count(); ++c) {
    if (p.is_empty(c)) std::fill(grad + c * stride, grad + c * stride + width, T(0));
  }
}

// What completes the gradient of prototypes: through the directions, and nothing for empty classes.
template <typename T>
void finish_prototypes(const Points<T>& p, T* grad) {
  p.through_directions(0, p.count(), grad);
  clear_empty(p, p.features(), grad, p.features());
}

inline void check_label(const char* name, int64_t label, int64_t classes) {
  if (label >= 0 && label < classes) return;
  const bool of_prototypes = std::string_view(name) == "targets";
  TORCH_CHECK_INDEX(false, name, ": expected labels in 0 ... ", classes - 1,
                    of_prototypes ? " (prototypes - 1), got " : " (num_classes - 1), got ", label,
                    "; relabel the classes or ", of_prototypes ? "add prototypes" : "raise num_classes");
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
  return needed ? as_type(result.reshape(input.sizes()), input.scalar_type()) : result;
}

inline Tensor empty_gradient(bool needed, at::IntArrayRef shape, const Tensor& input, at::ScalarType dtype) {
  return needed ? at::empty(shape, input.options().dtype(dtype)) : at::empty({0}, input.options());
}

}  // namespace
}  // namespace fastda
