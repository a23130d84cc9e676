// CORAL loss and its gradient without the two covariance matrices.
//
// With centred features Xs, Xt and v = 1/(N − correction), Cs − Ct = vs XsᵀXs − vt XtᵀXt has the squared norm
//     vs²‖Gss‖² − 2 vs vt‖Gst‖² + vt²‖Gtt‖²,   G = Z Zᵀ the Gram matrix of all samples, Z = [Xs; Xt],
// and its gradient is 4 V G V Z, V the diagonal of vs and −vt: O(n²D) for n samples and D features. Where samples
// outnumber features the D×D difference itself is cheaper, O(nD²), and its gradient ±4 v X (Cs − Ct). Both products are
// symmetric, so half of each is computed; samples are centred while they are packed, and no centred copy is kept.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <tuple>

#define FASTDA_LOOPS "coral_loops.h"
#include "for_each_isa.h"

#include "matrix.h"

namespace fastda {
namespace {

using Values = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// ‖Cs − Ct‖² and its gradient are trusted above this share of ‖Cs‖² + ‖Ct‖² when they come from a Gram matrix, whose
// terms cancel: there they are as exact as from the covariances. Below it float64 takes the place of float32.
template <typename T>
constexpr double trusted_above = std::is_same_v<T, float> ? 0.1 : 1e-4;
// The norm of a difference of covariances is trusted above this share of the largest squared variance of a feature.
constexpr double difference_trusted_above = 0.25;

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
  const double vs = 1.0 / (ns - correction), vt = 1.0 / (nt - correction);
  return {batch_size(source, 2), ns, nt, features, vs, vt, scale_factor(scale, features)};
}

// Both domains of one element of the batch.
template <typename T>
struct Domains {
  Samples<T> source, target;
  Domains(const Tensor& source, const Tensor& target, const Tensor& means, int64_t b)
      : source(source, b, data<double>(means) + b * means.stride(0)),
        target(target, b, data<double>(means) + b * means.stride(0) + means.stride(1)) {}
};

// Z Zᵀ of all centred samples. Blocks of columns are turned over while they are packed.
template <typename T>
void gram_matrix(const Domains<T>& domains, T* gram) {
  const Samples<T>&source = domains.source, &target = domains.target;
  const int64_t features = source.columns, samples = source.rows + target.rows;
  const auto pack = [&](int64_t block, int64_t first, int64_t last, T* packed) {
    const int64_t column = block * block_depth, depth = std::min(block_depth, features - column);
    FASTDA_RUN(pack_stacked_rows(source.data + column, source.rows, source.stride, source.mean + column,
                                 target.data + column, target.rows, target.stride, target.mean + column, depth, first,
                                 last, packed));
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
    return of_source ? source.pack(block, first, last, packed)
                     : target.pack(block - source.count(), first, last, packed);
  };
  symmetric_product(problem.features, source.count() + target.count(), problem.samples(), pack, result);
}

// The terms of the Gram form.
struct GramTerms {
  double within, between;
  double norm() const { return within - 2 * between; }
  bool trusted(double above) const { return norm() >= above * within; }  // not if NaN
};

template <typename T>
GramTerms gram_terms(const T* gram, const Problem& problem) {
  const int64_t n = problem.samples(), ns = problem.source, nt = problem.target;
  const double vs = problem.source_weight, vt = problem.target_weight;
  return {vs * vs * squares(gram, ns, ns, n) + vt * vt * squares(gram + ns * n + ns, nt, nt, n),
          vs * vt * squares(gram + ns, ns, nt, n)};
}

bool identical(const Tensor& source, const Tensor& target) {
  return source.sizes() == target.sizes() && at::equal(source, target);
}

// Both domains of one batch element, centred, in float64.
struct Exact {
  Tensor source, target, means;

