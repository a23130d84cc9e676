// CORAL loss and its gradient without the two covariance matrices.
//
// With centred features Xs, Xt and v = 1/(N − correction), the squared Frobenius norm of Cs − Ct = vs XsᵀXs − vt XtᵀXt is
//     vs²‖Gss‖² − 2 vs vt‖Gst‖² + vt²‖Gtt‖²,   G = Z Zᵀ the Gram matrix of all samples, Z = [Xs; Xt],
// and its gradient is 4 A Z with A = G scaled by ±v of its row and column: O(n²D) for n samples and D features. Where
// samples outnumber features the D×D difference itself is cheaper, O(nD²), and its gradient ±4 v X (Cs − Ct).
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <tuple>

#define FASTDA_LOOPS "coral_loops.h"
#include "for_each_isa.h"

namespace fastda {
namespace {

using at::Tensor;

// Below this share of ‖Cs‖² + ‖Ct‖² the terms of the Gram form cancel, and float32 products are taken again in float64.
constexpr double cancels_below = 1e-2;
constexpr int64_t columns_per_task = 256;

struct Sizes {
  int64_t batch, source, target, features;
  int64_t samples() const { return source + target; }
  bool gram() const { return samples() < features; }
};

Sizes sizes_of(const Tensor& source, const Tensor& target) {
  return {batch_size(source, 2), source.size(-2), target.size(-2), source.size(-1)};
}

double scale_factor(c10::string_view scale, int64_t features) {
  const double d = static_cast<double>(std::max<int64_t>(features, 1));
  if (scale == "paper") return 1 / (4 * d * d);
  if (scale == "mean") return 1 / (d * d);
  TORCH_CHECK_VALUE(scale == "sum", "scale: expected 'paper', 'mean' or 'sum', got '", scale, "'");
  return 1;
}

// (batch, samples, features) in the accumulation dtype, its last dimension dense.
Tensor rows_of(const Tensor& x, at::ScalarType dtype, int64_t batch) {
  Tensor rows = x.to(dtype).reshape({batch, x.size(-2), x.size(-1)});
  return rows.stride(-1) == 1 || rows.size(-1) <= 1 ? rows : rows.contiguous();
}

// Writes the centred rows of one domain into centred[:, offset:], and its means.
template <typename T>
void centre(const Tensor& x, const Tensor& centred, int64_t offset, const Tensor& mean) {
  const int64_t batch = x.size(0), rows = x.size(1), features = x.size(2);
  const int64_t tasks = (features + columns_per_task - 1) / columns_per_task;
  const T* from = x.const_data_ptr<T>();
  T* to = centred.mutable_data_ptr<T>() + offset * features;
  T* means = mean.mutable_data_ptr<T>();
  const int64_t x_batch = x.stride(0), x_row = x.stride(1), to_batch = centred.size(1) * features;
  at::parallel_for(0, batch * tasks, grain(rows * columns_per_task), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tasks, column = task % tasks * columns_per_task;
      const int64_t width = std::min(columns_per_task, features - column);
      FASTDA_RUN(centre_columns<T>(from + b * x_batch + column, rows, x_row, width, to + b * to_batch + column, features,
                                   means + b * features + column));
    }
  });
}

template <typename T>
double squares(const T* x, int64_t rows, int64_t columns, int64_t stride) {
  double result = 0;
  FASTDA_RUN(sum_of_squares<T>(x, rows, columns, stride, &result));
  return result;
}

// The three terms of the Gram form, each with its weight.
struct GramTerms {
  double within, between;
  double norm() const { return within - 2 * between; }
  bool cancel() const { return norm() < cancels_below * within; }
};

template <typename T>
GramTerms gram_terms(const T* gram, const Sizes& sizes, double source_weight, double target_weight) {
  const int64_t n = sizes.samples(), ns = sizes.source, nt = sizes.target;
  return {source_weight * source_weight * squares(gram, ns, ns, n) +
              target_weight * target_weight * squares(gram + ns * n + ns, nt, nt, n),
          source_weight * target_weight * squares(gram + ns, ns, nt, n)};
}

