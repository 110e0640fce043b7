// The CUDA backend: kernels over the chunks of many tensors, and their launches. Free of torch.
//
// All that a kernel is told of its tensors travels by value in its arguments, so that nothing is copied to the device,
// nothing waits, and a CUDA graph may capture the launches. A block works on one chunk of one tensor.
// Contraction to fused multiply-adds is off (setup.py), as on the CPU. tests/cuda/emulation compiles this very file for
// the CPU, where SAM_SHARED, SAM_CONSTANT and launch() are its own.
#include "backends.h"

#include <algorithm>
#include <exception>
#include <new>
#include <type_traits>

namespace sam {
namespace {

// Bytes of a launch's arguments. Every driver takes up to 4,096; since CUDA 12.1 it is 32,764.
constexpr int kSmall = 4096, kMedium = 12288, kLarge = 32000;
constexpr int kOther = 64;  // bytes of them that are not rows
static_assert(kSmall <= 4096 && kLarge <= 32764);

// What a launch carries: its arguments one after the other, each aligned.
template <class... P>
constexpr size_t bytes_of() {
  size_t n = 0;
  ((n = (n + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return n;
}

}  // namespace
}  // namespace sam

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define SAM_SHARED(T, name, n) __shared__ T name[n]
#define SAM_CONSTANT(...) const __grid_constant__ __VA_ARGS__

namespace sam {
namespace {

// Reports what this launch is refused for. An error of an earlier call stays for whoever asks the runtime.
template <int kBytes = kSmall, class... P>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, void* stream,
            const std::type_identity_t<P>&... args) {
  static_assert(bytes_of<P...>() <= kBytes, "more bytes of kernel arguments than a driver takes");
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                             dim3(threads), pointers, 0, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next to ask would be told of it again
  throw std::runtime_error(std::string("CUDA launch of ") + name + ": " + cudaGetErrorString(error));
}

// Without a kernel. That it is refused too is of no account: it follows a launch whose error is reported.
void copy_on_device(void* to, const void* from, size_t bytes, void* stream) {
  if (cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)) != cudaSuccess)
    cudaGetLastError();
}

bool takes_large_arguments() {
  static const int version = [] {
    int v = 0;
    return cudaDriverGetVersion(&v) == cudaSuccess ? v : 0;
  }();
  return version >= 12010;
}

}  // namespace
}  // namespace sam
#else
#include "cuda_emulation.h"
#endif

namespace sam {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;  // of the one block that sums a group's chunks
constexpr int kChunk = 1 << 13;    // elements, of tables of a common size: see chunk_of()
constexpr int kBlocks = 1 << 12;

// ---- arguments ----

struct Nothing {};

// A tensor and those that go with it. Blocks first_block and on work on its chunks.
template <int kPointers, class Extra>
struct Entry : Extra {
  void* pointers[kPointers];
  int64_t numel;
  int32_t first_block;
  int32_t index;  // of its first partial sum, or of its update
};

template <class E, int kBytes>
struct Entries {
  static constexpr int kMax = (kBytes - kOther) / sizeof(E);
  int32_t n = 0, chunk;  // the chunk's elements
  E at[kMax];
};

// The block's entry, and the elements of it that are the block's.
template <class E>
struct Share {
  const E& entry;
  int64_t begin;
  int size;

