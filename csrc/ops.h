// The operations over rows, which both front ends call: torch.ops (schemas, tracing, rows made anew in each call) and
// the Python module (rows that are kept).
#pragma once
#include <functional>
#include <optional>

#include "rows.h"

namespace sam {

using Scalar = std::optional<at::Tensor>;

// An operation calls its hook at one moment, which its comment names; empty, it is not called.
using Hook = std::function<void()>;

// Squared norms ||T g||^2 of the groups, float64 [groups]. `ascent` is float64 [groups, 3]: rho, eta, adaptive.
at::Tensor grad_sq_norm(Rows&, const Reads& grads, const at::Tensor& ascent);

// Writes {grad_norm, sharpness, norm} to `out`, float64 [3]: the first two divided by `grad_scale` (float32, one
// element) if it is given, the last of the gradients as they are. A finite sharpness is added to `total`, float64 {sum,
// count}, if that is given.
void sharpness_(const at::Tensor& sq_norms, const at::Tensor& ascent, const at::Tensor& out, const Scalar& total,
                const Scalar& grad_scale);

// Saves params to backups and adds rho T^2 g / grad_norm; only saves them where grad_norm is not finite. The hook comes
// after the last check and before anything moves.
void perturb_(Rows&, const Reads& grads, const at::Tensor& grad_norm, const at::Tensor& ascent, const Hook& begin = {});

// Writes saved + rho T^2 direction / norm to params, with T of what is saved; `saved` itself where norm is not finite.
void perturb_from_(Rows&, const Reads& directions, const at::Tensor& norm, const at::Tensor& ascent);

// Copies what is saved to params.
void restore_(Rows&);

// One step of the base from what is saved, or where nothing is from params. `hyper` is float64 [groups,
// hyper-parameters], in the order of the base's Hyper; `lr` is empty, or has for each group None or what takes the
// place of its learning rate (float32 or float64, one element, on the device). Gradients are divided by `grad_scale`;
// where `found_inf` is not 0 what is saved is restored and nothing else happens (float32, one element each, on the
// device). The hook comes when all is done.
void restore_step_(Rows&, const Reads& grads, const at::Tensor& hyper, const OptionalRefs& lr, const Scalar& grad_scale,
                   const Scalar& found_inf, const Hook& done = {});

// The same step. Returns the squared norms ||T m||^2 of the groups as grad_sq_norm does, m the list of the state with
// the number `moment` after the step, T of the parameters after it.
at::Tensor step_along_(Rows&, const Reads& grads, const at::Tensor& hyper, const at::Tensor& ascent, int64_t moment,
                       const OptionalRefs& lr, const Scalar& grad_scale, const Scalar& found_inf);

}  // namespace sam
