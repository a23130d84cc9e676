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
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <cmath>
#include <tuple>

#define FASTDA_LOOPS "coral_loops.h"
#include "for_each_isa.h"

namespace fastda {
namespace {

using at::Tensor;
using Values = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

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
  double* means = mean.mutable_data_ptr<double>();
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

// Z Zᵀ. One matrix is taken in bands of rows, each against the rows from its own on: little more than half of the products.
template <typename T>
Tensor gram_matrix(const Tensor& z) {
  const int64_t n = z.size(1), band = n < 128 ? 32 : 64;
  if (z.size(0) != 1 || n < 2 * band) return at::bmm(z, z.mT());
  const Tensor rows = z[0];
  Tensor gram = at::empty({n, n}, z.options());
  for (int64_t i = 0; i < n; i += band) {
    const int64_t count = std::min(band, n - i);
    Tensor upper = gram.narrow(0, i, count).narrow(1, i, n - i);
    at::mm_out(upper, rows.narrow(0, i, count), rows.narrow(0, i, n - i).t());
  }
  T* values = gram.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) values[i * n + j] = values[j * n + i];
  }
  return gram.unsqueeze(0);
}

// ‖Cs − Ct‖² of float64 features whose Gram terms cancel, from the difference itself, a band of its rows at a time.
double norm_of_difference(const Tensor& z, const Sizes& sizes, double source_weight, double target_weight) {
  constexpr int64_t band = 64;
  const Tensor s = z.narrow(0, 0, sizes.source), t = z.narrow(0, sizes.source, sizes.target);
  double norm = 0;
  for (int64_t i = 0; i < sizes.features; i += band) {
    const int64_t count = std::min(band, sizes.features - i);
    Tensor difference = at::empty({count, sizes.features}, z.options());
    at::addmm_out(difference, difference, s.narrow(1, i, count).t(), s, 0, source_weight);
    at::addmm_out(difference, difference, t.narrow(1, i, count).t(), t, 1, -target_weight);
    norm += squares(difference.const_data_ptr<double>(), count, sizes.features, sizes.features);
  }
  return norm;
}

// The same of features whose Gram terms cancel in their own precision: never negative, 0 for identical domains.
double careful_norm(const Tensor& z, const Sizes& sizes, double source_weight, double target_weight) {
  if (identical_domains(z, sizes)) return 0;
  if (z.scalar_type() == at::kDouble) return norm_of_difference(z, sizes, source_weight, target_weight);
  const Tensor exact = z.to(at::kDouble);
  const Tensor gram = at::mm(exact, exact.t());
  return std::max(gram_terms(gram.const_data_ptr<double>(), sizes, source_weight, target_weight).norm(), 0.0);
}