  template <class T>
  __device__ T* pointer(int k) const {
    return static_cast<T*>(entry.pointers[k]) + begin;
  }
};

template <class E, int kBytes>
__device__ Share<E> share_of_block(const Entries<E, kBytes>& entries) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = entries.n - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries.at[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const E& entry = entries.at[low];
  const int64_t begin = static_cast<int64_t>(block - entry.first_block) * entries.chunk, left = entry.numel - begin;
  return {entry, begin, static_cast<int>(left < entries.chunk ? left : entries.chunk)};
}

// ---- memory ----

// kWidth numbers, as the words that registers hold them in.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vec {
  using Word =
      std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) * kWidth == 2, uint16_t, uint32_t>>;
  static constexpr int width = kWidth, kPerWord = sizeof(Word) / sizeof(T);
  Word words[kWidth / kPerWord];

  __device__ __forceinline__ T get(int k) const {
    T x;
    if constexpr (kPerWord == 2)
      x.bits = static_cast<uint16_t>(words[k / 2] >> 16 * (k % 2));
    else
      memcpy(&x, &words[k], sizeof x);
    return x;
  }
  __device__ __forceinline__ void set(int k, T x) {
    if constexpr (kPerWord == 2)
      words[k / 2] = (words[k / 2] & 0xffff0000u >> 16 * (k % 2)) | static_cast<uint32_t>(x.bits) << 16 * (k % 2);
    else
      memcpy(&words[k], &x, sizeof x);
  }
};

// kWidth numbers, from p or to p, at once if p is aligned to all their bytes, else word by word, or one by one.
template <int kWidth, class T>
__device__ __forceinline__ Vec<T, kWidth> read(const T* p) {
  using V = Vec<T, kWidth>;
  using Word = typename V::Word;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (kWidth == 1 || address % sizeof(V) == 0) return *reinterpret_cast<const V*>(p);
  V v{};
  if (V::kPerWord == 1 || address % sizeof(Word) == 0)
    for (int k = 0; k < kWidth / V::kPerWord; ++k) v.words[k] = reinterpret_cast<const Word*>(p)[k];
  else
    for (int k = 0; k < kWidth; ++k) v.set(k, p[k]);
  return v;
}
template <int kWidth, class T>
__device__ __forceinline__ void write(T* p, const Vec<T, kWidth>& v) {
  using V = Vec<T, kWidth>;
  using Word = typename V::Word;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (kWidth == 1 || address % sizeof(V) == 0)
    *reinterpret_cast<V*>(p) = v;
  else if (V::kPerWord == 1 || address % sizeof(Word) == 0)
    for (int k = 0; k < kWidth / V::kPerWord; ++k) reinterpret_cast<Word*>(p)[k] = v.words[k];
  else
    for (int k = 0; k < kWidth; ++k) p[k] = v.get(k);
}

// Calls use(i, v) for each few of n elements, where v[k] holds from[k][i] and on: 16 bytes of them from the first
// 16-byte boundary of from[0] on, one element before it and after the last 16 bytes. A thread starts four reads of 16
// bytes, or all of one i, before it uses the first: a write must not come between them, or they would wait for each
// other.
template <class T, int kFrom, class Use>
__device__ void for_elements(int n, const T* const (&from)[kFrom], const Use& use) {
  constexpr int kWidth = 16 / sizeof(T), kStep = kThreads * kWidth, kBatch = kFrom < 4 ? 4 / kFrom : 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int to_boundary = static_cast<int>((16 - reinterpret_cast<uintptr_t>(from[0]) % 16) % 16 / sizeof(T));
  const int head = to_boundary < n ? to_boundary : n, body = (n - head) / kWidth * kWidth;
  for (int first = thread * kWidth; first < body; first += kBatch * kStep) {
    Vec<T, kWidth> v[kBatch][kFrom];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (first + b * kStep < body)
        for (int k = 0; k < kFrom; ++k) v[b][k] = read<kWidth>(from[k] + head + first + b * kStep);
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (first + b * kStep < body) use(head + first + b * kStep, v[b]);
  }
  if (thread < n - body) {
    const int i = thread < head ? thread : thread + body;
    Vec<T, 1> v[kFrom];
    for (int k = 0; k < kFrom; ++k) v[k] = read<1>(from[k] + i);
    use(i, v);
  }
}

// ---- sums ----

// The sum over the block, in thread 0; `sums` is shared memory, one for each warp.
__device__ double block_sum(double x, double* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int k = 16; k > 0; k /= 2) x += __shfl_down_sync(0xffffffffu, x, k);
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < warps ? sums[lane] : 0;
    for (int k = 16; k > 0; k /= 2) x += __shfl_down_sync(0xffffffffu, x, k);
  }
  return x;
}

