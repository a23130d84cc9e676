// g₁ − λ·g₂ on the GPU: one pass over memory, one launch for a list of gradients of any sizes; λ is read on the device.
#include "../common.h"
#include "../gradient_reversal.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>

namespace fastda {
namespace {

using at::Tensor;

constexpr int threads = 256;
constexpr int loads = 4;          // vectors that a thread has in flight
constexpr int most_tensors = 64;  // of one launch: their table is a kernel argument, of at most 4 KB

template <typename A, typename B>
constexpr int vector_size = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// Which tensor a block works on follows from the number of its first block.
template <typename A, typename B>
struct Table {
  A* sums[most_tensors];
  const A* grads[most_tensors];
  const B* reversed_grads[most_tensors];
  int64_t sizes[most_tensors];
  int64_t first_blocks[most_tensors];
  int count;
};

// Elements in 16-byte accesses.
template <typename T, int N>
struct alignas(16) Vector {
  T values[N];
};

__device__ double read(const void* lambd, at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return *static_cast<const double*>(lambd);
    case at::kHalf:
      return static_cast<float>(*static_cast<const at::Half*>(lambd));
    case at::kBFloat16:
      return static_cast<float>(*static_cast<const at::BFloat16*>(lambd));
    default:
      return *static_cast<const float*>(lambd);
  }
}

template <typename Op, typename A, typename B>
__device__ A subtracted(Op lambd, A grad, B reversed_grad) {
  return static_cast<A>(static_cast<Op>(grad) - lambd * static_cast<Op>(reversed_grad));
}

template <typename A, typename B>
__device__ bool is_aligned(const A* sum, const A* grad, const B* reversed_grad) {
  return ((reinterpret_cast<uintptr_t>(sum) | reinterpret_cast<uintptr_t>(grad) |
           reinterpret_cast<uintptr_t>(reversed_grad)) &
          15) == 0;
}

template <typename A, typename B, typename Op>
__global__ void __launch_bounds__(threads)
    fork_backward_kernel(const Table<A, B> table, const void* lambd, at::ScalarType dtype) {
  constexpr int N = vector_size<A, B>;
  int index = 0;
  while (index + 1 < table.count && table.first_blocks[index + 1] <= static_cast<int64_t>(blockIdx.x)) ++index;
  A* sum = table.sums[index];
  const A* grad = table.grads[index];
  const B* reversed_grad = table.reversed_grads[index];
  const int64_t size = table.sizes[index];
  const Op factor = static_cast<Op>(read(lambd, dtype));
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.first_blocks[index]) * (threads * loads * N);

  if (begin + threads * loads * N <= size && is_aligned(sum, grad, reversed_grad)) {
    Vector<A, N> a[loads];
    Vector<B, N> b[loads];
#pragma unroll
    for (int k = 0; k < loads; ++k) {
      const int64_t i = begin + (k * threads + threadIdx.x) * N;
      a[k] = *reinterpret_cast<const Vector<A, N>*>(grad + i);
      b[k] = *reinterpret_cast<const Vector<B, N>*>(reversed_grad + i);
    }
#pragma unroll
    for (int k = 0; k < loads; ++k) {
#pragma unroll
      for (int n = 0; n < N; ++n) a[k].values[n] = subtracted(factor, a[k].values[n], b[k].values[n]);
      *reinterpret_cast<Vector<A, N>*>(sum + begin + (k * threads + threadIdx.x) * N) = a[k];
    }
    return;
  }
  const int64_t end = begin + threads * loads * N < size ? begin + threads * loads * N : size;
  for (int64_t i = begin + threadIdx.x; i < end; i += threads) sum[i] = subtracted(factor, grad[i], reversed_grad[i]);
}

template <typename A, typename B>
void launch(const std::vector<size_t>& which, const std::vector<Tensor>& sums, const std::vector<Tensor>& grads,
            const std::vector<Tensor>& reversed_grads, const Tensor& lambd) {
  using Op = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;
  constexpr int64_t block = threads * loads * vector_size<A, B>;
  for (size_t start = 0; start < which.size(); start += most_tensors) {
    Table<A, B> table;
    table.count = static_cast<int>(std::min<size_t>(most_tensors, which.size() - start));
    int64_t blocks = 0;
    for (int k = 0; k < table.count; ++k) {
      const size_t i = which[start + k];
      table.sums[k] = sums[i].mutable_data_ptr<A>();
      table.grads[k] = grads[i].const_data_ptr<A>();
      table.reversed_grads[k] = reversed_grads[i].const_data_ptr<B>();
      table.sizes[k] = sums[i].numel();
      table.first_blocks[k] = blocks;
      blocks += (table.sizes[k] + block - 1) / block;
    }
    fork_backward_kernel<A, B, Op><<<static_cast<unsigned>(blocks), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        table, lambd.const_data_ptr(), lambd.scalar_type());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::vector<Tensor> fork_backward(at::TensorList grads, at::TensorList reversed_grads, const Tensor& lambd) {
  check_fork_backward(grads, reversed_grads, lambd);
  const KernelGuard guard;
  const c10::cuda::CUDAGuard device(lambd.device());
  std::vector<Tensor> sums, dense, reversed_dense;
  std::map<std::pair<at::ScalarType, at::ScalarType>, std::vector<size_t>> by_dtypes;  // a launch for each
  for (size_t i = 0; i < grads.size(); ++i) {
    dense.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].clone());
    const Tensor& grad = dense.back();
    const bool alike = reversed_grads[i].strides() == grad.strides();
    reversed_dense.push_back(alike ? reversed_grads[i]
                                   : at::empty_like(grad, reversed_grads[i].scalar_type()).copy_(reversed_grads[i]));
    sums.push_back(at::empty_like(grad));
    if (grad.numel() > 0) by_dtypes[{grad.scalar_type(), reversed_grads[i].scalar_type()}].push_back(i);
  }
  for (const auto& [dtypes, which] : by_dtypes) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtypes.first, "gradient_reversal_fork_backward", [&] {
      using A = scalar_t;
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtypes.second, "gradient_reversal_fork_backward",
                                      [&] { launch<A, scalar_t>(which, sums, dense, reversed_dense, lambd); });
    });
  }
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CUDA, m) { m.impl("gradient_reversal_fork_backward", &fork_backward); }

}  // namespace fastda
