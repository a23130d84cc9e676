// Sums over features of queries against prototypes, and over samples of their differences; compiled once for each
// instruction set by for_each_isa.h.
//
// Few of them: from the differences q − p themselves, exact where ‖q‖² − 2q·p + ‖p‖² cancels. Many: from products of
// what is left of the points without one near them all, and from differences where even that cancels. Rows hold whole
// vectors, filled up with zeros.

// Terms that are added up one by one: sums of sums round less than one long sum.
constexpr int64_t terms_of_sum = 32, terms_of_products = 64;

// Inlined, arrays of vectors stay in registers.
#define FASTDA_INLINE inline __attribute__((always_inline))

template <typename T>
struct Grid {
  static constexpr int64_t lanes = FASTDA_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t queries = FASTDA_VECTOR_BYTES == 64 ? 4 : 2;  // what the registers hold
  static constexpr int64_t classes = 5;
  typedef T Vector __attribute__((vector_size(FASTDA_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  static Vector load(const T* x) { return *reinterpret_cast<const Vector*>(x); }
  static void store(T* x, Vector value) { *reinterpret_cast<Vector*>(x) = value; }
  // Adds each lane to a sum of its own in float64.
  static FASTDA_INLINE void add_in_float64(Vector value, double* sums) {
    typedef double Wide __attribute__((vector_size(lanes * sizeof(double)), aligned(sizeof(double)), may_alias));
    *reinterpret_cast<Wide*>(sums) += __builtin_convertvector(value, Wide);
  }
  // Past the caches; `to` is aligned to whole vectors.
  static void stream(T* to, Vector value) {
#if FASTDA_X86 && FASTDA_VECTOR_BYTES == 64
    asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(to)) : "v"(value));
#elif FASTDA_X86 && FASTDA_VECTOR_BYTES == 32
    asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(to)) : "x"(value));
#elif FASTDA_X86
    asm volatile("movntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(to)) : "x"(value));
#else
    store(to, value);
#endif
  }
  // Stores a value, or adds it; no more than `width` of its lanes.
  static void put(Vector value, bool add, T* to, int64_t width) {
    if (width >= lanes) return store(to, add ? load(to) + value : value);
    for (int64_t c = 0; c < width; ++c) to[c] = (add ? to[c] : T(0)) + value[c];
  }
};

// Of two vectors one, that holds the sums of neighbouring groups of `group` lanes, those of a before those of b.
template <int group, typename Vector, size_t... lane>
FASTDA_INLINE Vector fold(Vector a, Vector b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
  const Vector first =
      FASTDA_SHUFFLE(a, b, int(lane / (2 * group) * 2 * group + lane % group + lane / group % 2 * lanes)...);
  const Vector second =
      FASTDA_SHUFFLE(a, b, int(lane / (2 * group) * 2 * group + lane % group + lane / group % 2 * lanes + group)...);
  return first + second;
}

template <int group, int lanes, typename Vector>
FASTDA_INLINE void fold_all(Vector* x) {
  if constexpr (group < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes / group / 2; ++i) {
      x[i] = fold<group>(x[2 * i], x[2 * i + 1], std::make_index_sequence<lanes>{});
    }
    fold_all<2 * group, lanes>(x);
  }
}

// The sum of the lanes of each vector. `out` has room for a whole number of vectors. Inlined, the vectors stay in
// registers.
template <typename T, int count>
FASTDA_INLINE void sum_lanes(const typename Grid<T>::Vector* x, T* out) {
  constexpr int lanes = Grid<T>::lanes;
#pragma GCC unroll 32
  for (int begin = 0; begin < count; begin += lanes) {
    typename Grid<T>::Vector some[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) some[i] = x[begin + i < count ? begin + i : count - 1];
    fold_all<1, lanes>(some);
    Grid<T>::store(out + begin, some[0]);
  }
}

// Σ_d (q_d − p_d)² or Σ_d q_d p_d of a few queries and a few classes. The next queries lie `ahead` of these.
template <typename T, bool product>
FASTDA_INLINE void sum_features(const T* const* q, int64_t ahead, const T* const* p, int64_t depth, T* out) {
  using G = Grid<T>;
  typename G::Vector sum[G::queries * G::classes], left[G::queries];
#pragma GCC unroll 32
  for (int64_t i = 0; i < G::queries * G::classes; ++i) sum[i] = typename G::Vector{};
  for (int64_t d = 0; d < depth; d += G::lanes) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < G::queries; ++i) {
      left[i] = G::load(q[i] + d);
      __builtin_prefetch(q[i] + d + ahead, 0, 2);  // to the second cache, which waits for more lines at a time
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < G::classes; ++j) {
      const typename G::Vector right = G::load(p[j] + d);
#pragma GCC unroll 8
      for (int64_t i = 0; i < G::queries; ++i) {
        if (product) {
          sum[i * G::classes + j] += left[i] * right;
        } else {
          const typename G::Vector difference = left[i] - right;
          sum[i * G::classes + j] += difference * difference;
        }
      }
    }
  }
  sum_lanes<T, G::queries * G::classes>(sum, out);
}

