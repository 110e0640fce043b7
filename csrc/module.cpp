// The Python module: the operations on rows that are kept, and what is no operator.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "backends.h"
#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using at::Tensor;
using sam::Scalar;

const Tensor& tensor_of(PyObject* object, const char* name) {
  if (!THPVariable_Check(object)) throw py::type_error(std::string(name) + ": expected a tensor");
  return THPVariable_Unpack(object);
}

// Borrowed from a list or a tuple.
template <class R>
R refs(py::handle sequence, const char* name) {
  R out;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(sequence.ptr());
  PyObject** const items = PySequence_Fast_ITEMS(sequence.ptr());
  out.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const bool none = std::is_same_v<R, sam::OptionalRefs> && items[i] == Py_None;
    out.push_back(none ? nullptr : &tensor_of(items[i], name));
  }
  return out;
}

// Gradients as gather() has found them. Python makes no objects of them, and those that fit are not checked again.
class Gradients {
 public:
  void add(const Tensor& param, const Tensor& grad) {
    const bool wrapper = grad.key_set().has(c10::DispatchKey::Python);
    const bool fits = !wrapper && sam::is_dense(param) && sam::fits(grad, param);
    add(grad, fits ? grad.const_data_ptr() : nullptr);
  }

  std::unique_ptr<Gradients> pick(const std::vector<size_t>& positions) const {
    auto out = std::make_unique<Gradients>();
    for (const size_t i : positions) out->add(held_.at(i), reads_[i].data);
    return out;
  }

  py::list tensors() const {
    py::list out;
    for (const Tensor& t : held_) out.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(t)));
    return out;
  }

  const sam::Reads& reads() const { return reads_; }

  size_t size() const { return held_.size(); }

 private:
  void add(const Tensor& grad, const void* data) { reads_.push_back({&held_.emplace_back(grad), data}); }

  std::deque<Tensor> held_;  // whose elements stay where they are
  sam::Reads reads_;
};

// Of Gradients, or of a list.
sam::Reads reads(py::handle tensors, const char* name) {
  if (py::isinstance<Gradients>(tensors)) return tensors.cast<const Gradients&>().reads();
  if (!PyList_Check(tensors.ptr())) throw py::type_error(std::string(name) + ": expected a list of tensors");
  sam::Reads out;
  for (const Tensor* t : refs<sam::Refs>(tensors, name)) out.push_back({t});
  return out;
}

// Rows, and the tensors that they point to.
class Kept {
 public:
  static std::unique_ptr<Kept> make(const py::list& params, const std::vector<int64_t>& run_sizes,
                                    const std::optional<py::list>& backups, const std::optional<py::list>& saved,
                                    const std::string& base, const py::list& state, const py::list& steps) {
    auto kept = std::make_unique<Kept>();
    sam::Rows& rows = kept->rows_.emplace(kept->hold<sam::Refs>(params, "params"), run_sizes);
    if (backups) rows.backups(kept->hold<sam::Refs>(*backups, "backups"));
    if (saved) rows.saved(kept->hold<sam::OptionalRefs>(*saved, "saved"), "saved");
    if (!base.empty()) rows.state(base, kept->hold<sam::Refs>(state, "state"), kept->hold<sam::Refs>(steps, "steps"));
    return kept;
  }

  sam::Rows& rows() {
    if (!rows_) throw std::runtime_error("rows: the garbage collector has cleared them");
    return *rows_;
  }

  // For Python's collector: a parameter may hold its optimizer, which holds its rows.
  static void collect(PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (Kept* const kept = of(self))
        for (const py::tuple& held : kept->held_) Py_VISIT(held.ptr());
      return 0;
    };
    type.tp_clear = [](PyObject* self) {
      if (Kept* const kept = of(self)) {
        kept->rows_.reset();
        kept->held_.clear();
      }
      return 0;
    };
  }

 private:
  // Null while it is being made.
  static Kept* of(PyObject* self) {
    return static_cast<Kept*>(reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr());
  }

  template <class R>
  R hold(const py::list& list, const char* name) {
    return refs<R>(held_.emplace_back(list), name);
  }

  std::vector<py::tuple> held_;
  std::optional<sam::Rows> rows_;
};

template <class F>
auto without_gil(const F& f) {
  const py::gil_scoped_release release;
  return f();
}

