// What every kernel file shares: the guard it runs under, and the dtype it accumulates in.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

namespace fastda {

// Kernels call ATen: neither autograd nor autocast (which would round the products to half precision) may step in.
struct KernelGuard {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{at::autocast_dispatch_keyset};
};

// Half precision is raised to float32; float32 and float64 stay as they are.
inline at::ScalarType accumulate_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// x in that dtype; itself, without asking the dispatcher, which takes longer than a small op, where it is in it.
inline at::Tensor as_type(const at::Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : x.to(dtype);
}

// The product of the leading batch dimensions, all but the last `trailing`.
inline int64_t batch_size(const at::Tensor& x, int64_t trailing) {
  int64_t batch = 1;
  for (int64_t i = 0; i < x.dim() - trailing; ++i) batch *= x.size(i);
  return batch;
}

// Shape of a result: the batch dimensions of x, then `last`.
inline std::vector<int64_t> batched(const at::Tensor& x, int64_t trailing, std::initializer_list<int64_t> last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - trailing);
  shape.insert(shape.end(), last);
  return shape;
}

// Items that a thread should at least be given, each of `work` operations.
inline int64_t grain(int64_t work) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, work));
}

// Checks of a direct call of an op; the public functions have said more by then.
inline void check_floating(const char* name, const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
                   ": expected float32, float64, bfloat16 or float16, got ", dtype);
}

inline void check_features(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, name, ": expected shape (..., samples, features), got ", x.sizes());
  check_floating(name, x);
}

inline void check_same(const char* name, const at::Tensor& x, const char* other_name, const at::Tensor& other) {
  const auto batch = [](const at::Tensor& tensor) { return tensor.sizes().slice(0, tensor.dim() - 2); };
  TORCH_CHECK_VALUE(batch(x) == batch(other) && x.size(-1) == other.size(-1), name,
                    ": expected the batch dimensions and features of ", other_name, ", ", other.sizes(), ", got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == other.scalar_type(), name, ": expected the dtype of ", other_name, ", ",
                   other.scalar_type(), ", got ", x.scalar_type());
}

inline void check_count(const char* name, const at::Tensor& x, int64_t count) {
  TORCH_CHECK_VALUE(x.numel() == count, name, ": expected ", count, " elements, got shape ", x.sizes());
}

}  // namespace fastda