template <typename T>
Values forward(const Tensor& source, const Tensor& target, int64_t correction, double factor) {
  const Sizes sizes = sizes_of(source, target);
  const int64_t batch = sizes.batch, features = sizes.features, n = sizes.samples();
  const auto dtype = accumulate_type(source.scalar_type());
  const auto options = source.options().dtype(dtype);
  const double source_weight = 1.0 / (sizes.source - correction), target_weight = 1.0 / (sizes.target - correction);

  Tensor centred = at::empty({batch, n, features}, options);
  Tensor source_mean = at::empty({batch, features}, options.dtype(at::kDouble)), target_mean = at::empty_like(source_mean);
  centre<T>(rows_of(source, dtype, batch), centred, 0, source_mean);
  centre<T>(rows_of(target, dtype, batch), centred, sizes.source, target_mean);

  Tensor products;
  if (sizes.gram()) {
    products = gram_matrix<T>(centred);
  } else {
    const Tensor s = centred.narrow(1, 0, sizes.source), t = centred.narrow(1, sizes.source, sizes.target);
    products = at::empty({batch, features, features}, options);
    for (int64_t b = 0; b < batch; ++b) {
      Tensor difference = products[b];
      at::addmm_out(difference, difference, s[b].t(), s[b], 0, source_weight);
      at::addmm_out(difference, difference, t[b].t(), t[b], 1, -target_weight);
    }
  }

  Tensor losses = at::empty({batch}, options), mean_distances = at::empty({batch}, options);
  const Tensor mean_difference = source_mean.sub_(target_mean);
  T *loss = losses.mutable_data_ptr<T>(), *mean_distance = mean_distances.mutable_data_ptr<T>();
  const T* product = products.const_data_ptr<T>();
  const double* difference = mean_difference.const_data_ptr<double>();
  const int64_t side = products.size(-1);
  for (int64_t b = 0; b < batch; ++b) {
    double norm;
    if (sizes.gram()) {
      const GramTerms terms = gram_terms(product + b * side * side, sizes, source_weight, target_weight);
      norm = terms.cancel() ? careful_norm(centred[b], sizes, source_weight, target_weight) : terms.norm();
    } else {
      norm = squares(product + b * side * side, side, side, side);
    }
    loss[b] = static_cast<T>(factor * norm);
    const double total = squares(difference + b * features, 1, features, features);
    mean_distance[b] = static_cast<T>(total / std::max<int64_t>(features, 1));
  }
  return {losses.reshape(batched(source, 2, {})), mean_distances.reshape(batched(source, 2, {})),
          centred.reshape(batched(source, 2, {n, features})), products.reshape(batched(source, 2, {side, side})),
          mean_difference.to(dtype).reshape(batched(source, 2, {features}))};
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
std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& grad_mean_distance, const Tensor& source,
                                    const Tensor& target, const Tensor& centred, const Tensor& products,
                                    const Tensor& mean_difference, int64_t correction, double factor, bool need_source,
                                    bool need_target) {
  const Sizes sizes = sizes_of(source, target);
  const int64_t batch = sizes.batch, features = sizes.features, n = sizes.samples(), side = products.size(-1);
  const auto dtype = accumulate_type(source.scalar_type());
  const auto options = source.options().dtype(dtype);
  const double source_weight = 1.0 / (sizes.source - correction), target_weight = 1.0 / (sizes.target - correction);

  const Tensor incoming = grad_loss.to(dtype).reshape({batch}).contiguous();
  const Tensor of_means = grad_mean_distance.to(dtype).reshape({batch}).contiguous();
  const Tensor z = centred.to(dtype).reshape({batch, n, features}).contiguous();
  const Tensor p = products.to(dtype).reshape({batch, side, side}).contiguous();
  const Tensor means = mean_difference.to(dtype).reshape({batch, features});
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
  const T* pulls = of_means.const_data_ptr<T>();
  if (std::any_of(pulls, pulls + batch, [](T pull) { return pull != 0; })) {
    const Tensor pull = at::mul(means, of_means.unsqueeze(-1)).mul_(2.0 / std::max<int64_t>(features, 1)).unsqueeze(1);
    if (need_source) grad_source.add_(pull, 1.0 / sizes.source);
    if (need_target) grad_target.sub_(pull, 1.0 / sizes.target);
  }
  const auto finish = [](const Tensor& result, const Tensor& like, bool needed) {
    return needed ? result.reshape(like.sizes()).to(like.scalar_type()) : result.to(like.scalar_type()).reshape({0});
  };
  return {finish(grad_source, source, need_source), finish(grad_target, target, need_target)};
}

// The public function names what is wrong; these keep a direct call of the op from reading past the end.
void check(const Tensor& source, const Tensor& target, int64_t correction) {
  check_features("source", source);
  check_features("target", target);
  check_same("target", target, "source", source);
  for (const int64_t samples : {source.size(-2), target.size(-2)}) {
    TORCH_CHECK_VALUE(samples > correction, "expected more samples than correction, ", correction, ", got ", samples);
  }
}

Values coral_loss(const Tensor& source, const Tensor& target, int64_t correction, c10::string_view scale) {
  const KernelGuard guard;
  check(source, target, correction);
  const double factor = scale_factor(scale, source.size(-1));
  const auto run = accumulate_type(source.scalar_type()) == at::kDouble ? &forward<double> : &forward<float>;
  return run(source, target, correction, factor);
}

std::tuple<Tensor, Tensor> coral_loss_backward(const Tensor& grad_loss, const Tensor& grad_mean_distance,
                                               const Tensor& source, const Tensor& target, const Tensor& centred,
                                               const Tensor& products, const Tensor& mean_difference, int64_t correction,
                                               c10::string_view scale, bool need_source, bool need_target) {
  const KernelGuard guard;
  check(source, target, correction);
  const Sizes sizes = sizes_of(source, target);
  const int64_t side = std::min(sizes.samples(), sizes.features);
  check_count("grad_loss", grad_loss, sizes.batch);
  check_count("grad_mean_distance", grad_mean_distance, sizes.batch);
  check_count("centred", centred, sizes.batch * sizes.samples() * sizes.features);
  check_count("products", products, sizes.batch * side * side);
  check_count("mean_difference", mean_difference, sizes.batch * sizes.features);
  const double factor = scale_factor(scale, source.size(-1));
  const auto run = accumulate_type(source.scalar_type()) == at::kDouble ? &backward<double> : &backward<float>;
  return run(grad_loss, grad_mean_distance, source, target, centred, products, mean_difference, correction, factor,
             need_source, need_target);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("coral_loss", &coral_loss);
  m.impl("coral_loss_backward", &coral_loss_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "coral_loss"); }

}  // namespace fastda
