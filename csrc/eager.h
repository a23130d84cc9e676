// Which calls may take the lane of plain eager mode: straight into C++, past the checks in Python and the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastda {

// Neither a transform of torch.func, nor a dispatch mode (fake tensors), nor torch.jit.trace, nor forward-mode
// differentiation is active.
bool is_plain_eager();

// Dense floating values in memory of their own meaning, on a device that this library has kernels for.
bool is_plain(const at::Tensor& x);

}  // namespace fastda
