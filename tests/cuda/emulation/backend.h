// csrc/cuda.cu, emulated, with a host and a device apart.
//
// The host's half of a call gets copies of the caller's arrays, and a stack of its own. Its launches run when it has
// returned, and by then both are gone: a kernel that reads the host's memory reads freed memory. With
// -fsanitize=address the device's memory is poisoned as long as the host's half runs.
#pragma once
#define cuda_backend emulated_kernels
#include "cuda.cu"
#undef cuda_backend

#include <memory>

namespace sam {
namespace {

// One call: what it has on the device, and copies of what it reads on the host.
class Call {
 public:
  explicit Call(const Queue& queue, const Table& rows = {})
      : table(std::make_unique<Table>(rows)),
        queue{queue.stream, [this, &queue](size_t bytes) {
                return const_cast<char*>(device(static_cast<char*>(queue.allocate(bytes)), bytes));
              }} {
    for (const Row& row : rows) {
      n_groups = std::max(n_groups, int64_t{row.group} + 1);
      int64_t bytes = 0;
      with_dtype(row.dtype, [&](auto t) { bytes = row.numel * sizeof t; });
      for (const void* p : {static_cast<const void*>(row.param), row.grad, static_cast<const void*>(row.backup)})
        device(static_cast<const char*>(p), bytes);
      for (const void* p : row.state) device(static_cast<const char*>(p), bytes);
      device(row.step, 1);
    }
  }

  // Returns p, n elements of the device's memory, which may be null.
  template <class T>
  T* device(T* p, int64_t n) {
    if (!p) return p;
    extents.emplace_back(p, n * sizeof(T));
    EMULATION_ASAN(__asan_poison_memory_region(p, n * sizeof(T));)
    return p;
  }

  // A copy of n elements of the host's memory.
  template <class T>
  const T* host(const T* p, int64_t n) {
    const char* bytes = reinterpret_cast<const char*>(p);
    copies.emplace_back(bytes, bytes + n * sizeof(T));
    return reinterpret_cast<const T*>(copies.back().data());
  }

  // f(), the host's half, and then what it launched.
  template <class F>
  void run(const F& f) {
    std::exception_ptr error;
    try {
      emulation::on_own_stack(f);
    } catch (...) {
      error = std::current_exception();
    }
    for (const auto& [p, bytes] : extents) {
      (void)p, (void)bytes;
      EMULATION_ASAN(__asan_unpoison_memory_region(p, bytes);)
    }
    for (auto& copy : copies) std::fill(copy.begin(), copy.end(), '\xff');
    copies.clear();
    table.reset();
    emulation::synchronize();
    if (error) std::rethrow_exception(error);
  }

  std::unique_ptr<const Table> table;
  const Queue queue;
  int64_t n_groups = 0;

 private:
  std::vector<std::pair<const void*, size_t>> extents;
  std::vector<std::vector<char>> copies;
};

constexpr Backend synchronous{
    .grad_sq_norm =
        [](const Queue& queue, const Table& table, const Ascent* groups, int64_t n_groups, double* sq_norms) {
          Call call(queue, table);
          call.device(sq_norms, n_groups);
          const Ascent* copy = call.host(groups, n_groups);
          call.run([&] { emulated_kernels.grad_sq_norm(call.queue, *call.table, copy, n_groups, sq_norms); });
        },
    .sharpness =
        [](const Queue& queue, const double* sq_norms, const Ascent* groups, int64_t n_groups, const float* grad_scale,
           double* total, double* out) {
          Call call(queue);
          call.device(sq_norms, n_groups);
          call.device(grad_scale, 1);
          call.device(total, 2);
          call.device(out, 3);
          const Ascent* copy = call.host(groups, n_groups);
          call.run([&] { emulated_kernels.sharpness(call.queue, sq_norms, copy, n_groups, grad_scale, total, out); });
        },
    .perturb =
        [](const Queue& queue, const Table& table, const Ascent* groups, const double* norm, bool saved) {
          Call call(queue, table);
          call.device(norm, 1);
          const Ascent* copy = call.host(groups, call.n_groups);
          call.run([&] { emulated_kernels.perturb(call.queue, *call.table, copy, norm, saved); });
        },
    .restore =
        [](const Queue& queue, const Table& table) {
          Call call(queue, table);
          call.run([&] { emulated_kernels.restore(call.queue, *call.table); });
        },
    .restore_step =
        [](const Queue& queue, const Table& table, int base, const double* hyper, const Rate* rates,
           const float* grad_scale, const float* found_inf, const Along* along) {
          Call call(queue, table);
          for (int64_t g = 0; g < call.n_groups; ++g)
            call.device(static_cast<const char*>(rates[g].at), rates[g].bytes);
          rates = call.host(rates, call.n_groups);
          call.device(grad_scale, 1);
          call.device(found_inf, 1);
          const Along* copy = nullptr;
          if (along) {
            call.device(along->sq_norms, along->n_groups);
            const Ascent* groups = call.host(along->groups, along->n_groups);
            const Along moved{along->state, groups, along->n_groups, along->sq_norms};
            copy = call.host(&moved, 1);
          }
          const double* rows = nullptr;
          with_base(base, [&]<class Base>(Base) {
            rows = call.host(hyper, call.n_groups * sizeof(typename Base::Hyper) / sizeof(double));
          });
          call.run([&] {
            emulated_kernels.restore_step(call.queue, *call.table, base, rows, rates, grad_scale, found_inf, copy);
          });
        }};

}  // namespace

extern const Backend cuda_backend;
const Backend cuda_backend = synchronous;

}  // namespace sam
