// Derivatives of the fused ops, of any order, under autograd, torch.func and torch.compile alike.
//
// An op `name(tensors..., constants...) -> (values..., saved...)` and its `name_backward(grad_x, ..., tensors...,
// saved..., constants..., bool need_a, ...) -> (grad_a, ...)`, with one `grad_` for each value and one `need_` for
// each differentiable tensor (these come first), get kernels for PyTorch's Autograd key: the first derivative is the
// backward op; the derivative of that is the formula's, which Python differentiates.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace fastda {

// second_order(op, gradients of the backward op's results (undefined where none came), grads and tensors, constants,
// needs)
//   -> the gradients of the grads and of the differentiable tensors
using SecondOrder = std::function<std::vector<at::Tensor>(
    const std::string& op, const std::vector<at::Tensor>& incoming, const std::vector<at::Tensor>& operands,
    const std::vector<c10::IValue>& constants, const std::vector<bool>& needs)>;

// The module installs Python's, once.
void set_second_order(SecondOrder second_order);

// An op's results, and the gradients of its differentiable tensors where the incoming gradient is 1.
struct WithGradients {
  std::vector<at::Tensor> results, gradients;  // the latter in the accumulation dtype, empty where not needed
};

// Both in one pass, for an op with one value for each element of the batch, which scales the gradients of that element;
// nullopt where two passes are better. Called on the CPU, in plain eager mode.
using ForwardWithGradients = std::optional<WithGradients> (*)(const c10::IValue* arguments,
                                                              const std::vector<bool>& needs);

// Registers both kernels: differentiable(m, "coral_loss") inside TORCH_LIBRARY_IMPL(fastda, Autograd, m).
void differentiable(torch::Library& m, const std::string& name, ForwardWithGradients with_gradients = nullptr);

// Nodes are held by intrusive_ptr, up to torch 2.12 by shared_ptr with a deleter that spares the stack.
using NodePtr = decltype(torch::autograd::Edge::function);

template <typename T, typename... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

}  // namespace fastda