// The same for all queries and classes: out[query * out_stride + class].
template <typename T, bool product>
void sum_features_of(const T* q, int64_t q_stride, int64_t queries, const T* p, int64_t p_stride, int64_t classes,
                     int64_t depth, T* out, int64_t out_stride) {
  using G = Grid<T>;
  constexpr int64_t at_once = 4 * G::classes;  // classes that stay in the first cache
  T sums[G::queries * G::classes + G::lanes];
  const T *q_rows[G::queries], *p_rows[G::classes];
  for (int64_t first = 0; first < classes; first += at_once) {
    const int64_t last = least(first + at_once, classes);
    for (int64_t i = 0; i < queries; i += G::queries) {
      const int64_t some_queries = least(G::queries, queries - i);
      for (int64_t r = 0; r < G::queries; ++r) q_rows[r] = q + (i + least(r, some_queries - 1)) * q_stride;
      for (int64_t j = first; j < last; j += G::classes) {
        const int64_t some_classes = least(G::classes, last - j);
        for (int64_t r = 0; r < G::classes; ++r) p_rows[r] = p + (j + least(r, some_classes - 1)) * p_stride;
        const int64_t ahead = j == 0 && i + G::queries < queries ? G::queries * q_stride : 0;
        sum_features<T, product>(q_rows, ahead, p_rows, depth, sums);
        for (int64_t r = 0; r < some_queries; ++r) {
          T* to = out + (i + r) * out_stride + j;
          for (int64_t c = 0; c < some_classes; ++c) to[c] = sums[r * G::classes + c];
        }
      }
    }
  }
}

template <typename T>
void sum_features_of(bool product, const T* q, int64_t q_stride, int64_t queries, const T* p, int64_t p_stride,
                     int64_t classes, int64_t depth, T* out, int64_t out_stride) {
  if (product) {
    sum_features_of<T, true>(q, q_stride, queries, p, p_stride, classes, depth, out, out_stride);
  } else {
    sum_features_of<T, false>(q, q_stride, queries, p, p_stride, classes, depth, out, out_stride);
  }
}

// Some columns of Σ_k w_k (x − y_k), or of Σ_k w_k y_k, for `rows` rows x, each with weights of its own.
template <typename T, bool product, int rows, int vectors>
FASTDA_INLINE void sum_samples(const T* const* x, const T* const* w, int64_t w_step, const T* y, int64_t y_stride,
                               int64_t samples, typename Grid<T>::Vector (*sum)[vectors]) {
  using G = Grid<T>;
  typename G::Vector at[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      at[r][v] = product ? typename G::Vector{} : G::load(x[r] + v * G::lanes);
      sum[r][v] = typename G::Vector{};
    }
  }
  for (int64_t k = 0; k < samples; ++k, y += y_stride) {
    typename G::Vector right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = G::load(y + v * G::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const T weight = w[r][k * w_step];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += weight * (product ? right[v] : at[r][v] - right[v]);
    }
  }
}

// Adds Σ_k w_k of some rows, whose weights are neighbours where those of a sample are not.
template <typename T>
void totals_of_weights(const T* w, int64_t w_row, int64_t w_step, int64_t rows, int64_t samples, double* totals) {
  constexpr int64_t block = 64;
  if (w_step == 1) {
    for (int64_t i = 0; i < rows; ++i, w += w_row) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < samples; ++k) sum += static_cast<double>(w[k]);
      totals[i] += sum;
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += block) {
    double sum[block] = {};
    const int64_t some = least(block, rows - i);
    for (int64_t k = 0; k < samples; ++k) {
      const T* weights = w + i + k * w_step;
#pragma omp simd
      for (int64_t r = 0; r < some; ++r) sum[r] += static_cast<double>(weights[r]);
    }
    for (int64_t r = 0; r < some; ++r) totals[i + r] += sum[r];
  }
}

