// The operators: checks of what is no list of tensors, the calls of the backends, and the schemas.
#include "ops.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <deque>

#include "backends.h"

#if defined(SAM_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

namespace sam {
namespace {

using at::Tensor;

// The device of a tensor, made the current one: its backend, and where the backend's work goes.
class Target {
 public:
  explicit Target(const Tensor& like) : backend(backend_of(like.device())), guard_(like.device()) {
#if defined(SAM_CUDA)
    if (like.is_cuda()) queue.stream = c10::cuda::getCurrentCUDAStream().stream();
#endif
    queue.allocate = [this, options = like.options().dtype(at::kByte).requires_grad(false)](size_t bytes) {
      return scratch_.emplace_back(at::empty({static_cast<int64_t>(bytes)}, options)).data_ptr();
    };
  }
  Target(const Target&) = delete;

  const Backend& backend;
  Queue queue;

 private:
  static const Backend& backend_of(const at::Device& device) {
    if (device.is_cpu()) return cpu_backend;
#if defined(SAM_CUDA)
    if (device.is_cuda()) return cuda_backend;
#endif
    TORCH_CHECK_NOT_IMPLEMENTED(!device.is_cuda(), "sam_fused was built without CUDA kernels, for device ", device,
                                "; build it with SAM_FUSED_CUDA=1, which says what is missing");
    TORCH_CHECK_NOT_IMPLEMENTED(false, "sam_fused has no kernels for device ", device);
  }

  c10::DeviceGuard guard_;
  mutable std::deque<Tensor> scratch_;
};

// ---- checks; each message names the argument, what was expected and what came ----

// A float64 matrix on the CPU with one row a group.
const double* check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kDouble && t.is_contiguous(), name,
              ": expected a contiguous float64 tensor on the CPU, got ", t.scalar_type(), " on ", t.device());
  check_own_data(t, name);
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ",
              columns, "], got ", t.sizes());
  return t.const_data_ptr<double>();
}

const Ascent* check_ascent(const Tensor& ascent, int64_t groups) {
  return reinterpret_cast<const Ascent*>(check_rows(ascent, "ascent", groups, 3));
}

double* check_doubles(const Tensor& t, const char* name, int64_t numel, const at::Device& device) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.is_contiguous() && t.numel() == numel && t.device() == device, name,
              ": expected ", numel, " contiguous float64 elements on ", device, ", got ", t.scalar_type(), " of shape ",
              t.sizes(), " on ", t.device());
  check_own_data(t, name);
  return t.data_ptr<double>();
}

// Null if it is not given.
const float* check_scalar(const Scalar& t, const char* name, const at::Device& device) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->numel() == 1 && t->device() == device, name,
              ": expected one float32 element on ", device, ", got ", t->scalar_type(), " of shape ", t->sizes(),
              " on ", t->device());
  check_own_data(*t, name);
  return static_cast<const float*>(t->const_data_ptr());
}

// One for each group, from a list of none or of one for each group.
std::vector<Rate> check_rates(const OptionalRefs& lr, int64_t n_groups, const at::Device& device) {
  TORCH_CHECK(lr.empty() || static_cast<int64_t>(lr.size()) == n_groups, "lr: expected none or ", n_groups,
              ", one for each run, got ", lr.size());
  std::vector<Rate> rates(n_groups);
  for (size_t g = 0; g < lr.size(); ++g) {
    if (!lr[g]) continue;
    const Tensor& t = *lr[g];
    const bool real = t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
    TORCH_CHECK(real && t.numel() == 1 && t.device() == device, "lr[", g,
                "]: expected one float32 or float64 element on ", device, ", got ", t.scalar_type(), " of shape ",
                t.sizes(), " on ", t.device());
    check_own_data(t, "lr");
    rates[g] = {t.const_data_ptr(), static_cast<int64_t>(t.itemsize())};
  }
  return rates;
}

}  // namespace

// ---- operators ----

Tensor grad_sq_norm(Rows& rows, const Reads& grads, const Tensor& ascent) {
  const Rows::Copies copies = rows.grads(grads, "grads");
  const int64_t n = rows.n_groups();
  const Ascent* groups = check_ascent(ascent, n);
  Tensor out = at::empty({n}, rows.like().options().dtype(at::kDouble).requires_grad(false));
  const Target on(rows.like());
  on.backend.grad_sq_norm(on.queue, rows.table(), groups, n, out.data_ptr<double>());
  return out;
}