// The sum of the squares of a vector's w numbers. Double arithmetic is up to 64 times as slow as float, and so is the
// conversion to it. So the squares are added up in float, to w 2^-24 of the sum, which is converted once. Where they
// overflow, or are so small that underflow would count, each number is converted.
template <class A, int kWidth>
__device__ __forceinline__ double sum_of_squares(const A (&x)[kWidth]) {
  A sum = 0;
  for (int k = 0; k < kWidth; ++k) sum = std::fma(x[k], x[k], sum);
  if (std::is_same_v<A, double> || (sum >= A(0x1p-100) && std::isfinite(sum))) return sum;
  bool zero = true;  // as most rows of an embedding's gradient are
  for (int k = 0; k < kWidth; ++k) zero &= x[k] == 0;
  if (zero) return 0;
  double exact = 0;
  for (int k = 0; k < kWidth; ++k) exact = std::fma(static_cast<double>(x[k]), static_cast<double>(x[k]), exact);
  return exact;
}

template <bool kAdaptive, class T>
__device__ double sq_norm_of_elements(const Ascent& ascent, int n, const T* w, const T* g) {
  using A = arithmetic_t<T>;
  const Ascend<A, kAdaptive> ascend(ascent);
  double sum = 0;
  const auto add = [&](const auto& x, const auto& y) {
    constexpr int kWidth = std::remove_reference_t<decltype(x)>::width;
    A scaled[kWidth];
    for (int k = 0; k < kWidth; ++k) scaled[k] = ascend.scaled(load(x.get(k)), load(y.get(k)));
    sum += sum_of_squares(scaled);
  };
  if constexpr (kAdaptive)
    for_elements<T>(n, {g, w}, [&](int, const auto& v) { add(v[1], v[0]); });
  else
    for_elements<T>(n, {g}, [&](int, const auto& v) { add(v[0], v[0]); });
  return sum;
}

using NormEntry = Entry<2, Ascent>;  // param, grad

template <class T, int kBytes>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(SAM_CONSTANT(Entries<NormEntry, kBytes>) entries, double* partial) {
  SAM_SHARED(double, sums, kThreads / 32);
  const Share<NormEntry> share = share_of_block(entries);
  const T* w = share.template pointer<const T>(0);
  const T* g = share.template pointer<const T>(1);
  const double sum = share.entry.adaptive != 0 ? sq_norm_of_elements<true>(share.entry, share.size, w, g)
                                               : sq_norm_of_elements<false>(share.entry, share.size, w, g);
  const double total = block_sum(sum, sums);
  if (threadIdx.x == 0) partial[share.entry.index + blockIdx.x - share.entry.first_block] = total;
}

// Where the partial sums of consecutive groups begin, and where the last one's end.
struct Ranges {
  static constexpr int kMax = (kSmall - kOther) / sizeof(int32_t) - 1;
  int32_t begin[kMax + 1];
};

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(SAM_CONSTANT(Ranges) ranges, const double* partial, double* sq_norms) {
  SAM_SHARED(double, sums, kSumThreads / 32);
  const int end = ranges.begin[blockIdx.x + 1];
  double sum = 0;
#pragma unroll 4
  for (int i = ranges.begin[blockIdx.x] + static_cast<int>(threadIdx.x); i < end; i += kSumThreads) sum += partial[i];
  const double total = block_sum(sum, sums);
  if (threadIdx.x == 0) sq_norms[blockIdx.x] = total;
}

struct Rhos {
  static constexpr int kMax = (kSmall - kOther) / sizeof(double);
  int32_t n = 0;
  bool first, last;
  double at[kMax];
};

