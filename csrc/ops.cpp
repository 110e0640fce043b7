// The operators: every check of their arguments, the tables that the kernels run over, and the schemas.
#include "ops.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <deque>

#include "adapter.h"
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
  std::deque<Tensor> scratch_;
};

// ---- checks; each message names the tensor, what was expected and what came ----

DType dtype_of(const Tensor& t, const char* list, size_t i) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat;
    case at::kDouble: return DType::kDouble;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kHalf;
    default:
      TORCH_CHECK_TYPE(false, list, "[", i, "]: expected dtype float32, float64, bfloat16 or float16, got ",
                       t.scalar_type());
  }
}

// Whether `t` has the kind of memory that `like` has: equal layout, bits and device. With a thousand small tensors the
// checks are most of a step, so this and fits() are asked first, and what is amiss only where they are false.
bool same_kind(const Tensor& t, const Tensor& like) {
  return t.key_set() == like.key_set() && (t.is_cpu() || t.device() == like.device());
}

void check_dense(const Tensor& t, const char* list, size_t i) {
  TORCH_CHECK(t.layout() == at::kStrided, list, "[", i, "]: expected a dense tensor, got layout ", t.layout());
}

// `data`, where `t` is. A tensor subclass may be an empty wrapper.
template <class Void>
Void* check_data(Void* data, const Tensor& t, const char* list, size_t i) {
  TORCH_CHECK(data || t.numel() == 0 || t.is_meta(), list, "[", i,
              "]: expected a tensor with memory of its own, got a wrapper around others");
  return data;
}

void check_like(const Tensor& t, const Tensor& param, const char* list, size_t i) {
  check_dense(t, list, i);
  TORCH_CHECK(t.device() == param.device(), list, "[", i, "]: expected device ", param.device(), ", got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == param.scalar_type(), list, "[", i, "]: expected dtype ", param.scalar_type(),
                   ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == param.sizes(), list, "[", i, "]: expected shape ", param.sizes(), ", got ", t.sizes());
}

// Equal strides, but for dimensions of size 1, whose stride says nothing.
bool same_strides(const Tensor& a, const Tensor& b) {
  const Sizes sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (x[d] != y[d] && sizes[d] != 1) return false;
  return true;
}

// Whether the memory of `t` can be used as that of `like`: of its kind, dtype, shape and strides.
bool fits(const Tensor& t, const Tensor& like) {
  if (!same_kind(t, like) || t.dtype() != like.dtype()) return false;
  const Sizes sizes = t.sizes(), others = like.sizes();
  bool same = sizes.size() == others.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == others[d];
  return same && same_strides(t, like);
}

void check_length(const Refs& list, const Refs& params, const char* name) {
  TORCH_CHECK(list.size() == params.size(), name, ": expected ", params.size(),
              " tensors, one for each of params, got ", list.size());
}

// The memory of a tensor with the negative bit (the imaginary part of a conjugate) is not what it says.
void check_not_negated(const Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_neg(), name, ": expected a tensor without the negative bit; call resolve_neg() on it");
}

// A float64 matrix on the CPU with one row a group.
const double* check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kDouble && t.is_contiguous(), name,
              ": expected a contiguous float64 tensor on the CPU, got ", t.scalar_type(), " on ", t.device());
  check_not_negated(t, name);
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
  check_not_negated(t, name);
  return t.data_ptr<double>();
}

// Null if it is not given.
const float* check_scalar(const Scalar& t, const char* name, const at::Device& device) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->numel() == 1 && t->device() == device, name,
              ": expected one float32 element on ", device, ", got ", t->scalar_type(), " of shape ", t->sizes(),
              " on ", t->device());
  check_not_negated(*t, name);
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
    check_not_negated(t, "lr");
    rates[g] = {t.const_data_ptr(), static_cast<int64_t>(t.itemsize())};
  }
  return rates;
}

// ---- tables ----