  Exact(const Tensor& source, const Tensor& target, const Tensor& means)
      : source(centred(source, means[0])),
        target(centred(target, means[1])),
        means(at::zeros_like(means).unsqueeze(0)) {}
  static Tensor centred(const Tensor& x, const Tensor& mean) { return x.to(at::kDouble).sub(mean); }
  Domains<double> domains() const { return {source.unsqueeze(0), target.unsqueeze(0), means, 0}; }
};

// ‖Cs − Ct‖² of centred samples that are fewer than their features. In an orthonormal basis of what they span (the Q of
// Zᵀ = Q R) the covariances are n×n and can be subtracted: nothing cancels that does not cancel in Cs − Ct.
double norm_in_basis(const Exact& samples, const Problem& problem) {
  const Tensor r = std::get<1>(at::linalg_qr(at::cat({samples.source, samples.target}).t(), "r"));
  const Tensor s = r.narrow(1, 0, problem.source), t = r.narrow(1, problem.source, problem.target);
  const Tensor difference = at::mm(s, s.t()).mul_(problem.source_weight).addmm_(t, t.t(), 1, -problem.target_weight);
  return squares(difference.const_data_ptr<double>(), r.size(0), r.size(0), r.size(0));
}

// The norm of one batch element that is not trusted as `norm`, in float64: 0 for identical domains, never negative.
// Where the product is the difference of the covariances, it is mended too.
double careful_norm(const Tensor& source, const Tensor& target, const Tensor& means, const Problem& problem,
                    double norm, const Tensor& product) {
  if (identical(source, target)) {
    if (!problem.gram()) Tensor(product).zero_();
    return 0;
  }
  const bool is_double = source.scalar_type() == at::kDouble;
  if (is_double && !problem.gram()) return norm;
  const Exact samples(source, target, means);
  const Tensor exact_product = at::empty({problem.side(), problem.side()}, samples.source.options());
  double* values = data<double>(exact_product);
  if (!problem.gram()) {
    difference(samples.domains(), problem, values);
    Tensor(product).copy_(exact_product);
    return squares(values, problem.side(), problem.side(), problem.side());
  }
  if (!is_double) {
    gram_matrix(samples.domains(), values);
    const GramTerms terms = gram_terms(values, problem);
    if (terms.trusted(trusted_above<double>)) return terms.norm();
    norm = terms.norm();
  }
  return std::isfinite(norm) ? norm_in_basis(samples, problem) : norm;
}

// One layer: samples (batch, N, D) of both domains; results (batch), (batch, 2, D) and (batch, side, side), which are
// dense but for the batch dimension.
struct Layer {
  Problem problem;
  Tensor source, target, loss, mean_distance, means, products;
};

template <typename T>
void forward(const Layer& layer) {
  const Problem& problem = layer.problem;
  const int64_t side = problem.side();
  std::vector<double> norms(problem.batch);
  std::vector<uint8_t> trusted(problem.batch);
  for_batch(problem.batch, [&](int64_t b) {
    const Domains<T> domains(layer.source, layer.target, layer.means, b);
    T* product = data<T>(layer.products) + b * layer.products.stride(0);
    const double variance = find_means({domains.source, domains.target});
    if (problem.gram()) {
      gram_matrix(domains, product);
      const GramTerms terms = gram_terms(product, problem);
      norms[b] = terms.norm();
      trusted[b] = terms.trusted(trusted_above<T>);
    } else {
      difference(domains, problem, product);
      norms[b] = squares(product, side, side, side);
      trusted[b] = norms[b] >= difference_trusted_above * variance * variance;
    }
    double distance = 0;
    for (int64_t i = 0; i < problem.features; ++i) {
      const double of_means = domains.source.mean[i] - domains.target.mean[i];
      distance += of_means * of_means;
    }
    distance *= problem.weight / std::max<int64_t>(problem.features, 1);
    data<T>(layer.mean_distance)[b * layer.mean_distance.stride(0)] = static_cast<T>(distance);
  });
  for (int64_t b = 0; b < problem.batch; ++b) {  // outside of the threads: the careful way creates tensors
    if (!trusted[b]) {
      norms[b] = careful_norm(layer.source[b], layer.target[b], layer.means[b], problem, norms[b], layer.products[b]);
    }
    data<T>(layer.loss)[b * layer.loss.stride(0)] = static_cast<T>(problem.factor * norms[b]);
  }
}

// coefficient · V G V Z, for the domains that need it.
template <typename T>
void gram_gradient_of(const Domains<T>& domains, const T* gram, const Problem& problem, double coefficient,
                      T* grad_source, T* grad_target) {
  constexpr int64_t width = 128;
  const Samples<T>&source = domains.source, &target = domains.target;
  const int64_t n = problem.samples(), depth = std::min(block_depth, n), features = problem.features;
  const auto pack = [&](bool needed, int64_t first, int64_t rows) {
    Scratch<T> packed(needed ? (rows + widest_panel) * n : 0);
    if (needed) FASTDA_RUN(pack_gram(gram, n, first, rows, packed.data()));
    return packed;
  };
  const auto from_column = [](T* grad, int64_t column) { return grad ? grad + column : nullptr; };
  const Scratch<T> of_source = pack(grad_source, 0, source.rows),
                   of_target = pack(grad_target, source.rows, target.rows);
  at::parallel_for(0, blocks(features, width), grain(width * n * n), [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch((width + widest_panel) * depth);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t column = chunk * width;
      FASTDA_RUN(gram_gradient(source.data + column, source.rows, source.stride, source.mean + column,
                               problem.source_weight, target.data + column, target.rows, target.stride,
                               target.mean + column, problem.target_weight, grad_source ? of_source.data() : nullptr,
                               grad_target ? of_target.data() : nullptr, coefficient,
                               std::min(width, features - column), depth, scratch.data(),
                               from_column(grad_source, column), from_column(grad_target, column), features));
    }
  });
}

