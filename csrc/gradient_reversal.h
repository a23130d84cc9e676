// Gradient reversal for plain eager mode, which the Python module binds. Results are views of the input; gradients are
// those of a C++ node.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <variant>
#include <vector>

namespace fastda {

// λ as a number, or as a tensor of one element that stays on its device. A node keeps the value of now.
using Lambda = std::variant<double, at::Tensor>;

// A view of x whose gradient is multiplied by −λ.
at::Tensor gradient_reversal(const at::Tensor& x, const Lambda& lambd);

// For each tensor of the list two views; their gradients g₁ and g₂ come back as g₁ − λ·g₂, in one pass over memory.
using TensorPair = std::pair<at::Tensor, at::Tensor>;
std::vector<TensorPair> gradient_reversal_fork(at::TensorList x, const Lambda& lambd);

// A view of x, and h = x·Wᵀ + b; their gradients come back as g₁ − λ·g_h·W, in one product that adds into g₁.
TensorPair gradient_reversal_linear(const at::Tensor& x, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const Lambda& lambd);

// Does the layer fit the features: shapes, device, and the dtype, which autocast may choose?
bool is_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// What gradient_reversal_fork_backward, g₁ − λ·g₂ for lists, asks of a direct call.
void check_fork_backward(at::TensorList grads, at::TensorList reversed_grads, const at::Tensor& lambd);

}  // namespace fastda