// In-place operators on lists must do this themselves, or autograd uses mutated tensors without a word.
void bump_versions(const Refs& tensors) {
  for (const Tensor* t : tensors)
    if (t && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
}

// Builds the rows of a table. Kernels see one dense layout a row: the parameter's own, or for a parameter that has
// gaps or the negative bit, that of empty_like. What is only read and laid out otherwise is copied into it; such a
// parameter is copied in, and back by write().
class Rows {
 public:
  Rows(const Refs& params, Sizes run_sizes) : params_(params) {
    TORCH_CHECK(!params.empty(), "params: expected at least one tensor");
    int64_t n = 0;
    for (int64_t size : run_sizes) n += size;
    TORCH_CHECK(n == static_cast<int64_t>(params.size()), "run_sizes: expected to add up to the ", params.size(),
                " tensors of params, got ", n);
    table_.reserve(params.size());
    dense_.reserve(params.size());
    const Tensor& first = *params[0];
    check_dense(first, "params", 0);
    size_t i = 0;
    for (size_t g = 0; g < run_sizes.size(); ++g)
      for (int64_t k = 0; k < run_sizes[g]; ++k, ++i) {
        const Tensor& p = *params[i];
        if (!same_kind(p, first)) {
          check_dense(p, "params", i);
          TORCH_CHECK(p.device() == first.device(), "params[", i, "]: expected device ", first.device(),
                      ", as params[0] has, got ", p.device());
        }
        const bool in_place = p.is_non_overlapping_and_dense() && !p.is_neg();
        if (!in_place) {
          check_data(p.const_data_ptr(), p, "params", i);
          TORCH_CHECK(at::has_internal_overlap(p) != at::MemOverlap::Yes, "params[", i,
                      "]: expected a tensor whose elements do not share memory, got an expanded one");
          copies_.push_back(at::empty_like(p).copy_(p.detach()));
        }
        dense_.push_back(in_place ? &p : &copies_.back());
        Row& row = table_.emplace_back();
        row.dtype = dtype_of(p, "params", i);
        row.group = static_cast<int32_t>(g);
        row.numel = p.numel();
        row.param = check_data(dense_.back()->data_ptr(), p, "params", i);
      }
  }

  // A tensor for each parameter, `name` in errors: the gradients, or what takes their place.
  void grads(const Refs& grads, const char* name) {
    check_length(grads, params_, name);
    for (size_t i = 0; i < grads.size(); ++i) {
      const bool fit = fits(*grads[i], *dense_[i]);
      if (!fit) check_like(*grads[i], *params_[i], name, i);
      table_[i].grad = laid_out(*grads[i], fit, i, name);
    }
  }

  // To be written: each like its parameter.
  void backups(const Refs& backups) {
    check_length(backups, params_, "backups");
    for (size_t i = 0; i < backups.size(); ++i) table_[i].backup = own(*backups[i], i, "backups");
  }

  // To be read: null for a parameter that was not perturbed; the parameter may have changed its layout, dtype or device
  // since the backup was made.
  void saved(const Refs& backups, const char* name) {
    check_length(backups, params_, name);
    for (size_t i = 0; i < backups.size(); ++i) {
      if (!backups[i]) continue;
      const bool fit = fits(*backups[i], *dense_[i]);
      TORCH_CHECK(fit || backups[i]->sizes() == params_[i]->sizes(), name, "[", i, "]: expected shape ",
                  params_[i]->sizes(), ", got ", backups[i]->sizes());
      table_[i].backup = const_cast<void*>(laid_out(*backups[i], fit, i, name));
    }
  }

  void state(const Refs& state, int lists) {
    const size_t n = params_.size();
    TORCH_CHECK(state.size() == lists * n, "state: expected ", lists, " x ", n, " tensors, got ", state.size());
    for (size_t k = 0; k < static_cast<size_t>(lists); ++k)
      for (size_t i = 0; i < n; ++i) table_[i].state[k] = own(*state[k * n + i], i, "state");
  }

  void steps(const Refs& steps) {
    check_length(steps, params_, "steps");
    for (size_t i = 0; i < steps.size(); ++i) {
      const Tensor& step = *steps[i];
      const bool there = same_kind(step, *dense_[i]) || step.device() == dense_[i]->device();
      TORCH_CHECK(there && step.scalar_type() == at::kFloat && step.numel() == 1, "steps[", i,
                  "]: expected one float32 element on ", dense_[i]->device(), ", got ", step.scalar_type(),
                  " of shape ", step.sizes(), " on ", step.device());
      check_not_negated(step, "steps");
      table_[i].step = static_cast<float*>(step.data_ptr());
    }
  }

  // f(table), which only reads the parameters.
  template <class F>
  void read(const F& f) const {
    f(table_);
  }

  // f(table), which writes the parameters.
  template <class F>
  void write(const F& f) const {
    f(table_);
    for (size_t i = 0; i < params_.size(); ++i)
      if (dense_[i] != params_[i]) params_[i]->detach().copy_(*dense_[i]);
    bump_versions(params_);
  }

 private:
  // The data of `t` in the type, device and dense layout of parameter i: its own if it fits, or a copy's.
  const void* laid_out(const Tensor& t, bool fit, size_t i, const char* list) {
    const void* data = check_data(t.const_data_ptr(), t, list, i);
    if (fit) return data;
    copies_.push_back(at::empty_like(*dense_[i]).copy_(t));
    return copies_.back().const_data_ptr();
  }

  void* own(const Tensor& t, size_t i, const char* list) {
    if (!fits(t, *dense_[i])) {
      check_like(t, *params_[i], list, i);
      TORCH_CHECK(same_strides(t, *dense_[i]), list, "[", i, "]: expected strides ", dense_[i]->strides(),
                  ", the parameter's dense layout, got ", t.strides());
      check_not_negated(t, list);
    }
    return check_data(t.data_ptr(), t, list, i);
  }

  const Refs& params_;
  Table table_;
  Refs dense_;
  std::deque<Tensor> copies_;
};

int find_base(std::string_view name) {
  int found = -1;
  for (int i = 0; i < static_cast<int>(std::tuple_size_v<Bases>); ++i)
    with_base(i, [&](auto base) {
      if (name == base.name) found = i;
    });
  TORCH_CHECK_VALUE(found >= 0, "base: the extension has no update called '", name, "'");
  return found;
}

}  // namespace

