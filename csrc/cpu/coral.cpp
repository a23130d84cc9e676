// CORAL loss and its gradient without the two covariance matrices.
//
// With centred features Xs, Xt and v = 1/(N − correction), the squared Frobenius norm of Cs − Ct = vs XsᵀXs − vt XtᵀXt is
//     vs²‖Gss‖² − 2 vs vt‖Gst‖² + vt²‖Gtt‖²,   G = Z Zᵀ the Gram matrix of all samples, Z = [Xs; Xt],
// and its gradient is 4 V G V Z, V the diagonal of vs and −vt: O(n²D) for n samples and D features. Where samples outnumber
// features the D×D difference itself is cheaper, O(nD²), and its gradient ±4 v X (Cs − Ct). Both products are symmetric, so
// half of each is computed; samples are centred while they are packed, and no centred copy is kept.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <cmath>
#include <tuple>

#define FASTDA_LOOPS "coral_loops.h"
#include "for_each_isa.h"

#include "matrix.h"

namespace fastda {
namespace {

using Values = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Below this share of ‖Cs‖² + ‖Ct‖² the terms of the Gram form cancel, and float32 products are taken again in float64.
constexpr double cancels_below = 1e-2;

// What both directions know about a call.
struct Problem {
  int64_t batch, source, target, features;
  double source_weight, target_weight, factor, weight = 1;  // factor: the scale, times the weight of the layer

