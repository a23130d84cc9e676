// The autograd nodes of gradient reversal: views of the input for plain eager mode, and an op with a result of its own
// for torch.func, which cannot see through a view that is made outside the dispatcher.
//
// Gradients are plain ATen, so that they are differentiable, and torch.func and torch.compile see through them. It does
// g₁ − λ·g₂ in one pass over memory where λ is a number; where λ lies on a GPU, a kernel of csrc/cuda does.
#include "gradient_reversal.h"

#include "autograd.h"
#include "common.h"
#include "eager.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The value of now: a schedule may overwrite its buffer before backward runs.
Lambda snapshot(const Lambda& lambd) {
  const Tensor* tensor = std::get_if<Tensor>(&lambd);
  if (!tensor) return lambd;
  if (tensor->is_cpu()) return tensor->item<double>();
  return tensor->detach().reshape({}).clone();
}

// May the gradient be overwritten? As in PyTorch's own accumulation: where nobody holds it and no graph is recorded.
bool is_ours_alone(const Tensor& grad) {
  return !at::GradMode::is_enabled() && is_plain_eager() && is_plain(grad) && grad.use_count() == 1 &&
         grad.storage().use_count() == 1 && grad.is_non_overlapping_and_dense();
}

Tensor in_dtype_of(const Tensor& grad, Tensor result) {
  return result.scalar_type() == grad.scalar_type() ? result : result.to(grad.scalar_type());
}

// −λ·g, in the dtype of g.
Tensor reversed(const Tensor& grad, const Lambda& lambd) {
  if (const double* number = std::get_if<double>(&lambd)) {
    return is_ours_alone(grad) ? grad.mul_(-*number) : at::mul(grad, -*number);
  }
  Tensor factor = std::get<Tensor>(lambd).neg();
  while (factor.dim() > 0 && factor.dim() < grad.dim()) factor = factor.unsqueeze(-1);  // one λ for each batch element
  return in_dtype_of(grad, at::mul(grad, factor));
}

// g₁ − λ·g₂, in the dtype of g₁.
Tensor subtracted(const Tensor& grad, const Tensor& reversed_grad, const Lambda& lambd) {
  if (const double* number = std::get_if<double>(&lambd)) {
    if (is_ours_alone(grad)) return grad.sub_(reversed_grad, *number);
    return in_dtype_of(grad, at::sub(grad, reversed_grad, *number));
  }
  return in_dtype_of(grad, at::add(grad, reversed(reversed_grad, lambd)));
}

struct GradientReversal : torch::autograd::Node {
  explicit GradientReversal(Lambda lambd) : lambd(std::move(lambd)) {}

  variable_list apply(variable_list&& grads) override {
    return {grads[0].defined() ? reversed(grads[0], lambd) : Tensor()};
  }
  std::string name() const override { return "fastda::GradientReversalBackward"; }

  Lambda lambd;
};

// g₁ − λ·g₂ for lists of gradients, λ a tensor: a kernel for each device.
std::vector<Tensor> call_fork_backward(at::TensorList grads, at::TensorList reversed_grads, const Tensor& lambd) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastda::gradient_reversal_fork_backward", "")
                             .typed<std::vector<Tensor>(at::TensorList, at::TensorList, const Tensor&)>();
  return op.call(grads, reversed_grads, lambd);
}

// As plain ATen where it is to be differentiated.
std::vector<Tensor> fork_backward_autograd(at::TensorList grads, at::TensorList reversed_grads, const Tensor& lambd) {
  check_fork_backward(grads, reversed_grads, lambd);
  const auto is_differentiated = [](const Tensor& x) { return is_recorded(x) || x._fw_grad(/*level=*/0).defined(); };
  if (std::none_of(grads.begin(), grads.end(), is_differentiated) &&
      std::none_of(reversed_grads.begin(), reversed_grads.end(), is_differentiated)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_fork_backward(grads, reversed_grads, lambd);
  }
  std::vector<Tensor> results;
  for (size_t i = 0; i < grads.size(); ++i) results.push_back(subtracted(grads[i], reversed_grads[i], lambd.detach()));
  return results;
}

std::vector<Tensor> fork_backward_kernel(at::TensorList grads, at::TensorList reversed_grads, const Tensor& lambd) {
  check_fork_backward(grads, reversed_grads, lambd);
  const KernelGuard guard;
  const double number = lambd.item<double>();
  std::vector<Tensor> results;
  for (size_t i = 0; i < grads.size(); ++i) {
    results.push_back(at::empty_like(grads[i]));
    at::sub_out(results.back(), grads[i], reversed_grads[i], number);
  }
  return results;
}

// Its results, and so its incoming gradients, are y₁ and y₂ of the first tensor, then those of the second, …
struct GradientReversalFork : torch::autograd::Node {
  explicit GradientReversalFork(Lambda lambd) : lambd(std::move(lambd)) {}

