// The distances of a block of queries to all classes, held until the gradients have been taken from them: three
// products in all, where a backward pass has to find the distances again. Include after prototypes.h.
//
// They lie in tiles of the queries and a panel of classes. The gradients pass by in blocks of classes, which stay in
// the second cache while both products read their weights.
#pragma once

namespace fastda {
namespace {

// The same part of everything that is split among the threads.
struct Share {
  int64_t begin, end, total;

  // Of rows, in blocks of so many.
  Range of(Range rows, int64_t at_once) const {
    const int64_t count = blocks(rows.size(), at_once);
    return {std::min(rows.end, rows.begin + count * begin / total * at_once),
            std::min(rows.end, rows.begin + count * end / total * at_once)};
  }
};

template <typename F>
void for_shares(int64_t work, const F& each) {
  constexpr int64_t total = 64, turns = 4;  // a thread's
  const int64_t at_once = std::max<int64_t>(1, total / (turns * at::get_num_threads()));
  parallel_in_turn(total, std::max(at_once, thread_grain(work / total)),
                   [&](int64_t begin, int64_t end) { each(Share{begin, end, total}); });
}

template <typename T>
class HeldDistances {
 public:
  // Memory has room for `of_class` values a class, at least as many as there are queries, and stays the caller's.
  HeldDistances(Range queries, int64_t classes, T* memory, int64_t of_class)
      : queries_(queries),
        classes_(classes),
        columns_(panel_shape_of(T()).columns),
        of_class_(of_class),
        memory_(memory),
        last_(classes % columns_ == 0 ? 0 : queries.size() * columns_) {}

  Range queries() const { return queries_; }
  int64_t columns() const { return columns_; }
  int64_t panels() const { return blocks(classes_, columns_); }
  Range classes(int64_t panel) const {
    return {panel * columns_, std::min((panel + 1) * columns_, classes_)};
  }
  // From the first query to the classes of a panel. A tile is as wide where they are fewer, and takes more room then.
  T* tile(int64_t panel) const {
    return classes(panel).size() == columns_ ? memory_ + panel * columns_ * of_class_ : last_.data();
  }
  const T* row(int64_t panel, int64_t query) const { return tile(panel) + (query - queries_.begin) * columns_; }
  T distance(int64_t query, int64_t c) const { return row(c / columns_, query)[c % columns_]; }

  // Finds them; prototypes(classes) gives points, and found(panel, queries, near) is told what has just been found, and
  // whether there are near pairs, whose distances are negated. A query's products are rounded the same however the
  // queries are split.
  template <typename Prototypes, typename Found>
  void find(const Points<T>& q, Metric metric, const std::vector<T>& centre, const Prototypes& prototypes,
            const Found& found) const {
    const auto find_some = [&](const PackedQueries<T>& packed, Range some, int64_t first, int64_t last) {
      for (; first < last; first += panels_at_once) {
        packed.find_tiles(
            prototypes({classes(first).begin, classes(std::min(first + panels_at_once, last) - 1).end}),
            [&](int64_t i) { return tile(first + i) + (some.begin - queries_.begin) * columns_; },
            [&](int64_t i, Range few, bool near) { found(first + i, few, near); });
      }
    };
    const int64_t lanes = panel_shape_of(T()).rows, query_blocks = blocks(queries_.size(), lanes);
    const int64_t work = columns_ * q.depth();
    if (panels() >= query_blocks) {
      const PackedQueries<T> packed(q, queries_, metric, centre);
      const int64_t turn = std::clamp<int64_t>(panels() / at::get_num_threads(), 1, panels_at_once);
      parallel_in_turn(panels(), std::max(turn, thread_grain(work * queries_.size())),
                       [&](int64_t begin, int64_t end) { find_some(packed, queries_, begin, end); });
    } else {
      at::parallel_for(0, query_blocks, thread_grain(work * panels() * lanes), [&](int64_t begin, int64_t end) {
        const Range some{queries_.begin + begin * lanes, std::min(queries_.begin + end * lanes, queries_.end)};
        find_some(PackedQueries<T>(q, some, metric, centre), some, 0, panels());
      });
    }
  }

 private:
  static constexpr int64_t panels_at_once = 4;  // that a few queries meet while these are near

  const Range queries_;
  const int64_t classes_, columns_, of_class_;
  T* memory_;
  const Scratch<T> last_;
};

// Samples of sums, less a point near them, below each other in panels of their features.
template <typename T>
class PackedSamples {
 public:
  // Room for so many values, of samples and the features that fill up their last vector.
  PackedSamples(int64_t count, const std::vector<T>& centre) : centre_(centre), packed_(count) {}

  // Rows of y, which has all samples.
  void pack(const Points<T>& y, Range all, Range rows) const {
    FASTDA_RUN(pack_all_below(y.row(rows.begin), y.stride(), rows.size(), y.features(), centre_.data(),
                              rows.begin - all.begin, all.size(), packed_.data()));
  }

  // The panel of feature d on, `samples` of which are in all, from the first one on.
  const T* panel(int64_t d, int64_t features, int64_t samples, int64_t first) const {
    const PanelShape shape = panel_shape_of(T());
    const int64_t width = blocks(std::min(shape.columns, features - d), shape.rows) * shape.rows;
    return packed_.data() + d * samples + first * width;
  }

 private:
  const std::vector<T>& centre_;
  const Scratch<T> packed_;
};

}  // namespace
}  // namespace fastda
