// The Python module: the operations on Python lists, without boxing, and what is no operator.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "adapter.h"
#include "backends.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

const at::Tensor& tensor_of(PyObject* object, const char* name) {
  if (!THPVariable_Check(object)) throw py::type_error(std::string(name) + ": expected a tensor");
  return THPVariable_Unpack(object);
}

// What Python passes: lists, whose tensors are borrowed. The operation runs without the GIL.
struct Python {
  using Running = py::gil_scoped_release;
};

}  // namespace

template <>
struct sam::Argument<Python, std::string_view> : PassedAs<const std::string&, std::string_view> {};
template <>
struct sam::Argument<Python, sam::Sizes> : PassedAs<const std::vector<int64_t>&, sam::Sizes> {};
template <>
struct sam::Argument<Python, const sam::Refs&> {
  using In = const py::list&;
  struct Held {
    Refs refs;
    Held(In list, const char* name) {
      refs.reserve(list.size());
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i)
        refs.push_back(&tensor_of(PyList_GET_ITEM(list.ptr(), i), name));
    }
    operator const Refs&() const { return refs; }
  };
};
template <>
struct sam::Argument<Python, const sam::OptionalRefs&> {
  using In = const py::list&;
  struct Held {
    OptionalRefs refs;
    Held(In list, const char* name) {
      refs.reserve(list.size());
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) {
        PyObject* const item = PyList_GET_ITEM(list.ptr(), i);
        refs.push_back(item == Py_None ? nullptr : &tensor_of(item, name));
      }
    }
    operator const OptionalRefs&() const { return refs; }
  };
};

namespace {

// Defines `name`, with the names and defaults of its arguments. Its keyword `hook` takes a function that is called at
// the moment that ops.h says. Python looks for interrupts between two bytecodes, so a hook without bytecode, such as a
// list's own method, cannot be parted from the operation by one.
template <auto op, class R, class... P, class... Args>
void define(py::module& m, const char* name, R (*)(const sam::Hook&, P...), const Args&... args) {
  const auto call = [names = std::array{args.name...}](typename sam::Argument<Python, P>::In... in,
                                                       const py::object& hook) {
    const sam::Hook with_gil = [&hook] {
      const py::gil_scoped_acquire gil;
      hook();
    };
    return sam::Call<Python, op>::with(hook.is_none() ? sam::Hook() : with_gil, names, in...);
  };
  m.def(name, torch::wrap_pybind_function(call), args..., "hook"_a = py::none());
}
template <auto op, class... Args>
void define(py::module& m, const char* name, const Args&... args) {
  define<op>(m, name, op, args...);
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

// How often each tensor of each list was changed in place, as autograd counts it.
std::vector<uint32_t> versions(const py::list& lists) {
  std::vector<uint32_t> out;
  for (const py::handle list : lists)
    for (const py::handle t : list) out.push_back(tensor_of(t.ptr(), "tensors")._version());
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sam_fused's compiled part. Importing it registers torch.ops.sam_fused, whose operators it has too.";
  const auto none = [](const char* name) { return py::arg(name) = py::none(); };
  define<sam::grad_sq_norm>(m, "grad_sq_norm", "params"_a, "grads"_a, "ascent"_a, "run_sizes"_a);
  define<sam::sharpness_>(m, "sharpness_", "sq_norms"_a, "ascent"_a, none("total"), none("grad_scale"));
  define<sam::perturb_>(m, "perturb_", "params"_a, "grads"_a, "backups"_a, "grad_norm"_a, "ascent"_a, "run_sizes"_a);
  define<sam::perturb_from_>(m, "perturb_from_", "params"_a, "directions"_a, "saved"_a, "norm"_a, "ascent"_a,
                             "run_sizes"_a);
  define<sam::restore_>(m, "restore_", "params"_a, "backups"_a);
  define<sam::restore_step_>(m, "restore_step_", "base"_a, "params"_a, "grads"_a, "backups"_a, "state"_a, "steps"_a,
                             "hyper"_a, "run_sizes"_a, "lr"_a, none("grad_scale"), none("found_inf"));
  define<sam::step_along_>(m, "step_along_", "base"_a, "params"_a, "grads"_a, "state"_a, "steps"_a, "hyper"_a,
                           "ascent"_a, "moment"_a, "run_sizes"_a, "lr"_a, none("grad_scale"), none("found_inf"));
  m.def("gather", torch::wrap_pybind_function(gather));
  m.def("contents", contents);
  m.def("versions", torch::wrap_pybind_function(versions));
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
