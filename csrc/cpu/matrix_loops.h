// Matrix products on packed panels; compiled once for each instruction set by for_each_isa.h.
//
// A panel of width W holds W columns of a matrix, row after row; the last panel of a matrix is filled up with zeros.
// Element (k, j) lies at packed[(j / W * depth + k) * W + j % W]. The inner kernel keeps a tile of
// Σ_k a(k, i) b(k, j) in registers.

// As many sums as the registers hold: there are 32 with AVX-512, 16 with less.
template <typename T>
struct Tile {
  static constexpr int64_t lanes = FASTDA_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t vectors = FASTDA_VECTOR_BYTES == 32 ? 3 : 2;
  static constexpr int64_t rows = FASTDA_VECTOR_BYTES == 64 ? 8 : 4;
  static constexpr int64_t columns = lanes * vectors;  // a multiple of rows
  static_assert(columns % rows == 0 && columns <= 32, "matrix.h lays out scratch for panels of up to 32 columns");
  typedef T Vector __attribute__((vector_size(FASTDA_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <typename T>
void tile_shape(int64_t* rows, int64_t* columns) {
  *rows = Tile<T>::rows;
  *columns = Tile<T>::columns;
}

// tile(i, j) = Σ_k a[k·step + i] · b[k·columns + j].
template <typename T>
void multiply_tile(const T* a, int64_t step, const T* b, int64_t depth, T* tile) {
  using Vector = typename Tile<T>::Vector;
  constexpr int64_t rows = Tile<T>::rows, vectors = Tile<T>::vectors, lanes = Tile<T>::lanes;
  Vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) sum[i][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k, a += step, b += vectors * lanes) {
    Vector right[vectors];
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + v * lanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; ++i) {
      const T left = a[i];
#pragma GCC unroll 3
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) *reinterpret_cast<Vector*>(tile + (i * vectors + v) * lanes) = sum[i][v];
  }
}

// Adds weight · tile to the rows × columns corner of `to`, or stores it there.
template <typename T>
void put_tile(const T* tile, T weight, bool add, T* to, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i, tile += Tile<T>::columns, to += stride) {
    if (add) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] += weight * tile[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] = weight * tile[j];
    }
  }
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The upper triangle of weight · PᵀP, of a matrix P of `count` columns in panels of Tile::columns, is stored in `to` or
// added to it: tiles begin to end, counted down each panel from its top to its diagonal, which the last reach below.
template <typename T>
void multiply_symmetric_panels(const T* packed, int64_t depth, int64_t count, T weight, bool add, T* to, int64_t stride,
                               int64_t begin, int64_t end) {
  constexpr int64_t rows = Tile<T>::rows, columns = Tile<T>::columns, ratio = columns / rows;
  T tile[rows * columns];
  int64_t panel = 0;
  while ((panel + 1) * (panel + 2) / 2 * ratio <= begin) ++panel;
  int64_t i = (begin - panel * (panel + 1) / 2 * ratio) * rows;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (i >= (panel + 1) * columns) ++panel, i = 0;
    if (i < count) {
      multiply_tile(packed + i / columns * depth * columns + i % columns, columns, packed + panel * depth * columns,
                    depth, tile);
      put_tile(tile, weight, add, to + i * stride + panel * columns, stride, least(rows, count - i),
               least(columns, count - panel * columns));
    }
    i += rows;
  }
}

// to (rows × columns) = weight · AᵀB, or added to it, for A in panels of Tile::rows, `a_depth` deep, and B in panels of
// Tile::columns.
template <typename T>
void multiply_panels(const T* a, int64_t a_depth, int64_t rows, const T* b, int64_t columns, int64_t depth, T weight,
                     bool add, T* to, int64_t stride) {
  constexpr int64_t tile_rows = Tile<T>::rows, tile_columns = Tile<T>::columns;
  T tile[tile_rows * tile_columns];
  for (int64_t j = 0; j < columns; j += tile_columns) {
    for (int64_t i = 0; i < rows; i += tile_rows) {
      multiply_tile(a + i * a_depth, tile_rows, b + j * depth, depth, tile);
      put_tile(tile, weight, add, to + i * stride + j, stride, least(tile_rows, rows - i),
               least(tile_columns, columns - j));
    }
  }
}

// A mean in two parts of T: what lies below the last digit of the first is in the second.
template <typename T>
struct SplitMean {
  T high, low;
  explicit SplitMean(double mean) : high(static_cast<T>(mean)), low(static_cast<T>(mean - static_cast<double>(high))) {}
};