// One thread. `out` holds the sums between the launches for many groups.
__global__ void sharpness_kernel(SAM_CONSTANT(Rhos) rhos, const double* sq_norms, const float* grad_scale,
                                 double* total, double* out) {
  Sharpness sharpness;
  if (!rhos.first) sharpness = {out[0], out[1]};
  for (int g = 0; g < rhos.n; ++g) sharpness.add(sq_norms[g], rhos.at[g]);
  out[0] = sharpness.sq;
  out[1] = sharpness.weighted;
  if (rhos.last) sharpness.report(grad_scale, total, out);
}

// ---- perturb and restore ----

using PerturbEntry = Entry<3, Ascent>;  // param, grad, backup

template <class T>
__device__ void copy_elements(int n, T* to, const T* from) {
  for_elements<T>(n, {from}, [&](int i, const auto& v) { write(to + i, v[0]); });
}

template <bool kAdaptive, class T>
__device__ void perturb_elements(const Ascent& ascent, double norm, bool saved, uint32_t first, int n, T* w, const T* g,
                                 T* backup) {
  const Ascend<arithmetic_t<T>, kAdaptive> ascend(ascent, norm);
  for_elements<T>(n, {saved ? backup : w, g}, [&](int i, auto& v) {
    if (!saved) write(backup + i, v[0]);
    for (int k = 0; k < v[0].width; ++k) {
      T x = v[0].get(k);
      ascend.perturb(x, x, load(v[1].get(k)), first + i + k);
      v[0].set(k, x);
    }
    write(w + i, v[0]);
  });
}

template <class T, int kBytes>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(SAM_CONSTANT(Entries<PerturbEntry, kBytes>) entries, const double* norm, bool saved) {
  const Share<PerturbEntry> share = share_of_block(entries);
  T* w = share.template pointer<T>(0);
  const T* g = share.template pointer<const T>(1);
  T* backup = share.template pointer<T>(2);
  const uint32_t first = static_cast<uint32_t>(share.begin);
  if (!std::isfinite(*norm))
    copy_elements(share.size, saved ? w : backup, saved ? backup : w);
  else if (share.entry.adaptive != 0)
    perturb_elements<true>(share.entry, *norm, saved, first, share.size, w, g, backup);
  else
    perturb_elements<false>(share.entry, *norm, saved, first, share.size, w, g, backup);
}

using RestoreEntry = Entry<2, Nothing>;  // param, backup

template <class T, int kBytes>
__global__ void __launch_bounds__(kThreads) restore_kernel(SAM_CONSTANT(Entries<RestoreEntry, kBytes>) entries) {
  const Share<RestoreEntry> share = share_of_block(entries);
  copy_elements(share.size, share.template pointer<T>(0), share.template pointer<const T>(1));
}

// ---- restore and update ----

// Room for the Update of a row, whatever its arithmetic type.
template <class Base>
struct alignas(8) Slot {
  char bytes[sizeof(typename Base::template Update<double>)];
};

// What the updates of a run of rows are made from. The rows' groups are first_group and on.
template <class Base>
struct Preparation {
  struct Row {
    float* step;
    int32_t group;  // less first_group
    bool wide;      // float64
  };
  static constexpr int kGroups = 16;
  struct Group {
    typename Base::Hyper hyper;
    Rate rate;
  };
  static constexpr int kMax = (kSmall - kOther - kGroups * sizeof(Group)) / sizeof(Row);
  int32_t n = 0, first_row = 0, first_group = 0;
  Group groups[kGroups];
  Row rows[kMax];
};

// One thread a row: counts its step and makes its Update.
template <class Base>
__global__ void __launch_bounds__(kThreads) prepare_kernel(SAM_CONSTANT(Preparation<Base>) all, const float* grad_scale,
                                                           const float* found_inf, Slot<Base>* slots) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= all.n || (found_inf && *found_inf != 0)) return;
  const auto& row = all.rows[i];
  const auto& group = all.groups[row.group];
  typename Base::Hyper hyper = group.hyper;
  hyper.lr = group.rate.value_or(hyper.lr);
  const typename Base::Step step(hyper, row.step ? * row.step += 1 : 0);
  const double scale = grad_scale ? *grad_scale : 1;
  void* slot = slots + all.first_row + i;
  if (row.wide)
    new (slot) typename Base::template Update<double>(hyper, step, scale);
  else
    new (slot) typename Base::template Update<float>(hyper, step, scale);
}

