// See tensor_watch.h.
#include "tensor_watch.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>

#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace adamw_kernels {

using c10::DispatchKey;
using c10::DispatchKeySet;

namespace {

constexpr size_t kAhead = 8;

// Empty tensors have no address, yet a gradient of no elements is a gradient: any non-zero number stands for it.
constexpr int64_t kEmptyGradient = 16;

// A loop, where std::equal calls memcmp for one or two numbers.
bool are_equal(const int64_t* a, const int64_t* b, size_t count) {
  for (size_t k = 0; k < count; ++k) {
    if (a[k] != b[k]) return false;
  }
  return true;
}

}  // namespace

// --- what is remembered ----------------------------------------------------------------------------------------------

TensorWatch::TensorWatch(PyObject* param_groups, PyObject* state, PyObject* state_keys,
                         const std::vector<int64_t>& slots, const std::vector<PyObject*>& grad_dtypes) {
  try {
    if (slots.size() != grad_dtypes.size()) throw std::invalid_argument("as many grad_dtypes as slots are needed");
    grad_descriptor_ = PyObject_GetAttr(THPVariableClass, str_grad_.get());
    if (grad_descriptor_ == nullptr) throw py::error_already_set();
    snapshot_params(param_groups, slots, grad_dtypes);
    guard_state(state);  // first: what is written while it is looked through counts as written
    snapshot_state(state, state_keys);
    held_params_.reserve(params_.size());
    held_shards_.reserve(params_.size());
    held_grads_.reserve(params_.size());
  } catch (...) {
    drop();  // a destructor does not run for an object that was never finished
    throw;
  }
}

void TensorWatch::snapshot_params(PyObject* param_groups, const std::vector<int64_t>& slots,
                                  const std::vector<PyObject*>& grad_dtypes) {
  params_.reserve(slots.size());
  Layouts known;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups, g), str_params_.get());
    if (params == nullptr || !PyList_Check(params)) throw std::invalid_argument("group['params'] must be a list");
    group_sizes_.push_back(PyList_GET_SIZE(params));
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
      if (slot <= 0) continue;
      if (!THPDtype_Check(grad_dtype)) throw std::invalid_argument("a gradient's dtype is none");
      param.slot = reinterpret_cast<int64_t*>(slot);
      param.grad_dtype = c10::scalarTypeToTypeMeta(reinterpret_cast<THPDtype*>(grad_dtype)->scalar_type);
      param.grad_itemsize = static_cast<uint8_t>(param.grad_dtype.itemsize());
      snapshot_memory(&param, &known);
      param.is_plain = param.plain_grad && param.sharding == nullptr;
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
  const c10::TensorImpl* wrapper = impl_of(param->object);
  if (param->sharding) {
    param->sharding->wrapper = wrapper;
    param->sharding->local = local.get();
  }
  param->impl = impl;
  param->storage = storage_of(impl);
  param->autograd = wrapper->autograd_meta();
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

// Until release(): what bump_versions() writes.
void TensorWatch::hold(PyObject* param) {
  const c10::TensorImpl* impl = impl_of(param);
  held_params_.push_back({Py_NewRef(param), impl, version_hint(impl)});
}

void TensorWatch::release() {
  // What they refer to may be freed here, which may run anybody's code, and even come here again.
  while (!held_params_.empty()) {
    PyObject* param = held_params_.back().param;
    held_params_.pop_back();
    if (held_params_.size() > kAhead) prefetch((held_params_.end() - kAhead)->param);
    Py_DECREF(param);
  }
  while (!held_shards_.empty()) {
    PyObject* shard = held_shards_.back();
    held_shards_.pop_back();
    Py_DECREF(shard);
  }
  while (!held_grads_.empty()) {
    const at::Tensor grad = std::move(held_grads_.back());
    held_grads_.pop_back();
    if (held_grads_.size() > kAhead) prefetch((held_grads_.end() - kAhead)->unsafeGetTensorImpl());
  }
}

// --- what is compared ------------------------------------------------------------------------------------------------