// Columns of x less their means (none if null), times `scale`, as rows first, first + 1, ... of panels `depth` deep.
template <typename T, int64_t width = Tile<T>::columns>
void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, const double* mean, T scale, T* packed,
                  int64_t depth, int64_t first) {
  for (int64_t panel = 0; panel < columns; panel += width) {
    const int64_t used = least(width, columns - panel);
    T high[width] = {}, low[width] = {};
    for (int64_t j = 0; mean && j < used; ++j) {
      const SplitMean<T> split(mean[panel + j]);
      high[j] = split.high;
      low[j] = split.low;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = x + row * stride + panel;
      T* to = packed + (panel / width * depth + first + row) * width;
      if (used == width) {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) to[j] = ((from[j] - high[j]) - low[j]) * scale;
      } else {
        for (int64_t j = 0; j < used; ++j) to[j] = ((from[j] - high[j]) - low[j]) * scale;
        for (int64_t j = used; j < width; ++j) to[j] = 0;
      }
    }
  }
}

// A square of 16 bytes by 16 bytes, turned over; less two numbers for each of its columns.
struct Corner {
  typedef float Floats __attribute__((vector_size(16), aligned(4), may_alias));
  typedef double Doubles __attribute__((vector_size(16), aligned(8), may_alias));

  static void turn(const float* x, int64_t stride, const float* high, const float* low, float* to, int64_t to_stride) {
    const Floats h = *reinterpret_cast<const Floats*>(high), l = *reinterpret_cast<const Floats*>(low);
    Floats row[4];
    for (int64_t i = 0; i < 4; ++i) row[i] = (*reinterpret_cast<const Floats*>(x + i * stride) - h) - l;
    const Floats a = FASTDA_SHUFFLE(row[0], row[1], 0, 4, 1, 5), b = FASTDA_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
    const Floats c = FASTDA_SHUFFLE(row[2], row[3], 0, 4, 1, 5), d = FASTDA_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
    *reinterpret_cast<Floats*>(to) = FASTDA_SHUFFLE(a, c, 0, 1, 4, 5);
    *reinterpret_cast<Floats*>(to + to_stride) = FASTDA_SHUFFLE(a, c, 2, 3, 6, 7);
    *reinterpret_cast<Floats*>(to + 2 * to_stride) = FASTDA_SHUFFLE(b, d, 0, 1, 4, 5);
    *reinterpret_cast<Floats*>(to + 3 * to_stride) = FASTDA_SHUFFLE(b, d, 2, 3, 6, 7);
  }

  static void turn(const double* x, int64_t stride, const double* high, const double* low, double* to,
                   int64_t to_stride) {
    const Doubles h = *reinterpret_cast<const Doubles*>(high), l = *reinterpret_cast<const Doubles*>(low);
    const Doubles a = (*reinterpret_cast<const Doubles*>(x) - h) - l;
    const Doubles b = (*reinterpret_cast<const Doubles*>(x + stride) - h) - l;
    *reinterpret_cast<Doubles*>(to) = FASTDA_SHUFFLE(a, b, 0, 2);
    *reinterpret_cast<Doubles*>(to + to_stride) = FASTDA_SHUFFLE(a, b, 1, 3);
  }
};

// Rows of x less the means of their columns, as columns first, first + 1, ... of panels that are `depth` deep.
template <typename T, int64_t width = Tile<T>::columns>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, const double* mean, T* packed, int64_t first) {
  constexpr int64_t block = 16, side = 16 / sizeof(T);
  T high[block], low[block];
  for (int64_t k = 0; k < depth; k += block) {
    const int64_t count = least(block, depth - k);
    for (int64_t c = 0; c < count; ++c) {
      const SplitMean<T> split(mean[k + c]);
      high[c] = split.high;
      low[c] = split.low;
    }
    for (int64_t row = 0; row < rows;) {
      const int64_t column = first + row;
      const T* from = x + row * stride + k;
      T* to = packed + (column / width * depth + k) * width + column % width;
      if (count == block && rows - row >= side && width - column % width >= side) {
        for (int64_t c = 0; c < block; c += side)
          Corner::turn(from + c, stride, high + c, low + c, to + c * width, width);
        row += side;
      } else {
        for (int64_t c = 0; c < count; ++c) to[c * width] = (from[c] - high[c]) - low[c];
        ++row;
      }
    }
  }
}

// Zeros for the columns of the last panel that a matrix of `count` columns leaves open.
template <typename T, int64_t width = Tile<T>::columns>
void fill_last_panel(T* packed, int64_t depth, int64_t count) {
  const int64_t used = count % width;
  if (used == 0) return;
  T* panel = packed + count / width * depth * width;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = used; j < width; ++j) panel[k * width + j] = 0;
  }
}

// Rows first to first + depth and columns begin to begin + columns of a square matrix plus its transpose.
template <typename T, int64_t width = Tile<T>::columns>
void pack_symmetric_sum(const T* x, int64_t size, int64_t first, int64_t depth, int64_t begin, int64_t columns,
                        T* packed) {
  for (int64_t panel = 0; panel < columns; panel += width) {
    const int64_t used = least(width, columns - panel);
    for (int64_t k = 0; k < depth; ++k) {
      const T *row = x + (first + k) * size + begin + panel, *column = x + (begin + panel) * size + first + k;
      T* to = packed + (panel / width * depth + k) * width;
      for (int64_t j = 0; j < used; ++j) to[j] = row[j] + column[j * size];
      for (int64_t j = used; j < width; ++j) to[j] = 0;
    }
  }
}