template <class Base>
using UpdateEntry = Entry<3 + Base::states, Nothing>;  // param, grad, backup, states

// Blocks that a multiprocessor is to have the registers for. More would put some into local memory.
template <class T, class Base>
constexpr int kResident = sizeof(T) == 8                        ? 2
                          : sizeof(T) == 2 && Base::states == 3 ? 3
                                                                : 4;

template <class T, class Base, int kBytes>
__global__ void __launch_bounds__(kThreads, kResident<T, Base>)
    update_kernel(SAM_CONSTANT(Entries<UpdateEntry<Base>, kBytes>) entries, const Slot<Base>* slots,
                  const float* found_inf) {
  using A = arithmetic_t<T>;
  const Share<UpdateEntry<Base>> share = share_of_block(entries);
  T* w = share.template pointer<T>(0);
  const T* g = share.template pointer<const T>(1);
  const T* from = share.entry.pointers[2] ? share.template pointer<const T>(2) : w;
  if (found_inf && *found_inf != 0) {
    if (from != w) copy_elements(share.size, w, from);
    return;
  }
  const auto update = *reinterpret_cast<const typename Base::template Update<A>*>(slots + share.entry.index);
  constexpr int kStates = Base::states;
  T* states[kStates + 1];
  const T* lists[2 + kStates] = {from, g};
  for (int k = 0; k < kStates; ++k) lists[2 + k] = states[k] = share.template pointer<T>(3 + k);
  for_elements<T>(share.size, lists, [&](int i, auto& v) {
    for (int j = 0; j < v[0].width; ++j) {
      A weight = load(v[0].get(j)), state[kStates + 1];
      for (int k = 0; k < kStates; ++k) state[k] = load(v[2 + k].get(j));
      update(weight, load(v[1].get(j)), state);
      T x;
      for (int k = 0; k < kStates; ++k) store(x, state[k]), v[2 + k].set(j, x);
      store(x, weight), v[0].set(j, x);
    }
    for (int k = 0; k < kStates; ++k) write(states[k] + i, v[2 + k]);
    write(w + i, v[0]);
  });
}

// ---- launches ----

// The elements of a chunk: the fewest of three sizes that make no more than kBlocks blocks of a table. So a small model
// has work for every multiprocessor, a large one few partial sums, and the order of a sum depends on the table alone.
int chunk_of(const Table& table) {
  int64_t total = 0;
  for (const Row& row : table) total += row.numel;
  int chunk = kChunk / 4;
  while (chunk < kChunk * 4 && total > static_cast<int64_t>(chunk) * kBlocks) chunk *= 4;
  return chunk;
}

int32_t blocks_of(const Row& row, int chunk) { return static_cast<int32_t>((row.numel + chunk - 1) / chunk); }

// Fills arguments with the rows of one type from row r on, hands them over with the number of their blocks, and
// returns the row to go on with. `fill` says whether it wants a row.
template <class E, int kBytes, class Fill, class Launch>
size_t launch_entries(const Table& table, size_t r, DType dtype, int chunk, const Fill& fill, const Launch& launch) {
  Entries<E, kBytes> entries;
  entries.chunk = chunk;
  int32_t blocks = 0;
  for (; r < table.size() && entries.n < entries.kMax; ++r) {
    E& entry = entries.at[entries.n];
    if (table[r].dtype != dtype || table[r].numel == 0 || !fill(entry, table[r], static_cast<int>(r))) continue;
    entry.numel = table[r].numel;
    entry.first_block = blocks;
    blocks += blocks_of(table[r], chunk);
    ++entries.n;
  }
  if (entries.n > 0) launch(entries, blocks);
  return r;
}

