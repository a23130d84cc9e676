// The domain-adversarial loss: its lane from Python, checks, and what its kernels for the CPU and for CUDA share.
#include "domain_loss.h"

#include "autograd.h"
#include "common.h"
#include "eager.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/tensor.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Weights for their logits, or a tensor that stands for none, whose shape is another; nothing where Python has to
// raise.
std::optional<Tensor> plain_weight(const std::optional<Tensor>& weight, const Tensor& logits) {
  static const auto& none = *new std::array<Tensor, 2>{at::empty({0}), at::empty({0, 0})};  // outlives the interpreter
  if (!weight) return none[logits.dim() == 1];
  const bool fits = is_plain(*weight) && weight->sizes() == logits.sizes() && weight->device() == logits.device();
  return fits ? weight : std::nullopt;
}

void check_weight(const char* name, const Tensor& weight, const char* logits_name, const Tensor& logits) {
  TORCH_CHECK_VALUE(weight.numel() == 0 || weight.sizes() == logits.sizes(), name, ": expected the shape of ",
                    logits_name, ", ", logits.sizes(), ", or no element, got ", weight.sizes());
}

// Without weights on the CPU a call is mostly overhead: there a node of its own takes the place of the dispatcher's
// passes and keeps what it needs in one buffer. Where its gradient is to be recorded or transformed, the op takes over.
struct DomainLoss : torch::autograd::Node {
  DomainLoss(const Tensor& source_logits, const Tensor& target_logits, const UnweightedDomainLoss& found, bool mean)
      : source_logits(source_logits, /*is_output=*/false),
        target_logits(target_logits, /*is_output=*/false),
        slopes(found.slopes, /*is_output=*/false),
        scale(found.scale),
        mean(mean) {}

  variable_list apply(variable_list&& incoming) override {
    const Tensor& grad = incoming[0];
    if (!grad.defined()) return variable_list(2);
    Tensor source, target, slope;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      source = source_logits.unpack(), target = target_logits.unpack(), slope = slopes.unpack();
    }
    const bool need_source = task_should_compute_output(0), need_target = task_should_compute_output(1);
    if (needs_op(grad)) {
      return by_op(grad, source, target, slope, need_source, need_target);
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const double value = grad.scalar_type() == at::kDouble ? *grad.const_data_ptr<double>()
                                                           : *grad.const_data_ptr<float>();
    variable_list results(2);
    if (need_source) results[0] = scaled_slopes(slope, 0, value * scale[0], source.sizes());
    if (need_target) results[1] = scaled_slopes(slope, source.numel(), value * scale[1], target.sizes());
    return results;
  }

  variable_list by_op(const Tensor& grad, const Tensor& source, const Tensor& target, const Tensor& slope,
                      bool need_source, bool need_target) const {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fastda::domain_adversarial_loss_backward", "")
            .typed<std::tuple<Tensor, Tensor, Tensor, Tensor>(
                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, int64_t, c10::string_view, bool, bool, bool, bool)>();
    const Tensor factors = at::tensor(at::ArrayRef<double>(scale), slope.options());
    auto [of_source, of_target, of_source_weight, of_target_weight] = op.call(
        grad, source, target, *plain_weight(std::nullopt, source), *plain_weight(std::nullopt, target),
        slope.narrow(0, 0, source.numel()).view(source.sizes()),
        slope.narrow(0, source.numel(), target.numel()).view(target.sizes()), factors, /*batch_dims=*/0,
        mean ? "mean" : "sum", need_source, need_target, /*need_source_weight=*/false, /*need_target_weight=*/false);
    return {need_source ? of_source : Tensor(), need_target ? of_target : Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    source_logits.reset_data(), target_logits.reset_data(), slopes.reset_data();
  }
  std::string name() const override { return "fastda::domain_adversarial_lossBackward"; }

  SavedVariable source_logits, target_logits, slopes;
  const std::array<double, 2> scale;
  const bool mean;
};

bool is_lean(const Tensor& logits) {
  const auto dtype = logits.scalar_type();
  return logits.is_cpu() && logits.is_contiguous() && (dtype == at::kFloat || dtype == at::kDouble);
}

Tensor lean_domain_loss(const Tensor& source_logits, const Tensor& target_logits, bool mean, bool recorded) {
  RECORD_FUNCTION("fastda::domain_adversarial_loss", std::vector<c10::IValue>({source_logits, target_logits}),
                  recorded ? at::sequence_number::peek() : -1);
  UnweightedDomainLoss found;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    found = unweighted_domain_loss(source_logits, target_logits, mean);
  }
  if (recorded) {
    auto node = make_node<DomainLoss>(source_logits, target_logits, found, mean);
    node->set_next_edges(torch::autograd::collect_next_edges(source_logits, target_logits));
    torch::autograd::set_history(found.loss, node);
  }
  return std::move(found.loss);
}

}  // namespace