// out = Σ_k w_k (x − y_k) or Σ_k w_k y_k for some rows x and the columns begin to end, or added to it. w of row r and
// sample k: w[r · w_row + k · w_step]. Columns from `width` on are filling, and not written.
template <typename T, bool product, int rows, int vectors>
void sum_samples_of(const T* x, int64_t x_stride, int64_t count, const T* w, int64_t w_row, int64_t w_step, const T* y,
                    int64_t y_stride, int64_t samples, int64_t begin, int64_t end, int64_t width, Put put, T* out,
                    int64_t out_stride) {
  using G = Grid<T>;
  typename G::Vector sum[rows][vectors];
  const T *x_rows[rows], *w_rows[rows];
  for (int64_t k = 0; k < samples || k == 0; k += terms_of_sum) {
    const int64_t some = least(terms_of_sum, samples - k);
    for (int64_t d = begin; d < end; d += vectors * G::lanes) {
      for (int64_t i = 0; i < count; i += rows) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = least(i + r, count - 1);
          x_rows[r] = x + row * x_stride + d;
          w_rows[r] = w + row * w_row + k * w_step;
        }
        sum_samples<T, product, rows, vectors>(x_rows, w_rows, w_step, y + k * y_stride + d, y_stride, some, sum);
        for (int64_t r = 0; r < least(rows, count - i); ++r) {
          T* to = out + (i + r) * out_stride + d;
          for (int64_t v = 0; v < vectors && d + v * G::lanes < width; ++v) {
            if (put == Put::stream && samples <= terms_of_sum) {
              G::stream(to + v * G::lanes, sum[r][v]);
            } else {
              G::put(sum[r][v], put == Put::add || k > 0, to + v * G::lanes, width - d - v * G::lanes);
            }
          }
        }
      }
    }
  }
}

// Many rows, or few with more of their columns: as much as the registers hold.
template <typename T, bool product>
void sum_samples_of(const T* x, int64_t x_stride, int64_t count, const T* w, int64_t w_row, int64_t w_step, const T* y,
                    int64_t y_stride, int64_t samples, int64_t begin, int64_t end, int64_t width, Put put, T* out,
                    int64_t out_stride) {
  constexpr bool wide = FASTDA_VECTOR_BYTES == 64;
  constexpr int64_t many = wide ? 10 : 5, few = 5;
  constexpr int64_t of_many = product ? 2 : 1, of_few = (wide ? 4 : 2) / (product ? 1 : 2);  // differences hold x too
  const int64_t rest = count % many, whole = rest <= few ? count - rest : count;
  const auto split = [&](int64_t vectors) {
    const int64_t at_once = vectors * Grid<T>::lanes;
    return begin + (end - begin) / at_once * at_once;
  };
  if (whole > 0) {
    const int64_t middle = split(of_many);
    sum_samples_of<T, product, many, of_many>(x, x_stride, whole, w, w_row, w_step, y, y_stride, samples, begin, middle,
                                              width, put, out, out_stride);
    sum_samples_of<T, product, many, 1>(x, x_stride, whole, w, w_row, w_step, y, y_stride, samples, middle, end, width,
                                        put, out, out_stride);
  }
  if (whole == count) return;
  x += whole * x_stride;
  w += whole * w_row;
  out += whole * out_stride;
  const int64_t middle = split(of_few);
  sum_samples_of<T, product, few, of_few>(x, x_stride, rest, w, w_row, w_step, y, y_stride, samples, begin, middle,
                                          width, put, out, out_stride);
  sum_samples_of<T, product, few, 1>(x, x_stride, rest, w, w_row, w_step, y, y_stride, samples, middle, end, width, put,
                                     out, out_stride);
}

template <typename T>
void sum_samples_of(bool product, const T* x, int64_t x_stride, int64_t count, const T* w, int64_t w_row,
                    int64_t w_step, const T* y, int64_t y_stride, int64_t samples, int64_t begin, int64_t end,
                    int64_t width, Put put, T* out, int64_t out_stride) {
  const auto run = product ? &sum_samples_of<T, true> : &sum_samples_of<T, false>;
  run(x, x_stride, count, w, w_row, w_step, y, y_stride, samples, begin, end, width, put, out, out_stride);
#if FASTDA_X86
  if (put == Put::stream) asm volatile("sfence" ::: "memory");  // before another thread is told that it is done
#endif
}

// Many rows and many columns: products of what is packed, of points less one near them all. What is subtracted is no
// part of a distance, but is what cancels in ‖q‖² − 2q·p + ‖p‖².

// Rows are packed in blocks as wide as a vector, columns in panels of a few vectors: element (k, j) of a block or panel
// lies at packed[k * width + j].
template <typename T>
struct Panel {
  static constexpr int64_t lanes = FASTDA_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t vectors = 3, columns = vectors * lanes;
  static constexpr int64_t rows = FASTDA_VECTOR_BYTES == 64 ? 8 : least(4, lanes);  // that are multiplied at once
  static constexpr int64_t depth = 24576 / (columns * sizeof(T));  // of a panel that stays in the first cache
};

