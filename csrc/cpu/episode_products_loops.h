// Distances and gradients of episodes by products with panels of their classes, where these are not very few; compiled
// once for each instruction set by for_each_isa.h. Include after prototypes_loops.h.
//
// Queries are multiplied as they lie: there are too few classes to make up for packing them.

template <typename T>
struct ClassPanel {
  static constexpr bool wide = FASTDA_VECTOR_BYTES == 64;
  static constexpr int64_t lanes = Grid<T>::lanes, vectors = wide ? 4 : 3, columns = vectors * lanes;
  // That stays in the first cache, and is no longer a sum than the accuracy allows: what it rounds adds up.
  static constexpr int64_t depth = least(32768 / (columns * sizeof(T)), 128) / lanes * lanes;
  static constexpr int rows_beside(int vectors) { return (wide ? 24 : 12) / (vectors == 1 ? 2 : vectors); }
  static_assert(rows_beside(1) <= class_panel_rows, "metric.h says how far weights are read");
};

template <typename T>
void class_panel_shape(PanelShape* shape) {
  *shape = {class_panel_rows, ClassPanel<T>::columns, ClassPanel<T>::depth};
}

// add_products, which fetches the next rows meanwhile, one at a time: there is room for so many lines on their way.
// `width` values of each are read from `next`, those from `to_write` are written, where it is not null.
template <typename T, int vectors, int rows>
FASTDA_INLINE void add_products_and_fetch(const T* a, int64_t step, int64_t row, const T* b, int64_t depth,
                                          const T* next, int64_t stride, const T* to_write, int64_t write_stride,
                                          int64_t width, typename Grid<T>::Vector (*sum)[vectors]) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t part = (depth + rows - 1) / rows;
  for (int64_t r = 0; r < rows; ++r, next += stride) {
    for (int64_t d = 0; d <= width; d += line) __builtin_prefetch(next + d);
    for (int64_t d = 0; to_write && d <= width; d += line) __builtin_prefetch(to_write + r * write_stride + d, 1);
    const int64_t begin = least(r * part, depth), end = least(begin + part, depth);
    add_products<T, vectors, rows>(a + begin * step, step, row, b + begin * vectors * Grid<T>::lanes, end - begin, sum);
  }
}

// A few rows less the centre, ClassPanel::depth apart; adds their squares to `squares`, one sum for each lane, where
// they are not null.
template <typename T>
FASTDA_INLINE void centre_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, const T* centre, T* centred,
                               double* squares) {
  using G = Grid<T>;
  for (int64_t r = 0; r < rows; ++r, x += stride, centred += ClassPanel<T>::depth) {
    typename G::Vector sum = {};
    for (int64_t k = 0; k < depth; k += G::lanes) {
      const typename G::Vector value = G::load(x + k) - G::load(centre + k);
      G::store(centred + k, value);
      sum += value * value;
    }
    if (squares) G::add_in_float64(sum, squares + r * G::lanes);
  }
}

template <typename T, int vectors>
void products_of_vectors(const T* x, int64_t stride, int64_t count, int64_t depth, const T* centre, const T* panel,
                         double* squares, T* out, int64_t out_stride) {
  using P = ClassPanel<T>;
  constexpr int rows = P::rows_beside(vectors);
  alignas(64) T centred[rows * P::depth] = {};
  typename Grid<T>::Vector sum[rows][vectors];
  for (int64_t k = 0; k < depth; k += P::depth) {
    const int64_t some_depth = least(P::depth, depth - k);
    for (int64_t i = 0; i < count; i += rows) {
      const int64_t some = least(rows, count - i);
      const T* from = x + i * stride + k;
      centre_rows(from, stride, some, some_depth, centre + k, centred,
                  squares ? squares + i * Grid<T>::lanes : nullptr);
      clear<T, vectors, rows>(sum);
      add_products_and_fetch<T, vectors, rows>(centred, 1, P::depth, panel + k * vectors * P::lanes, some_depth,
                                               from + rows * stride, stride, nullptr, 0, some_depth, sum);
      put_rows<T, vectors, rows>(sum, some, vectors * P::lanes, k > 0, out + i * out_stride, out_stride);
    }
  }
}

