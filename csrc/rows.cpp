#include "rows.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>

#include <cstring>

namespace sam {

using at::Tensor;

namespace {

// Whether `data` is nowhere although `t` has elements: a tensor subclass may be an empty wrapper around others.
bool is_wrapper(const Tensor& t, const void* data) { return !data && t.numel() != 0 && !t.is_meta(); }

constexpr auto kGotWrapper = ": expected a tensor with memory of its own, got a wrapper around others";

}  // namespace

void check_own_data(const Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_neg(), name, ": expected a tensor without the negative bit; call resolve_neg() on it");
  TORCH_CHECK(!is_wrapper(t, t.const_data_ptr()), name, kGotWrapper);
}

void bump_versions(const Refs& tensors) {
  for (const Tensor* t : tensors)
    if (t && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
}

namespace {

// Whether `t` has the kind of memory that `like` has: equal layout, bits and device. With a thousand small tensors the
// checks are most of a step, so this and fits() are asked first, and what is amiss only where they are false.
bool same_kind(const Tensor& t, const Tensor& like) {
  return t.key_set() == like.key_set() && (t.is_cpu() || t.device() == like.device());
}

// Equal strides, but for dimensions of size 1, whose stride says nothing.
bool same_strides(const Tensor& a, const Tensor& b) {
  const Sizes sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (x[d] != y[d] && sizes[d] != 1) return false;
  return true;
}

}  // namespace

bool is_dense(const Tensor& t) { return t.is_non_overlapping_and_dense() && !t.is_neg(); }

bool fits(const Tensor& t, const Tensor& like) {
  if (!same_kind(t, like) || t.dtype() != like.dtype()) return false;
  const Sizes sizes = t.sizes(), others = like.sizes();
  bool same = sizes.size() == others.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == others[d];
  return same && same_strides(t, like);
}

namespace {

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

void check_dense(const Tensor& t, const char* list, size_t i) {
  TORCH_CHECK(t.layout() == at::kStrided, list, "[", i, "]: expected a dense tensor, got layout ", t.layout());
}

// `data`, where `t` is.
template <class Void>
Void* check_data(Void* data, const Tensor& t, const char* list, size_t i) {
  TORCH_CHECK(!is_wrapper(t, data), list, "[", i, "]", kGotWrapper);
  return data;
}

void check_like(const Tensor& t, const Tensor& param, const char* list, size_t i) {
  check_dense(t, list, i);
  TORCH_CHECK(t.device() == param.device(), list, "[", i, "]: expected device ", param.device(), ", got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == param.scalar_type(), list, "[", i, "]: expected dtype ", param.scalar_type(),
                   ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == param.sizes(), list, "[", i, "]: expected shape ", param.sizes(), ", got ", t.sizes());
}

template <class List>
void check_length(const List& list, const Refs& params, const char* name) {
  TORCH_CHECK(list.size() == params.size(), name, ": expected ", params.size(),
              " tensors, one for each of params, got ", list.size());
}

// Of tensors one after the other that count their versions together, as views of one storage do, the first: counting up
// a thousand by themselves takes longer than writing to small ones.
Refs one_for_each_counter(const Refs& tensors) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));  // a pointer to the count, which is all we compare
  const auto counter = [](const Tensor* t) { return &t->unsafeGetTensorImpl()->version_counter(); };
  Refs out;
  for (const Tensor* t : tensors)
    if (out.empty() || memcmp(counter(out.back()), counter(t), sizeof(void*)) != 0) out.push_back(t);
  return out;
}

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

Rows::Rows(Refs params, Sizes run_sizes)
    : params_(std::move(params)), n_groups_(static_cast<int64_t>(run_sizes.size())) {
  TORCH_CHECK(!params_.empty(), "params: expected at least one tensor");
  int64_t n = 0;
  for (int64_t size : run_sizes) {
    TORCH_CHECK(size >= 0, "run_sizes: expected numbers >= 0, got ", size);
    n += size;
  }
  TORCH_CHECK(n == static_cast<int64_t>(params_.size()), "run_sizes: expected to add up to the ", params_.size(),
              " tensors of params, got ", n);
  table_.reserve(params_.size());
  dense_.reserve(params_.size());
  const Tensor& first = *params_[0];
  check_dense(first, "params", 0);
  size_t i = 0;
  for (size_t g = 0; g < run_sizes.size(); ++g)
    for (int64_t k = 0; k < run_sizes[g]; ++k, ++i) {
      const Tensor& p = *params_[i];
      if (!same_kind(p, first)) {
        check_dense(p, "params", i);
        TORCH_CHECK(p.device() == first.device(), "params[", i, "]: expected device ", first.device(),
                    ", as params[0] has, got ", p.device());
      }
      const bool dense = is_dense(p);
      if (!dense) {
        check_data(p.const_data_ptr(), p, "params", i);
        TORCH_CHECK(at::has_internal_overlap(p) != at::MemOverlap::Yes, "params[", i,
                    "]: expected a tensor whose elements do not share memory, got an expanded one");
        copies_.push_back(at::empty_like(p).copy_(p.detach()));
      }
      dense_.push_back(dense ? &p : &copies_.back());
      Row& row = table_.emplace_back();
      row.dtype = dtype_of(p, "params", i);
      row.group = static_cast<int32_t>(g);
      row.numel = p.numel();
      row.param = check_data(dense_.back()->data_ptr(), p, "params", i);
    }
}

