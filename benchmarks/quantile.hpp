// SPDX-License-Identifier: Apache-2.0
// Medians and percentiles of times.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace bitdecoding::bench {

// The `share` quantile of times, linear between two of them.
inline double quantile(std::vector<double> times, double share) {
  std::sort(times.begin(), times.end());
  const double place = share * static_cast<double>(times.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, times.size() - 1);
  return times[below] + (place - static_cast<double>(below)) * (times[above] - times[below]);
}

}  // namespace bitdecoding::bench