  int64_t samples() const { return source + target; }
  bool gram() const { return samples() < features; }
  int64_t side() const { return std::min(samples(), features); }
};

double scale_factor(c10::string_view scale, int64_t features) {
  const double d = static_cast<double>(std::max<int64_t>(features, 1));
  if (scale == "paper") return 1 / (4 * d * d);
  if (scale == "mean") return 1 / (d * d);
  TORCH_CHECK_VALUE(scale == "sum", "scale: expected 'paper', 'mean' or 'sum', got '", scale, "'");
  return 1;
}

Problem problem_of(const Tensor& source, const Tensor& target, int64_t correction, c10::string_view scale) {
  const int64_t ns = source.size(-2), nt = target.size(-2), features = source.size(-1);
  return {batch_size(source, 2), ns, nt, features, 1.0 / (ns - correction), 1.0 / (nt - correction), scale_factor(scale, features)};
}

// Both domains of one element of the batch.
template <typename T>
struct Domains {
  Samples<T> source, target;
  Domains(const Tensor& source, const Tensor& target, const Tensor& means, int64_t b)
      : source(source, b, data<double>(means) + b * means.stride(0)),
        target(target, b, data<double>(means) + b * means.stride(0) + source.size(2)) {}
};

// Z Zᵀ of all centred samples. Blocks of columns are turned over while they are packed.
template <typename T>
void gram_matrix(const Domains<T>& domains, T* gram) {
  const Samples<T>&source = domains.source, &target = domains.target;
  const int64_t features = source.columns, samples = source.rows + target.rows;
  const auto pack = [&](int64_t block, int64_t first, int64_t last, T* packed) {
    const int64_t column = block * block_depth, depth = std::min(block_depth, features - column);
    FASTDA_RUN(pack_stacked_rows(source.data + column, source.rows, source.stride, source.mean + column, target.data + column,
                                 target.rows, target.stride, target.mean + column, depth, first, last, packed));
    return Packed{depth, 1};
  };
  symmetric_product(samples, blocks(features, block_depth), features, pack, gram);
}

// Cs − Ct.
template <typename T>
void difference(const Domains<T>& domains, const Problem& problem, T* result) {
  const SampleBlocks<T> source{domains.source, problem.source_weight}, target{domains.target, -problem.target_weight};
  const auto pack = [&](int64_t block, int64_t first, int64_t last, T* packed) {
    const bool of_source = block < source.count();
    return of_source ? source.pack(block, first, last, packed) : target.pack(block - source.count(), first, last, packed);
  };
  symmetric_product(problem.features, source.count() + target.count(), problem.samples(), pack, result);
}

// The terms of the Gram form.
struct GramTerms {
  double within, between;
  double norm() const { return within - 2 * between; }
  bool cancel() const { return norm() < cancels_below * within; }
};

template <typename T>
GramTerms gram_terms(const T* gram, const Problem& problem) {
  const int64_t n = problem.samples(), ns = problem.source, nt = problem.target;
  const double vs = problem.source_weight, vt = problem.target_weight;
  return {vs * vs * squares(gram, ns, ns, n) + vt * vt * squares(gram + ns * n + ns, nt, nt, n),
          vs * vt * squares(gram + ns, ns, nt, n)};
}

// ‖Cs − Ct‖² of float64 features whose Gram terms cancel, from the difference itself, a band of its rows at a time.
double norm_of_difference(const Tensor& source, const Tensor& target, const Problem& problem) {
  constexpr int64_t band = 64;
  double norm = 0;
  for (int64_t i = 0; i < problem.features; i += band) {
    const int64_t count = std::min(band, problem.features - i);
    Tensor difference = at::empty({count, problem.features}, source.options());
    at::addmm_out(difference, difference, source.narrow(1, i, count).t(), source, 0, problem.source_weight);
    at::addmm_out(difference, difference, target.narrow(1, i, count).t(), target, 1, -problem.target_weight);
    norm += squares(difference.const_data_ptr<double>(), count, problem.features, problem.features);
  }
  return norm;
}

// Centred samples in float64.
Tensor exact(const Tensor& x, const Tensor& mean) { return x.to(at::kDouble).sub(mean); }

// The norm of one batch element whose Gram terms cancel in its own precision: never negative, 0 for identical domains.
double careful_norm(const Tensor& source, const Tensor& target, const Tensor& means, const Problem& problem) {
  if (source.sizes() == target.sizes() && at::equal(source, target)) return 0;
  const Tensor s = exact(source, means[0]), t = exact(target, means[1]);
  if (source.scalar_type() == at::kDouble) return norm_of_difference(s, t, problem);
  const Tensor z = at::cat({s, t}), gram = at::mm(z, z.t());
  return std::max(gram_terms(gram.const_data_ptr<double>(), problem).norm(), 0.0);
}

// One layer: samples (batch, N, D) of both domains, results (batch), (batch, 2, D) and (batch, side, side), all but the batch
// dimension dense.
struct Layer {
  Problem problem;
  Tensor source, target, loss, mean_distance, means, products;
};

template <typename T>
void forward(const Layer& layer) {
  const Problem& problem = layer.problem;
  const int64_t side = problem.side();
  std::vector<uint8_t> cancels(problem.batch, false);
  for_batch(problem.batch, [&](int64_t b) {
    const Domains<T> domains(layer.source, layer.target, layer.means, b);
    T* product = data<T>(layer.products) + b * layer.products.stride(0);
    double norm;
    find_means({domains.source, domains.target});
    if (problem.gram()) {
      gram_matrix(domains, product);
      const GramTerms terms = gram_terms(product, problem);
      norm = terms.norm();
      cancels[b] = terms.cancel();
    } else {
      difference(domains, problem, product);
      norm = squares(product, side, side, side);
    }
    data<T>(layer.loss)[b * layer.loss.stride(0)] = static_cast<T>(problem.factor * norm);
    double distance = 0;
    for (int64_t i = 0; i < problem.features; ++i) {
      const double of_means = domains.source.mean[i] - domains.target.mean[i];
      distance += of_means * of_means;
    }
    distance *= problem.weight / std::max<int64_t>(problem.features, 1);
    data<T>(layer.mean_distance)[b * layer.mean_distance.stride(0)] = static_cast<T>(distance);
  });
  for (int64_t b = 0; b < problem.batch; ++b) {
    if (!cancels[b]) continue;
    const double norm = careful_norm(layer.source[b], layer.target[b], layer.means[b], problem);
    data<T>(layer.loss)[b * layer.loss.stride(0)] = static_cast<T>(problem.factor * norm);
  }
}

// coefficient · V G V Z, for the domains that need it.
template <typename T>
void gram_gradient_of(const Domains<T>& domains, const T* gram, const Problem& problem, double coefficient, T* grad_source,
                      T* grad_target) {
  constexpr int64_t width = 128;
  const Samples<T>&source = domains.source, &target = domains.target;
  const int64_t n = problem.samples(), depth = std::min(block_depth, n), features = problem.features;
  const auto pack = [&](bool needed, int64_t first, int64_t rows) {
    Scratch<T> packed(needed ? (rows + widest_panel) * n : 0);
    if (needed) FASTDA_RUN(pack_gram(gram, n, first, rows, packed.data()));
    return packed;
  };
  const Scratch<T> of_source = pack(grad_source, 0, source.rows), of_target = pack(grad_target, source.rows, target.rows);
  at::parallel_for(0, blocks(features, width), grain(width * n * n), [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch((width + widest_panel) * depth);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t column = chunk * width;
      FASTDA_RUN(gram_gradient(source.data + column, source.rows, source.stride, source.mean + column, problem.source_weight,
                               target.data + column, target.rows, target.stride, target.mean + column, problem.target_weight,
                               grad_source ? of_source.data() : nullptr, grad_target ? of_target.data() : nullptr,
                               coefficient, std::min(width, features - column), depth, scratch.data(), grad_source + column,
                               grad_target + column, features));
    }
  });
}

// The same in float64, where the terms cancel.
void careful_gradient(const Tensor& source, const Tensor& target, const Tensor& means, const Problem& problem,
                      double coefficient, const Tensor& grad_source, const Tensor& grad_target) {
  const bool identical = source.sizes() == target.sizes() && at::equal(source, target) && std::isfinite(coefficient);
  const Tensor s = exact(source, means[0]), t = exact(target, means[1]), z = at::cat({s, t});
  const Tensor weighted = at::cat({s.mul(problem.source_weight), t.mul(-problem.target_weight)});
  const auto one_domain = [&](const Tensor& grad, const Tensor& rows, double weight) {
    if (!grad.defined()) return;
    if (identical) {
      grad.zero_();
    } else {
      grad.copy_(at::mm(at::mm(rows, z.t()), weighted).mul_(coefficient * weight));
    }
  };
  one_domain(grad_source, s, problem.source_weight);
  one_domain(grad_target, t, -problem.target_weight);
}

// Writes the gradient of the domains that need it; the other's is undefined. The layer holds incoming gradients for results.
template <typename T>
void backward(const Layer& layer, const Tensor& grad_source, const Tensor& grad_target) {
  const Problem& problem = layer.problem;
  const auto incoming = [](const Tensor& grad, int64_t b) { return grad.const_data_ptr<T>()[b * grad.stride(0)]; };
  const auto coefficient_of = [&](int64_t b) { return 4 * problem.factor * incoming(layer.loss, b); };
  const auto gradient = [](const Tensor& grad, int64_t b) { return grad.defined() ? data<T>(grad) + b * grad.stride(0) : nullptr; };
  std::vector<uint8_t> cancels(problem.batch, false);
  bool pulls = false;
  for_batch(problem.batch, [&](int64_t b) {
    const Domains<T> domains(layer.source, layer.target, layer.means, b);
    const T* p = layer.products.const_data_ptr<T>() + b * layer.products.stride(0);
    T *gs = gradient(grad_source, b), *gt = gradient(grad_target, b);
    const double coefficient = coefficient_of(b);
    if (!problem.gram()) {
      if (gs) multiply_symmetric(domains.source, p, false, coefficient * problem.source_weight, gs);
      if (gt) multiply_symmetric(domains.target, p, false, -coefficient * problem.target_weight, gt);
    } else {
      cancels[b] = gram_terms(p, problem).cancel();
      if (!cancels[b]) gram_gradient_of(domains, p, problem, coefficient, gs, gt);
    }
  });
  for (int64_t b = 0; b < problem.batch; ++b) {
    pulls = pulls || incoming(layer.mean_distance, b) != 0;
    if (!cancels[b]) continue;
    careful_gradient(layer.source[b], layer.target[b], layer.means[b], problem, coefficient_of(b),
                     grad_source.defined() ? grad_source[b] : Tensor(), grad_target.defined() ? grad_target[b] : Tensor());
  }
  if (!pulls) return;
  const double factor = 2 * problem.weight / std::max<int64_t>(problem.features, 1);
  const Tensor of_means = layer.means.select(1, 0).sub(layer.means.select(1, 1)).to(layer.source.scalar_type());
  const Tensor pull = at::mul(of_means, layer.mean_distance.unsqueeze(-1)).mul_(factor).unsqueeze(1);
  if (grad_source.defined()) Tensor(grad_source).add_(pull, 1.0 / problem.source);
  if (grad_target.defined()) Tensor(grad_target).sub_(pull, 1.0 / problem.target);
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

void run_forward(const Layer& layer) {
  layer.source.scalar_type() == at::kDouble ? forward<double>(layer) : forward<float>(layer);
}

void run_backward(const Layer& layer, const Tensor& grad_source, const Tensor& grad_target) {
  const auto run = layer.source.scalar_type() == at::kDouble ? &backward<double> : &backward<float>;
  run(layer, grad_source, grad_target);
}

Values coral_loss(const Tensor& source, const Tensor& target, int64_t correction, c10::string_view scale) {
  const KernelGuard guard;
  check(source, target, correction);
  const Problem problem = problem_of(source, target, correction, scale);
  const auto dtype = accumulate_type(source.scalar_type());
  const auto options = source.options().dtype(dtype);
  const Layer layer{problem,
                    matrices(source, dtype, problem.batch),
                    matrices(target, dtype, problem.batch),
                    at::empty({problem.batch}, options),
                    at::empty({problem.batch}, options),
                    at::empty({problem.batch, 2, problem.features}, options.dtype(at::kDouble)),
                    at::empty({problem.batch, problem.side(), problem.side()}, options)};
  run_forward(layer);
  return {layer.loss.reshape(batched(source, 2, {})), layer.mean_distance.reshape(batched(source, 2, {})),
          layer.means.reshape(batched(source, 2, {2, problem.features})),
          layer.products.reshape(batched(source, 2, {problem.side(), problem.side()}))};
}

std::tuple<Tensor, Tensor> coral_loss_backward(const Tensor& grad_loss, const Tensor& grad_mean_distance, const Tensor& source,
                                               const Tensor& target, const Tensor& means, const Tensor& products,
                                               int64_t correction, c10::string_view scale, bool need_source, bool need_target) {
  const KernelGuard guard;
  check(source, target, correction);
  const Problem problem = problem_of(source, target, correction, scale);
  const int64_t batch = problem.batch, features = problem.features, side = problem.side();
  check_count("grad_loss", grad_loss, batch);
  check_count("grad_mean_distance", grad_mean_distance, batch);
  check_count("means", means, batch * 2 * features);
  check_count("products", products, batch * side * side);
  const auto dtype = accumulate_type(source.scalar_type());
  const auto options = source.options().dtype(dtype);
  const Layer layer{problem,
                    matrices(source, dtype, batch),
                    matrices(target, dtype, batch),
                    grad_loss.to(dtype).reshape({batch}),
                    grad_mean_distance.to(dtype).reshape({batch}),
                    means.to(at::kDouble).reshape({batch, 2, features}).contiguous(),
                    products.to(dtype).reshape({batch, side, side}).contiguous()};
  const Tensor grad_source = need_source ? at::empty({batch, problem.source, features}, options) : Tensor();
  const Tensor grad_target = need_target ? at::empty({batch, problem.target, features}, options) : Tensor();
  run_backward(layer, grad_source, grad_target);
  const auto finish = [](const Tensor& grad, const Tensor& like) {
    return grad.defined() ? grad.reshape(like.sizes()).to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {finish(grad_source, source), finish(grad_target, target)};
}

// Layers that lie one after the other in flat features (batch, total), and their shares of the flat results.
std::vector<Layer> layers_of(const Tensor& features, at::IntArrayRef num_source, at::IntArrayRef num_target,
                             at::IntArrayRef num_features, at::ArrayRef<double> weights, int64_t correction,
                             c10::string_view scale, const Tensor& losses, const Tensor& mean_distances, const Tensor& means,
                             const Tensor& products) {
  std::vector<Layer> layers;
  int64_t first = 0, first_mean = 0, first_product = 0;
  for (size_t l = 0; l < num_features.size(); ++l) {
    const int64_t width = num_features[l];
    const auto part = [&](const Tensor& x, int64_t& begin, int64_t rows, int64_t columns) {
      const Tensor result = x.narrow(1, begin, rows * columns).unflatten(1, {rows, columns});
      begin += rows * columns;
      return result;
    };
    const Tensor source = part(features, first, num_source[l], width), target = part(features, first, num_target[l], width);
    Problem problem = problem_of(source, target, correction, scale);
    problem.weight = weights[l];
    problem.factor *= weights[l];
    layers.push_back({problem, source, target, losses.select(1, l), mean_distances.select(1, l),
                      part(means, first_mean, 2, width), part(products, first_product, problem.side(), problem.side())});
  }
  return layers;
}

// Elements of features, means and products that the layers take up.
struct LayerCounts {
  int64_t features = 0, means = 0, products = 0;

  LayerCounts(const Tensor& x, at::IntArrayRef num_source, at::IntArrayRef num_target, at::IntArrayRef num_features,
              at::ArrayRef<double> weights, int64_t correction) {
    const size_t layers = num_features.size();
    TORCH_CHECK_VALUE(num_source.size() == layers && num_target.size() == layers && weights.size() == layers,
                      "num_source, num_target, num_features, weights: expected one entry a layer, got ", num_source.size(), ", ",
                      num_target.size(), ", ", layers, ", ", weights.size());
    for (size_t l = 0; l < layers; ++l) {
      const int64_t ns = num_source[l], nt = num_target[l], width = num_features[l];
      TORCH_CHECK_VALUE(ns > correction && nt > correction && width >= 0, "layer ", l, ": expected more samples than correction, ",
                        correction, ", got ", ns, " and ", nt, " of ", width, " features");
      const int64_t side = std::min(ns + nt, width);
      features += (ns + nt) * width;
      means += 2 * width;
      products += side * side;
    }
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == features, "features: expected (..., ", features, "), got ", x.sizes());
    check_floating("features", x);
  }
};

Values coral_layers(const Tensor& features, at::IntArrayRef num_source, at::IntArrayRef num_target, at::IntArrayRef num_features,
                    at::ArrayRef<double> weights, int64_t correction, c10::string_view scale) {
  const KernelGuard guard;
  const LayerCounts counts(features, num_source, num_target, num_features, weights, correction);
  const int64_t batch = batch_size(features, 1), layers = num_features.size();
  const auto dtype = accumulate_type(features.scalar_type());
  const auto options = features.options().dtype(dtype);
  const Tensor x = features.to(dtype).reshape({batch, counts.features}).contiguous();
  const Tensor losses = at::empty({batch, layers}, options), mean_distances = at::empty({batch, layers}, options);
  const Tensor means = at::empty({batch, counts.means}, options.dtype(at::kDouble));
  const Tensor products = at::empty({batch, counts.products}, options);
  for (const Layer& layer : layers_of(x, num_source, num_target, num_features, weights, correction, scale, losses, mean_distances,
                                      means, products)) {
    run_forward(layer);
  }
  return {losses.reshape(batched(features, 1, {layers})), mean_distances.reshape(batched(features, 1, {layers})),
          means.reshape(batched(features, 1, {counts.means})), products.reshape(batched(features, 1, {counts.products}))};
}

Tensor coral_layers_backward(const Tensor& grad_losses, const Tensor& grad_mean_distances, const Tensor& features,
                             const Tensor& means, const Tensor& products, at::IntArrayRef num_source, at::IntArrayRef num_target,
                             at::IntArrayRef num_features, at::ArrayRef<double> weights, int64_t correction,
                             c10::string_view scale, bool need_features) {
  const KernelGuard guard;
  const LayerCounts counts(features, num_source, num_target, num_features, weights, correction);
  const int64_t batch = batch_size(features, 1), layers = num_features.size();
  if (!need_features) return at::empty({0}, features.options());
  check_count("grad_losses", grad_losses, batch * layers);
  check_count("grad_mean_distances", grad_mean_distances, batch * layers);
  check_count("means", means, batch * counts.means);
  check_count("products", products, batch * counts.products);
  const auto dtype = accumulate_type(features.scalar_type());
  const auto flat = [&](const Tensor& x, at::ScalarType type, int64_t count) {
    return x.to(type).reshape({batch, count}).contiguous();
  };
  const Tensor x = flat(features, dtype, counts.features), grads = at::empty_like(x);
  int64_t first = 0;
  for (const Layer& layer : layers_of(x, num_source, num_target, num_features, weights, correction, scale,
                                      flat(grad_losses, dtype, layers), flat(grad_mean_distances, dtype, layers),
                                      flat(means, at::kDouble, counts.means), flat(products, dtype, counts.products))) {
    const auto part = [&](int64_t rows) {
      const Tensor grad = grads.narrow(1, first, rows * layer.problem.features).unflatten(1, {rows, layer.problem.features});
      first += rows * layer.problem.features;
      return grad;
    };
    const Tensor grad_source = part(layer.problem.source), grad_target = part(layer.problem.target);
    run_backward(layer, grad_source, grad_target);
  }
  return grads.reshape(features.sizes()).to(features.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("coral_loss", &coral_loss);
  m.impl("coral_loss_backward", &coral_loss_backward);
  m.impl("coral_layers", &coral_layers);
  m.impl("coral_layers_backward", &coral_layers_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) {
  differentiable(m, "coral_loss");
  differentiable(m, "coral_layers");
}

}  // namespace fastda
