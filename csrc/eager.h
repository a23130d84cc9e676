// Which calls may take the lane of plain eager mode: straight into C++, past the checks in Python and the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastda {

// Neither a transform of torch.func, nor a dispatch mode (fake tensors), nor torch.jit.trace, nor forward-mode
// differentiation is active.
bool is_plain_eager();

// Dense floating values in memory of their own meaning, on a device that this library has kernels for.
bool is_plain(const at::Tensor& x);

// The same for labels, int64.
bool are_plain_labels(const at::Tensor& x);

// Whether the derivative of a call on x is to be recorded; below autograd, and in inference mode, none is.
bool is_recorded(const at::Tensor& x);

// Whether a node may save x, and beside it what nobody else gets to see: hooks on saved tensors, as of checkpointing,
// would have to.
bool may_save(const at::Tensor& x);

// Whether a node that calls kernels has to call the op instead, for its gradient is recorded or transformed.
bool needs_op(const at::Tensor& grad);

}  // namespace fastda