template <typename T>
void panel_shape(PanelShape* shape) {
  *shape = {Panel<T>::lanes, Panel<T>::columns, Panel<T>::depth};
}

template <typename T, int vectors, int rows = Panel<T>::rows>
FASTDA_INLINE void clear(typename Grid<T>::Vector (*sum)[vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = typename Grid<T>::Vector{};
  }
}

// Adds Σ_k a(k, r) b(k, j) to sum(r, j) for a few rows and a panel of so many vectors; a(k, r) lies at
// a[k * step + r * row]. A panel that lies in the second cache (far) is fetched from there ahead of its products.
template <typename T, int vectors, int rows = Panel<T>::rows, bool far = false>
FASTDA_INLINE void add_products(const T* a, int64_t step, int64_t row, const T* b, int64_t depth,
                                typename Grid<T>::Vector (*sum)[vectors]) {
  using G = Grid<T>;
  constexpr int64_t ahead = 8;
#pragma GCC unroll 2  // fewer instructions beside the products, where another thread shares the core
  for (int64_t k = 0; k < depth; ++k, a += step, b += vectors * G::lanes) {
    typename G::Vector right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      right[v] = G::load(b + v * G::lanes);
      if (far) __builtin_prefetch(b + (ahead * vectors + v) * G::lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const T left = a[r * row];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += left * right[v];
    }
  }
}

// A square of vectors turned over: lane j of vector i becomes lane i of vector j.
template <int group, int lanes, typename Vector, size_t... lane>
FASTDA_INLINE void turn(Vector* x, std::index_sequence<lane...> all) {
  if constexpr (group < lanes) {
    Vector turned[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      const int low = i / (2 * group) * 2 * group + i % group;
      turned[i] = i / group % 2 == 0
                      ? FASTDA_SHUFFLE(x[low], x[low + group],
                                       int(lane / group % 2 == 0 ? lane : lanes + lane - group)...)
                      : FASTDA_SHUFFLE(x[low], x[low + group],
                                       int(lane / group % 2 == 0 ? lane + group : lanes + lane)...);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) x[i] = turned[i];
    turn<2 * group, lanes>(x, all);
  }
}

// As many rows of x as there are lanes side by side, in a panel that is `width` wide: less the centre; and their
// squared norms. Half of what rounding took from these goes to `rests`, where it is not null: it would be the same in
// all distances of a row, and would add up in its gradient. Rows are read, and packed, in whole vectors; what is packed
// beyond `count` rows is 0.
template <typename T>
void pack_lanes(const T* x, int64_t stride, int64_t count, int64_t depth, const T* centre, int64_t width, T* packed,
                T* norms, T* rests) {
  using G = Grid<T>;
  constexpr int64_t lanes = G::lanes, terms = least(lanes, 4);  // of a norm that are summed in their own precision
  double norm[lanes] = {};
  for (int64_t k = 0; k < depth; k += lanes) {
    const typename G::Vector middle = G::load(centre + k);
    typename G::Vector x_rows[lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      const T* row = x + i * stride + k;
      x_rows[i] = i < count ? G::load(row) - middle : typename G::Vector{};
      __builtin_prefetch(row + lanes * stride, 0, 2);  // the next rows, to the second cache
    }
    turn<1, lanes>(x_rows, std::make_index_sequence<lanes>{});
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; i += terms) {
      typename G::Vector sum = {};
#pragma GCC unroll 4
      for (int64_t j = i; j < i + terms; ++j) {
        sum += x_rows[j] * x_rows[j];
        G::store(packed + (k + j) * width, x_rows[j]);
      }
      G::add_in_float64(sum, norm);
    }
  }
  for (int64_t i = 0; i < lanes; ++i) {
    norms[i] = static_cast<T>(norm[i]);
    if (rests) rests[i] = static_cast<T>((norm[i] - static_cast<double>(norms[i])) / 2);
  }
}

// Rows of x as a panel that is `width` wide, a whole number of lanes.
template <typename T>
void pack_across(const T* x, int64_t stride, int64_t count, int64_t depth, const T* centre, int64_t width, T* packed,
                 T* norms, T* rests) {
  for (int64_t i = 0; i < width; i += Grid<T>::lanes) {
    pack_lanes(x + i * stride, stride, count - i, depth, centre, width, packed + i, norms + i,
               rests ? rests + i : nullptr);
  }
}

// Samples below each other, as a panel that is `width` wide: so many columns of y less the centre's.
template <typename T>
void pack_below(const T* y, int64_t stride, int64_t samples, const T* centre, int64_t width, T* packed) {
  using G = Grid<T>;
  constexpr int64_t ahead = 16;  // samples
  for (int64_t k = 0; k < samples; ++k, y += stride, packed += width) {
    for (int64_t d = 0; d < width; d += G::lanes) {
      __builtin_prefetch(y + ahead * stride + d);
      G::store(packed + d, G::load(y + d) - G::load(centre + d));
    }
  }
}

