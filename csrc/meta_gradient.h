// A loss whose gradients are known before `backward` asks for them, as meta-learning computes both at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <variant>
#include <vector>

namespace fastda {

// A number of tasks; a tensor where processes have added theirs.
using Divisor = std::variant<int64_t, at::Tensor>;

// total / divisor, whose gradients for the leaves are the given ones / divisor. It can be differentiated once.
at::Tensor with_gradient(const at::Tensor& total, std::vector<at::Tensor> gradients, Divisor divisor,
                         const std::vector<at::Tensor>& leaves);

}  // namespace fastda
