// The domain-adversarial loss on the CPU: loss and derivative in one pass over the logits.
#include "../domain_loss.h"

#include "../common.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_cpu_dispatch.h>

#include <cstring>

#define FASTDA_LOOPS "domain_loss_loops.h"
#include "for_each_isa.h"

namespace fastda {
namespace {

using at::Tensor;

// Samples whose losses are summed in their own precision; sums of blocks are added in double, in their order.
constexpr int64_t block = 512;

// What domain_terms gives, for a domain of any size.
template <typename T>
std::pair<double, double> sum_terms(const T* x, const T* w, int64_t count, T sign, T* slope) {
  const int64_t blocks = (count + block - 1) / block;
  std::vector<std::pair<double, double>> sums(blocks);
  at::parallel_for(0, blocks, grain(32 * block), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * block;
      FASTDA_RUN(domain_terms<T>(x + first, w ? w + first : nullptr, std::min(block, count - first), sign,
                                 slope + first, &sums[i].first, &sums[i].second));
    }
  });
  std::pair<double, double> total{0.0, 0.0};
  for (const auto& [loss, weight] : sums) total = {total.first + loss, total.second + weight};
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
  const Tensor s = dense(source_logits, dtype), t = dense(target_logits, dtype);
  const Tensor ws = dense(source_weight, dtype), wt = dense(target_weight, dtype);
  const Tensor loss = at::cpu::empty(sizes.batch, options), scale = at::cpu::empty(batched(loss, 0, {2}), options);
  const Tensor source_slope = at::cpu::empty(source_logits.sizes(), options),
               target_slope = at::cpu::empty(target_logits.sizes(), options);
  AT_DISPATCH_FLOATING_TYPES(dtype, "domain_adversarial_loss", [&] {
    const auto one_domain = [](const Tensor& x, const Tensor& w, const Tensor& slope, int64_t i, int64_t count,
                               int sign) {
      const scalar_t *logits = x.const_data_ptr<scalar_t>() + i * count, *weights = values<scalar_t>(w);
      return sum_terms<scalar_t>(logits, weights ? weights + i * count : nullptr, count, sign,
                                 slope.mutable_data_ptr<scalar_t>() + i * count);
    };
    scalar_t *losses = loss.mutable_data_ptr<scalar_t>(), *scales = scale.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, sizes.episodes, grain(32 * (sizes.sources + sizes.targets)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [source_sum, source_total] = one_domain(s, ws, source_slope, i, sizes.sources, -1);
        const auto [target_sum, target_total] = one_domain(t, wt, target_slope, i, sizes.targets, 1);
        losses[i] = sizes.mean ? (source_sum / source_total + target_sum / target_total) / 2 : source_sum + target_sum;
        scales[2 * i] = sizes.mean ? 0.5 / source_total : 1.0;
        scales[2 * i + 1] = sizes.mean ? 0.5 / target_total : 1.0;
      }
    });
  });
  return {loss, source_slope, target_slope, scale};
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
        const scalar_t factor = grads[i] * scales[2 * i + domain];
        at::parallel_for(0, count, at::internal::GRAIN_SIZE, [&](int64_t first, int64_t last) {
          FASTDA_RUN(scaled<scalar_t>(from + i * count + first, last - first, factor, to + i * count + first));
        });
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

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("domain_adversarial_loss", &forward);
  m.impl("domain_adversarial_loss_backward", &backward);
}

}  // namespace fastda
