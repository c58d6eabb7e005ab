#include "tensor_watch.h"

#include <structmember.h>

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
  return PyWeakref_GET_OBJECT(weakref) == object;
#endif
}

// A step over thousands of tensors touches more objects than a cache holds. What a tensor object's first field points
// at (its implementation) is fetched ahead; the address is a hint and never dereferenced.
const void* first_field(PyObject* tensor) { return reinterpret_cast<void**>(tensor)[sizeof(PyObject) / sizeof(void*)]; }

void prefetch(const PyObject* object, const void* hint) {
  __builtin_prefetch(object);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(static_cast<const char*>(hint) + 64 * line);
}

constexpr size_t kAhead = 8;

bool is_state_name(PyObject* name) {
  if (!PyUnicode_Check(name)) return false;
  for (const char* own :
       {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_ema", "param_remainder", "param_remainder_8bit",
        "exp_avg_code", "exp_avg_sq_code", "moment_groups", "exp_avg_sq_scale", "momentum_buffer"}) {
    if (PyUnicode_CompareWithASCIIString(name, own) == 0) return true;
  }
  return false;
}

// Empty tensors have no address, yet a gradient of no elements is a gradient: any non-zero number stands for it.
constexpr int64_t kEmptyGradient = 16;

}  // namespace

bool TensorWatch::read(PyObject* tensor, dlpack::Tensor* out) const {
  if (api_->tensor_from_py_object(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

// A DTensor's shard, whose attribute costs 0.02 us where to_local() costs 1.2; any other tensor itself. A new
// reference; nullptr with no Python error set where the shard is not a plain tensor (a collective still under way).
// That a tensor is none is remembered and not asked: an AttributeError takes longer than all the rest of a tensor.
PyObject* TensorWatch::local_of(PyObject* tensor, bool is_sharded) const {
  if (!is_sharded) return Py_NewRef(tensor);
  PyObject* local = slot_of(tensor, local_slot_, str_local_tensor_);
  if (local != nullptr && Py_TYPE(local) != tensor_type_) Py_CLEAR(local);
  return local;
}

// How a DTensor is sharded. A new reference, nullptr with no Python error set where it does not say.
PyObject* TensorWatch::spec_of(PyObject* tensor) const { return slot_of(tensor, spec_slot_, str_spec_); }

// An attribute of a DTensor: read where its type keeps it, without the interpreter's look-ups, or by name.
PyObject* TensorWatch::slot_of(PyObject* tensor, PyMemberDef* slot, PyObject* name) const {
  const bool is_known = slot != nullptr && Py_TYPE(tensor) == dtensor_type_;
  PyObject* value = is_known ? PyMember_GetOne(reinterpret_cast<char*>(tensor), slot) : PyObject_GetAttr(tensor, name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

void TensorWatch::learn(PyTypeObject* dtensor_type) {
  if (dtensor_type_ != nullptr) return;
  dtensor_type_ = dtensor_type;  // which outlives us, like every class of torch
  const auto slot = [&](PyObject* name) -> PyMemberDef* {
    const Ref descriptor(PyObject_GetAttr(reinterpret_cast<PyObject*>(dtensor_type), name));
    if (!descriptor) PyErr_Clear();
    if (!descriptor || Py_TYPE(descriptor.get()) != &PyMemberDescr_Type) return nullptr;
    return reinterpret_cast<PyMemberDescrObject*>(descriptor.get())->d_member;
  };
  local_slot_ = slot(str_local_tensor_);
  spec_slot_ = slot(str_spec_);
}

// The address of a tensor's memory, a DTensor's own shard; nullptr with no Python error set where it cannot be read.
void* TensorWatch::data_of(PyObject* tensor, bool is_sharded) const {
  const Ref local(local_of(tensor, is_sharded));
  if (!local) return nullptr;
  if (address_function_ == nullptr) return data_by_method(local.get());
  try {
    return address_function_(local.get());
  } catch (...) {  // a tensor without memory that can be written
    return nullptr;
  }
}

void* TensorWatch::data_by_method(PyObject* tensor) const {
  const Ref number(data_ptr_(tensor, nullptr));
  void* data = number ? PyLong_AsVoidPtr(number.get()) : nullptr;
  if (data == nullptr) PyErr_Clear();
  return data;
}

// A new reference; nullptr with a Python error set where it cannot be read.
PyObject* TensorWatch::grad_of(const Param& param, PyObject* object) const {
  if (!param.plain_grad) return PyObject_GetAttr(object, str_grad_);
  const PyGetSetDef& property = *reinterpret_cast<PyGetSetDescrObject*>(grad_descriptor_)->d_getset;
  return property.get(object, property.closure);
}

// Whether a DTensor's gradient lies on the same mesh in the same placements. Backward, under FSDP2 for one, gives every
// gradient the parameter's own spec, or the spec of the step before: only others are compared.
bool TensorWatch::is_sharded_alike(Param* param, PyObject* grad) const {
  const Ref spec(spec_of(grad));
  if (!spec) return false;
  if (spec.get() == param->spec || spec.get() == param->grad_spec) return true;
  for (PyObject* name : {str_mesh_, str_placements_}) {
    const Ref own(PyObject_GetAttr(param->spec, name)), other(PyObject_GetAttr(spec.get(), name));
    if (!own || !other || PyObject_RichCompareBool(own.get(), other.get(), Py_EQ) != 1) {
      PyErr_Clear();
      return false;
    }
  }
  Py_XSETREF(param->grad_spec, Py_NewRef(spec.get()));
  return true;
}

TensorWatch::TensorWatch(PyObject* exchange_capsule, PyObject* tensor_type, PyObject* param_groups, PyObject* state,
                         const std::vector<int64_t>& slots, const std::vector<int64_t>& grad_dtypes,
                         int64_t address_function)
    : tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type)),
      address_function_(reinterpret_cast<void* (*)(PyObject*)>(address_function)),
      str_grad_(PyUnicode_InternFromString("grad")),
      str_params_(PyUnicode_InternFromString("params")),
      str_is_neg_(PyUnicode_InternFromString("is_neg")),
      str_local_tensor_(PyUnicode_InternFromString("_local_tensor")),
      str_spec_(PyUnicode_InternFromString("_spec")),
      str_mesh_(PyUnicode_InternFromString("mesh")),
      str_placements_(PyUnicode_InternFromString("placements")) {
  try {
    check(exchange_capsule, slots, grad_dtypes);
    snapshot(param_groups, state, slots, grad_dtypes);
  } catch (...) {
    release();  // a destructor does not run for an object that was never finished
    throw;
  }
}

void TensorWatch::check(PyObject* exchange_capsule, const std::vector<int64_t>& slots,
                        const std::vector<int64_t>& grad_dtypes) {
  if (slots.size() != grad_dtypes.size()) throw std::invalid_argument("as many grad_dtypes as slots are needed");
  api_ = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_capsule, dlpack::kCapsuleName));
  if (api_ == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument("not a DLPack exchange capsule");
  }
  if (api_->header.version.major != dlpack::kMajorVersion || api_->tensor_from_py_object == nullptr) {
    throw std::invalid_argument("this DLPack exchange API cannot be read: version " +
                                std::to_string(api_->header.version.major));
  }

  const Ref descriptor(PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor_type_), "data_ptr"));
  if (!descriptor || Py_TYPE(descriptor.get()) != &PyMethodDescr_Type) {
    PyErr_Clear();
    throw std::invalid_argument("Tensor.data_ptr is not a native method");
  }
  const PyMethodDef& method = *reinterpret_cast<PyMethodDescrObject*>(descriptor.get())->d_method;
  if (method.ml_flags != METH_NOARGS) throw std::invalid_argument("Tensor.data_ptr takes arguments");
  data_ptr_ = method.ml_meth;
  grad_descriptor_ = PyObject_GetAttr(reinterpret_cast<PyObject*>(tensor_type_), str_grad_);
  if (grad_descriptor_ == nullptr || Py_TYPE(grad_descriptor_) != &PyGetSetDescr_Type) {
    PyErr_Clear();
    throw std::invalid_argument("Tensor.grad is not a native property");
  }
}

