// The Python module fastda._C, and nothing else: the kernels register themselves with PyTorch, each in its own file.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "autograd.h"
#include "gradient_reversal.h"

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
  return info;
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
  m.def("gradient_reversal", &fastda::gradient_reversal_view, "A view of x whose gradient is multiplied by -lambd.");
}
