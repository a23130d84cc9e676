#include "meta_gradient.h"

#include "autograd.h"
#include "eager.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/div.h>

#include <torch/csrc/autograd/graph_task.h>

#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

bool is_one(const Divisor& divisor) {
  const int64_t* number = std::get_if<int64_t>(&divisor);
  return number && *number == 1;
}

Tensor divided(const Tensor& x, const Divisor& divisor) {
  const int64_t* number = std::get_if<int64_t>(&divisor);
  return number ? at::div(x, *number) : at::div(x, std::get<Tensor>(divisor));
}

// Is it the number 1, as from `loss.backward()`? Not looked at where it lies on a GPU.
bool is_one(const Tensor& grad) {
  if (!is_plain_eager() || !is_plain(grad) || !grad.is_cpu()) return false;
  if (grad.scalar_type() == at::kFloat) return *grad.const_data_ptr<float>() == 1;
  return grad.scalar_type() == at::kDouble && *grad.const_data_ptr<double>() == 1;
}

struct KnownGradient : torch::autograd::Node {
  KnownGradient(std::vector<Tensor> gradients, Divisor divisor)
      : gradients(std::move(gradients)), divisor(std::move(divisor)) {}

  variable_list apply(variable_list&& incoming) override {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "create_graph: expected False, got True: a meta-loss can be differentiated once; for more, "
                "differentiate MAML.query_losses");
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!gradients.empty(), "retain_graph: expected True for a second backward pass, got False in the first");
    const Tensor& grad = incoming[0];
    if (!grad.defined()) return variable_list(gradients.size());
    // Without retain_graph nobody asks again: what is to be multiplied by 1 need not be copied.
    if (is_one(divisor) && is_one(grad) && !torch::autograd::get_current_graph_task_keep_graph()) {
      return std::move(gradients);
    }
    return at::_foreach_mul(gradients, is_one(divisor) ? grad : divided(grad, divisor));
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients.clear();
  }
  std::string name() const override { return "fastda::KnownGradientBackward"; }

  std::vector<Tensor> gradients;
  const Divisor divisor;
  bool given_out = false;
};

}  // namespace

Tensor with_gradient(const Tensor& total, std::vector<Tensor> gradients, Divisor divisor,
                     const std::vector<Tensor>& leaves) {
  Tensor result;
  if (is_one(divisor)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    result = at::alias(total);
  } else {
    const at::NoGradGuard no_grad;
    result = divided(total, divisor);
  }
  auto node = make_node<KnownGradient>(std::move(gradients), std::move(divisor));
  node->set_next_edges(torch::autograd::collect_next_edges(leaves));
  torch::autograd::set_history(result, node);
  return result;
}

}  // namespace fastda