void sharpness_(const Tensor& sq_norms, const Tensor& ascent, const Tensor& out, const Scalar& total,
                const Scalar& grad_scale) {
  const int64_t n = sq_norms.numel();
  const double* squares = check_doubles(sq_norms, "sq_norms", n, sq_norms.device());
  const Ascent* groups = check_ascent(ascent, n);
  double* const numbers = check_doubles(out, "out", 3, sq_norms.device());
  double* const sum = total ? check_doubles(*total, "total", 2, sq_norms.device()) : nullptr;
  const float* scale = check_scalar(grad_scale, "grad_scale", sq_norms.device());
  const Target on(sq_norms);
  on.backend.sharpness(on.queue, squares, groups, n, scale, sum, numbers);
  bump_versions({&out});
  if (total) bump_versions({&*total});
}

void perturb_(Rows& rows, const Reads& grads, const Tensor& grad_norm, const Tensor& ascent, const Hook& begin) {
  const Rows::Copies copies = rows.grads(grads, "grads");
  rows.check_backups();
  const Ascent* groups = check_ascent(ascent, rows.n_groups());
  const double* norm = check_doubles(grad_norm, "grad_norm", 1, rows.like().device());
  const Target on(rows.like());
  if (begin) begin();
  on.backend.perturb(on.queue, rows.table(), groups, norm, /*saved=*/false);
  rows.params_written();
  rows.backups_written();
}

void perturb_from_(Rows& rows, const Reads& directions, const Tensor& norm, const Tensor& ascent) {
  const Rows::Copies copies = rows.grads(directions, "directions");
  rows.check_all_saved();
  const Ascent* groups = check_ascent(ascent, rows.n_groups());
  const double* value = check_doubles(norm, "norm", 1, rows.like().device());
  const Target on(rows.like());
  on.backend.perturb(on.queue, rows.table(), groups, value, /*saved=*/true);
  rows.params_written();
}

void restore_(Rows& rows) {
  const Target on(rows.like());
  on.backend.restore(on.queue, rows.table());
  rows.params_written();
}

namespace {

void update(Rows& rows, const Reads& grads, const Tensor& hyper, const OptionalRefs& lr, const Scalar& grad_scale,
            const Scalar& found_inf, const Along* along) {
  const Rows::Copies copies = rows.grads(grads, "grads");
  const double* values = nullptr;
  with_base(rows.base(), [&](auto b) {
    values = check_rows(hyper, "hyper", rows.n_groups(),
                        static_cast<int64_t>(sizeof(typename decltype(b)::Hyper) / sizeof(double)));
    if (along)
      TORCH_CHECK_VALUE(0 <= along->state && along->state < b.states, "moment: expected one of the ", b.states,
                        " lists of state, got ", along->state);
  });
  const at::Device device = rows.like().device();
  const std::vector<Rate> rates = check_rates(lr, rows.n_groups(), device);
  const float* scale = check_scalar(grad_scale, "grad_scale", device);
  const float* skip = check_scalar(found_inf, "found_inf", device);
  const Target on(rows.like());
  on.backend.restore_step(on.queue, rows.table(), rows.base(), values, rates.data(), scale, skip, along);
  rows.params_written();
  rows.state_written();
}

}  // namespace

void restore_step_(Rows& rows, const Reads& grads, const Tensor& hyper, const OptionalRefs& lr,
                   const Scalar& grad_scale, const Scalar& found_inf, const Hook& done) {
  update(rows, grads, hyper, lr, grad_scale, found_inf, nullptr);
  if (done) done();
}

Tensor step_along_(Rows& rows, const Reads& grads, const Tensor& hyper, const Tensor& ascent, int64_t moment,
                   const OptionalRefs& lr, const Scalar& grad_scale, const Scalar& found_inf) {
  const int64_t n = rows.n_groups();
  Tensor out = at::empty({n}, rows.like().options().dtype(at::kDouble).requires_grad(false));
  const Along along{moment, check_ascent(ascent, n), n, out.data_ptr<double>()};
  update(rows, grads, hyper, lr, grad_scale, found_inf, &along);
  return out;
}

// ---- torch.ops.sam_fused: lists, and rows that are made anew in each call ----

namespace listed {
namespace {

using Tensors = std::vector<Tensor>;
using Optionals = c10::List<std::optional<Tensor>>;  // the one spelling of Tensor?[] that torch unboxes

Refs refs(const Tensors& list) {
  Refs out;
  for (const Tensor& t : list) out.push_back(&t);
  return out;
}

Reads reads(const Tensors& list) {
  Reads out;
  for (const Tensor& t : list) out.push_back({&t});
  return out;
}

struct Opened {
  explicit Opened(const Optionals& list) : tensors(list.vec()) {
    for (const std::optional<Tensor>& t : tensors) refs.push_back(t.has_value() ? &*t : nullptr);
  }
  Opened(const Opened&) = delete;

