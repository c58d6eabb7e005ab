// What a TensorWatch remembers: see tensor_watch.h.
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>

#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "tensor_watch.h"

namespace adamw_kernels {

using c10::DispatchKey;

TensorWatch::TensorWatch(PyObject* param_groups, PyObject* state, PyObject* state_keys,
                         const std::vector<int64_t>& slots, const std::vector<PyObject*>& grad_dtypes,
                         int64_t params_per_thread)
    : params_per_thread_(params_per_thread) {
  try {
    if (slots.size() != grad_dtypes.size()) throw std::invalid_argument("as many grad_dtypes as slots are needed");
    grad_descriptor_ = PyObject_GetAttr(THPVariableClass, str_grad_.get());
    if (grad_descriptor_ == nullptr) throw py::error_already_set();
    snapshot_params(param_groups, slots, grad_dtypes);
    guard_state(state);  // first: what is written while it is looked through counts as written
    snapshot_state(state, state_keys);
  } catch (...) {
    drop();  // a destructor does not run for an object that was never finished
    throw;
  }
}

void TensorWatch::snapshot_params(PyObject* param_groups, const std::vector<int64_t>& slots,
                                  const std::vector<PyObject*>& grad_dtypes) {
  params_.reserve(slots.size());
  Layouts known;
  std::unordered_set<PyObject*> seen;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups, g), str_params_.get());
    if (params == nullptr || !PyList_Check(params)) throw std::invalid_argument("group['params'] must be a list");
    groups_.push_back({params_.size(), static_cast<size_t>(PyList_GET_SIZE(params))});
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* object = PyList_GET_ITEM(params, i);
      if (params_.size() == slots.size()) throw std::invalid_argument("more parameters than slots");
      if (!THPVariable_Check(object)) throw std::invalid_argument("a parameter that is no tensor");
      const int64_t slot = slots[params_.size()];
      PyObject* grad_dtype = grad_dtypes[params_.size()];
      Param& param = params_.emplace_back();
      param.object = object;
      param.has_row = slot != 0;
      const Ref own_descriptor(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object)), str_grad_.get()));
      if (!own_descriptor) PyErr_Clear();
      param.plain_grad = own_descriptor.get() == grad_descriptor_;
      has_properties_ = has_properties_ || !param.plain_grad;
      // One that is listed twice is left to one thread, which counts its references.
      param.reads_suffice = param.plain_grad && slot >= 0 && seen.insert(object).second;
      param.autograd = impl_of(object)->autograd_meta();
      if (slot <= 0) continue;
      if (!THPDtype_Check(grad_dtype)) throw std::invalid_argument("a gradient's dtype is none");
      param.slot = reinterpret_cast<int64_t*>(slot);
      param.grad_dtype = c10::scalarTypeToTypeMeta(reinterpret_cast<THPDtype*>(grad_dtype)->scalar_type);
      param.grad_itemsize = static_cast<uint8_t>(param.grad_dtype.itemsize());
      snapshot_memory(&param, &known);
      param.reads_suffice = param.reads_suffice && !param.keys.has(DispatchKey::Python);
    }
  }
  if (params_.size() != slots.size()) throw std::invalid_argument("fewer parameters than slots");
}

void TensorWatch::snapshot_memory(Param* param, Layouts* known) {
  if (dtensors_.is_sharded(param->object)) {
    dtensors_.learn(Py_TYPE(param->object));
    param->sharding = std::make_unique<Sharding>();
    param->sharding->spec = dtensors_.spec_of(param->object);
    if (param->sharding->spec == nullptr) throw std::invalid_argument("a DTensor without a spec");
  }
  const Ref local(param->sharding ? dtensors_.local_of(param->object) : Py_NewRef(param->object));
  if (!local) throw std::invalid_argument("a DTensor whose shard is no plain tensor");
  const c10::TensorImpl* impl = impl_of(local.get());
  if (impl->layout() != c10::kStrided || !impl->has_storage()) throw std::invalid_argument("a tensor without memory");
  if (param->sharding) {
    param->sharding->wrapper = impl_of(param->object);
    param->sharding->local = local.get();
  }
  param->impl = impl;
  param->storage = storage_of(impl);
  param->place = place_of(impl);
  param->keys = impl->key_set();
  param->dtype = impl->dtype();
  param->device = impl->device();
  param->is_empty = impl->numel() == 0;
  param->ndim = static_cast<uint16_t>(impl->dim());
  param->layout = layout_of(impl, known);
}

// Tensors with the same sizes and strides share them.
uint32_t TensorWatch::layout_of(const c10::TensorImpl* impl, Layouts* known) {
  std::vector<int64_t> layout(impl->sizes().begin(), impl->sizes().end());
  layout.insert(layout.end(), impl->strides().begin(), impl->strides().end());
  const auto [found, is_new] = known->try_emplace(layout, static_cast<uint32_t>(layouts_.size()));
  if (is_new) layouts_.insert(layouts_.end(), layout.begin(), layout.end());
  return found->second;
}

void TensorWatch::guard_state(PyObject* state) {
  guard_.clear();
  guard_.add(state);
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    if (PyDict_Check(value)) guard_.add(value);
  }
  guarded_ = state;
}

void TensorWatch::snapshot_state(PyObject* state, PyObject* state_keys) {
  std::unordered_map<PyObject*, const Param*> by_object;
  for (const Param& param : params_) by_object[param.object] = &param;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    StateEntry entry;
    entry.key = key;
    entry.begin = state_items_.size();
    const auto found = by_object.find(key);
    entry.watched = found != by_object.end() && found->second->has_row && PyDict_Check(value);
    PyObject *name, *item;
    Py_ssize_t item_position = 0;
    while (entry.watched && PyDict_Next(value, &item_position, &name, &item)) {
      // None or a number under one of our names: not in use, or the table could not have been built.
      if (PySequence_Contains(state_keys, name) != 1 || !THPVariable_Check(item)) continue;
      const bool is_sharded = !THPVariable_CheckExact(item) && dtensors_.is_sharded(item);
      const Ref local(is_sharded ? dtensors_.local_of(item) : Py_NewRef(item));
      if (!local) throw std::invalid_argument("a state whose shard is no plain tensor");
      const c10::TensorImpl* impl = impl_of(local.get());
      const bool is_readable = found->second->slot != nullptr;
      state_items_.push_back({WeakTensor(THPVariable_Unpack(item).getIntrusivePtr()), item,
                              is_readable ? place_of(impl) : Place{}, is_readable ? impl->numel() : 0, impl,
                              impl->has_storage() ? storage_of(impl) : nullptr, impl->dtype(), is_sharded,
                              is_readable});
      if (is_sharded) {
        state_locals_.resize(state_items_.size());
        state_locals_.back() = local.get();
      }
      state_names_.push_back(Py_NewRef(name));
    }
    entry.end = state_items_.size();
    state_.push_back(entry);
  }
}

TensorWatch::~TensorWatch() { drop(); }

void TensorWatch::drop() {
  release();
  for (PyObject* name : state_names_) Py_DECREF(name);
  for (Param& param : params_) {
    if (!param.sharding) continue;
    Py_XDECREF(param.sharding->spec);
    Py_XDECREF(param.sharding->grad_spec);
  }
  Py_XDECREF(grad_descriptor_);
}

}  // namespace adamw_kernels
