// The domain-adversarial loss, softplus(−s) over source logits and softplus(t) over target logits, on CPU and GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace fastda {

// For plain eager mode, bound to Python: the loss, or nothing where Python has to look at the arguments.
std::optional<at::Tensor> domain_adversarial_loss(const at::Tensor& source_logits, const at::Tensor& target_logits,
                                                  const std::optional<at::Tensor>& source_weight,
                                                  const std::optional<at::Tensor>& target_weight,
                                                  const std::string& reduction);

// The first `batch_dims` dimensions of logits and weights are batch, the others samples. An empty weight is none.
struct DomainLossSizes {
  DomainLossSizes(const at::Tensor& source_logits, const at::Tensor& target_logits, const at::Tensor& source_weight,
                  const at::Tensor& target_weight, int64_t batch_dims, const std::string& reduction);

  std::vector<int64_t> batch;          // the batch dimensions
  int64_t episodes, sources, targets;  // their product, and samples in each
  bool mean;
};

// Logits without weights, float32 or float64 and dense, on the CPU: the loss, the slopes of all samples, source first,
// and what those of each domain are multiplied with.
struct UnweightedDomainLoss {
  at::Tensor loss, slopes;
  std::array<double, 2> scale;
};
UnweightedDomainLoss unweighted_domain_loss(const at::Tensor& source_logits, const at::Tensor& target_logits,
                                            bool mean);

// factor · slopes from the one at `first` on, in the shape of the logits they belong to.
at::Tensor scaled_slopes(const at::Tensor& slopes, int64_t first, double factor, at::IntArrayRef shape);

// (w·l − …)·grad·scale: the gradient of a weight, in plain ATen, since it is seldom asked for.
at::Tensor domain_weight_gradient(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& weight,
                                  const at::Tensor& scale, double sign, int64_t batch_dims, bool mean);

}  // namespace fastda