// Weights of up to a block of rows and up to Panel::depth samples, near each other: of row r and sample k at
// w[r * row + k * step], where row or step is 1. What is next to each other stays so. Read in whole vectors.
template <typename T>
void pack_weights(const T* w, int64_t row, int64_t step, int64_t rows, int64_t samples, T* packed) {
  using G = Grid<T>;
  if (row == 1) {
    for (int64_t k = 0; k < samples; ++k) G::store(packed + k * G::lanes, G::load(w + k * step));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* to = packed + r * Panel<T>::depth;
    for (int64_t k = 0; k < samples; k += G::lanes) G::store(to + k, G::load(w + r * row + k));
  }
}

// Stores a few rows of results, or adds them to what is there: `rows` of them, `width` columns of each.
template <typename T, int vectors, int all_rows = Panel<T>::rows>
FASTDA_INLINE void put_rows(const typename Grid<T>::Vector (*sum)[vectors], int64_t rows, int64_t width, bool add,
                            T* out, int64_t stride) {
  using G = Grid<T>;
  if (rows == all_rows && width == vectors * G::lanes) {  // all in registers
#pragma GCC unroll 16
    for (int r = 0; r < all_rows; ++r, out += stride) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        G::store(out + v * G::lanes, add ? G::load(out + v * G::lanes) + sum[r][v] : sum[r][v]);
      }
    }
    return;
  }
  constexpr int64_t columns = vectors * G::lanes;
  alignas(64) T values[all_rows * columns];  // indices that are not constant would take the sums out of registers
#pragma GCC unroll 16
  for (int r = 0; r < all_rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) G::store(values + r * columns + v * G::lanes, sum[r][v]);
  }
  for (int64_t r = 0; r < rows; ++r, out += stride) {
    for (int64_t d = 0; d < width; d += G::lanes) G::put(G::load(values + r * columns + d), add, out + d, width - d);
  }
}

// A few rows that are read, or written, after a product: fetched during it.
template <typename T, int vectors, int write = 0>
FASTDA_INLINE void prefetch_rows(const T* out, int64_t stride, int64_t rows) {
  if (rows != Panel<T>::rows) return;
#pragma GCC unroll 16
  for (int r = 0; r < Panel<T>::rows; ++r, out += stride) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(out + v * Grid<T>::lanes, write);
  }
}

// Calls run<T, vectors>(...) with as many vectors as hold that many columns.
#define FASTDA_WITH_VECTORS(run, columns, ...)                                           \
  do {                                                                                   \
    const int64_t vectors_needed = ((columns) + Grid<T>::lanes - 1) / Grid<T>::lanes;    \
    if (vectors_needed <= 1) return run<T, 1>(__VA_ARGS__);                              \
    if (vectors_needed == 2) return run<T, 2>(__VA_ARGS__);                              \
    return run<T, Panel<T>::vectors>(__VA_ARGS__);                                       \
  } while (false)

template <typename T, int vectors>
void products_with_vectors(const T* a, int64_t count, const T* panel, int64_t depth, int64_t width, T* out,
                           int64_t out_stride) {
  using G = Grid<T>;
  constexpr int64_t rows = Panel<T>::rows;
  typename G::Vector sum[rows][vectors];
  for (int64_t k = 0; k < depth || k == 0; k += Panel<T>::depth) {
    for (int64_t i = 0; i < count; i += rows) {
      clear<T, vectors>(sum);
      add_products<T, vectors>(a + i / G::lanes * G::lanes * depth + k * G::lanes + i % G::lanes, G::lanes, 1,
                               panel + k * vectors * G::lanes, least(Panel<T>::depth, depth - k), sum);
      put_rows<T, vectors>(sum, least(rows, count - i), width, k > 0, out + i * out_stride, out_stride);
    }
  }
}

// Products of blocks of rows, `depth` deep, with the columns of one panel, no wider than they need.
template <typename T>
void products_with_panel(const T* a, int64_t count, const T* panel, int64_t depth, int64_t width, T* out,
                         int64_t out_stride) {
  FASTDA_WITH_VECTORS(products_with_vectors, width, a, count, panel, depth, width, out, out_stride);
}

// Sums over features become distances.
template <typename T>
void distances_from_sums(T* row, int64_t classes, Metric metric) {
  if (metric == Metric::euclidean) {
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) row[c] = std::sqrt(row[c]);
  } else if (metric == Metric::cosine) {
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) {
      const T distance = 1 - row[c], above = distance < 0 ? T(0) : distance;
      row[c] = above > 2 ? T(2) : above;
    }
  }
}

