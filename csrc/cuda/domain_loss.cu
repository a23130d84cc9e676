// The domain-adversarial loss on the GPU: loss and derivative of both domains in one launch, nothing read by the host.
#include "../common.h"
#include "../domain_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace fastda {
namespace {

using at::Tensor;

constexpr int threads = 512;
constexpr int most_parts = threads;  // blocks that share one episode; the last to finish has a thread for each
constexpr int64_t part = 16 * threads;

// Σ w·l and Σ w of both domains.
template <typename T>
struct Sums {
  T source_loss, source_weight, target_loss, target_weight;
};

template <typename T>
__device__ Sums<T> operator+(const Sums<T>& a, const Sums<T>& b) {
  return {a.source_loss + b.source_loss, a.source_weight + b.source_weight, a.target_loss + b.target_loss,
          a.target_weight + b.target_weight};
}

template <typename T>
__device__ Sums<T> shuffled_down(const Sums<T>& a, int distance) {
  return {__shfl_down_sync(~0u, a.source_loss, distance), __shfl_down_sync(~0u, a.source_weight, distance),
          __shfl_down_sync(~0u, a.target_loss, distance), __shfl_down_sync(~0u, a.target_weight, distance)};
}

// The sum over the block, in the order of a tree; valid in thread 0.
template <typename T>
__device__ Sums<T> sum_of_block(Sums<T> sums) {
  __shared__ Sums<T> of_warps[32];
  for (int distance = 16; distance > 0; distance /= 2) sums = sums + shuffled_down(sums, distance);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x < 32) {
    sums = threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : Sums<T>{};
    for (int distance = 16; distance > 0; distance /= 2) sums = sums + shuffled_down(sums, distance);
  }
  return sums;
}

// The derivative sign·w·σ(sign·x) is written; loss and weight are added up.
template <typename In, typename T>
__device__ void add_domain(const In* x, const T* w, int64_t count, T sign, int64_t first, int64_t stride, T* slope,
                           T& loss, T& weight) {
  for (int64_t i = first; i < count; i += stride) {
    const T u = sign * static_cast<T>(x[i]), wi = w ? w[i] : T(1);
    const T e = exp(-abs(u)), likely = 1 / (1 + e);
    slope[i] = sign * wi * (u < 0 ? e * likely : likely);
    loss += wi * ((u > 0 ? u : T(0)) + log1p(e));
    weight += wi;
  }
}

template <typename T>
__device__ void finish(const Sums<T>& sums, bool mean, int64_t episode, T* loss, T* scale) {
  loss[episode] = mean ? (sums.source_loss / sums.source_weight + sums.target_loss / sums.target_weight) / 2
                       : sums.source_loss + sums.target_loss;
  scale[2 * episode] = mean ? T(0.5) / sums.source_weight : T(1);
  scale[2 * episode + 1] = mean ? T(0.5) / sums.target_weight : T(1);
}

// `parts` blocks for each episode. Where they are several, the last to finish adds their sums, in a fixed order.
template <typename In, typename T>
__global__ void __launch_bounds__(threads)
    forward_kernel(const In* source, const In* target, const T* source_weight, const T* target_weight, int64_t sources,
                   int64_t targets, int parts, bool mean, T* loss, T* source_slope, T* target_slope, T* scale,
                   Sums<T>* of_parts, int* finished) {
  const int64_t episode = blockIdx.x / parts;
  const int64_t first = (blockIdx.x % parts) * static_cast<int64_t>(threads) + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(parts) * threads;
  Sums<T> sums{};
  add_domain<In, T>(source + episode * sources, source_weight ? source_weight + episode * sources : nullptr, sources,
                    T(-1), first, stride, source_slope + episode * sources, sums.source_loss, sums.source_weight);
  add_domain<In, T>(target + episode * targets, target_weight ? target_weight + episode * targets : nullptr, targets,
                    T(1), first, stride, target_slope + episode * targets, sums.target_loss, sums.target_weight);
  sums = sum_of_block(sums);
  if (parts == 1) {
    if (threadIdx.x == 0) finish(sums, mean, episode, loss, scale);
    return;
  }
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    of_parts[blockIdx.x] = sums;
    __threadfence();
    is_last = atomicAdd(finished + episode, 1) == parts - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  sums = threadIdx.x < parts ? of_parts[episode * parts + threadIdx.x] : Sums<T>{};
  sums = sum_of_block(sums);
  if (threadIdx.x == 0) finish(sums, mean, episode, loss, scale);
}

// The slopes times what came in, for both domains. A gradient that is not needed is null.
template <typename In, typename T>
__global__ void __launch_bounds__(threads)
    backward_kernel(const T* grad_loss, const T* scale, const T* source_slope, const T* target_slope, int64_t sources,
                    int64_t targets, int64_t episodes, In* grad_source, In* grad_target) {
  const int64_t of_source = grad_source ? episodes * sources : 0,
                all = of_source + (grad_target ? episodes * targets : 0);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; i < all;
       i += gridDim.x * static_cast<int64_t>(threads)) {
    if (i < of_source) {
      const int64_t episode = i / sources;
      grad_source[i] = static_cast<In>(grad_loss[episode] * scale[2 * episode] * source_slope[i]);
    } else {
      const int64_t k = i - of_source, episode = k / targets;
      grad_target[k] = static_cast<In>(grad_loss[episode] * scale[2 * episode + 1] * target_slope[k]);
    }
  }
}