// A parameter's .grad, undefined where there is none; nullptr where it cannot be read or is no tensor. What a property
// of that name answers is kept in `read`. No other is copied: where only Python holds a tensor, that costs more than
// all the rest, since torch then counts the reference there.
const at::Tensor* TensorWatch::find_grad(PyObject* name, const Param& param, PyObject* object, at::Tensor* read) {
  if (param.plain_grad) return &grad_of(impl_of(object));
  const Ref value(PyObject_GetAttr(object, name));
  if (!value || (value.get() != Py_None && !THPVariable_Check(value.get()))) return nullptr;
  if (value.get() != Py_None) *read = THPVariable_Unpack(value.get());
  return read;
}

void TensorWatch::prefetch_param(const Param& param) {
  prefetch(param.object);
  prefetch(param.impl, sizeof(c10::TensorImpl));
  prefetch_storage(param.storage);
  prefetch(param.autograd, 64);
  prefetch(param.grad_impl, sizeof(c10::TensorImpl));
  prefetch_storage(param.grad_storage);
  if (param.sharding == nullptr) return;
  const Sharding& sharding = *param.sharding;
  for (const void* line :
       {sharding.wrapper, sharding.local, sharding.grad_object, sharding.grad_wrapper, sharding.grad_local}) {
    prefetch(line);
  }
}

// Whether a DTensor's gradient lies on the same mesh in the same placements. Backward, under FSDP2 for one, gives every
// gradient the parameter's own spec, or the spec of the step before: only others are compared.
bool TensorWatch::is_sharded_alike(Sharding* sharding, PyObject* grad) const {
  const Ref spec(dtensors_.spec_of(grad));
  if (!spec) return false;
  if (spec.get() == sharding->spec || spec.get() == sharding->grad_spec) return true;
  if (!dtensors_.are_alike(sharding->spec, spec.get())) return false;
  Py_XSETREF(sharding->grad_spec, Py_NewRef(spec.get()));
  return true;
}

bool TensorWatch::has_sizes(const Param& param, const c10::TensorImpl* tensor) const {
  const c10::IntArrayRef sizes = tensor->sizes();
  return sizes.size() == param.ndim && are_equal(sizes.data(), layouts_.data() + param.layout, param.ndim);
}

// Of a tensor that has as many dimensions.
bool TensorWatch::has_strides(const Param& param, const c10::TensorImpl* tensor) const {
  return are_equal(tensor->strides().data(), layouts_.data() + param.layout + param.ndim, param.ndim);
}

bool TensorWatch::has_same_memory(const Param& param, const c10::TensorImpl* local) const {
  return local->key_set() == param.keys && local->dtype() == param.dtype && place_of(local) == param.place &&
         local->device() == param.device && has_sizes(param, local) && has_strides(param, local);
}

// A gradient's own memory beside its parameter's.
TensorWatch::Grad TensorWatch::compare(const Param& param, const c10::TensorImpl* grad) const {
  // A subclass of Tensor may have gradients that are none.
  constexpr DispatchKeySet kPython({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});
  if (memory_keys(grad->key_set()) != memory_keys(param.keys) - kPython) {
    const bool is_alike = grad->layout() == c10::kStrided && grad->device() == param.device;
    return is_alike ? Grad::kNeedsPython : Grad::kChanged;  // a lazily negated view, a subclass of Tensor
  }
  if (grad->dtype() != param.grad_dtype || grad->device() != param.device || !has_sizes(param, grad)) {
    return Grad::kChanged;
  }
  if (has_strides(param, grad) || param.is_empty) return Grad::kFits;  // strides of nothing do not matter
  const c10::IntArrayRef strides = grad->strides();
  const int64_t* sizes = layouts_.data() + param.layout;
  for (size_t d = 0; d < param.ndim; ++d) {
    if (strides[d] != sizes[param.ndim + d] && sizes[d] != 1) return Grad::kNeedsPython;
  }
  return Grad::kFits;
}

