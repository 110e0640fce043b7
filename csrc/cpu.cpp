// The CPU backend: loops over chunks.
//
// Each kernel is a template that is forced inline into one function for each instruction set, and the set is chosen
// at run time. Contraction to fused multiply-adds is off (setup.py), so every set gives the same bits.
// The work is memory traffic: what is written without having been read (the backup, and the weight in an update that
// starts from the backup) goes past the cache when the whole job is larger than the cache.
#include <algorithm>
#include <atomic>

#include "backends.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#define SAM_X86 1
#endif

namespace sam {
namespace {

constexpr int64_t kChunk = 1 << 14;          // elements; the chunks of all of a row's tensors fit into the L2 cache
constexpr int kBlock = 512;                  // elements; a block's fit into the L1 cache
constexpr int64_t kGrain = 1 << 17;          // elements; less than this is not worth a second thread
constexpr int64_t kPastCacheFrom = 1 << 23;  // bytes of parameters; smaller jobs stay in the cache

// ---- instruction sets ----

enum class Isa { kDefault, kAvx2, kAvx512 };

constexpr const char* kIsaNames[] = {"default", "avx2", "avx512"};

Isa best_isa() {
#if SAM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

const Isa best = best_isa();
Isa isa = best;

template <class F>
void run_default(const F& f, int64_t begin, int64_t end) {
  f(begin, end);
}
#if SAM_X86
template <class F>
__attribute__((target("avx2"))) void run_avx2(const F& f, int64_t begin, int64_t end) {
  f(begin, end);
}
// clang prefers 512 bits by itself, and with an option that it does not know it would drop the whole attribute.
#if defined(__clang__)
#define SAM_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define SAM_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
template <class F>
__attribute__((target(SAM_AVX512))) void run_avx512(const F& f, int64_t begin, int64_t end) {
  f(begin, end);
}
#endif

template <class F>
void run(const F& f, int64_t begin, int64_t end) {
#if SAM_X86
  if (isa == Isa::kAvx512) return run_avx512(f, begin, end);
  if (isa == Isa::kAvx2) return run_avx2(f, begin, end);
#endif
  run_default(f, begin, end);
}

// ---- memory ----

// memcpy; by non-temporal stores if `past_cache`.
SAM_FN void copy(void* to, const void* from, int64_t bytes, bool past_cache) {
#if SAM_X86
  if (past_cache && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    char* d = static_cast<char*>(to);
    const char* s = static_cast<const char*>(from);
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64)
      for (int k = 0; k < 64; k += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(d + i + k),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i + k)));
    memcpy(d + i, s + i, bytes - i);
    return;
  }
#endif
  memcpy(to, from, bytes);
}

void order_stores() {
#if SAM_X86
  _mm_sfence();
#endif
}

// ---- kernels over one chunk ----

template <class V, class T>
SAM_FN V* elements(T* base, int64_t i) {
  return static_cast<V*>(base) + i;
}

typedef double Lanes __attribute__((vector_size(32)));  // four doubles, on any instruction set

// Adds the squares of x[0..n) to 32 sums, x[i] to sum i % 32.
template <class A>
SAM_FN void add_squares(Lanes (&sums)[8], const A* x, int n) {
  for (; n >= 32; n -= 32, x += 32)
    for (int k = 0; k < 8; ++k) {
      const A* in = x + 4 * k;
      // One conversion of four; g++ makes two halves of __builtin_convertvector.
      const Lanes wide = {double(in[0]), double(in[1]), double(in[2]), double(in[3])};
      sums[k] += wide * wide;
    }
  for (int i = 0; i < n; ++i) sums[i / 4][i % 4] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
}

