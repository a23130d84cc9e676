#include "prototypes.h"

#include "common.h"
#include "eager.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <tuple>

namespace fastda {
namespace {

using at::Tensor;

// Samples in rows and a label for each, on the CPU.
bool is_plain_set(const Tensor& samples, const Tensor& labels) {
  return samples.dim() == 2 && samples.is_cpu() && is_plain(samples) && labels.is_cpu() &&
         labels.scalar_type() == at::kLong && labels.layout() == at::kStrided && labels.dim() == 1 &&
         labels.size(0) == samples.size(0) && !labels.key_set().has(c10::DispatchKey::Python);
}

}  // namespace

std::optional<Tensor> prototypical_loss(const Tensor& support, const Tensor& support_labels, const Tensor& queries,
                                        const Tensor& query_labels, int64_t num_classes, const std::string& metric,
                                        double temperature, const std::string& reduction) {
  if (!is_plain_eager() || !is_plain_set(support, support_labels) || !is_plain_set(queries, query_labels) ||
      support.size(1) != queries.size(1) || support.scalar_type() != queries.scalar_type() ||
      !(temperature > 0) || !std::isfinite(temperature)) {
    return std::nullopt;
  }
  using Episode = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastda::prototypical_loss", "")
                             .typed<Episode(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            c10::SymInt, c10::string_view, c10::string_view)>();
  const Tensor t = at::scalar_tensor(temperature, at::TensorOptions(accumulate_type(queries.scalar_type())));
  try {
    return std::get<0>(
        op.call(support, queries, t, support_labels, query_labels, num_classes, metric, reduction));
  } catch (const c10::Error&) {  // a label that is none of the classes, say: Python has the exceptions for it
    return std::nullopt;
  }
}

}  // namespace fastda
