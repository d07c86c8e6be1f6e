// What the CPU engines ask of their caller, threads and memory, and how they spread work items over the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#include "attention.h"

namespace cogview {

struct Host {
  int threads;
  std::function<void(int64_t count, const std::function<void(int64_t)>& f)> parallel;  // f(0) to f(count - 1)
  std::function<char*(int64_t bytes)> memory;  // aligned to 64 bytes, there until the call is over
};

inline Scratch scratch(const Host& host, int64_t bytes) {
  const int64_t piece = (bytes + 63) / 64 * 64;
  return {host.memory(piece * host.threads), piece};
}

// Runs `kernel(plan, begin, end, slot)` over all items. Threads take the next `grain` items when they are free, so
// uneven items balance; which thread does what is not fixed, so items must be independent.
template <class Plan>
void run_items(const Host& host, void (*kernel)(const Plan&, int64_t, int64_t, int), const Plan& plan, int64_t items,
               int64_t grain = 1) {
  if (items == 0) return;
  std::atomic<int64_t> next{0};
  host.parallel(std::min<int64_t>(host.threads, (items + grain - 1) / grain), [&](int64_t slot) {
    for (int64_t begin; (begin = next.fetch_add(grain)) < items;)
      kernel(plan, begin, std::min(begin + grain, items), static_cast<int>(slot));
  });
}

}  // namespace cogview