// Writes the slot if the gradient fits.
TensorWatch::Grad TensorWatch::write_address(Param* param, const c10::TensorImpl* grad) const {
  const Grad result = compare(*param, grad);
  if (result != Grad::kFits) return result;
  const Place place = place_of(grad);
  if (param->is_empty) {
    *param->slot = kEmptyGradient;
    return result;
  }
  if (place.storage == nullptr) return Grad::kChanged;  // was released
  *param->slot = reinterpret_cast<int64_t>(place.storage + place.offset * param->grad_itemsize);
  param->grad_impl = grad;
  param->grad_storage = storage_of(grad);
  return result;
}

// Of a DTensor: writes the slot if the gradient's shard fits, and holds it.
TensorWatch::Grad TensorWatch::read_dtensor_grad(Param* param, PyObject* object, const at::Tensor& grad) {
  const Ref wrapper(THPVariable_Wrap(grad));
  if (!wrapper) return Grad::kChanged;
  Sharding* sharding = param->sharding.get();
  if (Py_TYPE(wrapper.get()) != Py_TYPE(object) || !is_sharded_alike(sharding, wrapper.get())) {
    return Grad::kNeedsPython;
  }
  PyObject* local = dtensors_.local_of(wrapper.get());
  if (local == nullptr) return Grad::kNeedsPython;
  held_shards_.push_back(local);
  sharding->grad_object = wrapper.get();
  sharding->grad_wrapper = grad.unsafeGetTensorImpl();
  sharding->grad_local = local;
  return write_address(param, impl_of(local));
}

// Any parameter: a DTensor, one whose type has a property named grad, one without a slot. False if it changed.
bool TensorWatch::read_param(size_t index, PyObject* object, std::vector<int64_t>* odd) {
  Param& param = params_[index];
  const Ref held(Py_NewRef(object));
  at::Tensor read;
  const at::Tensor* grad = find_grad(str_grad_.get(), param, object, &read);
  if (grad == nullptr) return false;
  if (!grad->defined()) {
    // Its address may change while it has no gradient: compared when the next one comes.
    if (param.slot != nullptr) *param.slot = 0;
    if (param.slot == nullptr && param.has_row) odd->push_back(-1 - static_cast<int64_t>(index));
    return true;
  }
  if (!param.has_row) return false;  // its first gradient: it needs a row
  Grad result = Grad::kNeedsPython;
  if (param.slot != nullptr) {
    const Ref local(param.sharding ? dtensors_.local_of(object) : Py_NewRef(object));
    if (!local || !has_same_memory(param, impl_of(local.get()))) return false;
    if (param.sharding) {
      if (Ref(dtensors_.spec_of(object)).get() != param.sharding->spec) return false;
      result = read_dtensor_grad(&param, object, *grad);
    } else {
      held_grads_.push_back(*grad);
      result = write_address(&param, grad->unsafeGetTensorImpl());
    }
  }
  if (result == Grad::kChanged) return false;
  if (result == Grad::kNeedsPython) odd->push_back(static_cast<int64_t>(index));
  hold(object);
  return true;
}

bool TensorWatch::params_unchanged(PyObject* param_groups, std::vector<int64_t>* odd) {
  if (!PyList_Check(param_groups) || PyList_GET_SIZE(param_groups) != static_cast<Py_ssize_t>(group_sizes_.size())) {
    return false;
  }
  size_t index = 0;
  for (size_t g = 0; g < group_sizes_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, str_params_.get()) : nullptr;
    if (list == nullptr || !PyList_Check(list)) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i, ++index) {
      if (PyList_GET_SIZE(list) != group_sizes_[g]) return false;  // a property named grad may run anybody's code
      if (index + kAhead < params_.size()) prefetch_param(params_[index + kAhead]);
      Param& param = params_[index];
      PyObject* object = PyList_GET_ITEM(list, i);
      if (object != param.object) return false;
      if (!param.is_plain) {
        if (!read_param(index, object, odd)) return false;
        continue;
      }
      // The same as read_param, as few instructions as may be.
      const c10::TensorImpl* impl = impl_of(object);
      const at::Tensor& grad = grad_of(impl);
      if (!grad.defined()) {
        *param.slot = 0;
        continue;
      }
      if (!has_same_memory(param, impl)) return false;
      const Grad result = write_address(&param, grad.unsafeGetTensorImpl());
      if (result == Grad::kChanged) return false;
      if (result == Grad::kNeedsPython) odd->push_back(static_cast<int64_t>(index));
      held_grads_.push_back(grad);
      hold(object);
    }
    if (PyList_GET_SIZE(list) != group_sizes_[g]) return false;
  }
  return true;
}

