// The entry points that a device provides, declared once. Pointers to double are memory of that device.
#pragma once
#include "table.h"

namespace sam {

struct Backend {
  // sq_norms[g] = ||T g||^2 over the rows of group g, summed in double, in a fixed order.
  void (*grad_sq_norm)(const Table&, const Ascent* groups, int64_t n_groups, double* sq_norms);
  // out = {grad_norm, sharpness, norm of the gradients as they are}, the first two divided by *grad_scale unless that
  // is null; a finite sharpness is added to total = {sum, count}.
  void (*sharpness)(const double* sq_norms, const Ascent* groups, int64_t n_groups, const float* grad_scale,
                    double* total, double* out);
  // backup = param, then param += rho T^2 grad / norm; the parameter stays where the norm is not finite.
  void (*perturb)(const Table&, const Ascent* groups, const double* norm);
  // param = backup.
  void (*restore)(const Table&);
  // The update of Bases[base] from the backup where there is one, else from the parameter itself. Gradients are divided
  // by *grad_scale, unless that is null; where *found_inf is not 0, the backups are restored and nothing is updated.
  void (*restore_step)(const Table&, int base, const double* hyper, const float* grad_scale, const float* found_inf);
};

extern const Backend cpu_backend;

// The CPU's instruction set in use: "default", "avx2" or "avx512". The best is chosen at load time; setting one that
// the machine does not have returns false. All give the same bits.
const char* cpu_isa();
bool set_cpu_isa(const char* name);

}  // namespace sam