// Calls run<T, vectors> with as many vectors of a ClassPanel as hold that many columns.
#define FASTDA_WITH_CLASS_VECTORS(run, columns, ...)                                  \
  do {                                                                                \
    const int64_t vectors_needed = ((columns) + Grid<T>::lanes - 1) / Grid<T>::lanes; \
    if (vectors_needed <= 1) return run<T, 1>(__VA_ARGS__);                           \
    if (vectors_needed == 2) return run<T, 2>(__VA_ARGS__);                           \
    if (vectors_needed == 3) return run<T, 3>(__VA_ARGS__);                           \
    return run<T, ClassPanel<T>::vectors>(__VA_ARGS__);                               \
  } while (false)

// Products of rows x, less the centre, with the columns of one panel, and the squares of each row, summed in as many
// sums as there are lanes, where they are not null; these are to be 0 before.
template <typename T>
void products_of_rows(const T* x, int64_t stride, int64_t count, int64_t depth, const T* centre, const T* panel,
                      int64_t classes, double* squares, T* out, int64_t out_stride) {
  FASTDA_WITH_CLASS_VECTORS(products_of_vectors, classes, x, stride, count, depth, centre, panel, squares, out,
                            out_stride);
}

// The squared norms of rows from these.
template <typename T>
void norms_of_rows(const double* squares, int64_t count, T* norms) {
  constexpr int64_t lanes = Grid<T>::lanes;
  for (int64_t i = 0; i < count; ++i, squares += lanes) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t r = 0; r < lanes; ++r) sum += squares[r];
    norms[i] = static_cast<T>(sum);
  }
}

// Points less one near them all, over the columns of a panel.
template <typename T, int vectors>
FASTDA_INLINE void centre_columns_of(const T* x, int64_t stride, int64_t rows, const T* centre, T* centred) {
  using G = Grid<T>;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    for (int v = 0; v < vectors; ++v, centred += G::lanes) {
      G::store(centred, G::load(x + v * G::lanes) - G::load(centre + v * G::lanes));
    }
  }
}

// Completes Σ_c w_c (q − p_c) = (q − m) Σ_c w_c − Σ_c w_c (p_c − m), of which the last sum is there, for a few rows q
// and the centre m; the sum alone stays, as it is, where it is a product. Keeps q − m.
template <typename T, int vectors, int rows>
FASTDA_INLINE void complete_rows(const EpisodeWeights<T>& of, int64_t first, int64_t count, T* centred,
                                 typename Grid<T>::Vector (*sum)[vectors]) {
  using G = Grid<T>;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const int64_t i = first + least(r, count - 1);
    const T total = static_cast<T>(of.of_queries[i]), *q = of.q + i * of.q_stride;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const typename G::Vector value = G::load(q + v * G::lanes) - G::load(of.centre + v * G::lanes);
      G::store(centred + (r * vectors + v) * G::lanes, value);
      if (!of.product) sum[r][v] = value * total - sum[r][v];
    }
  }
}

// Gradients of some queries, that is sums over classes first to first + depth; the first ones complete them.
template <typename T, int vectors>
FASTDA_INLINE void sum_over_some_classes(const EpisodeWeights<T>& of, int64_t begin, int64_t end, int64_t first,
                                         int64_t depth, const T* centred_p, int64_t width, T* centred_q, T* grad_q,
                                         int64_t stride) {
  using G = Grid<T>;
  constexpr int rows = ClassPanel<T>::rows_beside(vectors);
  typename G::Vector sum[rows][vectors];
  for (int64_t i = begin; i < end; i += rows) {
    const int64_t count = least(rows, end - i);
    const T* q = of.q + i * of.q_stride;
    T* to = grad_q + i * stride;
    clear<T, vectors, rows>(sum);
    add_products_and_fetch<T, vectors, rows>(of.w + i * of.w_stride + first, 1, of.w_stride, centred_p, depth,
                                             q + rows * of.q_stride, of.q_stride, to + rows * stride, stride,
                                             vectors * G::lanes, sum);
    if (first == 0) {
      complete_rows<T, vectors, rows>(of, i, count, centred_q + (i - begin) * vectors * G::lanes, sum);
    } else if (!of.product) {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] = -sum[r][v];
      }
    }
    put_rows<T, vectors, rows>(sum, count, width, first > 0, to, stride);
  }
}