// Python looks for interrupts between two bytecodes, so a hook without bytecode, such as a list's own method, cannot be
// parted from the operation by one.
sam::Hook with_gil(const py::object& hook) {
  if (hook.is_none()) return {};
  return [&hook] {
    const py::gil_scoped_acquire gil;
    hook();
  };
}

Tensor grad_sq_norm(Kept& rows, py::handle grads, const Tensor& ascent) {
  const sam::Reads g = reads(grads, "grads");
  return without_gil([&] { return sam::grad_sq_norm(rows.rows(), g, ascent); });
}

void sharpness_(const Tensor& sq_norms, const Tensor& ascent, const Tensor& out, const Scalar& total,
                const Scalar& grad_scale) {
  without_gil([&] { sam::sharpness_(sq_norms, ascent, out, total, grad_scale); });
}

void perturb_(Kept& rows, py::handle grads, const Tensor& grad_norm, const Tensor& ascent, const py::object& hook) {
  const sam::Reads g = reads(grads, "grads");
  const sam::Hook begin = with_gil(hook);
  without_gil([&] { sam::perturb_(rows.rows(), g, grad_norm, ascent, begin); });
}

void perturb_from_(Kept& rows, py::handle directions, const Tensor& norm, const Tensor& ascent) {
  const sam::Reads d = reads(directions, "directions");
  without_gil([&] { sam::perturb_from_(rows.rows(), d, norm, ascent); });
}

void restore_(Kept& rows) {
  without_gil([&] { sam::restore_(rows.rows()); });
}

void restore_step_(Kept& rows, py::handle grads, const Tensor& hyper, const py::list& lr, const Scalar& grad_scale,
                   const Scalar& found_inf, const py::object& hook) {
  const sam::Reads g = reads(grads, "grads");
  const auto rates = refs<sam::OptionalRefs>(lr, "lr");
  const sam::Hook done = with_gil(hook);
  without_gil([&] { sam::restore_step_(rows.rows(), g, hyper, rates, grad_scale, found_inf, done); });
}

Tensor step_along_(Kept& rows, py::handle grads, const Tensor& hyper, const Tensor& ascent, int64_t moment,
                   const py::list& lr, const Scalar& grad_scale, const Scalar& found_inf) {
  const sam::Reads g = reads(grads, "grads");
  const auto rates = refs<sam::OptionalRefs>(lr, "lr");
  return without_gil(
      [&] { return sam::step_along_(rows.rows(), g, hyper, ascent, moment, rates, grad_scale, found_inf); });
}

// A 64-bit hash of numbers one after the other. What is compared by it is not chosen by anyone, so two different inputs
// are taken for the same once in 2^64 comparisons.
class Hash {
 public:
  void operator()(uint64_t x) { value_ = (value_ ^ x) * 0x100000001b3u + (value_ >> 29); }
  void operator()(const void* p) { (*this)(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p))); }
  uint64_t value() const { return value_; }

  // Dtype, device and bits; shape and strides.
  void layout_of(const Tensor& t) {
    (*this)(t.key_set().raw_repr());
    (*this)(static_cast<uint64_t>(t.scalar_type()) << 32 | static_cast<uint64_t>(t.device().type()) << 16 |
            static_cast<uint64_t>(t.device().index() + 1));
    for (const int64_t size : t.sizes()) (*this)(size);
    if (t.layout() != at::kStrided) return;  // only frozen parameters, which nothing is done to
    for (const int64_t stride : t.strides()) (*this)(stride);
  }

  // The context is another one after a lazy clone, which shares the memory until one of the two is written to.
  void memory_of(const Tensor& t) {
    if (!t.has_storage()) return;
    const at::DataPtr& data = t.storage().data_ptr();
    (*this)(data.get());
    (*this)(data.get_context());
    (*this)(t.storage_offset());
  }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

