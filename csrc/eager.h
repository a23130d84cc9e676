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

// Whether a lane's node may save x. What it keeps beside its inputs, hooks on saved tensors would not get to see: where
// there are any, as in checkpointing, the op saves it.
bool may_save(const at::Tensor& x);

// Whether a lane's node has to call the op, since what it does with this gradient is recorded or transformed.
bool needs_op(const at::Tensor& grad);

}  // namespace fastda