template <typename T, int vectors>
void gradients_of_vectors(const EpisodeWeights<T>& of, int64_t width, T* grad_q, T* grad_p, int64_t stride,
                          T* scratch) {
  using G = Grid<T>;
  using P = ClassPanel<T>;
  constexpr int rows = P::rows_beside(vectors);
  constexpr int64_t columns = vectors * G::lanes;
  constexpr int64_t whole = 24, most = P::depth / whole * whole;  // of any number of rows: sums are cut alike
  T *centred_q = scratch, *centred_p = centred_q + P::depth * columns, *sums = centred_p + of.classes * columns;
  typename G::Vector sum[rows][vectors];
  centre_columns_of<T, vectors>(of.p, of.p_stride, of.classes, of.centre, centred_p);
  const int64_t parts = (of.queries + most - 1) / most;
  const int64_t at_once = ((of.queries + parts - 1) / parts + whole - 1) / whole * whole;
  const int64_t tiles = parts * ((of.classes + rows - 1) / rows), at_a_tile = (of.next_rows + tiles - 1) / tiles;
  int64_t fetched = 0;
  for (int64_t first = 0; first < of.queries; first += at_once) {
    const int64_t last = least(first + at_once, of.queries);
    for (int64_t c = 0; c < of.classes; c += P::depth) {
      sum_over_some_classes<T, vectors>(of, first, last, c, least(P::depth, of.classes - c), centred_p + c * columns,
                                        width, centred_q, grad_q, stride);
    }
    for (int64_t c = 0; c < of.classes; c += rows) {
      clear<T, vectors, rows>(sum);
      for (const int64_t some = least(fetched + at_a_tile, of.next_rows); fetched < some; ++fetched) {
        for (int v = 0; v < vectors; ++v) __builtin_prefetch(of.next + fetched * stride + v * G::lanes, 1, 2);
      }
      add_products<T, vectors, rows>(of.w + first * of.w_stride + c, of.w_stride, 1, centred_q, last - first, sum);
      put_rows<T, vectors, rows>(sum, rows, columns, first > 0, sums + c * columns, columns);
    }
  }
  for (int64_t c = 0; c < of.classes; ++c, centred_p += columns, sums += columns, grad_p += stride) {
    const T total = static_cast<T>(of.of_classes[c]);
    for (int64_t d = 0; !of.product && d < columns; d += G::lanes) {
      G::store(sums + d, G::load(centred_p + d) * total - G::load(sums + d));
    }
    for (int64_t d = 0; d < width; ++d) grad_p[d] = sums[d];
  }
}

// Gradients of all queries and prototypes, Σ_c w_c (q − p_c) and Σ_q w_q (p − q), as products Σ_c w_c p_c and
// Σ_q w_q q, over the columns of one panel, in one pass over the queries. Columns from `width` on are filling, and not
// written. Scratch holds ClassPanel::depth and twice the classes, and class_panel_rows more, of panels.
template <typename T>
void gradients_of_panel(const EpisodeWeights<T>& of, int64_t width, T* grad_q, T* grad_p, int64_t stride, T* scratch) {
  FASTDA_WITH_CLASS_VECTORS(gradients_of_vectors, width, of, width, grad_q, grad_p, stride, scratch);
}

// Gradients of prototypes, divided by the counts of their classes, and those of the samples, each its class's; over so
// many columns. A class is divided once, then copied: a division takes longer than memory does.
template <typename T>
void gradients_of_samples(T* grad_p, const int64_t* counts, int64_t classes, const int64_t* labels, int64_t samples,
                          int64_t width, int64_t stride, T* grad_x) {
  using G = Grid<T>;
  for (int64_t c = 0; c < classes; ++c) {
    const T count = static_cast<T>(counts[c] > 0 ? counts[c] : 1);
    divide(grad_p + c * stride, count, width, grad_p + c * stride);
  }
  for (int64_t s = 0; s < samples; ++s, grad_x += stride) {
    const T* row = grad_p + labels[s] * stride;
    int64_t d = 0;
    for (; d + G::lanes <= width; d += G::lanes) G::store(grad_x + d, G::load(row + d));
    for (; d < width; ++d) grad_x[d] = row[d];
  }
}

#undef FASTDA_WITH_CLASS_VECTORS
