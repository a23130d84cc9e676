// Means of the samples of each class. Include after prototypes.h.
#pragma once

namespace fastda {
namespace {

// The samples of each class, in their order: of(c) ... of(c) + count(c).
class Members {
 public:
  Members(const char* name, const int64_t* labels, int64_t samples, int64_t classes)
      : starts_(classes + 1), members_(samples) {
    for (int64_t s = 0; s < samples; ++s) {
      check_label(name, labels[s], classes);
      ++starts_[labels[s] + 1];
    }
    for (int64_t c = 0; c < classes; ++c) starts_[c + 1] += starts_[c];
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t s = 0; s < samples; ++s) members_[next[labels[s]]++] = s;
  }
  const int64_t* of(int64_t c) const { return members_.data() + starts_[c]; }
  int64_t count(int64_t c) const { return starts_[c + 1] - starts_[c]; }

 private:
  std::vector<int64_t> starts_, members_;
};

// Means of the rows of x (dense, `features` wide), `absent` for a class without any, and the classes' counts.
template <typename T>
void find_means(const Members& members, const T* x, int64_t samples, int64_t classes, int64_t features, T absent,
                T* means, int64_t* counts) {
  const int64_t work = samples * features / std::max<int64_t>(classes, 1);
  at::parallel_for(0, classes, thread_grain(work * 4), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T* mean = means + c * features;
      counts[c] = members.count(c);
      if (counts[c] == 0) {
        std::fill(mean, mean + features, absent);
      } else {
        FASTDA_RUN(mean_of_rows(x, features, members.of(c), counts[c], features, mean));
      }
    }
  });
}

// x in the accumulation dtype, dense.
inline Tensor rows_of(const Tensor& x) { return as_type(x, accumulate_type(x.scalar_type())).contiguous(); }

}  // namespace
}  // namespace fastda