  const std::vector<std::optional<Tensor>> tensors;
  OptionalRefs refs;
};

Tensor grad_sq_norm(const Tensors& params, const Tensors& grads, const Tensor& ascent, Sizes run_sizes) {
  Rows rows(refs(params), run_sizes);
  return sam::grad_sq_norm(rows, reads(grads), ascent);
}

void perturb_(const Tensors& params, const Tensors& grads, const Tensors& backups, const Tensor& grad_norm,
              const Tensor& ascent, Sizes run_sizes) {
  Rows rows(refs(params), run_sizes);
  rows.backups(refs(backups));
  sam::perturb_(rows, reads(grads), grad_norm, ascent);
}

void perturb_from_(const Tensors& params, const Tensors& directions, const Tensors& saved, const Tensor& norm,
                   const Tensor& ascent, Sizes run_sizes) {
  Rows rows(refs(params), run_sizes);
  rows.saved(refs(saved), "saved");
  sam::perturb_from_(rows, reads(directions), norm, ascent);
}

void restore_(const Tensors& params, const Tensors& backups) {
  Rows rows(refs(params), {static_cast<int64_t>(params.size())});
  rows.saved(refs(backups), "backups");
  sam::restore_(rows);
}

void restore_step_(c10::string_view base, const Tensors& params, const Tensors& grads, const Optionals& backups,
                   const Tensors& state, const Tensors& steps, const Tensor& hyper, Sizes run_sizes,
                   const Optionals& lr, const Scalar& grad_scale, const Scalar& found_inf) {
  Rows rows(refs(params), run_sizes);
  rows.saved(Opened(backups).refs, "backups");
  rows.state(base, refs(state), refs(steps));
  sam::restore_step_(rows, reads(grads), hyper, Opened(lr).refs, grad_scale, found_inf);
}

Tensor step_along_(c10::string_view base, const Tensors& params, const Tensors& grads, const Tensors& state,
                   const Tensors& steps, const Tensor& hyper, const Tensor& ascent, int64_t moment, Sizes run_sizes,
                   const Optionals& lr, const Scalar& grad_scale, const Scalar& found_inf) {
  Rows rows(refs(params), run_sizes);
  rows.state(base, refs(state), refs(steps));
  return sam::step_along_(rows, reads(grads), hyper, ascent, moment, Opened(lr).refs, grad_scale, found_inf);
}

}  // namespace
}  // namespace listed

// Lists hold one tensor for each of params; run_sizes cuts params into groups, whose values are the rows of
// `ascent` or `hyper` (ops.h).
TORCH_LIBRARY(sam_fused, m) {
  m.set_python_module("sam_fused.fakes");  // where the kernels for tracing are
  m.def("grad_sq_norm(Tensor[] params, Tensor[] grads, Tensor ascent, int[] run_sizes) -> Tensor");
  m.def(
      "sharpness_(Tensor sq_norms, Tensor ascent, Tensor(a!) out, Tensor(b!)? total=None, "
      "Tensor? grad_scale=None) -> ()");
  m.def(
      "perturb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backups, Tensor grad_norm, Tensor ascent, "
      "int[] run_sizes) -> ()");
  m.def(
      "perturb_from_(Tensor(a!)[] params, Tensor[] directions, Tensor[] saved, Tensor norm, Tensor ascent, "
      "int[] run_sizes) -> ()");
  m.def("restore_(Tensor(a!)[] params, Tensor[] backups) -> ()");
  m.def(
      "restore_step_(str base, Tensor(a!)[] params, Tensor[] grads, Tensor?[] backups, Tensor(b!)[] state, "
      "Tensor(c!)[] steps, Tensor hyper, int[] run_sizes, Tensor?[] lr, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
  m.def(
      "step_along_(str base, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor(c!)[] steps, "
      "Tensor hyper, Tensor ascent, int moment, int[] run_sizes, Tensor?[] lr, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> Tensor");
}

void implement(torch::Library& m) {
  m.impl("grad_sq_norm", listed::grad_sq_norm);
  m.impl("sharpness_", sharpness_);
  m.impl("perturb_", listed::perturb_);
  m.impl("perturb_from_", listed::perturb_from_);
  m.impl("restore_", listed::restore_);
  m.impl("restore_step_", listed::restore_step_);
  m.impl("step_along_", listed::step_along_);
}
TORCH_LIBRARY_IMPL(sam_fused, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(sam_fused, CUDA, m) { implement(m); }

// None of the operators is differentiable.
TORCH_LIBRARY_IMPL(sam_fused, Autograd, m) {
  for (const char* op :
       {"grad_sq_norm", "sharpness_", "perturb_", "perturb_from_", "restore_", "restore_step_", "step_along_"})
    m.impl(op, torch::CppFunction::makeFallthrough());
}

}  // namespace sam
