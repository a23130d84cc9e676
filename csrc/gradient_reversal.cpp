// The autograd node of gradient reversal, and its two lanes: a view of the input for eager mode, and an op with a result of
// its own for torch.func, which cannot see through a view that is made outside the dispatcher.
#include "gradient_reversal.h"

#include "autograd.h"
#include "common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct GradientReversal : torch::autograd::Node {
  explicit GradientReversal(const Lambda& value) {
    if (const Tensor* tensor = std::get_if<Tensor>(&value)) {
      lambd = SavedVariable(tensor->detach(), /*is_output=*/false);
    } else {
      number = std::get<double>(value);
    }
  }

  // Plain ATen, so that it is differentiable, and torch.func and torch.compile see through it.
  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor()};
    if (number) return {at::mul(grad, -*number)};
    Tensor factor = unpack().neg();
    while (factor.dim() > 0 && factor.dim() < grad.dim()) factor = factor.unsqueeze(-1);  // one λ for each batch element
    return {at::mul(grad, factor).to(grad.scalar_type())};
  }

  Tensor unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return lambd.unpack();
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    lambd.reset_data();
  }
  std::string name() const override { return "fastda::GradientReversalBackward"; }

  std::optional<double> number;
  SavedVariable lambd;
};

// The value of now: a schedule may overwrite its buffer before backward runs.
Lambda snapshot(const Lambda& lambd) {
  const Tensor* tensor = std::get_if<Tensor>(&lambd);
  if (!tensor) return lambd;
  if (tensor->is_cpu()) return tensor->item<double>();
  return tensor->detach().reshape({}).clone();
}

auto reversal_node(const Tensor& x, const Lambda& lambd) {
  auto node = make_node<GradientReversal>(lambd);
  node->add_next_edge(torch::autograd::impl::gradient_edge(x));
  return node;
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
  if (at::GradMode::is_enabled() && x.requires_grad()) {
    torch::autograd::set_history(result, reversal_node(x, lambd.clone()));
  }
  return result;
}

Tensor reversal_kernel(const Tensor& x, const Tensor& lambd) { return x.clone(at::MemoryFormat::Contiguous); }

}  // namespace

Tensor gradient_reversal_view(const Tensor& x, const Lambda& lambd) {
  if (!at::GradMode::is_enabled() || !x.requires_grad()) return at::alias(x);
  Tensor view;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    view = at::alias(x);
  }
  // An in-place operation would change x behind the node's back: PyTorch refuses it, as for any custom function's view.
  view = torch::autograd::as_view(x, view, /*is_bw_differentiable=*/true, /*is_fw_differentiable=*/false, nullptr, nullptr,
                                  torch::autograd::CreationMeta::IN_CUSTOM_FUNCTION);
  torch::autograd::set_history(view, reversal_node(x, snapshot(lambd)));
  return view;
}

TORCH_LIBRARY_IMPL(fastda, CPU, m) { m.impl("gradient_reversal", &reversal_kernel); }
TORCH_LIBRARY_IMPL(fastda, Autograd, m) { m.impl("gradient_reversal", &reversal_autograd); }

}  // namespace fastda
