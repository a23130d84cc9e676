#include "prototypes.h"

#include "autograd.h"
#include "common.h"
#include "eager.h"

#include <ATen/ScalarOps.h>
#include <ATen/SequenceNumber.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Samples in rows and a label for each, on the CPU.
bool is_plain_set(const Tensor& samples, const Tensor& labels) {
  return samples.dim() == 2 && samples.is_cpu() && is_plain(samples) && labels.is_cpu() && are_plain_labels(labels) &&
         labels.dim() == 1 && labels.size(0) == samples.size(0);
}

struct Options {
  int64_t num_classes;
  std::string metric, reduction;
};

// A call of a small episode is mostly overhead, and one of a large episode finds PyTorch's code out of the caches: a
// node of its own takes the place of the dispatcher's passes. Where its gradient is to be recorded or transformed, the
// op takes over.
struct PrototypicalLoss : torch::autograd::Node {
  PrototypicalLoss(const Tensor& support, const Tensor& support_labels, const Tensor& queries,
                   const Tensor& query_labels, Tensor temperature, EpisodeState state, Options options)
      : support(support, /*is_output=*/false),
        support_labels(support_labels, /*is_output=*/false),
        queries(queries, /*is_output=*/false),
        query_labels(query_labels, /*is_output=*/false),
        temperature(std::move(temperature)),
        state(std::move(state)),
        options(std::move(options)) {}

  variable_list apply(variable_list&& incoming) override {
    const Tensor& grad = incoming[0];
    if (!grad.defined()) return variable_list(2);
    Tensor s, s_labels, q, q_labels;
    EpisodeState found;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      s = support.unpack(), s_labels = support_labels.unpack();
      q = queries.unpack(), q_labels = query_labels.unpack();
      found = state;
    }
    const bool need_support = task_should_compute_output(0), need_queries = task_should_compute_output(1);
    std::tuple<Tensor, Tensor, Tensor> gradients;
    if (needs_op(grad)) {
      static const auto op =
          c10::Dispatcher::singleton()
              .findSchemaOrThrow("fastda::prototypical_loss_backward", "")
              .typed<std::tuple<Tensor, Tensor, Tensor>(
                  const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt,
                  c10::string_view, c10::string_view, bool, bool, bool)>();
      gradients = op.call(grad, s, q, temperature, s_labels, q_labels, found.prototypes, found.counts, found.weights,
                          found.slopes, found.near, options.num_classes, options.metric, options.reduction,
                          need_support, need_queries, /*need_temperature=*/false);
    } else {
      gradients = prototypical_loss_gradients_on_cpu(grad, s, q, temperature, s_labels, q_labels, found,
                                                     options.num_classes, options.metric, options.reduction,
                                                     need_support, need_queries, /*need_temperature=*/false);
    }
    return {need_support ? std::move(std::get<0>(gradients)) : Tensor(),
            need_queries ? std::move(std::get<1>(gradients)) : Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&support, &support_labels, &queries, &query_labels}) saved->reset_data();
    state = {};
  }
  std::string name() const override { return "fastda::prototypical_lossBackward"; }

  SavedVariable support, support_labels, queries, query_labels;
  const Tensor temperature;
  EpisodeState state;
  const Options options;
};

}  // namespace

std::optional<Tensor> prototypical_loss(const Tensor& support, const Tensor& support_labels, const Tensor& queries,
                                        const Tensor& query_labels, int64_t num_classes, const std::string& metric,
                                        double temperature, const std::string& reduction) {
  if (!is_plain_eager() || !is_plain_set(support, support_labels) || !is_plain_set(queries, query_labels) ||
      support.size(1) != queries.size(1) || support.scalar_type() != queries.scalar_type()) {
    return std::nullopt;
  }
  const bool recorded = is_recorded(support) || is_recorded(queries);
  if (recorded && !(may_save(support) && may_save(support_labels) && may_save(queries) && may_save(query_labels))) {
    return std::nullopt;
  }
  const Tensor t = at::detail::scalar_tensor_static(temperature, accumulate_type(queries.scalar_type()), at::kCPU);
  RECORD_FUNCTION("fastda::prototypical_loss",
                  std::vector<c10::IValue>({support, queries, t, support_labels, query_labels}),
                  recorded ? at::sequence_number::peek() : -1);
  EpisodeLoss found;
  try {
    found = prototypical_loss_on_cpu(support, queries, t, support_labels, query_labels, num_classes, metric, reduction);
  } catch (const c10::Error&) {  // a label that is none of the classes, say: Python has the exceptions for it
    return std::nullopt;
  }
  if (recorded) {
    auto node = make_node<PrototypicalLoss>(support, support_labels, queries, query_labels, t, std::move(found.state),
                                            Options{num_classes, metric, reduction});
    node->set_next_edges(torch::autograd::collect_next_edges(support, queries));
    torch::autograd::set_history(found.loss, node);
  }
  return std::move(found.loss);
}

}  // namespace fastda
