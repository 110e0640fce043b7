// Threads in the place of torch's, which sanitizers and emulators can follow.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace sam {

inline int get_num_threads() { return 3; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain_size*/, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back([&f, i] { f(i, i + 1); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace sam