// Σ_d (q_d − p_d)², of whole vectors.
template <typename T>
T squared_distance(const T* q, const T* p, int64_t depth) {
  using G = Grid<T>;
  constexpr int64_t vectors = 4;  // sums side by side: each addition waits for the one before
  typename G::Vector sum[vectors] = {};
  for (int64_t d = 0; d < depth; d += vectors * G::lanes) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) {
      if (d + v * G::lanes >= depth) break;
      const typename G::Vector difference = G::load(q + d + v * G::lanes) - G::load(p + d + v * G::lanes);
      sum[v] += difference * difference;
    }
  }
  T parts[G::lanes], result = 0;
  G::store(parts, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int64_t i = 0; i < G::lanes; ++i) result += parts[i];
  return result;
}

// Products become distances; for the Euclidean ones ‖q‖² − 2q·p + ‖p‖², taken from differences where these cancel,
// overflow or are NaN. Where these are finite the pair is near: `near`, if it is not null, is set if there are any, and
// their distances are negated, −0 included, until NearPairs::find has found them.
template <typename T>
void distances_from_products(Metric metric, const T* products, int64_t products_stride, const T* q, int64_t q_stride,
                             const T* q_norms, int64_t queries, const T* p, int64_t p_stride, const T* p_norms,
                             const T* p_rests, int64_t classes, int64_t depth, T* out, int64_t out_stride,
                             bool* near) {
  constexpr T cancels = static_cast<T>(0.5), infinity = std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < queries; ++i, out += out_stride, products += products_stride) {
    const T norm = q_norms[i];
    int good = 1;
    if (metric == Metric::cosine) {
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c) out[c] = products[c];
    } else {
#pragma omp simd reduction(& : good)
      for (int64_t c = 0; c < classes; ++c) {
        const T squares = norm + p_norms[c], squared = squares - 2 * (products[c] - p_rests[c]);
        out[c] = squared;
        good &= squared >= cancels * squares && squares < infinity;
      }
    }
    distances_from_sums(out, classes, metric);
    for (int64_t c = 0; !good && c < classes; ++c) {
      const T squares = norm + p_norms[c], squared = squares - 2 * (products[c] - p_rests[c]);
      if (squared >= cancels * squares && squares < infinity) continue;
      out[c] = squared_distance(q + i * q_stride, p + c * p_stride, depth);
      if (metric == Metric::euclidean) out[c] = std::sqrt(out[c]);
      if (!near || !(out[c] < infinity)) continue;
      out[c] = -out[c];
      *near = true;
    }
  }
}

// Whether distances of a row are negated.
template <typename T>
void has_near(const T* row, int64_t classes, bool* result) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t c = 0; c < classes; ++c) any |= std::signbit(row[c]) ? 1 : 0;
  *result = any != 0;
}

// add_near_pairs in so many vectors of columns; in a single one no more than `width`.
template <typename T, int vectors>
FASTDA_INLINE void add_near_vectors(const NearPair<T>* pair, const NearPair<T>* end, const T* x, int64_t x_stride,
                                    const T* y, int64_t y_stride, int64_t width, T* out, int64_t out_stride) {
  using G = Grid<T>;
  while (pair < end) {
    const int64_t row = pair->row;
    typename G::Vector at[vectors], total[vectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) at[v] = G::load(x + row * x_stride + v * G::lanes);
    while (pair < end && pair->row == row) {
      typename G::Vector sum[vectors] = {};
      for (int64_t k = 0; k < terms_of_sum && pair < end && pair->row == row; ++k, ++pair) {
        const T* sample = y + pair->sample * y_stride;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[v] += pair->weight * (at[v] - G::load(sample + v * G::lanes));
      }
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[v] += sum[v];
    }
    T* to = out + row * out_stride;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      if (vectors == 1) {
        G::put(total[v], true, to, width);
      } else {
        G::store(to + v * G::lanes, G::load(to + v * G::lanes) + total[v]);
      }
    }
  }
}

// Adds the w (x − y) of some pairs, ordered by their rows x, in so many columns.
template <typename T>
void add_near_pairs(const NearPair<T>* pairs, int64_t count, const T* x, int64_t x_stride, const T* y, int64_t y_stride,
                    int64_t width, T* out, int64_t out_stride) {
  constexpr int64_t vectors = 4, lanes = Grid<T>::lanes;
  int64_t d = 0;
  for (; d + vectors * lanes <= width; d += vectors * lanes) {
    add_near_vectors<T, vectors>(pairs, pairs + count, x + d, x_stride, y + d, y_stride, width - d, out + d,
                                 out_stride);
  }
  for (; d < width; d += lanes) {
    add_near_vectors<T, 1>(pairs, pairs + count, x + d, x_stride, y + d, y_stride, width - d, out + d, out_stride);
  }
}