// launch(T{}, entries, blocks) over all rows of a table, type by type, with arguments no larger than the rows need.
template <class E, class Fill, class Launch>
void for_entries(const Table& table, const Fill& fill, const Launch& launch) {
  const int chunk = chunk_of(table);
  for (const DType dtype : {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf})
    with_dtype(dtype, [&](auto t) {
      const auto one = [&](const auto& entries, int32_t blocks) { launch(t, entries, blocks); };
      for (size_t r = 0; r < table.size();) {
        const auto left = std::count_if(table.begin() + r, table.end(),
                                        [&](const Row& row) { return row.dtype == dtype && row.numel > 0; });
        if (left <= Entries<E, kSmall>::kMax || !takes_large_arguments())
          r = launch_entries<E, kSmall>(table, r, dtype, chunk, fill, one);
        else if (left <= Entries<E, kMedium>::kMax)
          r = launch_entries<E, kMedium>(table, r, dtype, chunk, fill, one);
        else
          r = launch_entries<E, kLarge>(table, r, dtype, chunk, fill, one);
      }
    });
}

void grad_sq_norm(const Queue& queue, const Table& table, const Ascent* groups, int64_t n_groups, double* sq_norms) {
  const int chunk = chunk_of(table);
  std::vector<int32_t> first(table.size() + 1), begin(n_groups + 1);  // partial sums before each row and each group
  for (size_t r = 0; r < table.size(); ++r) {
    first[r + 1] = first[r] + blocks_of(table[r], chunk);
    begin[table[r].group + 1] = first[r + 1];
  }
  for (int64_t g = 0; g < n_groups; ++g) begin[g + 1] = std::max(begin[g], begin[g + 1]);
  double* partial = static_cast<double*>(queue.allocate(sizeof(double) * first.back()));
  for_entries<NormEntry>(
      table,
      [&](NormEntry& e, const Row& row, int r) {
        static_cast<Ascent&>(e) = groups[row.group];
        e.pointers[0] = row.param;
        e.pointers[1] = const_cast<void*>(row.grad);
        e.index = first[r];
        return true;
      },
      [&]<class T, int kBytes>(T, const Entries<NormEntry, kBytes>& entries, int32_t blocks) {
        launch<kBytes>("norm_kernel", norm_kernel<T, kBytes>, blocks, kThreads, queue.stream, entries, partial);
      });
  for (int64_t g = 0; g < n_groups; g += Ranges::kMax) {
    const int64_t n = std::min<int64_t>(n_groups - g, Ranges::kMax);
    Ranges ranges;
    std::copy_n(begin.begin() + g, n + 1, ranges.begin);
    launch("sum_kernel", sum_kernel, n, kSumThreads, queue.stream, ranges, partial, sq_norms + g);
  }
}

void sharpness(const Queue& queue, const double* sq_norms, const Ascent* groups, int64_t n_groups,
               const float* grad_scale, double* total, double* out) {
  for (int64_t g = 0; g == 0 || g < n_groups; g += Rhos::kMax) {
    Rhos rhos;
    rhos.n = static_cast<int32_t>(std::min<int64_t>(n_groups - g, Rhos::kMax));
    rhos.first = g == 0;
    rhos.last = g + rhos.n == n_groups;
    for (int i = 0; i < rhos.n; ++i) rhos.at[i] = groups[g + i].rho;
    launch("sharpness_kernel", sharpness_kernel, 1, 1, queue.stream, rhos, sq_norms + g, grad_scale, total, out);
  }
}

