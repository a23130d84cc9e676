#include "eager.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>

namespace fastda {

bool is_plain_eager() {
  constexpr c10::DispatchKeySet modes({c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Tracer});
  return !c10::impl::tls_local_dispatch_key_set().included_.has_any(modes) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool is_plain(const at::Tensor& x) {
#ifdef FASTDA_WITH_CUDA
  const bool served = x.is_cpu() || x.is_cuda();
#else
  const bool served = x.is_cpu();
#endif
  constexpr c10::DispatchKeySet special({c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor, c10::DispatchKey::Batched,
                                         c10::DispatchKey::FuncTorchBatched});
  const auto dtype = x.scalar_type();
  return served && x.layout() == at::kStrided && !x.key_set().has_any(special) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16);
}

}  // namespace fastda
