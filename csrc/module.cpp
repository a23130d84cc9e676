// The Python module fastda._C, and nothing else: the kernels register themselves with PyTorch, each in its own file.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "autograd.h"
#include "domain_loss.h"
#include "eager.h"
#include "gradient_reversal.h"
#include "meta_gradient.h"
#include "prototypes.h"

// FASTDA_VERSION and its like are bare words on the command line: quotes would not survive every platform's shell.
#define FASTDA_STRING_(...) #__VA_ARGS__
#define FASTDA_STRING(...) FASTDA_STRING_(__VA_ARGS__)

#ifdef _MSC_VER
#define FASTDA_COMPILER "MSVC " FASTDA_STRING(_MSC_VER)
#elif defined(__clang__)
#define FASTDA_COMPILER __VERSION__
#else
#define FASTDA_COMPILER "GCC " __VERSION__
#endif

namespace py = pybind11;

static py::dict build_info() {
  const std::string cuda = FASTDA_STRING(FASTDA_CUDA_VERSION);
  py::dict info;
  info["fastda"] = FASTDA_STRING(FASTDA_VERSION);
  info["torch"] = FASTDA_STRING(FASTDA_TORCH_VERSION);
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["compiler"] = FASTDA_COMPILER;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef FASTDA_WITH_CUDA
  info["devices"] = py::make_tuple("cpu", "cuda");
#else
  info["devices"] = py::make_tuple("cpu");
#endif
  return info;
}

// What follows is called first for every eager call of an op. None says that Python has to look at the arguments: to
// raise an error with the right name, or to take another lane.

static bool is_tensor(py::handle x) {
  return THPVariable_CheckExact(x.ptr()) && fastda::is_plain(THPVariable_Unpack(x.ptr()));
}

// λ for features on a device.
static std::optional<fastda::Lambda> eager_lambda(py::handle lambd, at::Device device) {
  if (is_tensor(lambd)) {
    const at::Tensor& tensor = THPVariable_Unpack(lambd.ptr());
    if (tensor.numel() != 1 || tensor.dim() > 1 || tensor.device() != device) return std::nullopt;
    return tensor;
  }
  if (!PyFloat_Check(lambd.ptr()) && !PyLong_CheckExact(lambd.ptr())) return std::nullopt;
  const double number = PyFloat_AsDouble(lambd.ptr());
  if (PyErr_Occurred()) {  // an int beyond all floats
    PyErr_Clear();
    return std::nullopt;
  }
  return std::isfinite(number) ? std::optional<fastda::Lambda>(number) : std::nullopt;
}

static py::object gradient_reversal(py::handle x, py::handle lambd) {
  if (!is_tensor(x) || !fastda::is_plain_eager()) return py::none();
  const at::Tensor& features = THPVariable_Unpack(x.ptr());
  const auto value = eager_lambda(lambd, features.device());
  return value ? py::cast(fastda::gradient_reversal(features, *value)) : py::none();
}

static py::object gradient_reversal_fork(py::handle x, py::handle lambd) {
  if (!is_tensor(x) || !fastda::is_plain_eager()) return py::none();
  const at::Tensor& features = THPVariable_Unpack(x.ptr());
  const auto value = eager_lambda(lambd, features.device());
  return value ? py::cast(fastda::gradient_reversal_fork(features, *value)[0]) : py::none();
}

// The same for several tensors of one device: a pair for each.
static py::object gradient_reversal_forks(const std::vector<py::object>& x, py::handle lambd) {
  std::vector<at::Tensor> features;
  for (const py::object& one : x) {
    if (!is_tensor(one)) return py::none();
    features.push_back(THPVariable_Unpack(one.ptr()));
    if (features.back().device() != features.front().device()) return py::none();
  }
  if (features.empty() || !fastda::is_plain_eager()) return py::none();
  const auto value = eager_lambda(lambd, features.front().device());
  return value ? py::cast(fastda::gradient_reversal_fork(features, *value)) : py::none();
}

static py::object gradient_reversal_linear(py::handle x, py::handle weight, py::handle bias, py::handle lambd) {
  if (!is_tensor(x) || !is_tensor(weight) || !(bias.is_none() || is_tensor(bias)) || !fastda::is_plain_eager()) {
    return py::none();
  }
  const at::Tensor &features = THPVariable_Unpack(x.ptr()), &matrix = THPVariable_Unpack(weight.ptr());
  const auto offset = bias.is_none() ? std::nullopt : std::optional(THPVariable_Unpack(bias.ptr()));
  const auto value = eager_lambda(lambd, features.device());
  if (!value || !fastda::is_linear(features, matrix, offset)) return py::none();
  fastda::TensorPair results;
  {
    const py::gil_scoped_release without_gil;
    results = fastda::gradient_reversal_linear(features, matrix, offset, *value);
  }
  return py::cast(std::move(results));
}

