// The domain-adversarial loss on the CPU: loss and derivative in one pass over the logits.
#include "../domain_loss.h"

#include "../common.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <c10/util/SmallVector.h>

#include <cstring>

#define FASTDA_LOOPS "domain_loss_loops.h"
#include "for_each_isa.h"

namespace fastda {
namespace {

using at::Tensor;

// Samples whose losses are summed in their own precision; sums of blocks are added in double, in their order.
constexpr int64_t block = 512;

// Σ w·loss and Σ w of a domain.
struct Sums {
  double loss = 0, weight = 0;

  double scale(bool mean) const { return mean ? 0.5 / weight : 1.0; }  // what its slopes are multiplied with
};

double loss_of(const Sums& source, const Sums& target, bool mean) {
  return mean ? (source.loss / source.weight + target.loss / target.weight) / 2 : source.loss + target.loss;
}

// Values in T: where they lie, or copied.
template <typename T, typename From>
const T* values_in(const From* x, int64_t count, T* copy) {
  if constexpr (std::is_same_v<From, T>) {
    return x;
  } else {
    for (int64_t i = 0; i < count; ++i) copy[i] = static_cast<T>(x[i]);
    return copy;
  }
}

// What domain_terms gives, for a domain of any size. Half precision is raised block by block: a copy of all logits
// would take twice their memory.
template <typename T, typename From>
Sums sum_terms(const From* x, const T* w, int64_t count, T sign, T* slope) {
  const int64_t blocks = (count + block - 1) / block;
  c10::SmallVector<Sums, 4> sums(blocks);
  at::parallel_for(0, blocks, grain(32 * block), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * block;
      const int64_t some = std::min(block, count - first);
      T copy[block];
      const T* from = values_in(x + first, some, copy);
      FASTDA_RUN(domain_terms<T>(from, w ? w + first : nullptr, some, sign, slope + first, &sums[i].loss,
                                 &sums[i].weight));
    }
  });
  Sums total;
  for (const Sums& part : sums) total = {total.loss + part.loss, total.weight + part.weight};
  return total;
}

// In the dtype of accumulation and in order; where there is no element, null.
template <typename T>
const T* values(const Tensor& x) {
  return x.numel() ? x.const_data_ptr<T>() : nullptr;
}

Tensor dense(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype && x.is_contiguous() ? x : x.to(dtype).contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& source_logits, const Tensor& target_logits,
                                                   const Tensor& source_weight, const Tensor& target_weight,
                                                   int64_t batch_dims, c10::string_view reduction) {
  const KernelGuard guard;
  const DomainLossSizes sizes(source_logits, target_logits, source_weight, target_weight, batch_dims,
                              std::string(reduction));
  const auto dtype = accumulate_type(source_logits.scalar_type());
  const auto options = source_logits.options().dtype(dtype);
  const Tensor s = source_logits.contiguous(), t = target_logits.contiguous();
  const Tensor ws = dense(source_weight, dtype), wt = dense(target_weight, dtype);
  const Tensor loss = at::cpu::empty(sizes.batch, options), scale = at::cpu::empty(batched(loss, 0, {2}), options);
  const Tensor source_slope = at::cpu::empty(source_logits.sizes(), options),
               target_slope = at::cpu::empty(target_logits.sizes(), options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, s.scalar_type(), "domain_adversarial_loss", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto one_domain = [](const Tensor& x, const Tensor& w, const Tensor& slope, int64_t i, int64_t count,
                               int sign) {
      const T* weights = values<T>(w);
      return sum_terms<T>(x.const_data_ptr<scalar_t>() + i * count, weights ? weights + i * count : nullptr, count,
                          sign, slope.mutable_data_ptr<T>() + i * count);
    };
    T *losses = loss.mutable_data_ptr<T>(), *scales = scale.mutable_data_ptr<T>();
    at::parallel_for(0, sizes.episodes, grain(32 * (sizes.sources + sizes.targets)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Sums of_source = one_domain(s, ws, source_slope, i, sizes.sources, -1);
        const Sums of_target = one_domain(t, wt, target_slope, i, sizes.targets, 1);
        losses[i] = loss_of(of_source, of_target, sizes.mean);
        scales[2 * i] = of_source.scale(sizes.mean);
        scales[2 * i + 1] = of_target.scale(sizes.mean);
      }
    });
  });
  return {loss, source_slope, target_slope, scale};
}

template <typename T>
void scale_slopes(const T* slope, int64_t count, T factor, T* out) {
  at::parallel_for(0, count, at::internal::GRAIN_SIZE, [&](int64_t first, int64_t last) {
    FASTDA_RUN(scaled<T>(slope + first, last - first, factor, out + first));
  });
}

