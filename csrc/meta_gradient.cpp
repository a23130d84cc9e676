#include "meta_gradient.h"

#include "autograd.h"

#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/div.h>

#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

Tensor divided(const Tensor& x, const Divisor& divisor) {
  const int64_t* number = std::get_if<int64_t>(&divisor);
  return number ? at::div(x, *number) : at::div(x, std::get<Tensor>(divisor));
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
    if (!incoming[0].defined()) return variable_list(gradients.size());
    return at::_foreach_mul(gradients, divided(incoming[0], divisor));
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients.clear();
  }
  std::string name() const override { return "fastda::KnownGradientBackward"; }

  std::vector<Tensor> gradients;
  const Divisor divisor;
};

}  // namespace

Tensor with_gradient(const Tensor& total, std::vector<Tensor> gradients, Divisor divisor,
                     const std::vector<Tensor>& leaves) {
  Tensor result;
  {
    const at::NoGradGuard no_grad;
    result = divided(total, divisor);
  }
  auto node = make_node<KnownGradient>(std::move(gradients), std::move(divisor));
  node->set_next_edges(torch::autograd::collect_next_edges(leaves));
  torch::autograd::set_history(result, node);
  return result;
}

}  // namespace fastda
