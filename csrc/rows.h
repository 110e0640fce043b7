// A table's rows, made from lists of tensors: the checks of every tensor, and copies of what a kernel cannot see as it
// is.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <string_view>
#include <vector>

#include "table.h"

namespace sam {

// One pointer a tensor, owned by the caller: copying a tensor handle that only Python holds takes the GIL. In an
// optional list nullptr stands for None.
using Refs = std::vector<const at::Tensor*>;
struct OptionalRefs : Refs {
  using Refs::Refs;
};
using Sizes = at::IntArrayRef;

// A tensor that a call reads. `data` is its memory where it is known to be laid out as its row is, so that nothing is
// left to check; null where it is not.
struct Read {
  const at::Tensor* tensor;
  const void* data = nullptr;
};
using Reads = std::vector<Read>;

// Whether kernels may work on the memory of `t` itself: it has neither gaps nor the negative bit.
bool is_dense(const at::Tensor& t);

// Whether `t` is laid out as `like` is, and of its dtype and device: kernels may see the memory of the one beside that
// of the other.
bool fits(const at::Tensor& t, const at::Tensor& like);

// The memory of a tensor with the negative bit (the imaginary part of a conjugate) is not what it says, and a tensor
// subclass may be an empty wrapper.
void check_own_data(const at::Tensor&, const char* name);

// In-place operators on lists must do this themselves, or autograd uses mutated tensors without a word.
void bump_versions(const Refs&);

// Kernels see one dense layout a row: the parameter's own, or for a parameter that has gaps or the negative bit, that
// of empty_like. What is only read and laid out otherwise is copied into it; such a parameter is copied in, and back by
// params_written(). Gradients are given anew for each call. The rest may serve many calls, if it is lasting(), as long
// as every tensor keeps its memory, layout, dtype and device.
class Rows {
 public:
  using Copies = std::deque<at::Tensor>;

  // In runs of one group each.
  Rows(Refs params, Sizes run_sizes);
  Rows(Rows&&) = default;  // and no copy, which would write to the same parameters

  // To be written: each like its parameter.
  void backups(const Refs& backups);
  // To be read, null for a parameter that was not perturbed. The parameter may have changed its layout, dtype or device
  // since the backup was made.
  void saved(const Refs& backups, const char* name);
  // The lists of `base`'s state one after the other, and if it counts steps a float32 counter for each parameter.
  void state(std::string_view base, const Refs& state, const Refs& steps);

  // A tensor for each parameter, `name` in errors: the gradients, or what takes their place. The copies must live until
  // the call's work is queued.
  [[nodiscard]] Copies grads(const Reads& grads, const char* name);

  const Table& table() const { return table_; }
  const at::Tensor& like() const { return *params_[0]; }  // whose device is that of all
  int64_t n_groups() const { return n_groups_; }
  int base() const;
  bool lasting() const { return copies_.empty(); }

  void check_backups() const;
  void check_all_saved() const;

  // To be called when they have been written: versions are counted up, and copied parameters copied back.
  void params_written() const;
  void backups_written() const { bump_versions(backups_); }
  void state_written() const;

 private:
  const void* laid_out(const at::Tensor& t, bool fit, size_t i, const char* list, Copies& copies) const;
  void* own(const at::Tensor& t, size_t i, const char* list) const;

  Table table_;
  Refs params_, dense_;
  Refs backups_, state_, steps_;  // one for each version counter
  Copies copies_;
  int64_t n_groups_;
  int base_ = -1;
  bool all_saved_ = false;
};

}  // namespace sam