// The gradient of a domain's logits: the slope times what came in.
Tensor logits_gradient(const Tensor& grad_loss, const Tensor& logits, const Tensor& slope, const Tensor& scale,
                       int domain, int64_t episodes) {
  const Tensor result = at::cpu::empty(logits.sizes(), slope.options());
  const int64_t count = episodes ? logits.numel() / episodes : 0;
  AT_DISPATCH_FLOATING_TYPES(slope.scalar_type(), "domain_adversarial_loss_backward", [&] {
    const scalar_t *grads = grad_loss.const_data_ptr<scalar_t>(), *scales = scale.const_data_ptr<scalar_t>();
    const scalar_t* from = slope.const_data_ptr<scalar_t>();
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, episodes, grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scale_slopes(from + i * count, count, grads[i] * scales[2 * i + domain], to + i * count);
      }
    });
  });
  return dense(result, logits.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& source_logits,
                                                    const Tensor& target_logits, const Tensor& source_weight,
                                                    const Tensor& target_weight, const Tensor& source_slope,
                                                    const Tensor& target_slope, const Tensor& scale, int64_t batch_dims,
                                                    c10::string_view reduction, bool need_source_logits,
                                                    bool need_target_logits, bool need_source_weight,
                                                    bool need_target_weight) {
  const KernelGuard guard;
  const DomainLossSizes sizes(source_logits, target_logits, source_weight, target_weight, batch_dims,
                              std::string(reduction));
  check_count("grad_loss", grad_loss, sizes.episodes);
  check_count("scale", scale, 2 * sizes.episodes);
  check_count("source_slope", source_slope, source_logits.numel());
  check_count("target_slope", target_slope, target_logits.numel());
  const auto dtype = accumulate_type(source_logits.scalar_type());
  const Tensor grad = dense(grad_loss, dtype), factors = dense(scale, dtype);
  const auto of_logits = [&](bool needed, const Tensor& logits, const Tensor& slope, int domain) {
    if (!needed) return at::cpu::empty({0}, logits.options());
    return logits_gradient(grad, logits, dense(slope, dtype), factors, domain, sizes.episodes);
  };
  const auto of_weight = [&](bool needed, const Tensor& logits, const Tensor& weight, double sign) {
    if (!needed || weight.numel() == 0)
      return at::cpu::empty(needed ? weight.sizes() : at::IntArrayRef({0}), weight.options());
    return domain_weight_gradient(grad, logits, weight, factors, sign, batch_dims, sizes.mean);
  };
  return {of_logits(need_source_logits, source_logits, source_slope, 0),
          of_logits(need_target_logits, target_logits, target_slope, 1),
          of_weight(need_source_weight, source_logits, source_weight, -1.0),
          of_weight(need_target_weight, target_logits, target_weight, 1.0)};
}

}  // namespace

UnweightedDomainLoss unweighted_domain_loss(const Tensor& source_logits, const Tensor& target_logits, bool mean) {
  const int64_t sources = source_logits.numel(), targets = target_logits.numel();
  const auto options = source_logits.options();
  UnweightedDomainLoss result{at::cpu::empty({}, options), at::cpu::empty({sources + targets}, options), {}};
  AT_DISPATCH_FLOATING_TYPES(source_logits.scalar_type(), "domain_adversarial_loss", [&] {
    scalar_t* slope = result.slopes.mutable_data_ptr<scalar_t>();
    const Sums of_source = sum_terms<scalar_t>(source_logits.const_data_ptr<scalar_t>(), nullptr, sources, -1, slope);
    const Sums of_target =
        sum_terms<scalar_t>(target_logits.const_data_ptr<scalar_t>(), nullptr, targets, 1, slope + sources);
    *result.loss.mutable_data_ptr<scalar_t>() = loss_of(of_source, of_target, mean);
    result.scale = {of_source.scale(mean), of_target.scale(mean)};
  });
  return result;
}

Tensor scaled_slopes(const Tensor& slopes, int64_t first, double factor, at::IntArrayRef shape) {
  const Tensor result = at::cpu::empty(shape, slopes.options());
  AT_DISPATCH_FLOATING_TYPES(slopes.scalar_type(), "domain_adversarial_loss_backward", [&] {
    scale_slopes<scalar_t>(slopes.const_data_ptr<scalar_t>() + first, result.numel(), factor,
                           result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("domain_adversarial_loss", &forward);
  m.impl("domain_adversarial_loss_backward", &backward);
}

}  // namespace fastda