template <class T, bool kAdaptive>
SAM_FN double sq_norm_chunk(const Row& row, const Chunk& c, const Ascent& ascent) {
  using A = arithmetic_t<T>;
  const Ascend<A, kAdaptive> ascend(ascent);
  const T* w = elements<const T>(row.param, c.begin);
  const T* g = elements<const T>(row.grad, c.begin);
  Lanes sums[8] = {};
  alignas(64) A scaled[kBlock];
  for (int left = c.size; left > 0; left -= kBlock, w += kBlock, g += kBlock) {
    const int n = std::min(kBlock, left);
    if constexpr (std::is_same_v<T, A> && !kAdaptive) {
      add_squares(sums, g, n);
    } else {
      for (int i = 0; i < n; ++i) scaled[i] = ascend.scaled(load(w[i]), load(g[i]));
      add_squares(sums, scaled, n);
    }
  }
  for (int half = 4; half; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return (sums[0][0] + sums[0][1]) + (sums[0][2] + sums[0][3]);
}

SAM_FN double sq_norm(const Row& row, const Chunk& c, const Ascent& ascent) {
  double sum = 0;
  with_dtype(row.dtype, [&](auto t) __attribute__((always_inline)) {
    using T = decltype(t);
    sum = ascent.adaptive != 0 ? sq_norm_chunk<T, true>(row, c, ascent) : sq_norm_chunk<T, false>(row, c, ascent);
  });
  return sum;
}

// The same, for a chunk that an update has just left in the cache: one function, whatever the base.
__attribute__((noinline)) double sq_norm_after(const Row& row, const Chunk& c, const Ascent& ascent) {
  double sum = 0;
  run([&](int64_t, int64_t) __attribute__((always_inline)) { sum = sq_norm(row, c, ascent); }, 0, 1);
  return sum;
}

template <class T, bool kAdaptive>
SAM_FN void perturb_chunk(const Row& row, const Chunk& c, const Ascent& ascent, double norm, bool saved,
                          bool past_cache) {
  using A = arithmetic_t<T>;
  const Ascend<A, kAdaptive> ascend(ascent, norm);
  T* w = elements<T>(row.param, c.begin);
  const T* g = elements<const T>(row.grad, c.begin);
  T* backup = elements<T>(row.backup, c.begin);
  alignas(64) T moved[kBlock];
  const bool finite = std::isfinite(norm), staged = saved && past_cache;
  for (int b = 0; b < c.size; b += kBlock) {
    const int n = std::min(kBlock, c.size - b);
    if (!saved) copy(backup + b, w + b, n * sizeof(T), past_cache);
    T* __restrict to = staged ? moved : w + b;
    const T* __restrict from = backup + b;
    const T* __restrict d = g + b;
    const uint32_t first = static_cast<uint32_t>(c.begin) + b;
    if (!saved && finite)
      for (int i = 0; i < n; ++i) ascend.perturb(to[i], to[i], load(d[i]), first + i);
    else if (finite)
      for (int i = 0; i < n; ++i) ascend.perturb(to[i], from[i], load(d[i]), first + i);
    else if (saved)
      memcpy(to, from, n * sizeof(T));
    if (staged) copy(w + b, moved, n * sizeof(T), true);
  }
}

// The loop that follows has no dependency from one turn to the next.
#if defined(__clang__)
#define SAM_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define SAM_IVDEP _Pragma("GCC ivdep")
#endif

// One block of an update, from `from` to `to`, which may be the same.
template <class T, class Update, class... State>
SAM_FN void update_block(const Update& update, int n, T* to, const T* from, const T* __restrict g,
                         State* __restrict... states) {
  using A = arithmetic_t<T>;
  SAM_IVDEP
  for (int i = 0; i < n; ++i) {
    A w = load(from[i]);
    A state[sizeof...(states) + 1] = {load(states[i])...};
    update(w, load(g[i]), state);
    [[maybe_unused]] const A* next = state;
    (store(states[i], *next++), ...);
    store(to[i], w);
  }
}

template <class T, class Base>
SAM_FN void restore_step_chunk(const Row& row, const Chunk& c, const typename Base::Hyper& hyper,
                               const typename Base::Step& step, double grad_scale, bool past_cache) {
  const typename Base::template Update<arithmetic_t<T>> update(hyper, step, grad_scale);
  T* w = elements<T>(row.param, c.begin);
  const T* from = row.backup ? elements<const T>(row.backup, c.begin) : w;
  const T* g = elements<const T>(row.grad, c.begin);
  alignas(64) T fresh[kBlock];
  const bool staged = past_cache && row.backup;
  for (int b = 0; b < c.size; b += kBlock) {
    const int n = std::min(kBlock, c.size - b);
    T* to = staged ? fresh : w + b;
    [&]<size_t... K>(std::index_sequence<K...>) __attribute__((always_inline)) {
      update_block(update, n, to, from + b, g + b, elements<T>(row.state[K], c.begin + b)...);
    }(std::make_index_sequence<Base::states>());
    if (staged) copy(w + b, fresh, n * sizeof(T), true);
  }
}

// ---- drivers ----

int64_t size_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// Runs f(chunk, i, past_cache) over all chunks of a table, in parallel over one flat list of them. Threads take the
// next few whenever they are done, so that a slow one does not keep the others waiting.
template <class F>
void for_chunks(const Table& table, const std::vector<Chunk>& chunks, const F& f) {
  int64_t elements = 0, bytes = 0;
  for (const Row& row : table) {
    elements += row.numel;
    bytes += row.numel * size_of(row.dtype);
  }
  const int64_t n = static_cast<int64_t>(chunks.size());
  const int64_t threads = std::min<int64_t>(get_num_threads(), (elements + kGrain - 1) / kGrain);
  const int64_t batch = threads <= 1 ? n : std::max<int64_t>(1, n / (32 * threads));
  const bool past_cache = bytes >= kPastCacheFrom;
  const Chunk* data = chunks.data();
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(batch, std::memory_order_relaxed)) < n;)
      run(
          [&](int64_t b, int64_t e) __attribute__((always_inline)) {
            for (int64_t i = b; i < e; ++i) f(data[i], i, past_cache);
          },
          begin, std::min(begin + batch, n));
    if (past_cache) order_stores();
  };
  if (threads <= 1)
    work(0, 1);
  else
    parallel_for(0, threads, 1, work);
}

template <class F>
void for_chunks(const Table& table, const F& f) {
  for_chunks(table, chunks_of(table, kChunk), f);
}