bool identical_domains(const Tensor& centred, const Sizes& sizes) {
  return sizes.source == sizes.target &&
         at::equal(centred.narrow(0, 0, sizes.source), centred.narrow(0, sizes.source, sizes.target));
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& source, const Tensor& target, int64_t correction,
                                                   double factor, double mean_weight) {
  const Sizes sizes = sizes_of(source, target);
  const int64_t batch = sizes.batch, features = sizes.features, n = sizes.samples();
  const auto dtype = accumulate_type(source.scalar_type());
  const auto options = source.options().dtype(dtype);
  const double source_weight = 1.0 / (sizes.source - correction), target_weight = 1.0 / (sizes.target - correction);

  Tensor centred = at::empty({batch, n, features}, options);
  Tensor source_mean = at::empty({batch, features}, options), target_mean = at::empty({batch, features}, options);
  centre<T>(rows_of(source, dtype, batch), centred, 0, source_mean);
  centre<T>(rows_of(target, dtype, batch), centred, sizes.source, target_mean);

  Tensor products;
  if (sizes.gram()) {
    products = at::bmm(centred, centred.mT());
  } else {
    const Tensor s = centred.narrow(1, 0, sizes.source), t = centred.narrow(1, sizes.source, sizes.target);
    products = at::empty({batch, features, features}, options);
    for (int64_t b = 0; b < batch; ++b) {
      Tensor difference = products[b];
      at::addmm_out(difference, difference, s[b].t(), s[b], 0, source_weight);
      at::addmm_out(difference, difference, t[b].t(), t[b], 1, -target_weight);
    }
  }

  Tensor losses = at::empty({batch}, options);
  T* loss = losses.mutable_data_ptr<T>();
  const T* product = products.const_data_ptr<T>();
  const T *mean_s = source_mean.const_data_ptr<T>(), *mean_t = target_mean.const_data_ptr<T>();
  const int64_t side = products.size(-1);
  for (int64_t b = 0; b < batch; ++b) {
    double norm;
    if (sizes.gram()) {
      GramTerms terms = gram_terms(product + b * side * side, sizes, source_weight, target_weight);
      if (terms.cancel()) {
        const Tensor exact = centred[b].to(at::kDouble);
        const Tensor gram = at::mm(exact, exact.t());
        terms = gram_terms(gram.const_data_ptr<double>(), sizes, source_weight, target_weight);
        if (identical_domains(exact, sizes)) terms = {0, 0};
      }
      norm = std::isnan(terms.norm()) ? terms.norm() : std::max(terms.norm(), 0.0);
    } else {
      norm = squares(product + b * side * side, side, side, side);
    }
    double total = factor * norm;
    if (mean_weight != 0) {
      double distance = 0;
      for (int64_t d = 0; d < features; ++d) {
        const double difference = static_cast<double>(mean_s[b * features + d]) - mean_t[b * features + d];
        distance += difference * difference;
      }
      total += mean_weight * distance / std::max<int64_t>(features, 1);
    }
    loss[b] = static_cast<T>(total);
  }
  return {losses.reshape(batched(source, 2, {})), centred.reshape(batched(source, 2, {n, features})),
          products.reshape(batched(source, 2, {side, side})),
          source_mean.sub_(target_mean).reshape(batched(source, 2, {features}))};
}