std::optional<Tensor> domain_adversarial_loss(const Tensor& source_logits, const Tensor& target_logits,
                                              const std::optional<Tensor>& source_weight,
                                              const std::optional<Tensor>& target_weight,
                                              const std::string& reduction) {
  if ((reduction != "mean" && reduction != "sum") || !is_plain_eager() || !is_plain(source_logits) ||
      !is_plain(target_logits) || source_logits.device() != target_logits.device() ||
      source_logits.scalar_type() != target_logits.scalar_type()) {
    return std::nullopt;
  }
  const auto source = plain_weight(source_weight, source_logits), target = plain_weight(target_weight, target_logits);
  if (!source || !target) return std::nullopt;
  const bool recorded = is_recorded(source_logits) || is_recorded(target_logits);
  if (!source_weight && !target_weight && is_lean(source_logits) && is_lean(target_logits) &&
      (!recorded || (may_save(source_logits) && may_save(target_logits)))) {
    return lean_domain_loss(source_logits, target_logits, reduction == "mean", recorded);
  }
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastda::domain_adversarial_loss", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                            int64_t, c10::string_view)>();
  return std::get<0>(op.call(source_logits, target_logits, *source, *target, /*batch_dims=*/0, reduction));
}

DomainLossSizes::DomainLossSizes(const Tensor& source_logits, const Tensor& target_logits, const Tensor& source_weight,
                                 const Tensor& target_weight, int64_t batch_dims, const std::string& reduction)
    : mean(reduction == "mean") {
  TORCH_CHECK_VALUE(batch_dims >= 0 && batch_dims <= std::min(source_logits.dim(), target_logits.dim()),
                    "batch_dims: expected a number of dimensions that both logits have, got ", batch_dims);
  batch.assign(source_logits.sizes().begin(), source_logits.sizes().begin() + batch_dims);
  TORCH_CHECK_VALUE(target_logits.sizes().slice(0, batch_dims) == at::IntArrayRef(batch),
                    "target_logits: expected the batch dimensions of source_logits, ", source_logits.sizes(), ", got ",
                    target_logits.sizes());
  const auto dtype = source_logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                   "source_logits: expected float32, float64, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_TYPE(target_logits.scalar_type() == dtype, "target_logits: expected the dtype of source_logits, ", dtype,
                   ", got ", target_logits.scalar_type());
  check_weight("source_weight", source_weight, "source_logits", source_logits);
  check_weight("target_weight", target_weight, "target_logits", target_logits);
  TORCH_CHECK_VALUE(mean || reduction == "sum", "reduction: expected 'mean' or 'sum', got '", reduction, "'");
  episodes = c10::multiply_integers(batch);
  sources = c10::multiply_integers(source_logits.sizes().slice(batch_dims));
  targets = c10::multiply_integers(target_logits.sizes().slice(batch_dims));
}

Tensor domain_weight_gradient(const Tensor& grad_loss, const Tensor& logits, const Tensor& weight, const Tensor& scale,
                              double sign, int64_t batch_dims, bool mean) {
  std::vector<int64_t> rows(logits.sizes().begin(), logits.sizes().begin() + batch_dims);
  rows.push_back(c10::multiply_integers(logits.sizes().slice(batch_dims)));
  const auto dtype = accumulate_type(logits.scalar_type());
  Tensor losses = -at::log_sigmoid(logits.to(dtype).reshape(rows) * -sign);
  if (mean) {
    const Tensor weights = weight.to(dtype).reshape(rows);
    losses = losses - (weights * losses).sum(-1, true) / weights.sum(-1, true);
  }
  return (losses * (grad_loss * scale.select(-1, sign < 0 ? 0 : 1)).unsqueeze(-1))
      .reshape(weight.sizes())
      .to(weight.scalar_type());
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "domain_adversarial_loss"); }

}  // namespace fastda
