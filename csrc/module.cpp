// The Python module: the operations on Python lists, without boxing, and what is no operator.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "backends.h"
#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

const at::Tensor& tensor_of(PyObject* object, const char* name) {
  if (!THPVariable_Check(object)) throw py::type_error(std::string(name) + ": expected a tensor");
  return THPVariable_Unpack(object);
}

// Borrows the tensors of a list, which must outlive the result; None gives nullptr where it is allowed.
sam::Refs refs(const py::list& list, const char* name, bool optional = false) {
  const Py_ssize_t n = PyList_GET_SIZE(list.ptr());
  sam::Refs out(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PyList_GET_ITEM(list.ptr(), i);
    out[i] = optional && item == Py_None ? nullptr : &tensor_of(item, name);
  }
  return out;
}

std::vector<int64_t> sizes_of(const py::list& list) { return py::cast<std::vector<int64_t>>(list); }

at::Tensor grad_sq_norm(const py::list& params, const py::list& grads, const at::Tensor& ascent,
                        const py::list& group_sizes) {
  const auto p = refs(params, "params"), g = refs(grads, "grads");
  const auto sizes = sizes_of(group_sizes);
  const py::gil_scoped_release no_gil;
  return sam::grad_sq_norm(p, g, ascent, sizes);
}

// Python looks for interrupts between two bytecodes. So `entry` goes on `record` in here, when nothing can fail any
// more and nothing has moved: at no moment are weights perturbed that are not on record.
void perturb_(const py::list& params, const py::list& grads, const py::list& backups, const at::Tensor& grad_norm,
              const at::Tensor& ascent, const py::list& group_sizes, std::optional<py::list> record,
              const py::object& entry) {
  const auto p = refs(params, "params"), g = refs(grads, "grads"), b = refs(backups, "backups");
  const auto sizes = sizes_of(group_sizes);
  const py::gil_scoped_release no_gil;
  sam::perturb_(p, g, b, grad_norm, ascent, sizes, [&] {
    const py::gil_scoped_acquire gil;
    if (record) record->append(entry);
  });
}

void restore_(const py::list& params, const py::list& backups) {
  const auto p = refs(params, "params"), b = refs(backups, "backups");
  const py::gil_scoped_release no_gil;
  sam::restore_(p, b);
}

// Empties `record` when the weights have been updated: they then need no backup any more.
void restore_step_(const std::string& base, const py::list& params, const py::list& grads, const py::list& backups,
                   const py::list& state, const py::list& steps, const at::Tensor& hyper, const py::list& group_sizes,
                   const sam::Scalar& lr, const sam::Scalar& grad_scale, const sam::Scalar& found_inf,
                   std::optional<py::list> record) {
  const auto p = refs(params, "params"), g = refs(grads, "grads"), b = refs(backups, "backups", true),
             s = refs(state, "state"), t = refs(steps, "steps");
  const auto sizes = sizes_of(group_sizes);
  {
    const py::gil_scoped_release no_gil;
    sam::restore_step_(base, p, g, b, s, t, hyper, sizes, lr, grad_scale, found_inf);
  }
  if (record) record->attr("clear")();
}

// A 64-bit hash of numbers one after the other. What is compared by it is not chosen by anyone, so two different inputs
// are taken for the same once in 2^64 comparisons.
class Hash {
 public:
  void operator()(uint64_t x) { value_ = (value_ ^ x) * 0x100000001b3u + (value_ >> 29); }
  void operator()(const void* p) { (*this)(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p))); }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

// The gradients, of all parameters of all groups, that are not None, and two hashes. The first is of what a cached list
// depends on: the parameters themselves, which have a gradient and of which dtype, and each one's dtype, device, shape
// and strides. The second is of where the parameters lie in memory.
py::tuple gather(const py::list& groups) {
  py::list grads;
  Hash layout, memory;
  for (size_t g = 0; g < groups.size(); ++g) {
    const py::list params = groups[g];
    layout(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      PyObject* const p = PyList_GET_ITEM(params.ptr(), i);
      const at::Tensor& t = tensor_of(p, "params");
      const at::Tensor& grad = t.grad();
      layout(p);
      layout(static_cast<uint64_t>(t.scalar_type()) << 32 | static_cast<uint64_t>(t.device().type()) << 16 |
             static_cast<uint64_t>(t.device().index() + 1));
      layout(grad.defined() ? 1 + static_cast<uint64_t>(grad.scalar_type()) : 0);
      for (const int64_t size : t.sizes()) layout(size);
      for (const int64_t stride : t.strides()) layout(stride);
      if (t.has_storage()) {
        memory(t.storage().data());
        memory(t.storage_offset());
      }
      if (!grad.defined()) continue;
      TORCH_CHECK(grad.layout() == at::kStrided, "param_groups[", g, "]['params'][", i, "].grad: expected a dense ",
                  "gradient, got layout ", grad.layout(), "; sparse gradients are not supported");
      grads.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(grad)));
    }
  }
  return py::make_tuple(grads, layout.value(), memory.value());
}

// A hash of which objects a dictionary of dictionaries holds, as an optimizer's state is one.
uint64_t contents(const py::dict& state) {
  Hash hash;
  PyObject *key, *value, *name, *object;
  for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &value);) {
    hash(key);
    if (!PyDict_Check(value)) throw py::type_error("state: expected a dictionary for each parameter");
    for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &object);) {
      hash(name);
      hash(object);
    }
  }
  return hash.value();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sam_fused's compiled part. Importing it registers torch.ops.sam_fused, whose operators it has too.";
  m.def("grad_sq_norm", torch::wrap_pybind_function(grad_sq_norm), "params"_a, "grads"_a, "ascent"_a, "group_sizes"_a);
  m.def("sharpness_", torch::wrap_pybind_function(sam::sharpness_), "sq_norms"_a, "ascent"_a, "total"_a,
        "grad_scale"_a = py::none());
  m.def("perturb_", torch::wrap_pybind_function(perturb_), "params"_a, "grads"_a, "backups"_a, "grad_norm"_a,
        "ascent"_a, "group_sizes"_a, "record"_a = py::none(), "entry"_a = py::none());
  m.def("restore_", torch::wrap_pybind_function(restore_), "params"_a, "backups"_a);
  m.def("restore_step_", torch::wrap_pybind_function(restore_step_), "base"_a, "params"_a, "grads"_a, "backups"_a,
        "state"_a, "steps"_a, "hyper"_a, "group_sizes"_a, "lr"_a = py::none(), "grad_scale"_a = py::none(),
        "found_inf"_a = py::none(), "record"_a = py::none());
  m.def("gather", torch::wrap_pybind_function(gather));
  m.def("contents", contents);
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
