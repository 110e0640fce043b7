// The plainest kernel with a given mix of reads and writes: what an optimizer step's memory traffic costs at least.
// Built at run time by floor.py, for this very processor. Arrays of float32, whose sizes are multiples of 64 and whose
// data is aligned to 64 bytes; the threads take equal parts.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <vector>

namespace {

typedef float Line __attribute__((vector_size(64)));  // a line of the cache

void store_past_cache(float* to, const Line& x) {
#ifdef __SSE__
  for (int k = 0; k < 4; ++k) _mm_stream_ps(to + 4 * k, reinterpret_cast<const __m128*>(&x)[k]);
#else
  *reinterpret_cast<Line*>(to) = x;
#endif
}

// The mean of ``reads``, element by element, goes to every one of ``writes``, and past the cache to ``streams``; an
// array may be read and written. Returns a sum of all that was read, so that reading alone is not nothing.
double move(const std::vector<at::Tensor>& reads, std::vector<at::Tensor> writes, std::vector<at::Tensor> streams) {
  std::vector<const float*> from;
  std::vector<float*> to, past;
  for (const auto& t : reads) from.push_back(t.const_data_ptr<float>());
  for (auto& t : writes) to.push_back(t.data_ptr<float>());
  for (auto& t : streams) past.push_back(t.data_ptr<float>());
  const int64_t blocks = reads[0].numel() / 64;
  const float share = 1.0f / from.size();
  std::vector<double> sums(at::get_num_threads());
  // 100,000 elements are not worth a second thread.
  const int64_t grain = std::max<int64_t>(blocks / at::get_num_threads() + 1, 4096);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    Line sum[4] = {};
    for (int64_t i = 64 * begin; i < 64 * end; i += 64) {
      Line x[4] = {};
      for (const float* p : from)
        for (int k = 0; k < 4; ++k) x[k] += *reinterpret_cast<const Line*>(p + i + 16 * k);
      for (int k = 0; k < 4; ++k) sum[k] += x[k] *= share;
      for (float* p : to)
        for (int k = 0; k < 4; ++k) *reinterpret_cast<Line*>(p + i + 16 * k) = x[k];
      for (float* p : past)
        for (int k = 0; k < 4; ++k) store_past_cache(p + i + 16 * k, x[k]);
    }
#ifdef __SSE__
    _mm_sfence();
#endif
    sums[at::get_thread_num()] = sum[0][0] + sum[1][0] + sum[2][0] + sum[3][0];
  });
  double total = 0;
  for (double s : sums) total += s;
  return total;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("move", &move); }
