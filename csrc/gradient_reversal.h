// Gradient reversal for plain eager mode, which the Python module binds.
#pragma once

#include <ATen/core/Tensor.h>

#include <variant>

namespace fastda {

// λ as a number, or as a tensor that stays on its device.
using Lambda = std::variant<double, at::Tensor>;

// A view of x whose gradient is multiplied by −λ, with the value that λ has now.
at::Tensor gradient_reversal_view(const at::Tensor& x, const Lambda& lambd);

}  // namespace fastda
