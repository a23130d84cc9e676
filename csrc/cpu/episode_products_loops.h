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

// Apart, an inner loop has all registers to itself.
#define FASTDA_APART __attribute__((noinline))

// Without it GCC takes a lambda that does nothing but fetch for one that does nothing.
#define FASTDA_INLINE_LAMBDA __attribute__((always_inline))

// add_products in as many parts as there are rows, with something else before each: beside products, what waits for
// memory takes no time.
template <typename T, int vectors, int rows, typename Meanwhile>
FASTDA_INLINE void add_products_and(const Meanwhile& meanwhile, const T* a, int64_t step, int64_t row, const T* b,
                                    int64_t depth, typename Grid<T>::Vector (*sum)[vectors]) {
  const int64_t part = (depth + rows - 1) / rows;
  for (int64_t r = 0; r < rows; ++r) {
    meanwhile(r);
    const int64_t some = least(part, depth);
    add_products<T, vectors, rows>(a, step, row, b, some, sum);
    a += some * step;
    b += some * vectors * Grid<T>::lanes;
    depth -= some;
  }
}

// Fetches what is read soon, or written.
template <typename T, int write = 0>
FASTDA_INLINE void fetch(const T* x, int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += line) __builtin_prefetch(x + d, write);
}

// Goes on with copies, some rows of them.
template <typename T>
FASTDA_INLINE void copy_rows(RowCopies<T>* copies, int64_t rows) {
  using G = Grid<T>;
  constexpr int vectors = ClassPanel<T>::vectors;
  constexpr int64_t soon = 4;  // rows from here, which are fetched to be written
  const int64_t end = least(copies->done + rows, copies->rows);
  for (; copies->done < end; ++copies->done) {
    const T* from = copies->from + copies->source[copies->done] * copies->from_stride;
    T* to = copies->to + copies->done * copies->to_stride;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) G::store(to + v * G::lanes, G::load(from + v * G::lanes));
    fetch<T, 1>(to + soon * copies->to_stride, vectors * G::lanes);
    if (copies->ahead) fetch<T, 1>(to + copies->ahead, vectors * G::lanes);
  }
}

// The rest of them, of so many columns.
template <typename T>
void copy_rest(RowCopies<T>* copies, int64_t width) {
  using G = Grid<T>;
  for (; copies->done < copies->rows; ++copies->done) {
    const T* from = copies->from + copies->source[copies->done] * copies->from_stride;
    T* to = copies->to + copies->done * copies->to_stride;
    int64_t d = 0;
    for (; d + G::lanes <= width; d += G::lanes) G::store(to + d, G::load(from + d));
    for (; d < width; ++d) to[d] = from[d];
  }
}

// Some columns of a row less the centre; adds their squares to `squares`, one sum for each lane, where they are not
// null.
template <typename T>
FASTDA_INLINE void centre_row(const T* x, int64_t depth, const T* centre, T* centred, double* squares) {
  using G = Grid<T>;
  typename G::Vector sum = {};
  for (int64_t k = 0; k < depth; k += G::lanes) {
    const typename G::Vector value = G::load(x + k) - G::load(centre + k);
    G::store(centred + k, value);
    sum += value * value;
  }
  if (squares) G::add_in_float64(sum, squares);
}

// The first row and column of a tile of queries.
struct TileStart {
  int64_t row, column;
};

template <typename T, int vectors>
void products_of_vectors(const T* x, int64_t stride, int64_t count, int64_t depth, const T* centre, const T* panel,
                         double* squares, T* out, int64_t out_stride) {
  using P = ClassPanel<T>;
  constexpr int rows = P::rows_beside(vectors);
  alignas(64) T centred[2][rows * P::depth] = {};  // these rows, and the next ones
  int now = 0;
  typename Grid<T>::Vector sum[rows][vectors];
  const auto after = [&](TileStart at) {
    return at.row + rows < count ? TileStart{at.row + rows, at.column} : TileStart{0, at.column + P::depth};
  };
  const auto centre_one = [&](TileStart at, int64_t r, T* to) FASTDA_INLINE_LAMBDA {
    const int64_t row = at.row + r;
    if (row >= count || at.column >= depth) return;
    centre_row(x + row * stride + at.column, least(P::depth, depth - at.column), centre + at.column, to + r * P::depth,
               squares ? squares + row * Grid<T>::lanes : nullptr);
  };
  TileStart at{0, 0};
  for (int64_t r = 0; r < rows; ++r) centre_one(at, r, centred[now]);
  while (at.column < depth) {
    const TileStart next = after(at), fetched = after(next);
    const int64_t some_depth = least(P::depth, depth - at.column);
    const auto prepare = [&](int64_t r) FASTDA_INLINE_LAMBDA {
      centre_one(next, r, centred[1 - now]);
      const int64_t columns = least(P::depth, depth - fetched.column);
      if (columns > 0) fetch(x + (fetched.row + r) * stride + fetched.column, columns + 1);  // and of the next line
    };
    clear<T, vectors, rows>(sum);
    add_products_and<T, vectors, rows>(prepare, centred[now], 1, P::depth, panel + at.column * vectors * P::lanes,
                                       some_depth, sum);
    put_rows<T, vectors, rows>(sum, least(rows, count - at.row), vectors * P::lanes, at.column > 0,
                               out + at.row * out_stride, out_stride);
    at = next;
    now = 1 - now;
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

// A point less one near them all, over the columns of a panel.
template <typename T, int vectors>
FASTDA_INLINE void centre_columns_of(const T* x, const T* centre, T* centred) {
  using G = Grid<T>;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    G::store(centred + v * G::lanes, G::load(x + v * G::lanes) - G::load(centre + v * G::lanes));
  }
}

// Completes Σ_c w_c (q − p_c) = (q − m) Σ_c w_c − Σ_c w_c (p_c − m), of which the last sum is there, for a few rows
// q − m; or the same with queries and classes exchanged. Rows are read beyond those that count.
template <typename T, int vectors, int rows>
FASTDA_INLINE void complete_rows(const double* totals, int64_t count, const T* centred,
                                 typename Grid<T>::Vector (*sum)[vectors]) {
  using G = Grid<T>;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const T total = static_cast<T>(totals[least(r, count - 1)]);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = G::load(centred + (r * vectors + v) * G::lanes) * total - sum[r][v];
    }
  }
}

