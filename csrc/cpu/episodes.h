// A batch of episodes: sizes and options. Include after prototypes.h.
#pragma once

namespace fastda {
namespace {

struct Episodes {
  int64_t batch, support, queries, classes, features;
  Metric metric;
  bool reduces, mean;  // over the queries of an episode

  double share() const { return mean ? 1.0 / static_cast<double>(queries) : 1.0; }
};

inline Episodes episodes_of(const Tensor& support, const Tensor& queries, const Tensor& temperature,
                            const Tensor& support_labels, const Tensor& query_labels, int64_t num_classes,
                            c10::string_view metric, c10::string_view reduction) {
  check_features("support", support);
  check_features("queries", queries);
  check_same("queries", queries, "support", support);
  TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
  TORCH_CHECK_VALUE(reduction == "none" || reduction == "mean" || reduction == "sum",
                    "reduction: expected 'none', 'mean' or 'sum', got '", reduction, "'");
  const int64_t batch = batch_size(support, 2);
  check_count("temperature", temperature, batch);
  check_labels("support_labels", support_labels, batch * support.size(-2));
  check_labels("query_labels", query_labels, batch * queries.size(-2));
  return {batch,
          support.size(-2),
          queries.size(-2),
          num_classes,
          support.size(-1),
          metric_of(metric),
          reduction != "none",
          reduction == "mean"};
}

}  // namespace
}  // namespace fastda