void TensorWatch::snapshot(PyObject* param_groups, PyObject* state, const std::vector<int64_t>& slots,
                           const std::vector<int64_t>& grad_dtypes) {
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
      if (PyObject_TypeCheck(object, tensor_type_)) param.hint = first_field(object);
      const Ref own_descriptor(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object)), str_grad_));
      if (!own_descriptor) PyErr_Clear();
      param.plain_grad = own_descriptor.get() == grad_descriptor_;
      param.slot = slots[params_.size()];
      param.grad_dtype = static_cast<uint32_t>(grad_dtypes[params_.size()]);
      dlpack::Tensor view = {};
      if (param.slot > 0) {
        const bool is_sharded = PyObject_HasAttr(object, str_local_tensor_) != 0;
        const Ref local(local_of(object, is_sharded));
        if (!local || !read(local.get(), &view)) {
          throw std::invalid_argument("a parameter that DLPack cannot describe");
        }
        param.data = address(view);
        param.dtype = dtype_key(view);
        param.device = view.device;
        param.ndim = view.ndim;
        param.layout = layouts_.size();
        layouts_.insert(layouts_.end(), view.shape, view.shape + view.ndim);
        layouts_.insert(layouts_.end(), view.strides, view.strides + view.ndim);
        param.numel = 1;
        for (int32_t d = 0; d < view.ndim; ++d) param.numel *= view.shape[d];
        if (is_sharded) {
          learn(Py_TYPE(object));
          param.spec = spec_of(object);
          if (param.spec == nullptr) throw std::invalid_argument("a DTensor without a spec");
        }
      }
      params_.push_back(param);
      by_object[object] = &params_.back();
    }
  }

  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    StateEntry entry;
    entry.key = key;
    entry.begin = state_items_.size();
    const auto found = by_object.find(key);
    entry.watched = found != by_object.end() && found->second->slot != 0 && PyDict_Check(value);
    PyObject *name, *item;
    Py_ssize_t item_position = 0;
    while (entry.watched && PyDict_Next(value, &item_position, &name, &item)) {
      // None or a number under one of our names: not in use, or the table could not have been built.
      if (!is_state_name(name) || !PyObject_TypeCheck(item, tensor_type_)) continue;
      StateItem seen;
      seen.is_sharded = Py_TYPE(item) != tensor_type_ && PyObject_HasAttr(item, str_local_tensor_) != 0;
      if (found->second->slot > 0) {
        const Ref local(local_of(item, seen.is_sharded));
        if (local) seen.data = data_by_method(local.get());
        if (data_of(item, seen.is_sharded) != seen.data) address_function_ = nullptr;
      }
      seen.weakref = PyWeakref_NewRef(item, nullptr);
      if (seen.weakref == nullptr) {
        PyErr_Clear();
        throw std::invalid_argument("a state that cannot be weakly referenced");
      }
      seen.key = Py_NewRef(name);
      seen.object = item;
      seen.hint = first_field(item);
      state_items_.push_back(seen);
    }
    entry.end = state_items_.size();
    state_.push_back(entry);
  }
}