// The gradients, of all parameters of all groups, that are not None, and two hashes. The first is of what a plan
// depends on: the parameters themselves, each one's layout, whether it asks for a gradient, and whether it has one and
// of which dtype. The second is of where the parameters lie in memory.
py::tuple gather(const py::list& groups) {
  auto grads = std::make_unique<Gradients>();
  Hash layout, memory;
  for (size_t g = 0; g < groups.size(); ++g) {
    const py::list params = groups[g];
    layout(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      PyObject* const p = PyList_GET_ITEM(params.ptr(), i);
      const Tensor& t = tensor_of(p, "params");
      const Tensor& grad = t.grad();
      layout(p);
      layout.layout_of(t);
      layout((grad.defined() ? 1 + static_cast<uint64_t>(grad.scalar_type()) : 0) << 1 | t.requires_grad());
      memory.memory_of(t);
      if (!grad.defined()) continue;
      TORCH_CHECK(grad.layout() == at::kStrided, "param_groups[", g, "]['params'][", i, "].grad: expected a dense ",
                  "gradient, got layout ", grad.layout(), "; sparse gradients are not supported");
      grads->add(t, grad);
    }
  }
  return py::make_tuple(std::move(grads), layout.value(), memory.value());
}

// A hash of which objects an optimizer's state holds, a dictionary for each parameter, and of the layout and memory of
// those that are tensors. What is held under other keys may be anything.
uint64_t contents(const py::dict& state) {
  Hash hash;
  PyObject *key, *value, *name, *object;
  for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &value);) {
    hash(key);
    hash(value);
    if (!PyDict_Check(value)) continue;
    for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &object);) {
      hash(name);
      hash(object);
      if (!THPVariable_Check(object)) continue;
      const Tensor& t = THPVariable_Unpack(object);
      hash.layout_of(t);
      hash.memory_of(t);
    }
  }
  return hash.value();
}

// Of each tensor of each list, how often it was changed in place, as autograd counts it, and its address (0 without
// memory of its own): two numbers of 64 bits, in bytes, which Python compares at once.
py::bytes marks(const py::list& lists) {
  std::vector<uint64_t> out;
  for (const py::handle list : lists)
    for (const py::handle item : list) {
      const Tensor& t = tensor_of(item.ptr(), "tensors");
      out.push_back(t._version());
      const void* const data = t.has_storage() ? t.storage().data_ptr().get() : nullptr;
      out.push_back(data ? reinterpret_cast<uintptr_t>(data) + t.storage_offset() * t.itemsize() : 0);
    }
  return {reinterpret_cast<const char*>(out.data()), out.size() * sizeof(uint64_t)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sam_fused's compiled part. Importing it registers torch.ops.sam_fused, whose operators it has on rows.";
  const auto none = [](const char* name) { return py::arg(name) = py::none(); };
  const auto def = [&m](const char* name, auto* f, const auto&... args) {
    m.def(name, torch::wrap_pybind_function(f), args...);
  };
  py::class_<Gradients>(m, "Gradients")
      .def("pick", &Gradients::pick, "positions"_a)
      .def("tensors", &Gradients::tensors)
      .def("__len__", &Gradients::size);
  py::class_<Kept>(m, "Rows", py::custom_type_setup(Kept::collect))
      .def(py::init(torch::wrap_pybind_function(Kept::make)), "params"_a, "run_sizes"_a, none("backups"), none("saved"),
           "base"_a = "", "state"_a = py::list(), "steps"_a = py::list())
      .def_property_readonly("lasting", [](Kept& kept) { return kept.rows().lasting(); });
  def("grad_sq_norm", grad_sq_norm, "rows"_a, "grads"_a, "ascent"_a);
  def("sharpness_", sharpness_, "sq_norms"_a, "ascent"_a, "out"_a, none("total"), none("grad_scale"));
  def("perturb_", perturb_, "rows"_a, "grads"_a, "grad_norm"_a, "ascent"_a, none("hook"));
  def("perturb_from_", perturb_from_, "rows"_a, "directions"_a, "norm"_a, "ascent"_a);
  def("restore_", restore_, "rows"_a);
  def("restore_step_", restore_step_, "rows"_a, "grads"_a, "hyper"_a, "lr"_a = py::list(), none("grad_scale"),
      none("found_inf"), none("hook"));
  def("step_along_", step_along_, "rows"_a, "grads"_a, "hyper"_a, "ascent"_a, "moment"_a, "lr"_a = py::list(),
      none("grad_scale"), none("found_inf"));
  m.def("gather", torch::wrap_pybind_function(gather));
  m.def("contents", contents);
  m.def("marks", torch::wrap_pybind_function(marks));
#if defined(SAM_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("cpu_isa", &sam::cpu_isa);
  m.def("set_cpu_isa", [](const std::string& name) {
    if (!sam::set_cpu_isa(name.c_str()))
      throw py::value_error("this CPU cannot run the instruction set '" + name + "'");
  });
}