// Sums of chunks to sums of groups.
void add_up(const Table& table, const std::vector<Chunk>& chunks, const std::vector<double>& partial, int64_t n_groups,
            double* sq_norms) {
  std::fill(sq_norms, sq_norms + n_groups, 0.0);
  for (size_t i = 0; i < chunks.size(); ++i) sq_norms[table[chunks[i].row].group] += partial[i];
}

void grad_sq_norm(const Queue&, const Table& table, const Ascent* groups, int64_t n_groups, double* sq_norms) {
  const std::vector<Chunk> chunks = chunks_of(table, kChunk);
  std::vector<double> partial(chunks.size());
  double* const out = partial.data();
  for_chunks(table, chunks, [&](const Chunk& c, int64_t i, bool) __attribute__((always_inline)) {
    const Row& row = table[c.row];
    out[i] = sq_norm(row, c, groups[row.group]);
  });
  add_up(table, chunks, partial, n_groups, sq_norms);
}

void sharpness(const Queue&, const double* sq_norms, const Ascent* groups, int64_t n_groups, const float* grad_scale,
               double* total, double* out) {
  Sharpness sharpness;
  for (int64_t g = 0; g < n_groups; ++g) sharpness.add(sq_norms[g], groups[g].rho);
  sharpness.report(grad_scale, total, out);
}

void perturb(const Queue&, const Table& table, const Ascent* groups, const double* norm, bool saved) {
  for_chunks(table, [&](const Chunk& c, int64_t, bool past_cache) __attribute__((always_inline)) {
    const Row& row = table[c.row];
    const Ascent& a = groups[row.group];
    with_dtype(row.dtype, [&](auto t) __attribute__((always_inline)) {
      using T = decltype(t);
      if (a.adaptive != 0)
        perturb_chunk<T, true>(row, c, a, *norm, saved, past_cache);
      else
        perturb_chunk<T, false>(row, c, a, *norm, saved, past_cache);
    });
  });
}

void restore(const Queue&, const Table& table) {
  for_chunks(table, [&](const Chunk& c, int64_t, bool past_cache) __attribute__((always_inline)) {
    const Row& row = table[c.row];
    if (!row.backup) return;
    const int64_t size = size_of(row.dtype);
    copy(elements<char>(row.param, c.begin * size), elements<const char>(row.backup, c.begin * size), c.size * size,
         past_cache);
  });
}

// The rows of hyper-parameters, with the learning rates that are kept elsewhere.
template <class Hyper>
std::vector<Hyper> with_rates(const double* hyper, const Rate* rates, int64_t n_groups) {
  const auto* first = reinterpret_cast<const Hyper*>(hyper);
  std::vector<Hyper> rows(first, first + n_groups);
  for (int64_t g = 0; g < n_groups; ++g) rows[g].lr = rates[g].value_or(rows[g].lr);
  return rows;
}

void restore_step(const Queue& queue, const Table& table, int base, const double* hyper, const Rate* rates,
                  const float* grad_scale, const float* found_inf, const Along* along) {
  if (found_inf && *found_inf != 0) {
    restore(queue, table);
    if (along) grad_sq_norm(queue, along_state(table, along->state), along->groups, along->n_groups, along->sq_norms);
    return;
  }
  const double scale = grad_scale ? *grad_scale : 1;
  for (const Row& row : table)
    if (row.step) *row.step += 1;
  const std::vector<Chunk> chunks = chunks_of(table, kChunk);
  std::vector<double> partial(along ? chunks.size() : 0);
  double* const out = partial.data();
  with_base(base, [&](auto b) {
    using Base = decltype(b);
    const auto rows = with_rates<typename Base::Hyper>(hyper, rates, table.back().group + 1);
    // One Step a row; rows of one group mostly have one count.
    std::vector<typename Base::Step> steps;
    steps.reserve(table.size());
    const auto count = [](const Row& row) { return row.step ? *row.step : 0; };
    for (size_t r = 0; r < table.size(); ++r) {
      if (r > 0 && table[r].group == table[r - 1].group && count(table[r]) == count(table[r - 1]))
        steps.push_back(steps.back());
      else
        steps.emplace_back(rows[table[r].group], count(table[r]));
    }
    for_chunks(table, chunks, [&](const Chunk& c, int64_t i, bool past_cache) __attribute__((always_inline)) {
      const Row& row = table[c.row];
      with_dtype(row.dtype, [&](auto t) __attribute__((always_inline)) {
        restore_step_chunk<decltype(t), Base>(row, c, rows[row.group], steps[c.row], scale, past_cache);
      });
      if (along) out[i] = sq_norm_after(along_state(row, along->state), c, along->groups[row.group]);
    });
  });
  if (along) add_up(table, chunks, partial, along->n_groups, along->sq_norms);
}

}  // namespace

const char* cpu_isa() { return kIsaNames[static_cast<int>(isa)]; }

bool set_cpu_isa(const char* name) {
  for (int i = 0; i <= static_cast<int>(best); ++i)
    if (strcmp(name, kIsaNames[i]) == 0) {
      isa = static_cast<Isa>(i);
      return true;
    }
  return false;
}

const Backend cpu_backend{grad_sq_norm, sharpness, perturb, restore, restore_step};

}  // namespace sam