// Completes Σ_k w_k (x − y_k) = (x − c) Σ_k w_k − Σ_k w_k (y_k − c), of which the last sum is there, for a few rows x.
// Where totals, the Σ_k w_k, are null, the first part is left out.
template <typename T, int vectors>
FASTDA_INLINE void complete_sums(const T* x, int64_t x_stride, int64_t rows, const double* totals, const T* centre,
                                 typename Grid<T>::Vector (*sum)[vectors]) {
  using G = Grid<T>;
  typename G::Vector middle[vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Panel<T>::rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = -sum[r][v];
  }
  if (!totals) return;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) middle[v] = G::load(centre + v * G::lanes);
#pragma GCC unroll 16
  for (int r = 0; r < Panel<T>::rows; ++r) {
    const int64_t there = least(r, rows - 1);
    const T total = static_cast<T>(totals[there]), *row = x + there * x_stride;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] += (G::load(row + v * G::lanes) - middle[v]) * total;
  }
}

template <typename T, int vectors, int64_t step, int64_t row>
FASTDA_INLINE void weigh_vectors(bool product, const T* w, int64_t count, const T* panel, int64_t samples, const T* x,
                                 int64_t x_stride, const double* totals, const T* centre, int64_t width, bool add,
                                 T* out, int64_t out_stride) {
  constexpr int64_t rows = Panel<T>::rows, block = Panel<T>::lanes, between = block * Panel<T>::depth;
  typename Grid<T>::Vector sum[rows][vectors];
  for (int64_t i = 0; i < count; i += rows, out += rows * out_stride, x += rows * x_stride) {
    const int64_t some = least(rows, count - i);
    prefetch_rows<T, vectors, 1>(out, out_stride, some);
    if (totals) prefetch_rows<T, vectors>(x, x_stride, some);
    clear<T, vectors>(sum);
    add_products<T, vectors>(w + i / block * between + i % block * row, step, row, panel, samples, sum);
    if (!product) complete_sums<T, vectors>(x, x_stride, some, totals ? totals + i : nullptr, centre, sum);
    put_rows<T, vectors>(sum, some, width, add, out, out_stride);
  }
}

template <typename T, int vectors>
void weigh_vectors(bool product, bool by_row, const T* w, int64_t count, const T* panel, int64_t samples, const T* x,
                   int64_t x_stride, const double* totals, const T* centre, int64_t width, bool add, T* out,
                   int64_t out_stride) {
  if (by_row) {
    weigh_vectors<T, vectors, 1, Panel<T>::depth>(product, w, count, panel, samples, x, x_stride, totals, centre, width,
                                                  add, out, out_stride);
  } else {
    weigh_vectors<T, vectors, Panel<T>::lanes, 1>(product, w, count, panel, samples, x, x_stride, totals, centre, width,
                                                  add, out, out_stride);
  }
}

// Σ_k w_k (x − y_k) = (x − c) Σ_k w_k − Σ_k w_k (y_k − c) with packed blocks of weights, of each row or of each sample
// side by side, and a panel of samples y − c, no wider than it needs; for the cosine Σ_k w_k y_k, where c is 0. Where
// totals, the Σ_k w_k, are null, the first part is left out.
template <typename T>
void weigh_panel(bool product, bool by_row, const T* w, int64_t count, const T* panel, int64_t samples, const T* x,
                 int64_t x_stride, const double* totals, const T* centre, int64_t width, bool add, T* out,
                 int64_t out_stride) {
  FASTDA_WITH_VECTORS(weigh_vectors, width, product, by_row, w, count, panel, samples, x, x_stride, totals, centre,
                      width, add, out, out_stride);
}

// Tiles: what belongs to query q and class c of a panel of classes lies at tile[q * Panel::columns + c]. Weights that
// do are what products read row by row, whether queries are the rows or classes.