  variable_list apply(variable_list&& incoming) override {
    variable_list results(num_outputs());
    std::vector<size_t> both;
    for (size_t i = 0; i < results.size(); ++i) {
      Tensor &grad = incoming[2 * i], &reversed_grad = incoming[2 * i + 1];
      if (!task_should_compute_output(i)) continue;
      if (!reversed_grad.defined()) {
        results[i] = std::move(grad);
      } else if (!grad.defined()) {
        results[i] = reversed(reversed_grad, lambd);
      } else {
        both.push_back(i);
      }
    }
    const auto are_plain = [&](size_t i) { return is_plain(incoming[2 * i]) && is_plain(incoming[2 * i + 1]); };
    if (const Tensor* tensor = std::get_if<Tensor>(&lambd);
        tensor && !at::GradMode::is_enabled() && is_plain_eager() && std::all_of(both.begin(), both.end(), are_plain)) {
      variable_list grads, reversed_grads;
      for (const size_t i : both) {
        grads.push_back(std::move(incoming[2 * i]));
        reversed_grads.push_back(std::move(incoming[2 * i + 1]));
      }
      variable_list sums = call_fork_backward(grads, reversed_grads, *tensor);
      for (size_t k = 0; k < both.size(); ++k) results[both[k]] = std::move(sums[k]);
    } else {
      for (const size_t i : both) results[i] = subtracted(incoming[2 * i], incoming[2 * i + 1], lambd);
    }
    return results;
  }
  std::string name() const override { return "fastda::GradientReversalForkBackward"; }

  Lambda lambd;
};

// x of shape (…, D) as rows.
Tensor as_rows(const Tensor& x, int64_t rows) { return x.reshape({rows, x.size(-1)}); }

struct GradientReversalLinear : torch::autograd::Node {
  GradientReversalLinear(const Tensor& x, const Tensor& weight, at::ScalarType dtype, Lambda lambd)
      : x(weight.requires_grad() ? x : Tensor(), /*is_output=*/false),
        weight(weight, /*is_output=*/false),
        dtype(dtype),
        lambd(std::move(lambd)) {}

  variable_list apply(variable_list&& incoming) override {
    Tensor &grad = incoming[0], &hidden_grad = incoming[1];
    if (!hidden_grad.defined()) return {std::move(grad), Tensor(), Tensor()};
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
    const int64_t rows = c10::multiply_integers(hidden_grad.sizes().slice(0, hidden_grad.dim() - 1));
    const Tensor hidden = as_rows(hidden_grad, rows);
    variable_list results(3);
    if (task_should_compute_output(0)) results[0] = grad_x(grad, hidden, unpack(weight).to(dtype), hidden_grad.sizes());
    if (task_should_compute_output(1)) {
      Tensor features = unpack(x);
      if (at::GradMode::is_enabled())
        features = gradient_reversal(features, lambd);  // h is a function of the reversed x
      results[1] = at::mm(hidden.t(), as_rows(features.to(dtype), rows));
    }
    if (task_should_compute_output(2)) results[2] = hidden.sum(0);
    return results;
  }

  // g₁ − λ·g_h·W. λ on a GPU scales the small gradient: as the factor of a product the host would have to read it.
  Tensor grad_x(Tensor& grad, const Tensor& hidden, const Tensor& weight, at::IntArrayRef hidden_shape) const {
    std::vector<int64_t> shape(hidden_shape.begin(), hidden_shape.end());
    shape.back() = weight.size(1);
    const double* number = std::get_if<double>(&lambd);
    if (!grad.defined()) return at::mm(reversed(hidden, lambd), weight).reshape(shape);
    if (grad.scalar_type() != dtype) {  // under autocast
      const Tensor product = at::mm(hidden, weight).reshape(shape);
      return number ? subtracted(grad, product, lambd)
                    : at::add(grad, at::mm(reversed(hidden, lambd), weight).reshape(shape));
    }
    const Tensor factor = number ? hidden : reversed(hidden, lambd);
    const double alpha = number ? -*number : 1.0;
    if (is_ours_alone(grad) && grad.is_contiguous()) {
      as_rows(grad, hidden.size(0)).addmm_(factor, weight, 1, alpha);
      return std::move(grad);
    }
    return at::addmm(as_rows(grad, hidden.size(0)), factor, weight, 1, alpha).reshape(shape);
  }

  Tensor unpack(const SavedVariable& variable) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return variable.unpack();
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    weight.reset_data();
  }
  std::string name() const override { return "fastda::GradientReversalLinearBackward"; }

  SavedVariable x, weight;  // x only where the weight asks for a gradient
  at::ScalarType dtype;     // of the product
  Lambda lambd;
};

// A view of x that is a result of the node.
template <typename NodePointer>
Tensor view_of(const Tensor& x, const NodePointer& node) {
  Tensor view;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    view = at::alias(x);
  }
  // An in-place operation would change x behind the node's back: PyTorch refuses it, as for any custom function's view.
  view = torch::autograd::as_view(x, view, /*is_bw_differentiable=*/true, /*is_fw_differentiable=*/false, nullptr,
                                  nullptr, torch::autograd::CreationMeta::IN_CUSTOM_FUNCTION);
  torch::autograd::set_history(view, node);
  return view;
}