// Columns begin to begin + columns of weight · Xc S, for centred rows Xc of x and a symmetric S: `square`, or what it
// and its transpose add up to. Scratch holds depth · (columns + rows_at_once) values and one more panel of each.
template <typename T>
void multiply_samples(const T* x, int64_t stride, int64_t rows, int64_t size, const double* mean, const T* square,
                      bool add_transpose, int64_t begin, int64_t columns, int64_t depth, int64_t rows_at_once, T weight,
                      T* to, T* scratch) {
  constexpr int64_t width = Tile<T>::columns;
  T* left = scratch + (columns + width - 1) / width * width * depth;
  for (int64_t k = 0; k < size; k += depth) {
    const int64_t count = least(depth, size - k);
    if (add_transpose) {
      pack_symmetric_sum(square, size, k, count, begin, columns, scratch);
    } else {
      pack_columns<T>(square + k * size + begin, size, count, columns, nullptr, T(1), scratch, count, 0);
    }
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      const int64_t some = least(rows_at_once, rows - row);
      pack_rows<T, Tile<T>::rows>(x + row * stride + k, stride, some, count, mean + k, left, 0);
      fill_last_panel<T, Tile<T>::rows>(left, count, some);
      multiply_panels(left, count, some, scratch, columns, count, weight, k > 0, to + row * size + begin, size);
    }
  }
}

// The lower triangle from the upper one: rows begin to end, begin a multiple of four.
template <typename T>
void mirror(T* x, int64_t size, int64_t begin, int64_t end) {
  constexpr int64_t side = 16 / sizeof(T), block = 16;  // one column of a block stays in the cache
  const T zeros[side] = {};
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = least(first + block, end);
    for (int64_t j = 0; j < last; j += side) {
      for (int64_t i = first; i < last; i += side) {
        if (i + side <= last && j + side <= i) {
          Corner::turn(x + j * size + i, size, zeros, zeros, x + i * size + j, size);
        } else {
          for (int64_t row = i; row < least(i + side, last); ++row) {
            for (int64_t column = j; column < least(j + side, row); ++column)
              x[row * size + column] = x[column * size + row];
          }
        }
      }
    }
  }
}

// Means of columns in float64, and the largest of their variances if `largest` is not null. The mean of float64 columns
// is taken twice: there is no wider sum to take it from.
template <typename T>
void column_means(const T* x, int64_t rows, int64_t stride, int64_t columns, double* means, double* largest) {
  constexpr int64_t block = 64;
  constexpr bool twice = sizeof(T) == sizeof(double);
  const double divisor = static_cast<double>(rows);
  for (int64_t begin = 0; begin < columns; begin += block) {
    const int64_t count = least(block, columns - begin);
    double sum[block] = {}, rest[block] = {}, squares[block] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const T* values = x + row * stride + begin;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const double value = static_cast<double>(values[j]);
        sum[j] += value;
        squares[j] += value * value;
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      sum[j] /= divisor;
      squares[j] = twice ? 0 : squares[j] - divisor * sum[j] * sum[j];
    }
    for (int64_t row = 0; twice && row < rows; ++row) {
      const T* values = x + row * stride + begin;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const double centred = static_cast<double>(values[j]) - sum[j];
        rest[j] += centred;
        squares[j] += centred * centred;
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      means[begin + j] = sum[j] + rest[j] / divisor;
      if (largest && squares[j] > *largest * divisor) *largest = squares[j] / divisor;
    }
  }
}

// Centres the columns of x. What is left of float64 means when they are rounded goes with it.
template <typename T>
void centre_columns(T* x, int64_t rows, int64_t stride, int64_t columns) {
  constexpr int64_t block = 64;
  double mean[block];
  for (int64_t begin = 0; begin < columns; begin += block) {
    const int64_t count = least(block, columns - begin);
    column_means(x + begin, rows, stride, count, mean, nullptr);
    for (int64_t row = 0; row < rows; ++row) {
      T* values = x + row * stride + begin;
      for (int64_t j = 0; j < count; ++j) values[j] -= static_cast<T>(mean[j]);
    }
  }
}

// Sum of squares in float64 of a rows × columns block.
template <typename T>
void sum_of_squares(const T* x, int64_t rows, int64_t columns, int64_t stride, double* result) {
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* values = x + row * stride;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t column = 0; column < columns; ++column) {
      const double value = static_cast<double>(values[column]);
      sum += value * value;
    }
    total += sum;
  }
  *result = total;
}
