// SPDX-License-Identifier: Apache-2.0
// Threads of one call: started for it, joined before it returns. Items are handed out one by one,
// so uneven items balance; whoever computes an item, its result is the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace bitdecoding::cpu {

// Starting a thread costs about 20 us: each must have several times that to do.
inline constexpr std::int64_t kThreadWork_ns = 60'000;

// Threads for `items` that take `work_ns` together on one; `wanted` = 0: one per hardware thread.
inline int choose_threads(int wanted, std::int64_t items, std::int64_t work_ns) {
  const int most = wanted > 0 ? wanted : static_cast<int>(std::thread::hardware_concurrency());
  const std::int64_t useful = std::min(items, work_ns / kThreadWork_ns);
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(most, useful)));
}

// body(item) for every item of [0, items), on the caller's thread and `threads` - 1 others.
template <class Body>
void parallel_for(std::int64_t items, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t item = next++; item < items; item = next++) body(item);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads));
  try {
    while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no more threads: those that started do everything.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace bitdecoding::cpu
