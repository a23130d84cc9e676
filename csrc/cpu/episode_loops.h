// Inner loops of episodes; compiled once for each instruction set by for_each_isa.h. Here those of very few classes,
// whose gradients stay in registers; those of more are products, in episode_products_loops.h.
#include "prototypes_loops.h"

#include "episode_products_loops.h"

// Of the sums over queries, which stay in the first cache, with the prototypes.
template <typename T>
constexpr int64_t columns_of_group = 3072 / sizeof(T);

// A row's gradient, and what it adds to those of a group of prototypes, over some columns: Σ_c w_c (q − p_c), and
// w_c (p_c − q) on top of sums[c]; as products Σ_c w_c p_c and w_c q.
template <typename T, bool product, int rows>
FASTDA_INLINE void gradients_of_rows(const T* q, int64_t q_stride, const T* const* p, const T* w, int64_t begin,
                                     int64_t end, int64_t width, Put put, T* grad, int64_t grad_stride, T* sums) {
  using G = Grid<T>;
  typename G::Vector weight[rows][classes_of_group];
  const T* at[classes_of_group];
#pragma GCC unroll 8
  for (int c = 0; c < classes_of_group; ++c) {
    at[c] = p[c];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) weight[r][c] = w[r * classes_of_group + c] - typename G::Vector{};
  }
  for (int64_t d = begin; d < end; d += G::lanes) {
    typename G::Vector x[rows], of_query[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      x[r] = G::load(q + r * q_stride + d);
      __builtin_prefetch(q + (r + rows) * q_stride + d, 0, 2);  // to the second cache, as in sum_features
      of_query[r] = typename G::Vector{};
    }
#pragma GCC unroll 8
    for (int c = 0; c < classes_of_group; ++c) {
      T* to = sums + c * columns_of_group<T> + d - begin;
      const typename G::Vector y = G::load(at[c] + d);
      typename G::Vector sum = G::load(to);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const typename G::Vector difference = x[r] - y;
        of_query[r] += weight[r][c] * (product ? y : difference);
        sum += weight[r][c] * (product ? x[r] : -difference);
      }
      G::store(to, sum);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      T* to = grad + r * grad_stride + d;
      if (put == Put::stream) {
        G::stream(to, of_query[r]);
      } else {
        G::put(of_query[r], put == Put::add, to, width - d);
      }
    }
  }
}

// Gradients of queries and of up to classes_of_group prototypes in one pass over the queries, of some columns, whole
// vectors of them. Columns from `width` on are filling, and not written.
template <typename T, bool product>
void gradients_of_group(const T* q, int64_t q_stride, int64_t queries, const T* p, int64_t p_stride, int64_t classes,
                        const T* w, int64_t w_stride, int64_t begin, int64_t end, int64_t width, Put put, T* grad_q,
                        T* grad_p, int64_t grad_stride) {
  using G = Grid<T>;
  constexpr int64_t rows = 2;
  const T* p_rows[classes_of_group];
  for (int64_t c = 0; c < classes_of_group; ++c) p_rows[c] = p + least(c, classes - 1) * p_stride;
  const int64_t parts = (end - begin + columns_of_group<T> - 1) / columns_of_group<T>;
  const int64_t at_once = parts > 0 ? ((end - begin) / G::lanes + parts - 1) / parts * G::lanes : 0;
  for (; begin < end; begin += at_once) {
    const int64_t last = least(begin + at_once, end);
    T sums[classes_of_group * columns_of_group<T>], weights[rows * classes_of_group] = {};
    for (int64_t c = 0; c < classes_of_group; ++c) {
      for (int64_t d = 0; d < last - begin; ++d) sums[c * columns_of_group<T> + d] = 0;
    }
    for (int64_t i = 0; i < queries; i += rows) {
      const int64_t some = least(rows, queries - i);
      for (int64_t r = 0; r < some; ++r) {
        for (int64_t c = 0; c < classes; ++c) weights[r * classes_of_group + c] = w[(i + r) * w_stride + c];
      }
      const auto run = some == rows ? &gradients_of_rows<T, product, rows> : &gradients_of_rows<T, product, 1>;
      run(q + i * q_stride, q_stride, p_rows, weights, begin, last, width, put, grad_q + i * grad_stride, grad_stride,
          sums);
    }
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t d = begin; d < last; d += G::lanes) {
        G::put(G::load(sums + c * columns_of_group<T> + d - begin), false, grad_p + c * grad_stride + d, width - d);
      }
    }
  }
#if FASTDA_X86
  if (put == Put::stream) asm volatile("sfence" ::: "memory");  // before another thread is told that it is done
#endif
}

template <typename T>
void gradients_of_group(bool product, const T* q, int64_t q_stride, int64_t queries, const T* p, int64_t p_stride,
                        int64_t classes, const T* w, int64_t w_stride, int64_t begin, int64_t end, int64_t width,
                        Put put, T* grad_q, T* grad_p, int64_t grad_stride) {
  const auto run = product ? &gradients_of_group<T, true> : &gradients_of_group<T, false>;
  run(q, q_stride, queries, p, p_stride, classes, w, w_stride, begin, end, width, put, grad_q, grad_p, grad_stride);
}
