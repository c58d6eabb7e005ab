#include "tensor_watch.h"

#include <stdexcept>
#include <unordered_map>

namespace adamw_kernels {
namespace {

// An owned reference that is dropped at the end of the scope.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  ~Ref() { Py_XDECREF(object_); }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

uint32_t dtype_key(const dlpack::Tensor& tensor) {
  return tensor.dtype.code | static_cast<uint32_t>(tensor.dtype.bits) << 8;
}

void* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// Is `object` the live target of `weakref`?
bool is_target(PyObject* weakref, PyObject* object) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* target = nullptr;
  if (PyWeakref_GetRef(weakref, &target) < 0) PyErr_Clear();
  const bool same = target == object;
  Py_XDECREF(target);
  return same;
#else
  return PyWeakref_GetObject(weakref) == object;
#endif
}

// Empty tensors have no address, yet a gradient of no elements is a gradient: any non-zero number stands for it.
constexpr int64_t kEmptyGradient = 16;

}  // namespace

bool TensorWatch::read(PyObject* tensor, dlpack::Tensor* out) const {
  if (api_->tensor_from_py_object(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

TensorWatch::Seen TensorWatch::see(PyObject* tensor, const dlpack::Tensor& view) const {
  Seen seen;
  seen.weakref = PyWeakref_NewRef(tensor, nullptr);
  if (seen.weakref == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument("a tensor that cannot be weakly referenced");
  }
  seen.data = address(view);
  seen.dtype = dtype_key(view);
  return seen;
}

TensorWatch::TensorWatch(PyObject* exchange_capsule, PyObject* tensor_type, PyObject* param_groups, PyObject* state,
                         const std::vector<int64_t>& slots, const std::vector<int64_t>& grad_dtypes)
    : tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type)),
      str_grad_(PyUnicode_InternFromString("grad")),
      str_params_(PyUnicode_InternFromString("params")),
      str_is_neg_(PyUnicode_InternFromString("is_neg")),
      str_state_{PyUnicode_InternFromString("step"), PyUnicode_InternFromString("exp_avg"),
                 PyUnicode_InternFromString("exp_avg_sq"), PyUnicode_InternFromString("max_exp_avg_sq")} {
  api_ = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_capsule, dlpack::kCapsuleName));
  if (api_ == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument("not a DLPack exchange capsule");
  }
  if (api_->header.version.major != dlpack::kMajorVersion || api_->tensor_from_py_object == nullptr) {
    throw std::invalid_argument("this DLPack exchange API cannot be read: version " +
                                std::to_string(api_->header.version.major));
  }

  std::unordered_map<PyObject*, const Param*> by_object;
  params_.reserve(slots.size());  // by_object points into it
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups, g), str_params_);
    if (params == nullptr || !PyList_Check(params)) throw std::invalid_argument("group['params'] must be a list");
    group_sizes_.push_back(PyList_GET_SIZE(params));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* object = PyList_GET_ITEM(params, i);
      if (params_.size() == slots.size()) throw std::invalid_argument("more parameters than slots");
      Param param;
      param.object = object;
      param.slot = slots[params_.size()];
      param.grad_dtype = static_cast<uint32_t>(grad_dtypes[params_.size()]);
      dlpack::Tensor view = {};
      if (param.slot > 0) {
        if (!read(object, &view)) throw std::invalid_argument("a parameter that DLPack cannot describe");
        param.data = address(view);
        param.dtype = dtype_key(view);
        param.device = view.device;
        param.shape.assign(view.shape, view.shape + view.ndim);
        param.strides.assign(view.strides, view.strides + view.ndim);
        param.numel = 1;
        for (int64_t size : param.shape) param.numel *= size;
      }
      params_.push_back(std::move(param));
      by_object[object] = &params_.back();
    }
  }

  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    StateEntry entry;
    entry.key = key;
    const auto found = by_object.find(key);
    if (found != by_object.end() && found->second->slot != 0 && PyDict_Check(value)) {
      entry.readable = found->second->slot > 0;
      for (int k = 0; k < 4; ++k) {
        PyObject* tensor = PyDict_GetItem(value, str_state_[k]);
        if (tensor == nullptr) continue;
        dlpack::Tensor view = {};
        if (entry.readable && !read(tensor, &view)) throw std::invalid_argument("a state that DLPack cannot describe");
        entry.tensors[k] = see(tensor, view);
      }
    }
    state_.push_back(entry);
  }
}

TensorWatch::~TensorWatch() {
  for (StateEntry& entry : state_) {
    for (Seen& seen : entry.tensors) Py_XDECREF(seen.weakref);
  }
  Py_DECREF(str_grad_);
  Py_DECREF(str_params_);
  Py_DECREF(str_is_neg_);
  for (PyObject* name : str_state_) Py_DECREF(name);
}

