// The prototypical loss of one episode: its lane from Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace fastda {

// Nothing where Python has to look at the arguments.
std::optional<at::Tensor> prototypical_loss(const at::Tensor& support, const at::Tensor& support_labels,
                                            const at::Tensor& queries, const at::Tensor& query_labels,
                                            int64_t num_classes, const std::string& metric, double temperature,
                                            const std::string& reduction);

}  // namespace fastda