Tensor dense(const Tensor& x, at::ScalarType dtype) { return x.to(dtype).contiguous(); }

template <typename T>
const T* values(const Tensor& x) {
  return x.numel() ? x.const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& source_logits, const Tensor& target_logits,
                                                   const Tensor& source_weight, const Tensor& target_weight,
                                                   int64_t batch_dims, c10::string_view reduction) {
  const KernelGuard guard;
  const c10::cuda::CUDAGuard device(source_logits.device());
  const DomainLossSizes sizes(source_logits, target_logits, source_weight, target_weight, batch_dims,
                              std::string(reduction));
  const auto dtype = accumulate_type(source_logits.scalar_type());
  const auto options = source_logits.options().dtype(dtype);
  const Tensor s = source_logits.contiguous(), t = target_logits.contiguous();
  const Tensor ws = dense(source_weight, dtype), wt = dense(target_weight, dtype);
  const Tensor loss = at::empty(sizes.batch, options), scale = at::empty(batched(loss, 0, {2}), options);
  const Tensor source_slope = at::empty(source_logits.sizes(), options),
               target_slope = at::empty(target_logits.sizes(), options);
  if (sizes.episodes > 0) {
    const int64_t largest = std::max(sizes.sources, sizes.targets);
    const int parts = static_cast<int>(std::clamp<int64_t>((largest + part - 1) / part, 1, most_parts));
    const int64_t blocks = parts * sizes.episodes;
    const Tensor of_parts = at::empty({parts > 1 ? 4 * blocks : 0}, options);
    const Tensor finished = at::zeros({parts > 1 ? sizes.episodes : 0}, options.dtype(at::kInt));
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, source_logits.scalar_type(), "domain_adversarial_loss", [&] {
          using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
          forward_kernel<scalar_t, T><<<static_cast<unsigned>(blocks), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              s.const_data_ptr<scalar_t>(), t.const_data_ptr<scalar_t>(), values<T>(ws), values<T>(wt), sizes.sources,
              sizes.targets, parts, sizes.mean, loss.mutable_data_ptr<T>(), source_slope.mutable_data_ptr<T>(),
              target_slope.mutable_data_ptr<T>(), scale.mutable_data_ptr<T>(),
              reinterpret_cast<Sums<T>*>(of_parts.mutable_data_ptr<T>()), finished.mutable_data_ptr<int>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
  }
  return {loss, source_slope, target_slope, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& source_logits,
                                                    const Tensor& target_logits, const Tensor& source_weight,
                                                    const Tensor& target_weight, const Tensor& source_slope,
                                                    const Tensor& target_slope, const Tensor& scale, int64_t batch_dims,
                                                    c10::string_view reduction, bool need_source_logits,
                                                    bool need_target_logits, bool need_source_weight,
                                                    bool need_target_weight) {
  const KernelGuard guard;
  const c10::cuda::CUDAGuard device(source_logits.device());
  const DomainLossSizes sizes(source_logits, target_logits, source_weight, target_weight, batch_dims,
                              std::string(reduction));
  check_count("grad_loss", grad_loss, sizes.episodes);
  check_count("scale", scale, 2 * sizes.episodes);
  check_count("source_slope", source_slope, source_logits.numel());
  check_count("target_slope", target_slope, target_logits.numel());
  const auto dtype = accumulate_type(source_logits.scalar_type());
  const Tensor grad = dense(grad_loss, dtype), factors = dense(scale, dtype);
  const Tensor from_source = dense(source_slope, dtype), from_target = dense(target_slope, dtype);
  const auto result = [](bool needed, const Tensor& x) {
    return at::empty(needed ? x.sizes() : at::IntArrayRef({0}), x.options());
  };
  Tensor grad_source = result(need_source_logits, source_logits),
         grad_target = result(need_target_logits, target_logits);
  const int64_t count = grad_source.numel() + grad_target.numel();
  if (count > 0) {
    const int64_t blocks = std::min<int64_t>((count + threads - 1) / threads, 65535);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, source_logits.scalar_type(), "domain_adversarial_loss", [&] {
          using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
          const auto to = [](const Tensor& x) { return x.numel() ? x.mutable_data_ptr<scalar_t>() : nullptr; };
          backward_kernel<scalar_t, T>
              <<<static_cast<unsigned>(blocks), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                  grad.const_data_ptr<T>(), factors.const_data_ptr<T>(), from_source.const_data_ptr<T>(),
                  from_target.const_data_ptr<T>(), sizes.sources, sizes.targets, sizes.episodes, to(grad_source),
                  to(grad_target));
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
  }
  const auto of_weight = [&](bool needed, const Tensor& logits, const Tensor& weight, double sign) {
    if (!needed || weight.numel() == 0) return result(needed, weight);
    return domain_weight_gradient(grad, logits, weight, factors, sign, batch_dims, sizes.mean);
  };
  return {grad_source, grad_target, of_weight(need_source_weight, source_logits, source_weight, -1.0),
          of_weight(need_target_weight, target_logits, target_weight, 1.0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CUDA, m) {
  m.impl("domain_adversarial_loss", &forward);
  m.impl("domain_adversarial_loss_backward", &backward);
}

}  // namespace fastda