// The same for one batch element, in float64.
void careful_gradient(const Tensor& source, const Tensor& target, const Tensor& means, const Problem& problem,
                      double coefficient, const Tensor& grad_source, const Tensor& grad_target) {
  const Exact samples(source, target, means);
  const Tensor gram = at::empty({problem.side(), problem.side()}, samples.source.options());
  const Tensor gs = grad_source.defined() ? at::empty_like(samples.source) : Tensor();
  const Tensor gt = grad_target.defined() ? at::empty_like(samples.target) : Tensor();
  gram_matrix(samples.domains(), data<double>(gram));
  gram_gradient_of(samples.domains(), data<double>(gram), problem, coefficient,
                   gs.defined() ? data<double>(gs) : nullptr, gt.defined() ? data<double>(gt) : nullptr);
  if (gs.defined()) grad_source.copy_(gs);
  if (gt.defined()) grad_target.copy_(gt);
}

// Writes the gradient of the domains that need it; the other's is undefined. The layer holds incoming gradients.
template <typename T>
void backward(const Layer& layer, const Tensor& grad_source, const Tensor& grad_target) {
  constexpr bool is_double = std::is_same_v<T, double>;
  const Problem& problem = layer.problem;
  const auto incoming = [](const Tensor& grad, int64_t b) { return grad.const_data_ptr<T>()[b * grad.stride(0)]; };
  const auto coefficient_of = [&](int64_t b) { return 4 * problem.factor * incoming(layer.loss, b); };
  const auto gradient = [](const Tensor& grad, int64_t b) {
    return grad.defined() ? data<T>(grad) + b * grad.stride(0) : nullptr;
  };
  std::vector<uint8_t> trusted(problem.batch, true);
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
      trusted[b] = gram_terms(p, problem).trusted(trusted_above<T>);
      if (trusted[b] || is_double) gram_gradient_of(domains, p, problem, coefficient, gs, gt);
    }
    if (gs) centre_gradient(gs, problem.source, problem.features);
    if (gt) centre_gradient(gt, problem.target, problem.features);
  });
  const auto element = [](const Tensor& grad, int64_t b) { return grad.defined() ? grad[b] : Tensor(); };
  for (int64_t b = 0; b < problem.batch; ++b) {
    pulls = pulls || incoming(layer.mean_distance, b) != 0;
    if (trusted[b]) continue;
    const Tensor source = layer.source[b], gs = element(grad_source, b);
    const Tensor target = layer.target[b], gt = element(grad_target, b);
    if (std::isfinite(coefficient_of(b)) && identical(source, target)) {
      if (gs.defined()) gs.zero_();
      if (gt.defined()) gt.zero_();
    } else if (!is_double) {
      careful_gradient(source, target, layer.means[b], problem, coefficient_of(b), gs, gt);
    }
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

// A gradient in the shape and dtype of what it belongs to, empty where it is not needed.
Tensor finish(const Tensor& grad, const Tensor& like) {
  return grad.defined() ? grad.reshape(like.sizes()).to(like.scalar_type()) : at::empty({0}, like.options());
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

std::tuple<Tensor, Tensor> coral_loss_backward(const Tensor& grad_loss, const Tensor& grad_mean_distance,
                                               const Tensor& source, const Tensor& target, const Tensor& means,
                                               const Tensor& products, int64_t correction, c10::string_view scale,
                                               bool need_source, bool need_target) {
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
  return {finish(grad_source, source), finish(grad_target, target)};
}

// Layers lie one after the other in flat tensors, (batch, Σ N·D) of each domain. Gives out the next rows and columns.
class Parts {
 public:
  explicit Parts(const Tensor& flat) : flat_(flat) {}
  Tensor next(int64_t rows, int64_t columns) {
    if (!flat_.defined()) return flat_;
    const Tensor part = flat_.narrow(1, begin_, rows * columns).unflatten(1, {rows, columns});
    begin_ += rows * columns;
    return part;
  }

 private:
  Tensor flat_;
  int64_t begin_ = 0;
};

// What the ops of several layers are told.
struct Layers {
  at::IntArrayRef num_source, num_target, num_features;
  at::ArrayRef<double> weights;
  int64_t correction;
  c10::string_view scale;

  int64_t count() const { return num_features.size(); }

  // Visits each layer; its samples come from `source` and `target`, what it writes or is given from the others.
  template <typename F>
  void visit(const Tensor& source, const Tensor& target, const Tensor& losses, const Tensor& mean_distances,
             const Tensor& means, const Tensor& products, const F& each) const {
    Parts of_source(source), of_target(target), of_means(means), of_products(products);
    for (int64_t l = 0; l < count(); ++l) {
      const int64_t width = num_features[l];
      const Tensor s = of_source.next(num_source[l], width), t = of_target.next(num_target[l], width);
      Problem problem = problem_of(s, t, correction, scale);
      problem.weight = weights[l];
      problem.factor *= weights[l];
      each(Layer{problem, s, t, losses.select(1, l), mean_distances.select(1, l), of_means.next(2, width),
                 of_products.next(problem.side(), problem.side())});
    }
  }
};

// Elements of samples, means and products that the layers take up.
struct LayerCounts {
  int64_t source = 0, target = 0, means = 0, products = 0;

  LayerCounts(const Tensor& sources, const Tensor& targets, const Layers& layers) {
    const int64_t count = layers.count(), correction = layers.correction;
    const auto has_all = [&](const auto& list) { return static_cast<int64_t>(list.size()) == count; };
    TORCH_CHECK_VALUE(has_all(layers.num_source) && has_all(layers.num_target) && has_all(layers.weights),
                      "num_source, num_target, num_features, weights: expected one entry a layer, got ",
                      layers.num_source.size(), ", ", layers.num_target.size(), ", ", count, ", ",
                      layers.weights.size());
    for (int64_t l = 0; l < count; ++l) {
      const int64_t ns = layers.num_source[l], nt = layers.num_target[l], width = layers.num_features[l];
      TORCH_CHECK_VALUE(ns > correction && nt > correction && width >= 0, "layer ", l,
                        ": expected more samples than correction, ", correction, ", got ", ns, " and ", nt, " of ",
                        width, " features");
      const int64_t side = std::min(ns + nt, width);
      source += ns * width;
      target += nt * width;
      means += 2 * width;
      products += side * side;
    }
    check_floating("sources", sources);
    TORCH_CHECK_TYPE(sources.scalar_type() == targets.scalar_type(), "targets: expected the dtype of sources, ",
                     sources.scalar_type(), ", got ", targets.scalar_type());
    TORCH_CHECK_VALUE(sources.dim() >= 1 && sources.size(-1) == source, "sources: expected (..., ", source, "), got ",
                      sources.sizes());
    TORCH_CHECK_VALUE(targets.sizes() == at::IntArrayRef(batched(sources, 1, {target})),
                      "targets: expected the batch of sources, ", sources.sizes(), ", and ", target,
                      " elements each, got ", targets.sizes());
  }
};

Tensor flat(const Tensor& x, at::ScalarType dtype, int64_t batch, int64_t count) {
  return x.to(dtype).reshape({batch, count}).contiguous();
}

Values coral_layers(const Tensor& sources, const Tensor& targets, at::IntArrayRef num_source,
                    at::IntArrayRef num_target, at::IntArrayRef num_features, at::ArrayRef<double> weights,
                    int64_t correction, c10::string_view scale) {
  const KernelGuard guard;
  const Layers layers{num_source, num_target, num_features, weights, correction, scale};
  const LayerCounts counts(sources, targets, layers);
  const int64_t batch = batch_size(sources, 1), count = layers.count();
  const auto dtype = accumulate_type(sources.scalar_type());
  const auto options = sources.options().dtype(dtype);
  const Tensor losses = at::empty({batch, count}, options), mean_distances = at::empty({batch, count}, options);
  const Tensor means = at::empty({batch, counts.means}, options.dtype(at::kDouble));
  const Tensor products = at::empty({batch, counts.products}, options);
  layers.visit(flat(sources, dtype, batch, counts.source), flat(targets, dtype, batch, counts.target), losses,
               mean_distances, means, products, &run_forward);
  const auto finish = [&](const Tensor& x) { return x.reshape(batched(sources, 1, {x.size(1)})); };
  return {finish(losses), finish(mean_distances), finish(means), finish(products)};
}

std::tuple<Tensor, Tensor> coral_layers_backward(const Tensor& grad_losses, const Tensor& grad_mean_distances,
                                                 const Tensor& sources, const Tensor& targets, const Tensor& means,
                                                 const Tensor& products, at::IntArrayRef num_source,
                                                 at::IntArrayRef num_target, at::IntArrayRef num_features,
                                                 at::ArrayRef<double> weights, int64_t correction,
                                                 c10::string_view scale, bool need_sources, bool need_targets) {
  const KernelGuard guard;
  const Layers layers{num_source, num_target, num_features, weights, correction, scale};
  const LayerCounts counts(sources, targets, layers);
  const int64_t batch = batch_size(sources, 1), count = layers.count();
  check_count("grad_losses", grad_losses, batch * count);
  check_count("grad_mean_distances", grad_mean_distances, batch * count);
  check_count("means", means, batch * counts.means);
  check_count("products", products, batch * counts.products);
  const auto dtype = accumulate_type(sources.scalar_type());
  const Tensor s = flat(sources, dtype, batch, counts.source), t = flat(targets, dtype, batch, counts.target);
  const Tensor grad_sources = need_sources ? at::empty_like(s) : Tensor();
  const Tensor grad_targets = need_targets ? at::empty_like(t) : Tensor();
  Parts of_source(grad_sources), of_target(grad_targets);
  layers.visit(s, t, flat(grad_losses, dtype, batch, count), flat(grad_mean_distances, dtype, batch, count),
               flat(means, at::kDouble, batch, counts.means), flat(products, dtype, batch, counts.products),
               [&](const Layer& layer) {
                 const Problem& problem = layer.problem;
                 const Tensor grad_source = of_source.next(problem.source, problem.features);
                 run_backward(layer, grad_source, of_target.next(problem.target, problem.features));
               });
  return {finish(grad_sources, sources), finish(grad_targets, targets)};
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
