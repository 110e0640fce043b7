// The operations over lists of tensors, as both front ends call them: torch.ops (schemas, tracing) and the Python
// module (no boxing: boxing costs more than the work where tensors are small).
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string_view>
#include <vector>

namespace sam {

// One pointer a tensor, owned by the caller: copying a tensor handle that only Python holds takes the GIL. In an
// optional list nullptr stands for None.
using Refs = std::vector<const at::Tensor*>;
struct OptionalRefs : Refs {
  using Refs::Refs;
};
using Sizes = at::IntArrayRef;
using Scalar = std::optional<at::Tensor>;

// An operation calls its hook at one moment, which its comment names; empty, it is not called.
using Hook = std::function<void()>;

// Squared norms ||T g||^2 of the groups, float64 [groups]. `ascent` is float64 [groups, 3]: rho, eta, adaptive.
at::Tensor grad_sq_norm(const Hook&, const Refs& params, const Refs& grads, const at::Tensor& ascent, Sizes run_sizes);

// {grad_norm, sharpness, norm}, float64 [3]: the first two divided by `grad_scale` (float32, one element) if it is
// given, the last of the gradients as they are. A finite sharpness is added to `total`, float64 {sum, count}, if that
// is given.
at::Tensor sharpness_(const Hook&, const at::Tensor& sq_norms, const at::Tensor& ascent, const Scalar& total,
                      const Scalar& grad_scale);

// Saves params to backups and adds rho T^2 g / grad_norm; only saves them where grad_norm is not finite. The hook comes
// after the last check and before anything moves.
void perturb_(const Hook& begin, const Refs& params, const Refs& grads, const Refs& backups,
              const at::Tensor& grad_norm, const at::Tensor& ascent, Sizes run_sizes);

// Writes saved + rho T^2 direction / norm to params, with T of what is saved; `saved` itself where norm is not finite.
void perturb_from_(const Hook&, const Refs& params, const Refs& directions, const Refs& saved, const at::Tensor& norm,
                   const at::Tensor& ascent, Sizes run_sizes);

// Copies backups to params.
void restore_(const Hook&, const Refs& params, const Refs& backups);

// One step of `base` from the backups (optional, one by one) or from params. `state` is the base's state lists one
// after the other; `steps` are float32 step counters, which it advances, empty for a base that counts none; `hyper` is
// float64 [groups, hyper-parameters], in the order of the base's Hyper; `lr` is empty, or has for each group None or
// what takes the place of its learning rate (float32 or float64, one element, on the device). Gradients are divided by
// `grad_scale`; where `found_inf` is not 0 the backups are restored and nothing else happens (float32, one element
// each, on the device). The hook comes when all is done.
void restore_step_(const Hook& done, std::string_view base, const Refs& params, const Refs& grads,
                   const OptionalRefs& backups, const Refs& state, const Refs& steps, const at::Tensor& hyper,
                   Sizes run_sizes, const OptionalRefs& lr, const Scalar& grad_scale, const Scalar& found_inf);

// The same step of params themselves. Returns the squared norms ||T m||^2 of the groups as grad_sq_norm does, m the
// list of `state` with the number `moment` after the step, T of the parameters after it.
at::Tensor step_along_(const Hook& done, std::string_view base, const Refs& params, const Refs& grads,
                       const Refs& state, const Refs& steps, const at::Tensor& hyper, const at::Tensor& ascent,
                       int64_t moment, Sizes run_sizes, const OptionalRefs& lr, const Scalar& grad_scale,
                       const Scalar& found_inf);

}  // namespace sam
