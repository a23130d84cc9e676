// Class means, and the gradient of their samples.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#include <tuple>

#include "metric.h"

#define FASTDA_LOOPS "prototypes_loops.h"
#include "for_each_isa.h"

#include "prototypes.h"

#include "class_means.h"

namespace fastda {
namespace {

constexpr int64_t values_at_once = 1 << 19;  // of a gradient, before they are rounded to half precision

std::tuple<Tensor, Tensor> class_means(const Tensor& support, const Tensor& labels, int64_t num_classes,
                                       c10::string_view empty) {
  const KernelGuard guard;
  check_features("support", support);
  const int64_t batch = batch_size(support, 2), samples = support.size(-2), features = support.size(-1);
  check_labels("labels", labels, batch * samples);
  TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
  TORCH_CHECK_VALUE(empty == "nan" || empty == "zero", "empty: expected 'nan' or 'zero', got '", empty, "'");
  const auto options = support.options().dtype(accumulate_type(support.scalar_type()));
  const Tensor means = at::empty(batched(support, 2, {num_classes, features}), options);
  const Tensor counts = at::empty(batched(support, 2, {num_classes}), labels.options());
  const Tensor x = rows_of(support), label = labels.contiguous();
  accumulate_as(support, [&](auto zero) {
    using T = decltype(zero);
    const T absent = empty == "zero" ? T(0) : std::numeric_limits<T>::quiet_NaN();
    for_batch(batch, [&](int64_t b) {
      const Members members("labels", label.const_data_ptr<int64_t>() + b * samples, samples, num_classes);
      find_means(members, x.const_data_ptr<T>() + b * samples * features, samples, num_classes, features, absent,
                 data<T>(means) + b * num_classes * features, data<int64_t>(counts) + b * num_classes);
    });
  });
  return {means, counts};
}

Tensor class_means_backward(const Tensor& grad_means, const Tensor& support, const Tensor& labels, const Tensor& counts,
                            int64_t num_classes, c10::string_view, bool need_support) {
  const KernelGuard guard;
  check_features("support", support);
  const int64_t batch = batch_size(support, 2), samples = support.size(-2), features = support.size(-1);
  check_labels("labels", labels, batch * samples);
  check_count("counts", counts, batch * num_classes);
  check_count("grad_means", grad_means, batch * num_classes * features);
  if (!need_support) return at::empty({0}, support.options());
  const auto dtype = accumulate_type(support.scalar_type());
  const Tensor grad = grad_means.to(dtype).contiguous(), label = labels.contiguous(), count = counts.contiguous();
  const int64_t *label_of = label.const_data_ptr<int64_t>(), *count_of = count.const_data_ptr<int64_t>();
  const int64_t rows = batch * samples;
  const Tensor result = at::empty({rows, features}, support.options());
  // Half precision is rounded block by block: a gradient held in float32 would take twice the memory of the result.
  const bool rounds = dtype != support.scalar_type();
  const int64_t at_once = rounds ? std::max<int64_t>(1, values_at_once / std::max<int64_t>(1, features)) : rows;
  const Tensor exact = rounds ? at::empty({std::min(at_once, rows), features}, grad.options()) : result;
  accumulate_as(support, [&](auto zero) {
    using T = decltype(zero);
    const T* from = grad.const_data_ptr<T>();
    T* to = data<T>(exact);
    for (int64_t first = 0; first < rows; first += at_once) {
      const int64_t some = std::min(at_once, rows - first);
      at::parallel_for(0, some, grain(features), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t s = first + i;
          check_label("labels", label_of[s], num_classes);
          const int64_t c = s / samples * num_classes + label_of[s];
          FASTDA_RUN(divide(from + c * features, static_cast<T>(count_of[c]), features, to + i * features));
        }
      });
      if (rounds) result.narrow(0, first, some).copy_(exact.narrow(0, 0, some));
    }
  });
  return result.reshape(support.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("class_means", &class_means);
  m.impl("class_means_backward", &class_means_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "class_means"); }

}  // namespace fastda
