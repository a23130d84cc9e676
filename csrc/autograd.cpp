#include "autograd.h"

#include "eager.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <optional>
#include <utility>

namespace fastda {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

struct FusedOp;

template <typename T>
using Held = decltype(make_node<T>(std::declval<const FusedOp&>()));

SecondOrder& second_order() {
  static SecondOrder installed;
  return installed;
}

OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

// A fused op and its backward op, and how their arguments divide, read off their schemas at the first call: Python
// defines them after this library is loaded.
struct FusedOp {
  FusedOp(const std::string& name, const OperatorHandle& op, const OperatorHandle& backward)
      : name(name),
        backward_name(backward.schema().name()),
        backward(backward),
        tensors(leading_tensors(op.schema())),
        differentiable(count_named(backward.schema(), "need_")),
        arguments(op.schema().arguments().size()),
        values(count_named(backward.schema(), "grad_")),
        results(op.schema().returns().size()) {}

  static size_t leading_tensors(const c10::FunctionSchema& schema) {
    size_t count = 0;
    for (const auto& argument : schema.arguments()) {
      if (argument.type()->kind() != c10::TypeKind::TensorType) break;
      ++count;
    }
    return count;
  }
  static size_t count_named(const c10::FunctionSchema& schema, const char* prefix) {
    size_t count = 0;
    for (const auto& argument : schema.arguments()) count += argument.name().rfind(prefix, 0) == 0;
    return count;
  }

  const std::string name, backward_name;
  const OperatorHandle backward;
  const size_t tensors;         // tensor arguments, the differentiable ones first
  const size_t differentiable;  // as many as the backward op has `need_` flags
  const size_t arguments;
  const size_t values;  // as many as the backward op has `grad_` tensors
  const size_t results;
};

// The op of that name, looked up once.
class Lookup {
 public:
  explicit Lookup(const std::string& name) : name_("fastda::" + name) {}

  const FusedOp& operator()() {
    std::call_once(once_, [this] { found_.emplace(name_, find(name_), find(name_ + "_backward")); });
    return *found_;
  }

 private:
  const std::string name_;
  std::once_flag once_;
  std::optional<FusedOp> found_;
};

bool requires_grad(const IValue* tensors, size_t count) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(tensors, tensors + count, [](const IValue& x) { return x.toTensor().requires_grad(); });
}

// Forward mode is the reference's; a tangent must not be lost without a word.
void refuse_tangents(const std::string& name, const IValue* tensors, size_t count) {
  if (!torch::autograd::ForwardADLevel::try_get_by_idx(0)) return;
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK(!tensors[i].toTensor()._fw_grad(/*level=*/0).defined(), name,
                ": has no forward-mode derivative; call the public function fastda.", name.substr(8),
                ", which then evaluates the reference formula");
  }
}

torch::autograd::edge_list edges(const IValue* tensors, size_t count) {
  torch::autograd::edge_list result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) result.push_back(torch::autograd::impl::gradient_edge(tensors[i].toTensor()));
  return result;
}

// A node that keeps tensors and constants of the call it belongs to.
struct FusedNode : Node {
  explicit FusedNode(const FusedOp& op) : op(op) {}

  // An inference tensor cannot be saved; a copy of it can.
  void save(const Tensor& x) { saved.emplace_back(x.is_inference() ? x.clone() : x, /*is_output=*/false); }
  void save(const IValue* values, size_t count) {
    for (size_t i = 0; i < count; ++i) save(values[i].toTensor());
  }
  std::vector<Tensor> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Tensor> tensors;
    tensors.reserve(saved.size());
    for (const auto& variable : saved) tensors.push_back(variable.unpack());
    return tensors;
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  const FusedOp& op;
  std::vector<SavedVariable> saved;
  std::vector<IValue> constants;
};

// The derivative of an op's values: its backward op.
struct Gradient : FusedNode {
  using FusedNode::FusedNode;

