// Products with centred samples, spread over the threads; their loops, in matrix_loops.h, are to be included before.
#pragma once

#include "../common.h"

#include <c10/core/CPUAllocator.h>

#include <atomic>

namespace fastda {
namespace {

using at::Tensor;

constexpr int64_t widest_panel = 32;  // of Tile::columns, checked there
constexpr int64_t block_depth = 192;  // a block of a panel fits into the first cache, one of all panels into the second

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Runs on as many threads as `count` is worth, each of which goes on with take(&begin, &end) until that is false: the
// next `at_once` of the range, or on a single thread all of it. What is found may not depend on how the range is cut.
template <typename F>
void threads_in_turn(int64_t count, int64_t at_once, const F& run) {
  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::min<int64_t>(available, blocks(count, at_once));
  const int64_t some = threads <= 1 ? count : at_once;
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t* begin, int64_t* end) {
    *begin = next.fetch_add(some);
    *end = std::min(*begin + some, count);
    return *begin < *end;
  };
  if (threads <= 1) {
    if (count > 0) run(take);
    return;
  }
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { run(take); });
}

// As at::parallel_for, but a thread that is done takes the next `at_once`: cores are seldom equally fast. What is found
// may not depend on how the range is cut.
template <typename F>
void parallel_in_turn(int64_t count, int64_t at_once, const F& each) {
  threads_in_turn(count, at_once, [&](const auto& take) {
    for (int64_t begin, end; take(&begin, &end);) each(begin, end);
  });
}

// Runs over the batch, on all threads where it has enough elements for them; else each element uses them all.
template <typename F>
void for_batch(int64_t batch, const F& each) {
  const int64_t threads = at::get_num_threads(), turns = 8;  // a turn is long beside taking it
  if (batch < threads) {
    for (int64_t b = 0; b < batch; ++b) each(b);
    return;
  }
  parallel_in_turn(batch, std::max<int64_t>(1, batch / (threads * turns)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) each(b);
  });
}

// (batch, rows, columns) in one dtype, the columns dense.
inline Tensor matrices(const Tensor& x, at::ScalarType dtype, int64_t batch) {
  const Tensor one = as_type(x, dtype);
  const Tensor result = x.dim() == 3   ? one
                        : x.dim() == 2 ? one.unsqueeze(0)
                                       : one.reshape({batch, x.size(-2), x.size(-1)});
  return result.stride(-1) == 1 || result.size(-1) <= 1 ? result : result.contiguous();
}

// One matrix of samples, row by row, and the means of its columns once they are known.
template <typename T>
struct Samples {
  const T* data;
  int64_t rows, stride, columns;
  double* mean;

  Samples(const Tensor& x, int64_t batch, double* mean)
      : data(x.const_data_ptr<T>() + batch * x.stride(0)),
        rows(x.size(1)),
        stride(x.stride(1)),
        columns(x.size(2)),
        mean(mean) {}
};

template <typename T>
struct TileShape {
  int64_t rows, columns;
  TileShape() { FASTDA_RUN(tile_shape<T>(&rows, &columns)); }
};

// Memory for packed panels. Threads may not create tensors.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(c10::GetDefaultCPUAllocator()->allocate(count * sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

template <typename T>
T* data(const Tensor& x) {
  return x.mutable_data_ptr<T>();
}

// Finds the means of the columns of one matrix or several of the same width; returns the largest variance of a column.
template <typename T>
double find_means(std::initializer_list<Samples<T>> matrices) {
  constexpr int64_t width = 64;
  const Samples<T>* x = matrices.begin();
  const int64_t column_blocks = blocks(x->columns, width), count = matrices.size();
  std::vector<double> largest(count * column_blocks, 0.0);
  at::parallel_for(0, count * column_blocks, grain(x->rows * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Samples<T>& one = x[i / column_blocks];
      const int64_t column = i % column_blocks * width, columns = std::min(width, one.columns - column);
      FASTDA_RUN(column_means(one.data + column, one.rows, one.stride, columns, one.mean + column, &largest[i]));
    }
  });
  return largest.empty() ? 0 : *std::max_element(largest.begin(), largest.end());
}

// The gradient of centred samples has columns that sum to 0. In float64, whose means are rounded to the same precision,
// that takes out what their rounding left; float32 samples are less a mean of more digits.
template <typename T>
void centre_gradient(T* grad, int64_t rows, int64_t columns) {
  constexpr int64_t width = 64;
  if (sizeof(T) < sizeof(double)) return;
  at::parallel_for(0, blocks(columns, width), grain(rows * width), [&](int64_t begin, int64_t end) {
    const int64_t column = begin * width;
    FASTDA_RUN(centre_columns(grad + column, rows, columns, std::min(end * width, columns) - column));
  });
}

template <typename T>
void mirror_upper(T* x, int64_t size) {
  constexpr int64_t rows = 16;
  at::parallel_for(0, blocks(size, rows), grain(rows * size), [&](int64_t begin, int64_t end) {
    FASTDA_RUN(mirror(x, size, begin * rows, std::min(end * rows, size)));
  });
}