TensorWatch::~TensorWatch() { release(); }

void TensorWatch::release() {
  for (StateItem& seen : state_items_) {
    Py_DECREF(seen.key);
    Py_DECREF(seen.weakref);
  }
  for (Param& param : params_) {
    Py_XDECREF(param.spec);
    Py_XDECREF(param.grad_spec);
  }
  for (PyObject* name :
       {str_grad_, str_params_, str_is_neg_, str_local_tensor_, str_spec_, str_mesh_, str_placements_}) {
    Py_DECREF(name);
  }
  Py_XDECREF(grad_descriptor_);
}

bool TensorWatch::params_unchanged(PyObject* param_groups, PyObject* params, PyObject* grads, PyObject* odd) {
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
      Param& param = params_[index];
      if (index + kAhead < params_.size()) prefetch(params_[index + kAhead].object, params_[index + kAhead].hint);
      const Ref held(Py_NewRef(PyList_GET_ITEM(list, i)));  // for the same reason
      PyObject* object = held.get();
      if (object != param.object) return false;
      const Ref grad(grad_of(param, object));
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
      bool needs_python = param.slot < 0;
      if (param.slot > 0) {
        dlpack::Tensor view, grad_view;
        const Ref local(local_of(object, param.spec != nullptr));
        if (!local || !read(local.get(), &view) || address(view) != param.data || dtype_key(view) != param.dtype ||
            view.ndim != param.ndim) {
          return false;
        }
        if (param.spec != nullptr) {
          const Ref spec(spec_of(object));
          if (spec.get() != param.spec) return false;
          needs_python = Py_TYPE(grad.get()) != Py_TYPE(object) || !is_sharded_alike(&param, grad.get());
        } else {
          needs_python = Py_TYPE(grad.get()) != tensor_type_;
        }
        const int64_t* shape = layouts_.data() + param.layout;
        const int64_t* strides = shape + param.ndim;
        for (int32_t d = 0; d < view.ndim; ++d) {
          if (view.shape[d] != shape[d] || view.strides[d] != strides[d]) return false;
        }
        const Ref local_grad(needs_python ? nullptr : local_of(grad.get(), param.spec != nullptr));
        needs_python |= !local_grad;
        if (!needs_python) {
          if (!read(local_grad.get(), &grad_view) || dtype_key(grad_view) != param.grad_dtype ||
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
            const Ref negated(PyObject_CallMethodNoArgs(local_grad.get(), str_is_neg_));
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
    if (!entry.watched) continue;
    if (!PyDict_Check(value)) return false;
    // Ours come first and in one order, as a rule: walking along is faster than looking names up.
    PyObject *name = nullptr, *item = nullptr;
    Py_ssize_t item_position = 0;
    for (size_t k = entry.begin; k < entry.end; ++k) {
      const StateItem& seen = state_items_[k];
      if (k + 2 * kAhead < state_items_.size()) {
        prefetch(state_items_[k + 2 * kAhead].object, state_items_[k + 2 * kAhead].hint);
      }
      if (!PyDict_Next(value, &item_position, &name, &item) || name != seen.key) item = PyDict_GetItem(value, seen.key);
      if (item == nullptr || !is_target(seen.weakref, item)) return false;
      if (seen.data != nullptr && data_of(item, seen.is_sharded) != seen.data) return false;
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