// Whether `item`, which is some tensor, is the tensor that was seen, and its memory where it was.
bool TensorWatch::item_unchanged(const StateItem& seen, PyObject* item) const {
  if (impl_of(item) != seen.impl._unsafe_get_target()) return false;
  if (!seen.is_readable) return true;
  const auto fits = [&](const c10::TensorImpl* impl) {
    return place_of(impl) == seen.place && impl->numel() == seen.numel && impl->dtype() == seen.dtype;
  };
  if (!seen.is_sharded) return fits(impl_of(item));
  const Ref local(dtensors_.local_of(item));
  return local && fits(impl_of(local.get()));
}

// All items, where no dict was written since they were seen, and so holds them still.
bool TensorWatch::items_unchanged() const {
  for (size_t k = 0; k < state_items_.size(); ++k) {
    if (k + 2 * kAhead < state_items_.size()) {
      const StateItem& later = state_items_[k + 2 * kAhead];
      prefetch(later.object);
      prefetch_place(later.memory);
      prefetch_storage(later.storage);
      if (k + 2 * kAhead < state_locals_.size()) prefetch(state_locals_[k + 2 * kAhead]);
    }
    if (!item_unchanged(state_items_[k], state_items_[k].object)) return false;
  }
  return true;
}

// Looks through the dicts.
bool TensorWatch::entries_unchanged(PyObject* state) const {
  if (PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(state_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t index = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    const StateEntry& entry = state_[index++];
    if (key != entry.key) return false;
    if (!entry.watched) continue;
    if (!PyDict_Check(value)) return false;
    for (size_t k = entry.begin; k < entry.end; ++k) {
      const StateItem& seen = state_items_[k];
      PyObject* item = PyDict_GetItem(value, state_names_[k]);
      // What is no tensor is not looked into.
      if (item == nullptr || (item != seen.object && !THPVariable_Check(item))) return false;
      if (!item_unchanged(seen, item)) return false;
    }
  }
  return true;
}

bool TensorWatch::state_unchanged(PyObject* state) {
  if (state == guarded_ && guard_.is_unwritten()) return items_unchanged();
  if (!PyDict_Check(state)) return false;
  guard_state(state);
  guarded_ = nullptr;  // until all has been looked through, which may throw
  if (!entries_unchanged(state)) return false;
  guarded_ = state;
  return true;
}

PyObject* TensorWatch::sweep(PyObject* param_groups, PyObject* state) {
  release();
  std::vector<int64_t> odd;
  bool is_unchanged = false;
  try {
    is_unchanged = state_unchanged(state) && params_unchanged(param_groups, &odd);
  } catch (const std::exception&) {  // torch throws where a tensor has no memory to write
  }
  if (!is_unchanged) {
    release();
    PyErr_Clear();  // whatever is wrong, building the table anew finds it and names the parameter
    Py_RETURN_NONE;
  }
  PyObject* positions = PyTuple_New(static_cast<Py_ssize_t>(odd.size()));  // one and the same object if empty
  for (size_t k = 0; positions != nullptr && k < odd.size(); ++k) {
    PyObject* position = PyLong_FromLongLong(odd[k]);
    if (position == nullptr) Py_CLEAR(positions);
    if (position != nullptr) PyTuple_SET_ITEM(positions, static_cast<Py_ssize_t>(k), position);
  }
  return positions;
}

void TensorWatch::bump_versions() {
  for (size_t k = 0; k < held_params_.size(); ++k) {
    if (k + kAhead < held_params_.size()) {
      prefetch(held_params_[k + kAhead].param);
      prefetch(held_params_[k + kAhead].impl);
      prefetch(held_params_[k + kAhead].version);
    }
    impl_of(held_params_[k].param)->bump_version();
  }
}

}  // namespace adamw_kernels
