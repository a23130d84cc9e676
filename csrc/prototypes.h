// The prototypical loss of one episode: its lane from Python, and its kernels for the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <c10/util/string_view.h>

#include <optional>
#include <string>
#include <tuple>

namespace fastda {

// Nothing where Python has to look at the tensors; it has looked at the options.
std::optional<at::Tensor> prototypical_loss(const at::Tensor& support, const at::Tensor& support_labels,
                                            const at::Tensor& queries, const at::Tensor& query_labels,
                                            int64_t num_classes, const std::string& metric, double temperature,
                                            const std::string& reduction);

// What the gradients of episodes are taken from, beside their arguments.
struct EpisodeState {
  at::Tensor prototypes, counts, weights, slopes, near;
};

struct EpisodeLoss {
  at::Tensor loss;
  EpisodeState state;
};
EpisodeLoss prototypical_loss_on_cpu(const at::Tensor& support, const at::Tensor& queries,
                                     const at::Tensor& temperature, const at::Tensor& support_labels,
                                     const at::Tensor& query_labels, int64_t num_classes, c10::string_view metric,
                                     c10::string_view reduction);

// ∂L/∂ support, queries and temperature, undefined where one is not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> prototypical_loss_gradients_on_cpu(
    const at::Tensor& grad_loss, const at::Tensor& support, const at::Tensor& queries, const at::Tensor& temperature,
    const at::Tensor& support_labels, const at::Tensor& query_labels, const EpisodeState& state, int64_t num_classes,
    c10::string_view metric, c10::string_view reduction, bool need_support, bool need_queries, bool need_temperature);

}  // namespace fastda