  std::string name() const override { return op.name + "Backward"; }
  variable_list apply(variable_list&& incoming) override {
    const size_t differentiable = num_outputs();
    if (std::none_of(incoming.begin(), incoming.end(), [](const Tensor& grad) { return grad.defined(); })) {
      return variable_list(differentiable);
    }
    std::vector<Tensor> tensors = unpack();
    if (!at::GradMode::is_enabled() && is_plain_eager() && is_plain(incoming[0])) {  // else: scaled by a batch, say
      if (auto results = take_gradients(incoming[0], tensors); !results.empty()) return results;
    }
    Stack stack;
    stack.reserve(incoming.size() + tensors.size() + constants.size() + differentiable);
    for (size_t i = 0; i < incoming.size(); ++i) {
      stack.emplace_back(incoming[i].defined() ? std::move(incoming[i]) : input_metadata(i).zeros_like());
    }
    for (Tensor& tensor : tensors) stack.emplace_back(std::move(tensor));
    stack.insert(stack.end(), constants.begin(), constants.end());
    for (size_t i = 0; i < differentiable; ++i) stack.emplace_back(task_should_compute_output(i));
    call_backward(stack);
    variable_list results;
    for (size_t i = 0; i < differentiable; ++i) {
      results.push_back(task_should_compute_output(i) ? std::move(stack[i]).toTensor() : Tensor());
    }
    return results;
  }
  void release_variables() override {
    FusedNode::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients.clear();
  }

  std::vector<Tensor> gradients;  // from the forward pass, where it took them

 private:
  // The gradients that the forward pass took, times the incoming one; nothing where there are none. They are handed
  // over, scaled in place, unless the graph is kept for another time.
  variable_list take_gradients(const Tensor& incoming, const std::vector<Tensor>& inputs) {
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    std::vector<Tensor> taken;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      taken = keep ? gradients : std::exchange(gradients, {});
    }
    const bool is_one = is_one_on_cpu(incoming);  // loss.backward()
    variable_list results(taken.size());
    for (size_t i = 0; i < taken.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      if (keep || !is_one) {
        std::vector<int64_t> shape = incoming.sizes().vec();
        shape.resize(taken[i].dim(), 1);
        const Tensor factor = incoming.reshape(shape);
        taken[i] = keep ? at::mul(taken[i], factor) : taken[i].mul_(factor);
      }
      const auto dtype = inputs[i].scalar_type();
      results[i] = taken[i].scalar_type() == dtype ? std::move(taken[i]) : taken[i].to(dtype);
    }
    return results;
  }

  static bool is_one_on_cpu(const Tensor& x) {
    if (!x.is_cpu() || x.numel() != 1) return false;
    if (x.scalar_type() == at::kFloat) return *x.const_data_ptr<float>() == 1;
    return x.scalar_type() == at::kDouble && *x.const_data_ptr<double>() == 1;
  }

  // Past the Autograd key where nothing is to be recorded and no transform is to see the call.
  void call_backward(Stack& stack) const {
    if (at::GradMode::is_enabled() || !is_plain_eager()) {
      op.backward.callBoxed(stack);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.backward.callBoxed(stack);
    }
  }
};

// The derivative of a backward op's results: that of the formula.
struct SecondGradient : FusedNode {
  using FusedNode::FusedNode;

  std::string name() const override { return op.backward_name + "Backward"; }
  variable_list apply(variable_list&& incoming) override {
    TORCH_CHECK(second_order(), op.backward_name, ": its second derivative needs the Python package fastda");
    return second_order()(op.name, incoming, unpack(), constants, needs);
  }

  std::vector<bool> needs;
};

class ForwardKernel : public c10::OperatorKernel {
 public:
  ForwardKernel(std::shared_ptr<Lookup> lookup, ForwardWithGradients with_gradients)
      : lookup_(std::move(lookup)), with_gradients_(with_gradients) {}

