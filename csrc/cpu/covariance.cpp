// Covariance matrices: half of the symmetric product, of samples that are centred while they are packed.
#include "../autograd.h"
#include "../common.h"

#include <ATen/ops/empty.h>

#define FASTDA_LOOPS "matrix_loops.h"
#include "for_each_isa.h"

#include "matrix.h"

namespace fastda {
namespace {

template <typename T>
void forward(const Tensor& x, int64_t correction, const Tensor& value, const Tensor& mean) {
  const int64_t size = x.size(2);
  for_batch(x.size(0), [&](int64_t b) {
    const Samples<T> samples(x, b, data<double>(mean) + b * size);
    find_means({samples});
    const SampleBlocks<T> sample_blocks{samples, 1.0 / (samples.rows - correction)};
    const auto pack = [&](int64_t block, int64_t first, int64_t last, T* packed) {
      return sample_blocks.pack(block, first, last, packed);
    };
    symmetric_product(size, sample_blocks.count(), samples.rows, pack, data<T>(value) + b * size * size);
  });
}

// (x − mean)(g + gᵀ) / (N − correction)
template <typename T>
void backward(const Tensor& grad_value, const Tensor& x, const Tensor& mean, int64_t correction, const Tensor& grad_x) {
  const int64_t rows = x.size(1), size = x.size(2);
  for_batch(x.size(0), [&](int64_t b) {
    const Samples<T> samples(x, b, data<double>(mean) + b * size);
    T* grad = data<T>(grad_x) + b * rows * size;
    const T* incoming = grad_value.const_data_ptr<T>() + b * size * size;
    multiply_symmetric(samples, incoming, true, 1.0 / (rows - correction), grad);
    centre_gradient(grad, rows, size);
  });
}

void check(const Tensor& x, int64_t correction) {
  check_features("x", x);
  TORCH_CHECK_VALUE(x.size(-2) > correction, "x: expected more samples than correction, ", correction, ", got ",
                    x.size(-2));
}

std::tuple<Tensor, Tensor> covariance(const Tensor& x, int64_t correction) {
  const KernelGuard guard;
  check(x, correction);
  const int64_t batch = batch_size(x, 2), size = x.size(-1);
  const auto dtype = accumulate_type(x.scalar_type());
  const auto options = x.options().dtype(dtype);
  const Tensor value = at::empty({batch, size, size}, options),
               mean = at::empty({batch, size}, options.dtype(at::kDouble));
  (dtype == at::kDouble ? &forward<double> : &forward<float>)(matrices(x, dtype, batch), correction, value, mean);
  return {value.reshape(batched(x, 2, {size, size})), mean.reshape(batched(x, 2, {size}))};
}

Tensor covariance_backward(const Tensor& grad_value, const Tensor& x, const Tensor& mean, int64_t correction,
                           bool need_x) {
  const KernelGuard guard;
  check(x, correction);
  if (!need_x) return at::empty({0}, x.options());
  const int64_t batch = batch_size(x, 2), rows = x.size(-2), size = x.size(-1);
  check_count("grad_value", grad_value, batch * size * size);
  check_count("mean", mean, batch * size);
  const auto dtype = accumulate_type(x.scalar_type());
  const Tensor grad_x = at::empty({batch, rows, size}, x.options().dtype(dtype));
  const Tensor grad = grad_value.to(dtype).reshape({batch, size, size}).contiguous();
  const Tensor means = mean.to(at::kDouble).reshape({batch, size}).contiguous();
  (dtype == at::kDouble ? &backward<double> : &backward<float>)(grad, matrices(x, dtype, batch), means, correction,
                                                                grad_x);
  return grad_x.reshape(x.sizes()).to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("covariance", &covariance);
  m.impl("covariance_backward", &covariance_backward);
}

TORCH_LIBRARY_IMPL(fastda, Autograd, m) { differentiable(m, "covariance"); }

}  // namespace fastda
