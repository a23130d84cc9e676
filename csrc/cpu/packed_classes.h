// The products of an episode: its classes are packed, its queries are multiplied as they lie. Include after
// prototypes.h with the loops of episode_loops.h.
#pragma once

namespace fastda {
namespace {

template <typename T>
PanelShape class_panel_shape_of(T) {
  PanelShape shape{};
  FASTDA_RUN(class_panel_shape<T>(&shape));
  return shape;
}

// The classes of an episode as panels, less a point near the queries.
template <typename T>
class PackedClasses {
 public:
  PackedClasses(const Points<T>& p, Metric metric, const std::vector<T>& centre)
      : p_(p),
        metric_(metric),
        centre_(centre),
        lanes_(panel_shape_of(T()).rows),
        columns_(class_panel_shape_of(T()).columns),
        memory_(whole_lanes(p.count()) * (p.depth() + 2)),
        packed_(memory_.data()),
        norms_(packed_ + whole_lanes(p.count()) * p.depth()),
        rests_(norms_ + whole_lanes(p.count())) {
    const int64_t work = lanes_ * p.depth() * 16;
    at::parallel_for(0, blocks(p.count(), lanes_), thread_grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * lanes_; first < end * lanes_; first += lanes_) {
        const int64_t panel = first / columns_ * columns_, width = whole_lanes(std::min(columns_, p.count() - panel));
        FASTDA_RUN(pack_lanes(p.row(first), p.stride(), std::min(lanes_, p.count() - first), p.depth(), centre.data(),
                              width, packed_ + panel * p.depth() + first - panel, norms_ + first, rests_ + first));
      }
    });
  }

  // out[(q − queries.begin) · stride + c]: the distance from query q to class c. Whether there are near pairs, whose
  // distances are negated then, where that is asked for.
  bool find_distances(const Points<T>& q, Range queries, T* out, int64_t stride, bool ask_near) const {
    constexpr int64_t at_once = 480;  // queries, whose products stay in the second cache; a multiple of rows_beside
    const Scratch<T> products(std::min(at_once, queries.size()) * columns_);
    bool near = false;
    for (int64_t begin = queries.begin; begin < queries.end; begin += at_once) {
      const Range some{begin, std::min(begin + at_once, queries.end)};
      find_distances(q, some, products.data(), out + (begin - queries.begin) * stride, stride,
                     ask_near ? &near : nullptr);
    }
    return near;
  }

 private:
  void find_distances(const Points<T>& q, Range some, T* products, T* out, int64_t stride, bool* near) const {
    const int64_t count = some.size(), depth = p_.depth();
    std::vector<double> squares(count * lanes_, 0);
    std::vector<T> norms(count);
    for (int64_t first = 0; first < p_.count(); first += columns_) {
      const int64_t classes = std::min(columns_, p_.count() - first);
      FASTDA_RUN(products_of_rows(q.row(some.begin), q.stride(), count, depth, centre_.data(), packed_ + first * depth,
                                  classes, first == 0 ? squares.data() : nullptr, products, columns_));
      if (first == 0) FASTDA_RUN(norms_of_rows(squares.data(), count, norms.data()));
      FASTDA_RUN(distances_from_products(metric_, products, columns_, q.row(some.begin), q.stride(), norms.data(),
                                         count, p_.row(first), p_.stride(), norms_ + first, rests_ + first, classes,
                                         depth, out + first, stride, near));
    }
  }

  int64_t whole_lanes(int64_t classes) const { return blocks(classes, lanes_) * lanes_; }

  const Points<T>& p_;
  const Metric metric_;
  const std::vector<T>& centre_;
  const int64_t lanes_, columns_;
  const Scratch<T> memory_;
  T *const packed_, *const norms_, *const rests_;
};

}  // namespace
}  // namespace fastda