// ---- operators ----

Tensor grad_sq_norm(const Hook&, const Refs& params, const Refs& grads, const Tensor& ascent, Sizes run_sizes) {
  Rows rows(params, run_sizes);
  rows.grads(grads, "grads");
  const int64_t n = static_cast<int64_t>(run_sizes.size());
  const Ascent* groups = check_ascent(ascent, n);
  Tensor out = at::empty({n}, params[0]->options().dtype(at::kDouble).requires_grad(false));
  const Target on(*params[0]);
  rows.read([&](const Table& t) { on.backend.grad_sq_norm(on.queue, t, groups, n, out.data_ptr<double>()); });
  return out;
}

Tensor sharpness_(const Hook&, const Tensor& sq_norms, const Tensor& ascent, const Scalar& total,
                  const Scalar& grad_scale) {
  const int64_t n = sq_norms.numel();
  const double* squares = check_doubles(sq_norms, "sq_norms", n, sq_norms.device());
  const Ascent* groups = check_ascent(ascent, n);
  double* const sum = total ? check_doubles(*total, "total", 2, sq_norms.device()) : nullptr;
  const float* scale = check_scalar(grad_scale, "grad_scale", sq_norms.device());
  Tensor out = at::empty({3}, sq_norms.options());
  const Target on(sq_norms);
  on.backend.sharpness(on.queue, squares, groups, n, scale, sum, out.data_ptr<double>());
  if (total) bump_versions({&*total});
  return out;
}

void perturb_(const Hook& begin, const Refs& params, const Refs& grads, const Refs& backups, const Tensor& grad_norm,
              const Tensor& ascent, Sizes run_sizes) {
  Rows rows(params, run_sizes);
  rows.grads(grads, "grads");
  rows.backups(backups);
  const Ascent* groups = check_ascent(ascent, static_cast<int64_t>(run_sizes.size()));
  const double* norm = check_doubles(grad_norm, "grad_norm", 1, params[0]->device());
  const Target on(*params[0]);
  if (begin) begin();
  rows.write([&](const Table& t) { on.backend.perturb(on.queue, t, groups, norm, /*saved=*/false); });
  bump_versions(backups);
}

void perturb_from_(const Hook&, const Refs& params, const Refs& directions, const Refs& saved, const Tensor& norm,
                   const Tensor& ascent, Sizes run_sizes) {
  Rows rows(params, run_sizes);
  rows.grads(directions, "directions");
  rows.saved(saved, "saved");
  const Ascent* groups = check_ascent(ascent, static_cast<int64_t>(run_sizes.size()));
  const double* value = check_doubles(norm, "norm", 1, params[0]->device());
  const Target on(*params[0]);
  rows.write([&](const Table& t) { on.backend.perturb(on.queue, t, groups, value, /*saved=*/true); });
}

void restore_(const Hook&, const Refs& params, const Refs& backups) {
  Rows rows(params, {static_cast<int64_t>(params.size())});
  rows.saved(backups, "backups");
  const Target on(*params[0]);
  rows.write([&](const Table& t) { on.backend.restore(on.queue, t); });
}