// A: the Gram matrix with the weights of its row and column and the incoming gradient, so that the gradient is A Z.
template <typename T>
void scale_gram(const T* gram, const Sizes& sizes, double source_weight, double target_weight, double coefficient, T* scaled) {
  const int64_t n = sizes.samples();
  for (int64_t i = 0; i < n; ++i) {
    const double row = coefficient * (i < sizes.source ? source_weight : -target_weight);
    const T of_source = static_cast<T>(row * source_weight), of_target = static_cast<T>(-row * target_weight);
    for (int64_t j = 0; j < n; ++j) scaled[i * n + j] = gram[i * n + j] * (j < sizes.source ? of_source : of_target);
  }
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& source, const Tensor& target, const Tensor& centred,
                                    const Tensor& products, const Tensor& mean_difference, int64_t correction, double factor,
                                    double mean_weight, bool need_source, bool need_target) {
  const Sizes sizes = sizes_of(source, target);
  const int64_t batch = sizes.batch, features = sizes.features, n = sizes.samples(), side = products.size(-1);
  const auto dtype = accumulate_type(source.scalar_type());
  const auto options = source.options().dtype(dtype);
  const double source_weight = 1.0 / (sizes.source - correction), target_weight = 1.0 / (sizes.target - correction);

  const Tensor incoming = grad.to(dtype).reshape({batch}).contiguous();
  const Tensor z = centred.reshape({batch, n, features}), p = products.reshape({batch, side, side});
  const Tensor means = mean_difference.reshape({batch, features});
  const T* g = incoming.const_data_ptr<T>();
  Tensor grad_source = at::empty({need_source ? batch : 0, sizes.source, features}, options);
  Tensor grad_target = at::empty({need_target ? batch : 0, sizes.target, features}, options);

  Tensor scaled = sizes.gram() ? at::empty({batch, n, n}, options) : Tensor();
  std::vector<int64_t> cancelled;
  if (sizes.gram()) {
    for (int64_t b = 0; b < batch; ++b) {
      const T* gram = p.const_data_ptr<T>() + b * n * n;
      scale_gram(gram, sizes, source_weight, target_weight, 4 * factor * g[b], scaled.mutable_data_ptr<T>() + b * n * n);
      if (gram_terms(gram, sizes, source_weight, target_weight).cancel()) cancelled.push_back(b);
    }
  }
  const auto one_domain = [&](const Tensor& result, int64_t offset, int64_t count, double weight) {
    Tensor out = result;
    if (sizes.gram()) {
      at::bmm_out(out, scaled.narrow(1, offset, count), z);
    } else {
      for (int64_t b = 0; b < batch; ++b) {
        Tensor row = out[b];
        at::addmm_out(row, row, z[b].narrow(0, offset, count), p[b], 0, 4 * factor * weight * g[b]);
      }
    }
  };
  if (need_source) one_domain(grad_source, 0, sizes.source, source_weight);
  if (need_target) one_domain(grad_target, sizes.source, sizes.target, -target_weight);

  for (const int64_t b : cancelled) {
    const Tensor exact = z[b].to(at::kDouble);
    Tensor a = at::mm(exact, exact.t());
    scale_gram(a.const_data_ptr<double>(), sizes, source_weight, target_weight, 4 * factor * g[b],
               a.mutable_data_ptr<double>());
    if (identical_domains(exact, sizes) && std::isfinite(g[b])) a.zero_();
    if (need_source) grad_source[b].copy_(at::mm(a.narrow(0, 0, sizes.source), exact));
    if (need_target) grad_target[b].copy_(at::mm(a.narrow(0, sizes.source, sizes.target), exact));
  }
  if (mean_weight != 0) {
    const Tensor pull = at::mul(means, incoming.unsqueeze(-1)).mul_(2 * mean_weight / std::max<int64_t>(features, 1)).unsqueeze(1);
    if (need_source) grad_source.add_(pull, 1.0 / sizes.source);
    if (need_target) grad_target.sub_(pull, 1.0 / sizes.target);
  }
  const auto finish = [](const Tensor& result, const Tensor& like, bool needed) {
    return needed ? result.reshape(like.sizes()).to(like.scalar_type()) : result.to(like.scalar_type()).reshape({0});
  };
  return {finish(grad_source, source, need_source), finish(grad_target, target, need_target)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coral_loss(const Tensor& source, const Tensor& target, int64_t correction,
                                                      c10::string_view scale, double mean_weight) {
  const KernelGuard guard;
  const double factor = scale_factor(scale, source.size(-1));
  return accumulate_type(source.scalar_type()) == at::kDouble
             ? forward<double>(source, target, correction, factor, mean_weight)
             : forward<float>(source, target, correction, factor, mean_weight);
}

std::tuple<Tensor, Tensor> coral_loss_backward(const Tensor& grad, const Tensor& source, const Tensor& target,
                                               const Tensor& centred, const Tensor& products, const Tensor& mean_difference,
                                               int64_t correction, c10::string_view scale, double mean_weight,
                                               bool need_source, bool need_target) {
  const KernelGuard guard;
  const double factor = scale_factor(scale, source.size(-1));
  const auto run = accumulate_type(source.scalar_type()) == at::kDouble ? &backward<double> : &backward<float>;
  return run(grad, source, target, centred, products, mean_difference, correction, factor, mean_weight, need_source,
             need_target);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("coral_loss", &coral_loss);
  m.impl("coral_loss_backward", &coral_loss_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "coral_loss"); }

}  // namespace fastda