  void operator()(const OperatorHandle& handle, c10::DispatchKeySet keys, Stack* stack) {
    const FusedOp& op = (*lookup_)();
    const IValue* arguments = stack->data() + stack->size() - op.arguments;
    refuse_tangents(op.name, arguments, op.differentiable);

    Held<Gradient> node;
    if (requires_grad(arguments, op.differentiable)) {
      node = make_node<Gradient>(op);
      node->set_next_edges(edges(arguments, op.differentiable));
      node->saved.reserve(op.tensors + op.results - op.values);
      node->save(arguments, op.tensors);
      node->constants.assign(arguments + op.tensors, arguments + op.arguments);
    }
    if (!node || !take_gradients(op, *node, stack)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      handle.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    if (node) {
      const IValue* results = stack->data() + stack->size() - op.results;
      for (size_t i = 0; i < op.values; ++i) torch::autograd::set_history(results[i].toTensor(), node);
      node->save(results + op.values, op.results - op.values);
    }
  }

 private:
  // The op and its gradients in one pass, where that is possible and worth it: whether they were taken.
  bool take_gradients(const FusedOp& op, Gradient& node, Stack* stack) const {
    if (!with_gradients_ || !is_plain_eager()) return false;
    const IValue* arguments = stack->data() + stack->size() - op.arguments;
    std::vector<bool> needs;
    for (size_t i = 0; i < op.tensors; ++i) {
      const Tensor& x = arguments[i].toTensor();
      if (!x.is_cpu() || (i < op.differentiable && !is_plain(x))) return false;
      if (i < op.differentiable) needs.push_back(x.requires_grad());
    }
    std::optional<WithGradients> all = with_gradients_(arguments, needs);
    if (!all) return false;
    node.gradients = std::move(all->gradients);
    torch::jit::drop(*stack, op.arguments);
    for (Tensor& result : all->results) stack->emplace_back(std::move(result));
    return true;
  }

  std::shared_ptr<Lookup> lookup_;
  ForwardWithGradients with_gradients_;
};

class BackwardKernel : public c10::OperatorKernel {
 public:
  explicit BackwardKernel(std::shared_ptr<Lookup> lookup) : lookup_(std::move(lookup)) {}

  void operator()(const OperatorHandle& handle, c10::DispatchKeySet keys, Stack* stack) {
    const FusedOp& op = (*lookup_)();
    const size_t count = handle.schema().arguments().size();
    const IValue* arguments = stack->data() + stack->size() - count;
    const size_t variables = op.values + op.differentiable;
    refuse_tangents(op.backward_name, arguments, variables);

    Held<SecondGradient> node;
    if (requires_grad(arguments, variables)) {
      node = make_node<SecondGradient>(op);
      node->set_next_edges(edges(arguments, variables));
      node->save(arguments, op.values + op.tensors);
      const IValue* constants = arguments + op.tensors + op.results;
      const IValue* needs = arguments + count - op.differentiable;
      node->constants.assign(constants, needs);
      for (size_t i = 0; i < op.differentiable; ++i) node->needs.push_back(needs[i].toBool());
    }
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      handle.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    if (node) {
      const IValue* results = stack->data() + stack->size() - op.differentiable;
      for (size_t i = 0; i < op.differentiable; ++i) torch::autograd::set_history(results[i].toTensor(), node);
    }
  }

 private:
  std::shared_ptr<Lookup> lookup_;
};

}  // namespace

void set_second_order(SecondOrder function) { second_order() = std::move(function); }

void differentiable(torch::Library& m, const std::string& name, ForwardWithGradients with_gradients) {
  const auto lookup = std::make_shared<Lookup>(name);
  auto forward = std::make_unique<ForwardKernel>(lookup, with_gradients);
  m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(forward)));
  m.impl((name + "_backward").c_str(),
         torch::CppFunction::makeFromBoxedFunctor(std::make_unique<BackwardKernel>(lookup)));
}

}  // namespace fastda