void Rows::backups(const Refs& backups) {
  check_length(backups, params_, "backups");
  for (size_t i = 0; i < backups.size(); ++i) table_[i].backup = own(*backups[i], i, "backups");
  backups_ = one_for_each_counter(backups);
}

void Rows::saved(const Refs& backups, const char* name) {
  check_length(backups, params_, name);
  all_saved_ = true;
  for (size_t i = 0; i < backups.size(); ++i) {
    if (!backups[i]) {
      all_saved_ = false;
      continue;
    }
    const bool fit = fits(*backups[i], *dense_[i]);
    TORCH_CHECK(fit || backups[i]->sizes() == params_[i]->sizes(), name, "[", i, "]: expected shape ",
                params_[i]->sizes(), ", got ", backups[i]->sizes());
    table_[i].backup = const_cast<void*>(laid_out(*backups[i], fit, i, name, copies_));
  }
}

void Rows::state(std::string_view base, const Refs& state, const Refs& steps) {
  const size_t n = params_.size();
  base_ = find_base(base);
  bool counts_steps = false;
  with_base(base_, [&](auto b) {
    const size_t lists = b.states;
    TORCH_CHECK(state.size() == lists * n, "state: expected ", lists, " x ", n, " tensors, got ", state.size());
    counts_steps = b.counts_steps;
  });
  for (size_t k = 0; k * n < state.size(); ++k)
    for (size_t i = 0; i < n; ++i) table_[i].state[k] = own(*state[k * n + i], i, "state");
  state_ = one_for_each_counter(state);
  if (!counts_steps) return;
  check_length(steps, params_, "steps");
  for (size_t i = 0; i < n; ++i) {
    const Tensor& step = *steps[i];
    const bool there = same_kind(step, *dense_[i]) || step.device() == dense_[i]->device();
    TORCH_CHECK(there && step.scalar_type() == at::kFloat && step.numel() == 1, "steps[", i,
                "]: expected one float32 element on ", dense_[i]->device(), ", got ", step.scalar_type(), " of shape ",
                step.sizes(), " on ", step.device());
    check_own_data(step, "steps");
    table_[i].step = static_cast<float*>(step.data_ptr());
  }
  steps_ = one_for_each_counter(steps);
}

Rows::Copies Rows::grads(const Reads& grads, const char* name) {
  check_length(grads, params_, name);
  Copies copies;
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto [grad, data] = grads[i];
    if (data) {
      table_[i].grad = data;
      continue;
    }
    const bool fit = fits(*grad, *dense_[i]);
    if (!fit) check_like(*grad, *params_[i], name, i);
    table_[i].grad = laid_out(*grad, fit, i, name, copies);
  }
  return copies;
}

int Rows::base() const {
  TORCH_CHECK(base_ >= 0, "rows: expected rows that were given the state of a base");
  return base_;
}

void Rows::check_backups() const {
  TORCH_CHECK(!backups_.empty(), "rows: expected rows that were given backups to write");
}

void Rows::check_all_saved() const {
  TORCH_CHECK(all_saved_, "rows: expected rows that were given a backup for each parameter");
}

void Rows::params_written() const {
  for (size_t i = 0; i < params_.size(); ++i)
    if (dense_[i] != params_[i]) params_[i]->detach().copy_(*dense_[i]);
  bump_versions(params_);
}

void Rows::state_written() const {
  bump_versions(state_);
  bump_versions(steps_);
}

// The data of `t` in the type, device and dense layout of parameter i: its own if it fits, or a copy's.
const void* Rows::laid_out(const Tensor& t, bool fit, size_t i, const char* list, Copies& copies) const {
  const void* data = check_data(t.const_data_ptr(), t, list, i);
  if (fit) return data;
  copies.push_back(at::empty_like(*dense_[i]).copy_(t));
  return copies.back().const_data_ptr();
}

void* Rows::own(const Tensor& t, size_t i, const char* list) const {
  if (!fits(t, *dense_[i])) {
    check_like(t, *params_[i], list, i);
    TORCH_CHECK(same_strides(t, *dense_[i]), list, "[", i, "]: expected strides ", dense_[i]->strides(),
                ", the parameter's dense layout, got ", t.strides());
    check_own_data(t, list);
  }
  return check_data(t.data_ptr(), t, list, i);
}

}  // namespace sam