// Where a launch is refused, the rows that are not perturbed are saved all the same, so that restoring is exact.
void perturb(const Queue& queue, const Table& table, const Ascent* groups, const double* norm, bool saved) {
  std::exception_ptr refused;
  for_entries<PerturbEntry>(
      table,
      [&](PerturbEntry& e, const Row& row, int) {
        static_cast<Ascent&>(e) = groups[row.group];
        e.pointers[0] = row.param;
        e.pointers[1] = const_cast<void*>(row.grad);
        e.pointers[2] = row.backup;
        return true;
      },
      [&]<class T, int kBytes>(T, const Entries<PerturbEntry, kBytes>& entries, int32_t blocks) {
        if (!refused) {
          try {
            launch<kBytes>("perturb_kernel", perturb_kernel<T, kBytes>, blocks, kThreads, queue.stream, entries, norm,
                           saved);
            return;
          } catch (...) {
            refused = std::current_exception();
          }
        }
        for (int i = 0; !saved && i < entries.n; ++i)
          copy_on_device(entries.at[i].pointers[2], entries.at[i].pointers[0], entries.at[i].numel * sizeof(T),
                         queue.stream);
      });
  if (refused) std::rethrow_exception(refused);
}

void restore(const Queue& queue, const Table& table) {
  for_entries<RestoreEntry>(
      table,
      [&](RestoreEntry& e, const Row& row, int) {
        e.pointers[0] = row.param;
        e.pointers[1] = row.backup;
        return row.backup != nullptr;
      },
      [&]<class T, int kBytes>(T, const Entries<RestoreEntry, kBytes>& entries, int32_t blocks) {
        launch<kBytes>("restore_kernel", restore_kernel<T, kBytes>, blocks, kThreads, queue.stream, entries);
      });
}

template <class Base>
void prepare(const Queue& queue, const Table& table, const typename Base::Hyper* hyper, const Rate* rates,
             const float* grad_scale, const float* found_inf, Slot<Base>* slots) {
  Preparation<Base> all;
  const auto flush = [&](size_t next) {
    if (all.n > 0)
      launch("prepare_kernel", prepare_kernel<Base>, (all.n + kThreads - 1) / kThreads, kThreads, queue.stream, all,
             grad_scale, found_inf, slots);
    all.n = 0;
    all.first_row = static_cast<int32_t>(next);
  };
  for (size_t r = 0; r < table.size(); ++r) {
    const Row& row = table[r];
    if (all.n == all.kMax || row.group - all.first_group >= all.kGroups) flush(r);
    if (all.n == 0) all.first_group = row.group;
    const int group = row.group - all.first_group;
    all.groups[group] = {hyper[row.group], rates[row.group]};
    all.rows[all.n++] = {row.step, group, row.dtype == DType::kDouble};
  }
  flush(table.size());
}

void restore_step(const Queue& queue, const Table& table, int base, const double* hyper, const Rate* rates,
                  const float* grad_scale, const float* found_inf, const Along* along) {
  with_base(base, [&]<class Base>(Base) {
    using E = UpdateEntry<Base>;
    auto* slots = static_cast<Slot<Base>*>(queue.allocate(sizeof(Slot<Base>) * table.size()));
    prepare<Base>(queue, table, reinterpret_cast<const typename Base::Hyper*>(hyper), rates, grad_scale, found_inf,
                  slots);
    for_entries<E>(
        table,
        [&](E& e, const Row& row, int r) {
          e.pointers[0] = row.param;
          e.pointers[1] = const_cast<void*>(row.grad);
          e.pointers[2] = row.backup;
          std::copy_n(row.state, Base::states, e.pointers + 3);
          e.index = r;
          return true;
        },
        [&]<class T, int kBytes>(T, const Entries<E, kBytes>& entries, int32_t blocks) {
          launch<kBytes>("update_kernel", update_kernel<T, Base, kBytes>, blocks, kThreads, queue.stream, entries,
                         slots, found_inf);
        });
  });
  if (along) grad_sq_norm(queue, along_state(table, along->state), along->groups, along->n_groups, along->sq_norms);
}

}  // namespace

const Backend cuda_backend{grad_sq_norm, sharpness, perturb, restore, restore_step};

}  // namespace sam
