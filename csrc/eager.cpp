#include "eager.h"

#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>

namespace fastda {

bool is_plain_eager() {
  constexpr c10::DispatchKeySet modes({c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Tracer});
  return !c10::impl::tls_local_dispatch_key_set().included_.has_any(modes) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

namespace {

bool is_served(const at::Tensor& x) {
#ifdef FASTDA_WITH_CUDA
  const bool has_kernels = x.is_cpu() || x.is_cuda();
#else
  const bool has_kernels = x.is_cpu();
#endif
  constexpr c10::DispatchKeySet special({c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor, c10::DispatchKey::Batched,
                                         c10::DispatchKey::FuncTorchBatched});
  return has_kernels && x.layout() == at::kStrided && !x.key_set().has_any(special);
}

}  // namespace

bool is_plain(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return is_served(x) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16);
}

bool are_plain_labels(const at::Tensor& x) { return is_served(x) && x.scalar_type() == at::kLong; }

bool is_recorded(const at::Tensor& x) {
  const c10::DispatchKeySet excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  return c10::GradMode::is_enabled() && x.requires_grad() && !excluded.has(c10::DispatchKey::AutogradFunctionality);
}

bool may_save(const at::Tensor& x) { return !x.is_inference() && !at::SavedTensorDefaultHooks::get_hooks(); }

bool needs_op(const at::Tensor& grad) {
  return c10::GradMode::is_enabled() || !is_plain_eager() || !is_plain(grad);
}

}  // namespace fastda