// How much of a product one call of `pack` gave: rows of the packed panels, and what their product counts.
struct Packed {
  int64_t depth;
  double weight;
};

// to = Σ weight · PᵀP over blocks of rows of a matrix P of `size` columns and `total_depth` rows in all (to: size ×
// size). pack(block, first, last, packed) packs the panels first to last of a block, at most block_depth deep.
template <typename T, typename Pack>
void symmetric_product(int64_t size, int64_t num_blocks, int64_t total_depth, const Pack& pack, T* to) {
  const TileShape<T> tile;
  const int64_t panels = blocks(size, tile.columns), tiles = panels * (panels + 1) / 2 * (tile.columns / tile.rows);
  const int64_t worth_a_thread = 1 << 20, work = size * size / 2 * total_depth;
  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::min(available, 1 + work / worth_a_thread), panel_values = block_depth * tile.columns;
  if (threads == 1 ||
      (threads <= num_blocks && threads * size <= total_depth)) {  // a sum for each thread: no larger than P
    const Scratch<T> sums((threads - 1) * size * size), scratch(threads * panels * panel_values);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        T *sum = part == 0 ? to : sums.data() + (part - 1) * size * size,
          *packed = scratch.data() + part * panels * panel_values;
        const int64_t first = num_blocks * part / threads, last = num_blocks * (part + 1) / threads;
        for (int64_t block = first; block < last; ++block) {
          const Packed done = pack(block, 0, panels, packed);
          FASTDA_RUN(multiply_symmetric_panels(packed, done.depth, size, static_cast<T>(done.weight), block > first,
                                               sum, size, 0, tiles));
        }
      }
    });
    at::parallel_for(0, threads > 1 ? size : 0, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t part = 0; part < threads - 1; ++part) {
          const T* sum = sums.data() + part * size * size;
          for (int64_t i = row * size + row; i < (row + 1) * size; ++i) to[i] += sum[i];
        }
      }
    });
  } else {  // one sum, its tiles divided among the threads
    const Scratch<T> scratch(panels * panel_values);
    for (int64_t block = 0; block < num_blocks; ++block) {
      at::parallel_for(0, panels, grain(panel_values),
                       [&](int64_t begin, int64_t end) { pack(block, begin, end, scratch.data()); });
      const Packed done = pack(block, 0, 0, scratch.data());
      at::parallel_for(0, tiles, grain(done.depth * tile.rows * tile.columns), [&](int64_t begin, int64_t end) {
        FASTDA_RUN(multiply_symmetric_panels(scratch.data(), done.depth, size, static_cast<T>(done.weight), block > 0,
                                             to, size, begin, end));
      });
    }
  }
  mirror_upper(to, size);
}

// Blocks of the centred samples themselves, for symmetric_product: their scatter matrix XᵀX.
template <typename T>
struct SampleBlocks {
  const Samples<T>& x;
  double weight;

  int64_t count() const { return blocks(x.rows, block_depth); }
  Packed pack(int64_t block, int64_t first, int64_t last, T* packed) const {
    const TileShape<T> tile;
    const int64_t row = block * block_depth, depth = std::min(block_depth, x.rows - row), column = first * tile.columns;
    const int64_t columns = std::min(last * tile.columns, x.columns) - column;
    FASTDA_RUN(pack_columns<T>(x.data + row * x.stride + column, x.stride, depth, columns, x.mean + column, T(1),
                               packed + column * depth, depth, 0));
    return {depth, weight};
  }
};

// to = weight · X S for centred X and a symmetric S: `square`, or what it and its transpose add up to.
template <typename T>
void multiply_symmetric(const Samples<T>& x, const T* square, bool add_transpose, double weight, T* to) {
  constexpr int64_t row_block = 64, column_block = 256;
  const int64_t row_blocks = blocks(x.rows, row_block), column_blocks = blocks(x.columns, column_block);
  const int64_t depth = std::min(block_depth, x.columns);
  const int64_t work = row_block * x.columns * std::min(column_block, x.columns);
  at::parallel_for(0, row_blocks * column_blocks, grain(work), [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(depth * (column_block + row_block + 2 * widest_panel));
    while (begin < end) {  // all rows that meet one block of columns
      const int64_t block = begin / row_blocks, row = begin % row_blocks * row_block;
      const int64_t count = std::min(end - begin, row_blocks - begin % row_blocks);
      const int64_t rows = std::min(count * row_block, x.rows - row), column = block * column_block;
      FASTDA_RUN(multiply_samples(x.data + row * x.stride, x.stride, rows, x.columns, x.mean, square, add_transpose,
                                  column, std::min(column_block, x.columns - column), depth, row_block,
                                  static_cast<T>(weight), to + row * x.columns, scratch.data()));
      begin += count;
    }
  });
}

template <typename T>
double squares(const T* x, int64_t rows, int64_t columns, int64_t stride) {
  double result = 0;
  FASTDA_RUN(sum_of_squares(x, rows, columns, stride, &result));
  return result;
}

}  // namespace
}  // namespace fastda