Tensor reversal_autograd(const Tensor& x, const Tensor& lambd) {
  TORCH_CHECK(!x._fw_grad(/*level=*/0).defined(), "fastda::gradient_reversal: has no forward-mode derivative");
  Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastda::gradient_reversal", "")
                               .typed<Tensor(const Tensor&, const Tensor&)>();
    result = op.call(x, lambd);
  }
  if (is_recorded(x)) {
    auto node = make_node<GradientReversal>(lambd.clone());
    node->add_next_edge(torch::autograd::impl::gradient_edge(x));
    torch::autograd::set_history(result, node);
  }
  return result;
}

Tensor reversal_kernel(const Tensor& x, const Tensor& lambd) { return x.clone(at::MemoryFormat::Contiguous); }

}  // namespace

Tensor gradient_reversal(const Tensor& x, const Lambda& lambd) {
  if (!is_recorded(x)) return at::alias(x);
  auto node = make_node<GradientReversal>(snapshot(lambd));
  node->add_next_edge(torch::autograd::impl::gradient_edge(x));
  return view_of(x, node);
}

std::vector<TensorPair> gradient_reversal_fork(at::TensorList x, const Lambda& lambd) {
  std::vector<TensorPair> results(x.size());
  auto node =
      make_node<GradientReversalFork>(std::any_of(x.begin(), x.end(), is_recorded) ? snapshot(lambd) : Lambda(0.0));
  for (size_t i = 0; i < x.size(); ++i) {
    if (is_recorded(x[i])) {
      node->add_next_edge(torch::autograd::impl::gradient_edge(x[i]));
      results[i] = {view_of(x[i], node), view_of(x[i], node)};
    } else {
      results[i] = {at::alias(x[i]), at::alias(x[i])};
    }
  }
  return results;
}

bool is_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (x.dim() < 1 || weight.dim() != 2 || weight.size(1) != x.size(-1)) return false;
  if (bias && (bias->dim() != 1 || bias->size(0) != weight.size(0))) return false;
  const bool autocast = at::autocast::is_autocast_enabled(x.device().type());
  const auto fits = [&](const Tensor& parameter) {  // autocast leaves float64 alone
    return parameter.device() == x.device() &&
           (autocast ? parameter.scalar_type() != at::kDouble : parameter.scalar_type() == x.scalar_type());
  };
  return fits(weight) && (!bias || fits(*bias)) && !(autocast && x.scalar_type() == at::kDouble);
}

TensorPair gradient_reversal_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Lambda& lambd) {
  if (!is_recorded(x)) return {at::alias(x), at::linear(x, weight, bias)};
  const auto device = x.device().type();
  const auto dtype =
      at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device) : x.scalar_type();
  auto node = make_node<GradientReversalLinear>(x, weight, dtype, snapshot(lambd));
  node->set_next_edges(bias ? torch::autograd::collect_next_edges(x, weight, *bias)
                            : torch::autograd::collect_next_edges(x, weight, Tensor()));
  TensorPair results{view_of(x, node), Tensor()};
  {
    const KernelGuard guard;
    results.second = at::linear(x.to(dtype), weight.to(dtype), bias ? std::optional(bias->to(dtype)) : std::nullopt);
  }
  torch::autograd::set_history(results.second, node);
  return results;
}

void check_fork_backward(at::TensorList grads, at::TensorList reversed_grads, const Tensor& lambd) {
  TORCH_CHECK_VALUE(grads.size() == reversed_grads.size(), "reversed_grads: expected as many tensors as grads, ",
                    grads.size(), ", got ", reversed_grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    TORCH_CHECK_VALUE(grads[i].sizes() == reversed_grads[i].sizes(), "reversed_grads[", i,
                      "]: expected the shape of grads[", i, "], ", grads[i].sizes(), ", got ",
                      reversed_grads[i].sizes());
    TORCH_CHECK_VALUE(grads[i].device() == lambd.device() && reversed_grads[i].device() == lambd.device(), "grads[", i,
                      "]: expected the device of lambd, ", lambd.device(), ", got ", grads[i].device(), " and ",
                      reversed_grads[i].device());
    for (const Tensor& grad : {grads[i], reversed_grads[i]}) {
      const auto dtype = grad.scalar_type();
      TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                       "grads[", i, "]: expected float32, float64, bfloat16 or float16, got ", dtype);
    }
  }
  TORCH_CHECK_VALUE(lambd.numel() == 1, "lambd: expected one element, got shape ", lambd.sizes());
}

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("gradient_reversal", &reversal_kernel);
  m.impl("gradient_reversal_fork_backward", &fork_backward_kernel);
}
#ifdef FASTDA_WITH_CUDA
TORCH_LIBRARY_IMPL(fastda, CUDA, m) { m.impl("gradient_reversal", &reversal_kernel); }
#endif
TORCH_LIBRARY_IMPL(fastda, Autograd, m) {
  m.impl("gradient_reversal", &reversal_autograd);
  m.impl("gradient_reversal_fork_backward", &fork_backward_autograd);
}

}  // namespace fastda