bool TensorWatch::unchanged(const Seen& seen, PyObject* tensor, bool readable) const {
  if (!is_target(seen.weakref, tensor)) return false;
  if (!readable) return true;
  dlpack::Tensor view;
  return read(tensor, &view) && address(view) == seen.data && dtype_key(view) == seen.dtype;
}

bool TensorWatch::params_unchanged(PyObject* param_groups, PyObject* params, PyObject* grads, PyObject* odd) const {
  if (!PyList_Check(param_groups) || PyList_GET_SIZE(param_groups) != static_cast<Py_ssize_t>(group_sizes_.size())) {
    return false;
  }
  size_t index = 0;
  for (size_t g = 0; g < group_sizes_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, str_params_) : nullptr;
    if (list == nullptr || !PyList_Check(list) || PyList_GET_SIZE(list) != group_sizes_[g]) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i, ++index) {
      if (PyList_GET_SIZE(list) != group_sizes_[g]) return false;  // reading .grad may run anybody's code
      const Param& param = params_[index];
      PyObject* object = PyList_GET_ITEM(list, i);
      if (object != param.object) return false;
      const Ref grad(PyObject_GetAttr(object, str_grad_));
      if (!grad) return false;
      if (param.slot == 0) {
        if (grad.get() != Py_None) return false;  // its first gradient: it needs a row
        continue;
      }
      auto* slot = reinterpret_cast<int64_t*>(param.slot);
      if (grad.get() == Py_None) {
        if (param.slot > 0) *slot = 0;
        // Its address may change while it has no gradient: compared when the next one comes.
        if (param.slot < 0) {
          const Ref position(PyLong_FromSsize_t(-1 - static_cast<Py_ssize_t>(index)));
          if (!position || PyList_Append(odd, position.get()) < 0) return false;
        }
        continue;
      }
      bool needs_python = param.slot < 0 || Py_TYPE(grad.get()) != tensor_type_;
      if (param.slot > 0) {
        dlpack::Tensor view, grad_view;
        if (!read(object, &view) || address(view) != param.data || dtype_key(view) != param.dtype ||
            view.ndim != static_cast<int32_t>(param.shape.size())) {
          return false;
        }
        for (int32_t d = 0; d < view.ndim; ++d) {
          if (view.shape[d] != param.shape[d] || view.strides[d] != param.strides[d]) return false;
        }
        if (!needs_python) {
          if (!read(grad.get(), &grad_view) || dtype_key(grad_view) != param.grad_dtype ||
              grad_view.device.type != param.device.type || grad_view.device.id != param.device.id ||
              grad_view.ndim != view.ndim) {
            return false;
          }
          for (int32_t d = 0; d < view.ndim; ++d) {
            if (grad_view.shape[d] != view.shape[d]) return false;
            needs_python |= grad_view.strides[d] != view.strides[d] && view.shape[d] != 1;
          }
          needs_python &= param.numel != 0;  // strides of nothing do not matter
          if (param.numel == 1 && !needs_python) {
            // A lazily negated view is dense only when it has one element (the imaginary part of a scalar).
            const Ref negated(PyObject_CallMethodNoArgs(grad.get(), str_is_neg_));
            if (!negated) return false;
            needs_python = negated.get() == Py_True;
          }
          *slot = param.numel == 0 ? kEmptyGradient : reinterpret_cast<int64_t>(address(grad_view));
        }
      }
      if (PyList_Append(params, object) < 0 || PyList_Append(grads, grad.get()) < 0) return false;
      if (needs_python) {
        const Ref position(PyLong_FromSize_t(index));
        if (!position || PyList_Append(odd, position.get()) < 0) return false;
      }
    }
  }
  return true;
}

bool TensorWatch::state_unchanged(PyObject* state) const {
  if (!PyDict_Check(state) || PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(state_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t index = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    const StateEntry& entry = state_[index++];
    if (key != entry.key) return false;
    for (int k = 0; k < 4; ++k) {
      if (entry.tensors[k].weakref == nullptr) continue;
      PyObject* tensor = PyDict_Check(value) ? PyDict_GetItem(value, str_state_[k]) : nullptr;
      if (tensor == nullptr || !unchanged(entry.tensors[k], tensor, entry.readable)) return false;
    }
  }
  return true;
}

PyObject* TensorWatch::sweep(PyObject* param_groups, PyObject* state) {
  Ref params(PyList_New(0)), grads(PyList_New(0)), odd(PyList_New(0));
  if (!params || !grads || !odd) return nullptr;
  if (!state_unchanged(state) || !params_unchanged(param_groups, params.get(), grads.get(), odd.get())) {
    PyErr_Clear();  // whatever is wrong, building the table anew finds it and names the parameter
    Py_RETURN_NONE;
  }
  return PyTuple_Pack(3, params.get(), grads.get(), odd.get());
}

}  // namespace adamw_kernels
