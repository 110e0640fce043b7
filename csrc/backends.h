// The entry points that a device provides, declared once. Ascent rows and hyper-parameters are memory of the host,
// other pointers memory of that device. Nothing waits for a device.
#pragma once
#include <functional>

#include "table.h"

namespace sam {

// Where the work of a call goes. The CPU does it at once, and needs neither.
struct Queue {
  void* stream = nullptr;                 // a cudaStream_t
  std::function<void*(size_t)> allocate;  // bytes of the device, which the call's work may use
};

// The list of a base's state along which the parameters are to be perturbed after its update, and where the squared
// norms of that go, as grad_sq_norm has them.
struct Along {
  int64_t state;
  const Ascent* groups;
  int64_t n_groups;
  double* sq_norms;
};

struct Backend {
  // sq_norms[g] = ||T g||^2 over the rows of group g, summed in double, in a fixed order.
  void (*grad_sq_norm)(const Queue&, const Table&, const Ascent* groups, int64_t n_groups, double* sq_norms);
  // As Sharpness::report (functors.h).
  void (*sharpness)(const Queue&, const double* sq_norms, const Ascent* groups, int64_t n_groups,
                    const float* grad_scale, double* total, double* out);
  // backup = param, unless it is `saved` already, then param = backup + rho T^2 grad / norm, or backup where the norm
  // is not finite.
  void (*perturb)(const Queue&, const Table&, const Ascent* groups, const double* norm, bool saved);
  // param = backup.
  void (*restore)(const Queue&, const Table&);
  // The update of Bases[base] from the backup where there is one, else from the parameter itself. `rates` has one entry
  // a group. Gradients are divided by *grad_scale, unless that is null; where *found_inf is not 0, the backups are
  // restored and nothing is updated. `along` may be null.
  void (*restore_step)(const Queue&, const Table&, int base, const double* hyper, const Rate* rates,
                       const float* grad_scale, const float* found_inf, const Along* along);
};

extern const Backend cpu_backend, cuda_backend;

// The CPU's instruction set in use: "default", "avx2" or "avx512". The best is chosen at load time; setting one that
// the machine does not have returns false. All give the same bits.
const char* cpu_isa();
bool set_cpu_isa(const char* name);

}  // namespace sam
