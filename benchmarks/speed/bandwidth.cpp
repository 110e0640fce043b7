// The machine's memory bandwidth, by the plainest kernels that can be had: what an optimizer step is measured against.
// Built at run time by floor.py. Each kernel runs in parallel over equal parts of its arrays of float32, whose sizes
// are multiples of 16 and whose data is aligned to 16 bytes. SSE is enough: memory is the limit, not arithmetic.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <xmmintrin.h>

#include <atomic>

namespace {

// f(begin, end) over parts that are multiples of 16 elements.
template <class F>
void parallel(int64_t n, const F& f) {
  const int64_t lines = n / 16;
  at::parallel_for(0, lines, lines / at::get_num_threads() + 1, [&](int64_t b, int64_t e) { f(16 * b, 16 * e); });
}

// Reads.
int64_t sum(const at::Tensor& x) {
  const float* p = x.const_data_ptr<float>();
  std::atomic<int64_t> total{0};
  parallel(x.numel(), [&](int64_t b, int64_t e) {
    __m128 s[4] = {};
    for (int64_t i = b; i < e; i += 16)
      for (int k = 0; k < 4; ++k) s[k] = _mm_add_ps(s[k], _mm_load_ps(p + i + 4 * k));
    total += _mm_cvtss_si32(_mm_add_ps(_mm_add_ps(s[0], s[1]), _mm_add_ps(s[2], s[3])));
  });
  return total;
}

// Writes past the cache.
void fill(at::Tensor to) {
  float* p = to.data_ptr<float>();
  const __m128 one = _mm_set1_ps(1);
  parallel(to.numel(), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i += 4) _mm_stream_ps(p + i, one);
    _mm_sfence();
  });
}

// Reads one array, writes another past the cache.
void copy(at::Tensor to, const at::Tensor& from) {
  float* d = to.data_ptr<float>();
  const float* s = from.const_data_ptr<float>();
  parallel(to.numel(), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i += 4) _mm_stream_ps(d + i, _mm_load_ps(s + i));
    _mm_sfence();
  });
}

// Reads two arrays, writes a third past the cache.
void triad(at::Tensor to, const at::Tensor& x, const at::Tensor& y) {
  float* d = to.data_ptr<float>();
  const float *p = x.const_data_ptr<float>(), *q = y.const_data_ptr<float>();
  const __m128 half = _mm_set1_ps(0.5f);
  parallel(to.numel(), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i += 4)
      _mm_stream_ps(d + i, _mm_add_ps(_mm_load_ps(p + i), _mm_mul_ps(half, _mm_load_ps(q + i))));
    _mm_sfence();
  });
}

// Reads two arrays and writes one of them in place.
void add(at::Tensor to, const at::Tensor& x) {
  float* d = to.data_ptr<float>();
  const float* p = x.const_data_ptr<float>();
  const __m128 half = _mm_set1_ps(0.5f);
  parallel(to.numel(), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i += 4)
      _mm_store_ps(d + i, _mm_add_ps(_mm_mul_ps(half, _mm_load_ps(d + i)), _mm_load_ps(p + i)));
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("sum", &sum);
  m.def("fill", &fill);
  m.def("copy", &copy);
  m.def("triad", &triad);
  m.def("add", &add);
}
