#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>

namespace fastda {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

template <typename T>
using Held = decltype(make_node<T>(std::declval<const OperatorHandle&>()));

SecondOrder& second_order() {
  static SecondOrder installed;
  return installed;
}

// How an op's arguments divide, read off its schema.
struct Signature {
  size_t tensors = 0;         // tensor arguments, the differentiable ones first
  size_t differentiable = 0;  // as many as the backward op has `need_` flags
  size_t arguments = 0;
  size_t values = 0;  // as many as the backward op has `grad_` tensors
  size_t results = 0;
};

size_t leading_tensors(const c10::FunctionSchema& schema) {
  size_t count = 0;
  for (const auto& argument : schema.arguments()) {
    if (argument.type()->kind() != c10::TypeKind::TensorType) break;
    ++count;
  }
  return count;
}

size_t count_named(const c10::FunctionSchema& schema, const char* prefix) {
  size_t count = 0;
  for (const auto& argument : schema.arguments()) count += argument.name().rfind(prefix, 0) == 0;
  return count;
}

Signature signature_of(const OperatorHandle& op, const OperatorHandle& backward) {
  return {leading_tensors(op.schema()), count_named(backward.schema(), "need_"), op.schema().arguments().size(),
          count_named(backward.schema(), "grad_"), op.schema().returns().size()};
}

OperatorHandle find(const std::string& name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), ""); }

bool requires_grad(const IValue* tensors, size_t count) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(tensors, tensors + count, [](const IValue& x) { return x.toTensor().requires_grad(); });
}

// Forward mode is the reference's; a tangent must not be lost without a word.
void refuse_tangents(const OperatorHandle& op, const IValue* tensors, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK(!tensors[i].toTensor()._fw_grad(/*level=*/0).defined(), op.schema().name(),
                ": has no forward-mode derivative; call the public function fastda.", op.schema().name().substr(8),
                ", which then evaluates the reference formula");
  }
}

torch::autograd::edge_list edges(const IValue* tensors, size_t count) {
  torch::autograd::edge_list result;
  for (size_t i = 0; i < count; ++i) result.push_back(torch::autograd::impl::gradient_edge(tensors[i].toTensor()));
  return result;
}

std::string node_name(const OperatorHandle& op) { return op.schema().name() + "Backward"; }

// A node that keeps tensors and constants of the call it belongs to.
struct FusedNode : Node {
  explicit FusedNode(const OperatorHandle& op) : op(op) {}

  // An inference tensor cannot be saved; a copy of it can.
  void save(const Tensor& x) { saved.emplace_back(x.is_inference() ? x.clone() : x, /*is_output=*/false); }
  void save(const IValue* values, size_t count) {
    for (size_t i = 0; i < count; ++i) save(values[i].toTensor());
  }
  std::vector<Tensor> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Tensor> tensors;
    for (const auto& variable : saved) tensors.push_back(variable.unpack());
    return tensors;
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }
  std::string name() const override { return node_name(op); }

  OperatorHandle op;
  std::vector<SavedVariable> saved;
  std::vector<IValue> constants;
};

// The derivative of an op's values: its backward op.
struct Gradient : FusedNode {
  using FusedNode::FusedNode;

  variable_list apply(variable_list&& incoming) override {
    const size_t differentiable = num_outputs();
    if (std::none_of(incoming.begin(), incoming.end(), [](const Tensor& grad) { return grad.defined(); })) {
      return variable_list(differentiable);
    }
    Stack stack;
    for (size_t i = 0; i < incoming.size(); ++i) {
      stack.emplace_back(incoming[i].defined() ? incoming[i] : input_metadata(i).zeros_like());
    }
    for (Tensor& tensor : unpack()) stack.emplace_back(std::move(tensor));
    stack.insert(stack.end(), constants.begin(), constants.end());
    for (size_t i = 0; i < differentiable; ++i) stack.emplace_back(task_should_compute_output(i));
    find(op.schema().name() + "_backward").callBoxed(stack);
    variable_list results;
    for (size_t i = 0; i < differentiable; ++i) {
      results.push_back(task_should_compute_output(i) ? stack[i].toTensor() : Tensor());
    }
    return results;
  }
};

// The derivative of a backward op's results: that of the formula.
struct SecondGradient : FusedNode {
  using FusedNode::FusedNode;

  variable_list apply(variable_list&& incoming) override {
    TORCH_CHECK(second_order(), op.schema().name(), ": its second derivative needs the Python package fastda");
    return second_order()(forward_name, incoming, unpack(), constants, needs);
  }

  std::string forward_name;
  std::vector<bool> needs;
};

void forward_kernel(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const OperatorHandle backward = find(op.schema().name() + "_backward");
  const Signature signature = signature_of(op, backward);
  const IValue* arguments = stack->data() + stack->size() - signature.arguments;
  refuse_tangents(op, arguments, signature.differentiable);

  Held<Gradient> node;
  if (requires_grad(arguments, signature.differentiable)) {
    node = make_node<Gradient>(op);
    node->set_next_edges(edges(arguments, signature.differentiable));
    node->save(arguments, signature.tensors);
    node->constants.assign(arguments + signature.tensors, arguments + signature.arguments);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (node) {
    const IValue* results = stack->data() + stack->size() - signature.results;
    for (size_t i = 0; i < signature.values; ++i) torch::autograd::set_history(results[i].toTensor(), node);
    node->save(results + signature.values, signature.results - signature.values);
  }
}

void backward_kernel(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const std::string& name = op.schema().name();
  const OperatorHandle forward = find(name.substr(0, name.size() - std::string("_backward").size()));
  const Signature signature = signature_of(forward, op);
  const size_t count = op.schema().arguments().size();
  const IValue* arguments = stack->data() + stack->size() - count;
  const size_t variables = signature.values + signature.differentiable;
  refuse_tangents(op, arguments, variables);

  Held<SecondGradient> node;
  if (requires_grad(arguments, variables)) {
    node = make_node<SecondGradient>(op);
    node->set_next_edges(edges(arguments, variables));
    node->forward_name = forward.schema().name();
    node->save(arguments, signature.values + signature.tensors);
    const IValue* constants = arguments + signature.tensors + signature.results;
    const IValue* needs = arguments + count - signature.differentiable;
    node->constants.assign(constants, needs);
    for (size_t i = 0; i < signature.differentiable; ++i) node->needs.push_back(needs[i].toBool());
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (node) {
    const IValue* results = stack->data() + stack->size() - signature.differentiable;
    for (size_t i = 0; i < signature.differentiable; ++i) torch::autograd::set_history(results[i].toTensor(), node);
  }
}

}  // namespace

void set_second_order(SecondOrder function) { second_order() = std::move(function); }

void differentiable(torch::Library& m, const std::string& name) {
  m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&forward_kernel>());
  m.impl((name + "_backward").c_str(), torch::CppFunction::makeFromBoxedFunction<&backward_kernel>());
}

}  // namespace fastda
