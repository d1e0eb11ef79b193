// Sharing work among MindSpore's threads, and memory for each thread.
#pragma once
#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <new>
#include <utility>
#include <vector>

// The threads that MindSpore's own operators compute in: func(content, task, ...) for each task.
namespace mindspore {
class ThreadPool {
 public:
  int ParallelLaunch(const std::function<int(void *, int, float, float)> &func, void *content, int tasks);
};
namespace kernel {
ThreadPool *GetActorMgrInnerThreadPool();
}
}  // namespace mindspore

namespace {

constexpr int64_t PART = 1024, MIN_VALUES_PER_THREAD = 1 << 15;

// Calls `compute(first, end)` for parts of `items`, in as many of MindSpore's threads as have MIN_VALUES_PER_THREAD of
// the `values` each. Returns 1 if not `valid`, or if memory is short. Threads of our own would share a core with
// MindSpore's, which wait for work by spinning.
template <typename Compute>
int run(bool valid, int64_t items, int64_t values, const Compute &compute) {
  if (!valid) return 1;
  cpu_set_t processors;
  int64_t threads = sched_getaffinity(0, sizeof processors, &processors) == 0 ? CPU_COUNT(&processors) : 1;
  threads = std::max<int64_t>(1, std::min({threads, items, values / MIN_VALUES_PER_THREAD}));
  auto share = [&](void *, int thread, float, float) {
    try {
      compute(items * thread / threads, items * (thread + 1) / threads);
    } catch (const std::bad_alloc &) {
      return 1;
    }
    return 0;
  };
  if (threads == 1) return share(nullptr, 0, 0, 0);
  return mindspore::kernel::GetActorMgrInnerThreadPool()->ParallelLaunch(share, nullptr, int(threads));
}

// As `run`, with PART values to an item. The last values of an item are computed one by one, not as vectors, which may
// round differently, and with items of PART values their place does not depend on the number of threads.
template <typename Compute>
int run_parts(bool valid, int64_t values, const Compute &compute) {
  return run(valid, (values + PART - 1) / PART, values, [&](int64_t first, int64_t end) {
    compute(first * PART, std::min(end * PART, values));
  });
}

// Memory for a thread's intermediate results, kept for the next use: memory fresh from the system takes longer to be
// allocated than to be computed in. A second Scratch in the same thread at the same time has memory of its own.
class Scratch {
 public:
  explicit Scratch(int64_t values) : memory(std::move(kept)) {
    if (int64_t(memory.size()) < values) memory.resize(values);
  }
  ~Scratch() { kept = std::move(memory); }
  float *data() { return memory.data(); }

 private:
  static thread_local std::vector<float> kept;
  std::vector<float> memory;
};
thread_local std::vector<float> Scratch::kept;

}  // namespace