static py::object domain_adversarial_loss(py::handle source_logits, py::handle target_logits, py::handle source_weight,
                                          py::handle target_weight, py::handle reduction) {
  if (!is_tensor(source_logits) || !is_tensor(target_logits) || !py::isinstance<py::str>(reduction)) return py::none();
  const auto optional = [](py::handle x) {
    return x.is_none() ? std::nullopt : std::optional(THPVariable_Unpack(x.ptr()));
  };
  for (const py::handle weight : {source_weight, target_weight}) {
    if (!weight.is_none() && !is_tensor(weight)) return py::none();
  }
  const at::Tensor &source = THPVariable_Unpack(source_logits.ptr()), &target = THPVariable_Unpack(target_logits.ptr());
  const auto weights = std::pair(optional(source_weight), optional(target_weight));
  const auto kind = py::cast<std::string>(reduction);
  std::optional<at::Tensor> loss;
  {
    // To let other threads run takes as long as some hundred samples.
    std::optional<py::gil_scoped_release> without_gil;
    if (source.numel() + target.numel() > 1024) without_gil.emplace();
    loss = fastda::domain_adversarial_loss(source, target, weights.first, weights.second, kind);
  }
  return loss ? py::cast(*loss) : py::none();
}

static py::object prototypical_loss(py::handle support, py::handle support_labels, py::handle queries,
                                    py::handle query_labels, int64_t num_classes, const std::string& metric,
                                    double temperature, const std::string& reduction) {
  for (const py::handle x : {support, support_labels, queries, query_labels}) {
    if (!THPVariable_CheckExact(x.ptr())) return py::none();
  }
  std::optional<at::Tensor> loss;
  {
    const py::gil_scoped_release without_gil;
    loss = fastda::prototypical_loss(THPVariable_Unpack(support.ptr()), THPVariable_Unpack(support_labels.ptr()),
                                     THPVariable_Unpack(queries.ptr()), THPVariable_Unpack(query_labels.ptr()),
                                     num_classes, metric, temperature, reduction);
  }
  return loss ? py::cast(*loss) : py::none();
}

static py::object constant(const c10::IValue& value) {
  if (value.isList()) {
    py::list values;
    for (const c10::IValue& item : value.toListRef()) values.append(constant(item));
    return values;
  }
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isDouble()) return py::float_(value.toDouble());
  return py::str(value.toStringRef());
}

// Hands second derivatives to Python's `function(op, incoming, operands, constants, needs)`.
static void set_second_order(py::function function) {
  // Kept for the life of the process: when static objects are destroyed the interpreter is gone.
  auto* kept = new py::function(std::move(function));
  fastda::set_second_order([kept](const std::string& op, const std::vector<at::Tensor>& incoming,
                                  const std::vector<at::Tensor>& operands, const std::vector<c10::IValue>& constants,
                                  const std::vector<bool>& needs) {
    const py::gil_scoped_acquire gil;
    py::list values;
    for (const c10::IValue& value : constants) values.append(constant(value));
    return (*kept)(op, incoming, operands, values, needs).cast<std::vector<at::Tensor>>();
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled core of fastda. Importing it registers its kernels with PyTorch.";
  m.def("build_info", &build_info, "What this library was built for, and with: a dict.");
  m.def("set_second_order", &set_second_order, "Install fastda.ops.fused.second_order.");
  const char* eager =
      "The eager lane of the public op: its results, or None where Python has to look at the arguments.";
  m.def("gradient_reversal", &gradient_reversal, eager);
  m.def("gradient_reversal_fork", &gradient_reversal_fork, eager);
  m.def("gradient_reversal_forks", &gradient_reversal_forks, eager);
  m.def("gradient_reversal_linear", &gradient_reversal_linear, eager);
  m.def("domain_adversarial_loss", &domain_adversarial_loss, eager);
  m.def("prototypical_loss", &prototypical_loss, eager);
  m.def("with_gradient", &fastda::with_gradient, "A total over a divisor, whose gradients for leaves are given.");
}