// Gradients of some queries, that is sums over classes first to first + depth; the first ones complete them, and leave
// the queries less the centre.
template <typename T, int vectors>
FASTDA_APART void sum_over_some_classes(const EpisodeWeights<T>& of, int64_t begin, int64_t end, int64_t first,
                                        int64_t depth, const T* centred_p, int64_t width, T* centred_q, T* grad_q,
                                        int64_t stride) {
  using G = Grid<T>;
  constexpr int rows = ClassPanel<T>::rows_beside(vectors);
  typename G::Vector sum[rows][vectors];
  for (int64_t i = begin; i < end; i += rows) {
    const int64_t count = least(rows, end - i);
    const T* q = of.q + i * of.q_stride;
    T* to = grad_q + i * stride;
    T* centred = centred_q + (i - begin) * vectors * G::lanes;
    const auto centre_and_fetch = [&](int64_t r) FASTDA_INLINE_LAMBDA {
      if (first == 0) {
        centre_columns_of<T, vectors>(q + least(r, count - 1) * of.q_stride, of.centre,
                                      centred + r * vectors * G::lanes);
      }
      fetch(q + (rows + r) * of.q_stride, vectors * G::lanes);
      fetch<T, 1>(to + (rows + r) * stride, vectors * G::lanes);
    };
    clear<T, vectors, rows>(sum);
    add_products_and<T, vectors, rows>(centre_and_fetch, of.w + i * of.w_stride + first, 1, of.w_stride, centred_p,
                                       depth, sum);
    if (first == 0 && !of.product) {
      complete_rows<T, vectors, rows>(of.of_queries + i, count, centred, sum);
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

// Rows become columns; of each as much is written as whole squares of vectors hold.
template <typename T>
void turn_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, T* turned, int64_t turned_stride) {
  using G = Grid<T>;
  for (int64_t i = 0; i < rows; i += G::lanes) {
    for (int64_t c = 0; c < columns; c += G::lanes) {
      typename G::Vector some[G::lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < G::lanes; ++r) some[r] = G::load(x + least(i + r, rows - 1) * stride + c);
      turn<1, G::lanes>(some, std::make_index_sequence<G::lanes>{});
#pragma GCC unroll 16
      for (int64_t r = 0; r < G::lanes; ++r) G::store(turned + (c + r) * turned_stride + i, some[r]);
    }
  }
}

// How many queries a sum goes over, in all parts alike. Of many, most of which are far from a class, each adds next to
// nothing to what a few have added, and is rounded as the one before: such sums are to be short, and added up in
// float64.
template <typename T>
void queries_of_part(int64_t queries, int64_t* count, bool* many_parts) {
  constexpr int64_t whole = 24, few_parts = 4;  // whole tiles, however many rows these have
  static_assert(whole % ClassPanel<T>::rows_beside(1) == 0 && whole % ClassPanel<T>::rows_beside(3) == 0 &&
                whole % ClassPanel<T>::rows_beside(4) == 0);
  constexpr int64_t most = ClassPanel<T>::depth / whole * whole, most_of_many = least(most, 48);
  const int64_t parts = (queries + most - 1) / most;
  *many_parts = parts > few_parts;
  *count = *many_parts ? most_of_many : ((queries + parts - 1) / parts + whole - 1) / whole * whole;
}

// Gradients of prototypes, that is sums over so many queries from `first` on, less the centre; stored, added to what is
// there, or added up in float64.
template <typename T, int vectors, bool in_float64>
FASTDA_APART void sum_over_some_queries(const EpisodeWeights<T>& of, int64_t first, int64_t depth, const double* totals,
                                        const T* centred_q, const T* centred_p, RowCopies<T>* copies,
                                        int64_t copies_at_once, T* grad_p, int64_t p_stride, double* sums) {
  using G = Grid<T>;
  constexpr int rows = ClassPanel<T>::rows_beside(vectors);
  constexpr int64_t columns = vectors * G::lanes;
  const auto copy = [&](int64_t) FASTDA_INLINE_LAMBDA { copy_rows(copies, copies_at_once); };
  typename G::Vector sum[rows][vectors];
  for (int64_t c = 0; c < of.classes; c += rows, centred_p += rows * columns, grad_p += rows * p_stride) {
    clear<T, vectors, rows>(sum);
    add_products_and<T, vectors, rows>(copy, of.by_class + c * of.class_stride + first, 1, of.class_stride, centred_q,
                                       depth, sum);
    if (!of.product) complete_rows<T, vectors, rows>(totals + c, least(rows, of.classes - c), centred_p, sum);
    if (!in_float64) {
      put_rows<T, vectors, rows>(sum, rows, columns, first > 0, grad_p, p_stride);
      continue;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v, sums += G::lanes) G::add_in_float64(sum[r][v], sums);
    }
  }
}

template <typename T, int vectors>
void gradients_of_vectors(const EpisodeWeights<T>& of, int64_t width, RowCopies<T>* copies, T* grad_q, int64_t stride,
                          T* grad_p, int64_t p_stride, T* scratch, double* sums) {
  using G = Grid<T>;
  using P = ClassPanel<T>;
  constexpr int rows = P::rows_beside(vectors);
  constexpr int64_t columns = vectors * G::lanes;
  T *centred_q = scratch, *centred_p = centred_q + P::depth * columns;
  for (int64_t c = 0; c < of.classes; ++c) {
    centre_columns_of<T, vectors>(of.p + c * of.p_stride, of.centre, centred_p + c * columns);
  }
  const int64_t at_once = of.part;
  const bool many_parts = sums != nullptr;
  const int64_t turns = (of.queries + at_once - 1) / at_once * ((of.classes + rows - 1) / rows) * rows;
  const int64_t at_a_turn = (copies->rows + turns - 1) / turns;
  for (int64_t d = 0; many_parts && d < (of.classes + rows) * columns; ++d) sums[d] = 0;
  const double* totals = of.of_classes;
  for (int64_t first = 0; first < of.queries; first += at_once, totals += of.classes) {
    const int64_t last = least(first + at_once, of.queries);
    for (int64_t c = 0; c < of.classes; c += P::depth) {
      sum_over_some_classes<T, vectors>(of, first, last, c, least(P::depth, of.classes - c), centred_p + c * columns,
                                        width, centred_q, grad_q, stride);
    }
    const auto run = many_parts ? &sum_over_some_queries<T, vectors, true> : &sum_over_some_queries<T, vectors, false>;
    run(of, first, last - first, totals, centred_q, centred_p, copies, at_a_turn, grad_p, p_stride, sums);
  }
  for (int64_t c = 0; many_parts && c < of.classes; ++c) {
    for (int64_t d = 0; d < columns; ++d) grad_p[c * p_stride + d] = static_cast<T>(sums[c * columns + d]);
  }
}

// Gradients of all queries and prototypes, Σ_c w_c (q − p_c) and Σ_q w_q (p − q), as products Σ_c w_c p_c and
// Σ_q w_q q, over the columns of one panel, in one pass over the queries. Columns from `width` on are filling, and not
// written to grad_q. grad_p has room for whole vectors of columns, and for class_panel_rows rows beyond the classes, in
// which anything may be left; so have sums, null where there are few parts of queries. Scratch holds ClassPanel::depth
// and the classes, and class_panel_rows more, of panels. Finishes the copies meanwhile.
template <typename T>
void gradients_of_panel(const EpisodeWeights<T>& of, int64_t width, RowCopies<T>* copies, T* grad_q, int64_t stride,
                        T* grad_p, int64_t p_stride, T* scratch, double* sums) {
  FASTDA_WITH_CLASS_VECTORS(gradients_of_vectors, width, of, width, copies, grad_q, stride, grad_p, p_stride, scratch,
                            sums);
}

// Rows divided by the counts of their classes, where these are not 0.
template <typename T>
void divide_by_counts(T* rows, int64_t stride, int64_t width, const int64_t* counts, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c, rows += stride) {
    if (counts[c] > 1) divide(rows, static_cast<T>(counts[c]), width, rows);
  }
}

#undef FASTDA_WITH_CLASS_VECTORS
#undef FASTDA_INLINE_LAMBDA
#undef FASTDA_APART