namespace {

void update(Rows& rows, std::string_view base, const Refs& params, const Refs& state, const Refs& steps,
            const Tensor& hyper, Sizes run_sizes, const OptionalRefs& lr, const Scalar& grad_scale,
            const Scalar& found_inf, const Along* along) {
  const int index = find_base(base);
  const int64_t n_groups = static_cast<int64_t>(run_sizes.size());
  const double* values = nullptr;
  with_base(index, [&](auto b) {
    rows.state(state, b.states);
    if (b.counts_steps) rows.steps(steps);
    values = check_rows(hyper, "hyper", n_groups,
                        static_cast<int64_t>(sizeof(typename decltype(b)::Hyper) / sizeof(double)));
    if (along)
      TORCH_CHECK_VALUE(0 <= along->state && along->state < b.states, "moment: expected one of the ", b.states,
                        " lists of state, got ", along->state);
  });
  const at::Device device = params[0]->device();
  const std::vector<Rate> rates = check_rates(lr, n_groups, device);
  const float* scale = check_scalar(grad_scale, "grad_scale", device);
  const float* skip = check_scalar(found_inf, "found_inf", device);
  const Target on(*params[0]);
  rows.write(
      [&](const Table& t) { on.backend.restore_step(on.queue, t, index, values, rates.data(), scale, skip, along); });
  bump_versions(state);
  bump_versions(steps);
}

}  // namespace

void restore_step_(const Hook& done, std::string_view base, const Refs& params, const Refs& grads,
                   const OptionalRefs& backups, const Refs& state, const Refs& steps, const Tensor& hyper,
                   Sizes run_sizes, const OptionalRefs& lr, const Scalar& grad_scale, const Scalar& found_inf) {
  Rows rows(params, run_sizes);
  rows.grads(grads, "grads");
  rows.saved(backups, "backups");
  update(rows, base, params, state, steps, hyper, run_sizes, lr, grad_scale, found_inf, nullptr);
  if (done) done();
}

Tensor step_along_(const Hook& done, std::string_view base, const Refs& params, const Refs& grads, const Refs& state,
                   const Refs& steps, const Tensor& hyper, const Tensor& ascent, int64_t moment, Sizes run_sizes,
                   const OptionalRefs& lr, const Scalar& grad_scale, const Scalar& found_inf) {
  Rows rows(params, run_sizes);
  rows.grads(grads, "grads");
  const int64_t n = static_cast<int64_t>(run_sizes.size());
  Tensor out = at::empty({n}, params[0]->options().dtype(at::kDouble).requires_grad(false));
  const Along along{static_cast<int>(moment), check_ascent(ascent, n), n, out.data_ptr<double>()};
  update(rows, base, params, state, steps, hyper, run_sizes, lr, grad_scale, found_inf, &along);
  if (done) done();
  return out;
}

// ---- torch.ops.sam_fused ----

namespace {

// What the dispatcher passes.
struct Ops {
  struct Running {
    Running() {}
  };
};

}  // namespace

template <>
struct Argument<Ops, std::string_view> : PassedAs<c10::string_view, std::string_view> {};
template <>
struct Argument<Ops, const Refs&> {
  using In = const std::vector<Tensor>&;
  struct Held {
    Refs refs;
    Held(In list, const char*) {
      for (const Tensor& t : list) refs.push_back(&t);
    }
    operator const Refs&() const { return refs; }
  };
};
template <>
struct Argument<Ops, const OptionalRefs&> {
  using In = const c10::List<std::optional<Tensor>>&;  // the one spelling of Tensor?[] that torch unboxes
  struct Held {
    std::vector<std::optional<Tensor>> tensors;
    OptionalRefs refs;
    Held(In list, const char*) : tensors(list.vec()) {
      for (const std::optional<Tensor>& t : tensors) refs.push_back(t.has_value() ? &*t : nullptr);
    }
    Held(Held&&) = default;  // moves the vector, and what refs point to stays
    operator const OptionalRefs&() const { return refs; }
  };
};

// Lists hold one tensor for each of params; run_sizes cuts params into groups, whose values are the rows of
// `ascent` or `hyper` (ops.h).
TORCH_LIBRARY(sam_fused, m) {
  m.set_python_module("sam_fused.fakes");  // where the kernels for tracing are
  m.def("grad_sq_norm(Tensor[] params, Tensor[] grads, Tensor ascent, int[] run_sizes) -> Tensor");
  m.def("sharpness_(Tensor sq_norms, Tensor ascent, Tensor(a!)? total=None, Tensor? grad_scale=None) -> Tensor");
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
  m.impl("grad_sq_norm", Call<Ops, grad_sq_norm>::run);
  m.impl("sharpness_", Call<Ops, sharpness_>::run);
  m.impl("perturb_", Call<Ops, perturb_>::run);
  m.impl("perturb_from_", Call<Ops, perturb_from_>::run);
  m.impl("restore_", Call<Ops, restore_>::run);
  m.impl("restore_step_", Call<Ops, restore_step_>::run);
  m.impl("step_along_", Call<Ops, step_along_>::run);
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