// Sums like weigh_panel's for `count` rows x. The weights of row r and sample k of a tile lie at
// tile[k * step + r * row]; the samples y are those of tiles `between` apart, `of_tile` of each.
template <typename T, int vectors, int64_t step, int64_t row>
FASTDA_INLINE void weigh_vectors_by_tiles(bool product, const T* tiles, int64_t between, int64_t of_tile, int64_t count,
                                          const T* panel, int64_t samples, const T* x, int64_t x_stride,
                                          const double* totals, const T* centre, int64_t width, bool add, T* out,
                                          int64_t out_stride) {
  constexpr int64_t rows = Panel<T>::rows, columns = vectors * Grid<T>::lanes;
  typename Grid<T>::Vector sum[rows][vectors];
  alignas(64) T sums[rows * columns];  // of the terms before
  for (int64_t i = 0; i < count; i += rows, out += rows * out_stride, x += rows * x_stride) {
    const int64_t some = least(rows, count - i);
    if (add) prefetch_rows<T, vectors>(out, out_stride, some);
    if (totals) prefetch_rows<T, vectors>(x, x_stride, some);
    clear<T, vectors>(sum);
    const T* tile = tiles + i * row;
    int64_t terms = 0, done = 0;  // in this sum, and before
    for (int64_t k = 0; k < samples; k += of_tile, tile += between) {
      const int64_t end = least(k + of_tile, samples);
      for (int64_t j = k, more; j < end; j += more, terms += more) {
        more = least(terms_of_products, end - j);
        if (terms + more > terms_of_products) {
          put_rows<T, vectors>(sum, rows, columns, done > 0, sums, columns);
          clear<T, vectors>(sum);
          done += terms;
          terms = 0;
        }
        add_products<T, vectors, rows, true>(tile + (j - k) * step, step, row, panel + j * columns, more, sum);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows && done > 0; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += Grid<T>::load(sums + r * columns + v * Grid<T>::lanes);
    }
    if (!product) complete_sums<T, vectors>(x, x_stride, some, totals ? totals + i : nullptr, centre, sum);
    put_rows<T, vectors>(sum, some, width, add, out, out_stride);
  }
}

template <typename T, int vectors>
void sum_vectors_over_classes(bool product, const T* tiles, int64_t between, int64_t queries, const T* panel,
                              int64_t classes, const T* q, int64_t q_stride, const double* totals, const T* centre,
                              int64_t width, bool add, T* out, int64_t out_stride) {
  weigh_vectors_by_tiles<T, vectors, 1, Panel<T>::columns>(product, tiles, between, Panel<T>::columns, queries, panel,
                                                           classes, q, q_stride, totals, centre, width, add, out,
                                                           out_stride);
}

// Σ_c w(q, c) (q − p_c), or Σ_c w(q, c) p_c, from the tiles of some classes p and a panel of their columns.
template <typename T>
void sum_over_classes(bool product, const T* tiles, int64_t between, int64_t queries, const T* panel, int64_t classes,
                      const T* q, int64_t q_stride, const double* totals, const T* centre, int64_t width, bool add,
                      T* out, int64_t out_stride) {
  FASTDA_WITH_VECTORS(sum_vectors_over_classes, width, product, tiles, between, queries, panel, classes, q, q_stride,
                      totals, centre, width, add, out, out_stride);
}

template <typename T, int vectors>
void sum_vectors_over_queries(bool product, const T* tile, int64_t classes, const T* panel, int64_t queries, const T* p,
                              int64_t p_stride, const double* totals, const T* centre, int64_t width, bool add, T* out,
                              int64_t out_stride) {
  weigh_vectors_by_tiles<T, vectors, Panel<T>::columns, 1>(product, tile, 0, queries, classes, panel, queries, p,
                                                           p_stride, totals, centre, width, add, out, out_stride);
}

// Σ_q w(q, c) (p_c − q), or Σ_q w(q, c) q, for some classes p of one tile and a panel of the columns of the queries.
template <typename T>
void sum_over_queries(bool product, const T* tile, int64_t classes, const T* panel, int64_t queries, const T* p,
                      int64_t p_stride, const double* totals, const T* centre, int64_t width, bool add, T* out,
                      int64_t out_stride) {
  FASTDA_WITH_VECTORS(sum_vectors_over_queries, width, product, tile, classes, panel, queries, p, p_stride, totals,
                      centre, width, add, out, out_stride);
}

// Samples first, first + 1, ... of panels of all features, `depth` samples deep: y less the centre, below each other.
template <typename T>
void pack_all_below(const T* y, int64_t stride, int64_t samples, int64_t features, const T* centre, int64_t first,
                    int64_t depth, T* packed) {
  using G = Grid<T>;
  constexpr int64_t width = Panel<T>::columns;
  for (int64_t k = first; k < first + samples; ++k, y += stride) {
    for (int64_t d = 0; d < features; d += width) {
      const int64_t used = (least(width, features - d) + G::lanes - 1) / G::lanes * G::lanes;
      T* to = packed + d * depth + k * used;
      for (int64_t j = 0; j < used; j += G::lanes) G::store(to + j, G::load(y + d + j) - G::load(centre + d + j));
    }
  }
}

#undef FASTDA_WITH_VECTORS
