// The host's half of a warm step: read every gradient's address, and notice anything else that changed.
//
// A launch table holds raw addresses. They may be used again only while every parameter is the same object
// at the same address with the same dtype and layout, and every state tensor too. A watch remembers all that
// when the table is built, keeps no tensor's memory alive, and compares it on each step. State tensors are remembered
// by weak reference, parameters by identity: torch.utils.swap_tensors (`module.to()` of DTensors) refuses a tensor
// that has weak references. A new parameter at an old one's address finds no state there, or fits in all else.
//
// This is a module of its own because it is the only one that is compiled against torch: it reads tensors as torch's
// own inlined accessors do, a few loads each, where every stable interface (DLPack, Tensor.data_ptr) costs hundreds of
// instructions a tensor. It belongs to exactly the torch of its build, which it tells as `torch_version`; under any
// other torch, `adamw_kernels/tensor_watch.py` holds the twin in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structmember.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace adamw_kernels {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::TensorImpl;
using WeakTensor = c10::weak_intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>;

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

TensorImpl* impl_of(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

// Where a tensor's memory begins, and how far into it the tensor does. Compared as it is, it tells an address without
// the size of an element, which torch looks up.
struct Place {
  char* storage = nullptr;  // nullptr where it was released, or has none
  int64_t offset = 0;       // in elements
  int64_t numel = 0;

  bool operator==(const Place& other) const {
    return storage == other.storage && offset == other.offset && numel == other.numel;
  }
};

// Throws where the memory cannot be written.
Place place_of(const TensorImpl* tensor) {
  return {static_cast<char*>(tensor->unsafe_storage().unsafeGetStorageImpl()->mutable_data()), tensor->storage_offset(),
          tensor->numel()};
}

// What two tensors' keys must agree in to be read alike: the device's kind and the layout, and that neither is lazily
// negated or conjugated, or a wrapper around others. Whether autograd follows them does not matter.
DispatchKeySet memory_keys(const TensorImpl* tensor) {
  return tensor->key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
}

// A step over thousands of tensors touches more memory than a cache holds: what is compared is fetched ahead. These
// addresses are hints and never dereferenced.
struct Hint {
  const void* object = nullptr;   // the tensor, and its implementation where that of a DTensor
  const void* wrapper = nullptr;  // is only asked for its gradient
  const void* local = nullptr;    // its shard, or the tensor itself
  const void* impl = nullptr;
  const void* storage = nullptr;

  void prefetch() const {
    __builtin_prefetch(object);
    __builtin_prefetch(wrapper);
    __builtin_prefetch(local);
    for (size_t byte = 0; byte < sizeof(TensorImpl); byte += 64) {
      __builtin_prefetch(static_cast<const char*>(impl) + byte);
    }
    __builtin_prefetch(storage);
  }
};

Hint hint_of(PyObject* object, PyObject* local) {
  const TensorImpl* impl = impl_of(local);
  return {object, impl_of(object), local, impl,
          impl->has_storage() ? impl->unsafe_storage().unsafeGetStorageImpl() : nullptr};
}

// The entries of a small dict, where PyDict_Next reads them.
void prefetch_entries(const PyObject* dict, const void* keys) {
  __builtin_prefetch(dict);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(static_cast<const char*>(keys) + 64 * line);
}

constexpr size_t kAhead = 8;

// Empty tensors have no address, yet a gradient of no elements is a gradient: any non-zero number stands for it.
constexpr int64_t kEmptyGradient = 16;

class TensorWatch {
 public:
  // `state_keys`: a tuple of the names under which a table may refer to a tensor of the state.
  // `slots[i]`: where the address of parameter i's gradient goes; 0: the parameter has no row in any table;
  // -1: it has one, but Python reads it (complex).
  // `grad_dtypes[i]`: the torch.dtype that the table expects of its gradient, or None.
  // Throws std::invalid_argument when a tensor cannot be read.
  TensorWatch(PyObject* param_groups, PyObject* state, PyObject* state_keys, const std::vector<int64_t>& slots,
              const std::vector<PyObject*>& grad_dtypes);
  ~TensorWatch();
  TensorWatch(const TensorWatch&) = delete;
  TensorWatch& operator=(const TensorWatch&) = delete;

  // Writes every slot: the gradient's address, or 0 where there is none. Returns None if anything but the
  // gradients' addresses changed, else the positions that Python must look at (another layout or sharding, slot -1).
  // Parameters that have a gradient, and the gradients, are held until release(). New reference; nullptr with a Python
  // error set on failure.
  PyObject* sweep(PyObject* param_groups, PyObject* state);

  // Tells autograd that every parameter of the last sweep which has a gradient is written. Throws as torch does.
  void bump_versions();

  // Lets the tensors of the last sweep go.
  void release();

 private:
  struct Param {
    PyObject* object = nullptr;  // borrowed, compared only
    Hint hint;
    Hint grad_hint;
    const void* autograd_hint = nullptr;
    Place place;
    int64_t slot = 0;
    int64_t grad_itemsize = 0;
    size_t layout = 0;  // where its sizes and then its strides begin in layouts_
    size_t ndim = 0;
    DispatchKeySet keys;
    DispatchKeySet grad_keys;
    caffe2::TypeMeta dtype;
    caffe2::TypeMeta grad_dtype;
    c10::Device device = c10::kCPU;
    bool plain_grad = false;        // its type reads .grad as torch.Tensor does
    PyObject* spec = nullptr;       // owned: how a DTensor is sharded; nullptr for any other tensor
    PyObject* grad_spec = nullptr;  // owned: how its last gradient was, which is the same sharding
  };
  struct StateItem {  // one tensor of a parameter's state
    // Keeps the implementation's address from being used anew, not the memory it points to.
    WeakTensor impl;
    PyObject* key;  // owned
    Hint hint;
    Place place;
    caffe2::TypeMeta dtype;
    bool is_sharded;   // a DTensor
    bool is_readable;  // false where only the tensor's identity counts (complex)
  };
  struct StateEntry {
    PyObject* key = nullptr;         // borrowed, compared only
    const PyObject* dict = nullptr;  // a hint, like the next
    const void* dict_keys = nullptr;
    bool watched = false;
    size_t begin = 0, end = 0;  // its items in state_items_
  };
  enum class Grad { kFits, kNeedsPython, kChanged };

  void snapshot_params(PyObject* param_groups, const std::vector<int64_t>& slots,
                       const std::vector<PyObject*>& grad_dtypes);
  void snapshot_memory(Param* param);
  void snapshot_state(PyObject* state, PyObject* state_keys);
  void learn(PyTypeObject* dtensor_type);
  void drop();
  PyObject* local_of(PyObject* tensor, bool is_sharded) const;
  PyObject* spec_of(PyObject* tensor) const;
  PyObject* slot_of(PyObject* tensor, Py_ssize_t offset, PyObject* name) const;
  static const at::Tensor* find_grad(PyObject* name, const Param& param, PyObject* object, at::Tensor* read);
  bool is_sharded_alike(Param* param, PyObject* grad) const;
  bool has_sizes(const Param& param, const TensorImpl* tensor) const;
  bool has_same_memory(const Param& param, const TensorImpl* local) const;
  Grad compare(const Param& param, const TensorImpl* grad) const;
  Grad read_grad(Param* param, PyObject* object, const at::Tensor& grad);
  Grad write_address(Param* param, const TensorImpl* grad, Hint hint) const;
  bool params_unchanged(PyObject* param_groups, std::vector<int64_t>* odd);
  bool state_unchanged(PyObject* state) const;

  // The type of the first DTensor that was seen, and where its objects keep their shard and their spec.
  PyTypeObject* dtensor_type_ = nullptr;
  Py_ssize_t local_offset_ = 0;
  Py_ssize_t spec_offset_ = 0;
  PyObject* grad_descriptor_ = nullptr;  // owned
  std::vector<int64_t> group_sizes_;
  std::vector<Param> params_;
  std::vector<int64_t> layouts_;
  std::vector<StateEntry> state_;
  std::vector<StateItem> state_items_;
  std::vector<PyObject*> held_params_;  // owned, between sweep() and release()
  std::vector<PyObject*> held_shards_;  // owned, of gradients that are DTensors
  std::vector<at::Tensor> held_grads_;  // the others
  PyObject* str_grad_;
  PyObject* str_params_;
  PyObject* str_local_tensor_;
  PyObject* str_spec_;
  PyObject* str_mesh_;
  PyObject* str_placements_;
};

// A DTensor's shard; any other tensor itself. A new reference; nullptr with no Python error set where the shard is not
// a plain tensor (a collective still under way). That a tensor is no DTensor is remembered and not asked.
PyObject* TensorWatch::local_of(PyObject* tensor, bool is_sharded) const {
  if (!is_sharded) return Py_NewRef(tensor);
  PyObject* local = slot_of(tensor, local_offset_, str_local_tensor_);
  if (local != nullptr && !THPVariable_CheckExact(local)) Py_CLEAR(local);
  return local;
}

// How a DTensor is sharded. A new reference, nullptr with no Python error set where it does not say.
PyObject* TensorWatch::spec_of(PyObject* tensor) const { return slot_of(tensor, spec_offset_, str_spec_); }

// An attribute of a DTensor: read where its type keeps it, or, for another type, by name.
PyObject* TensorWatch::slot_of(PyObject* tensor, Py_ssize_t offset, PyObject* name) const {
  if (offset != 0 && Py_TYPE(tensor) == dtensor_type_) {
    return Py_XNewRef(*reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset));
  }
  PyObject* value = PyObject_GetAttr(tensor, name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

void TensorWatch::learn(PyTypeObject* dtensor_type) {
  if (dtensor_type_ != nullptr) return;
  dtensor_type_ = dtensor_type;  // which outlives us, like every class of torch
  const auto offset = [&](PyObject* name) -> Py_ssize_t {
    const Ref descriptor(PyObject_GetAttr(reinterpret_cast<PyObject*>(dtensor_type), name));
    if (!descriptor) PyErr_Clear();
    if (!descriptor || Py_TYPE(descriptor.get()) != &PyMemberDescr_Type) return 0;
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.get())->d_member;
    return member->type == T_OBJECT_EX ? member->offset : 0;
  };
  local_offset_ = offset(str_local_tensor_);
  spec_offset_ = offset(str_spec_);
}

// --- what is remembered ----------------------------------------------------------------------------------------------

TensorWatch::TensorWatch(PyObject* param_groups, PyObject* state, PyObject* state_keys,
                         const std::vector<int64_t>& slots, const std::vector<PyObject*>& grad_dtypes)
    : str_grad_(PyUnicode_InternFromString("grad")),
      str_params_(PyUnicode_InternFromString("params")),
      str_local_tensor_(PyUnicode_InternFromString("_local_tensor")),
      str_spec_(PyUnicode_InternFromString("_spec")),
      str_mesh_(PyUnicode_InternFromString("mesh")),
      str_placements_(PyUnicode_InternFromString("placements")) {
  try {
    if (slots.size() != grad_dtypes.size()) throw std::invalid_argument("as many grad_dtypes as slots are needed");
    grad_descriptor_ = PyObject_GetAttr(THPVariableClass, str_grad_);
    if (grad_descriptor_ == nullptr) throw py::error_already_set();
    snapshot_params(param_groups, slots, grad_dtypes);
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
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups, g), str_params_);
    if (params == nullptr || !PyList_Check(params)) throw std::invalid_argument("group['params'] must be a list");
    group_sizes_.push_back(PyList_GET_SIZE(params));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* object = PyList_GET_ITEM(params, i);
      if (params_.size() == slots.size()) throw std::invalid_argument("more parameters than slots");
      if (!THPVariable_Check(object)) throw std::invalid_argument("a parameter that is no tensor");
      PyObject* grad_dtype = grad_dtypes[params_.size()];
      Param& param = params_.emplace_back();
      param.object = object;
      param.slot = slots[params_.size() - 1];
      const Ref own_descriptor(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object)), str_grad_));
      if (!own_descriptor) PyErr_Clear();
      param.plain_grad = own_descriptor.get() == grad_descriptor_;
      if (param.slot <= 0) continue;
      if (!THPDtype_Check(grad_dtype)) throw std::invalid_argument("a gradient's dtype is none");
      param.grad_dtype = c10::scalarTypeToTypeMeta(reinterpret_cast<THPDtype*>(grad_dtype)->scalar_type);
      param.grad_itemsize = static_cast<int64_t>(param.grad_dtype.itemsize());
      snapshot_memory(&param);
    }
  }
  if (params_.size() != slots.size()) throw std::invalid_argument("fewer parameters than slots");
}

void TensorWatch::snapshot_memory(Param* param) {
  const bool is_sharded = PyObject_HasAttr(param->object, str_local_tensor_) != 0;
  if (is_sharded) {
    learn(Py_TYPE(param->object));
    param->spec = spec_of(param->object);
    if (param->spec == nullptr) throw std::invalid_argument("a DTensor without a spec");
  }
  const Ref local(local_of(param->object, is_sharded));
  if (!local) throw std::invalid_argument("a DTensor whose shard is no plain tensor");
  TensorImpl* impl = impl_of(local.get());
  if (impl->layout() != c10::kStrided || !impl->has_storage()) throw std::invalid_argument("a tensor without memory");
  param->hint = hint_of(param->object, local.get());
  param->autograd_hint = impl_of(param->object)->autograd_meta();
  param->place = place_of(impl);
  param->keys = impl->key_set();
  // A subclass of Tensor may have gradients that are none.
  param->grad_keys = memory_keys(impl) - DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});
  param->dtype = impl->dtype();
  param->device = impl->device();
  const c10::IntArrayRef sizes = impl->sizes(), strides = impl->strides();
  param->ndim = sizes.size();
  param->layout = layouts_.size();
  layouts_.insert(layouts_.end(), sizes.begin(), sizes.end());
  layouts_.insert(layouts_.end(), strides.begin(), strides.end());
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
    entry.dict = value;
    if (PyDict_Check(value)) entry.dict_keys = reinterpret_cast<PyDictObject*>(value)->ma_keys;
    const auto found = by_object.find(key);
    entry.watched = found != by_object.end() && found->second->slot != 0 && PyDict_Check(value);
    PyObject *name, *item;
    Py_ssize_t item_position = 0;
    while (entry.watched && PyDict_Next(value, &item_position, &name, &item)) {
      // None or a number under one of our names: not in use, or the table could not have been built.
      if (PySequence_Contains(state_keys, name) != 1 || !THPVariable_Check(item)) continue;
      const bool is_sharded = !THPVariable_CheckExact(item) && PyObject_HasAttr(item, str_local_tensor_) != 0;
      const Ref local(local_of(item, is_sharded));
      if (!local) throw std::invalid_argument("a state whose shard is no plain tensor");
      TensorImpl* impl = impl_of(local.get());
      const bool is_readable = found->second->slot > 0;
      const Place place = is_readable ? place_of(impl) : Place{};
      state_items_.push_back({WeakTensor(THPVariable_Unpack(item).getIntrusivePtr()), Py_NewRef(name),
                              hint_of(item, local.get()), place, impl->dtype(), is_sharded, is_readable});
    }
    entry.end = state_items_.size();
    state_.push_back(entry);
  }
}

TensorWatch::~TensorWatch() { drop(); }

void TensorWatch::drop() {
  release();
  for (StateItem& seen : state_items_) Py_DECREF(seen.key);
  for (Param& param : params_) {
    Py_XDECREF(param.spec);
    Py_XDECREF(param.grad_spec);
  }
  for (PyObject* name : {str_grad_, str_params_, str_local_tensor_, str_spec_, str_mesh_, str_placements_}) {
    Py_DECREF(name);
  }
  Py_XDECREF(grad_descriptor_);
}

void TensorWatch::release() {
  // What they refer to may be freed here, which may run anybody's code, and even come here again.
  for (std::vector<PyObject*>* held : {&held_params_, &held_shards_}) {
    while (!held->empty()) {
      PyObject* object = held->back();
      held->pop_back();
      Py_DECREF(object);
    }
  }
  while (!held_grads_.empty()) {
    const at::Tensor grad = std::move(held_grads_.back());
    held_grads_.pop_back();
  }
}

// --- what is compared ------------------------------------------------------------------------------------------------

// A parameter's .grad, undefined where there is none; nullptr where it cannot be read or is no tensor. What a property
// of that name answers is kept in `read`. No other is copied: where only Python holds a tensor, that costs more than
// all the rest, since torch then counts the reference there.
const at::Tensor* TensorWatch::find_grad(PyObject* name, const Param& param, PyObject* object, at::Tensor* read) {
  if (param.plain_grad) return &impl_of(object)->grad();
  const Ref value(PyObject_GetAttr(object, name));
  if (!value || (value.get() != Py_None && !THPVariable_Check(value.get()))) return nullptr;
  if (value.get() != Py_None) *read = THPVariable_Unpack(value.get());
  return read;
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

// Sizes, and then strides, as they are remembered.
bool TensorWatch::has_sizes(const Param& param, const TensorImpl* tensor) const {
  const c10::IntArrayRef sizes = tensor->sizes();
  if (sizes.size() != param.ndim) return false;
  const int64_t* seen = layouts_.data() + param.layout;
  for (size_t d = 0; d < param.ndim; ++d) {
    if (sizes[d] != seen[d]) return false;
  }
  return true;
}

bool TensorWatch::has_same_memory(const Param& param, const TensorImpl* local) const {
  if (local->key_set() != param.keys || local->dtype() != param.dtype || !(place_of(local) == param.place) ||
      local->device() != param.device || !has_sizes(param, local)) {
    return false;
  }
  const c10::IntArrayRef strides = local->strides();
  const int64_t* seen = layouts_.data() + param.layout + param.ndim;
  for (size_t d = 0; d < param.ndim; ++d) {
    if (strides[d] != seen[d]) return false;
  }
  return true;
}

// A gradient's own memory beside its parameter's.
TensorWatch::Grad TensorWatch::compare(const Param& param, const TensorImpl* grad) const {
  if (memory_keys(grad) != param.grad_keys) {
    const bool is_alike = grad->layout() == c10::kStrided && grad->device() == param.device;
    return is_alike ? Grad::kNeedsPython : Grad::kChanged;  // a lazily negated view, a subclass of Tensor
  }
  if (grad->dtype() != param.grad_dtype || grad->device() != param.device || !has_sizes(param, grad)) {
    return Grad::kChanged;
  }
  if (param.place.numel == 0) return Grad::kFits;  // strides of nothing do not matter
  const c10::IntArrayRef strides = grad->strides();
  const int64_t* sizes = layouts_.data() + param.layout;
  for (size_t d = 0; d < param.ndim; ++d) {
    if (strides[d] != sizes[param.ndim + d] && sizes[d] != 1) return Grad::kNeedsPython;
  }
  return Grad::kFits;
}

// Writes the slot if the gradient fits, and holds the tensor whose memory it is.
TensorWatch::Grad TensorWatch::read_grad(Param* param, PyObject* object, const at::Tensor& grad) {
  TensorImpl* impl = grad.unsafeGetTensorImpl();
  if (param->spec == nullptr) {
    held_grads_.push_back(grad);
    return write_address(param, impl, {});
  }
  const Ref wrapper(THPVariable_Wrap(grad));
  if (!wrapper) return Grad::kChanged;
  if (Py_TYPE(wrapper.get()) != Py_TYPE(object) || !is_sharded_alike(param, wrapper.get())) return Grad::kNeedsPython;
  PyObject* local = local_of(wrapper.get(), true);
  if (local == nullptr) return Grad::kNeedsPython;
  held_shards_.push_back(local);
  return write_address(param, impl_of(local), {wrapper.get(), impl, local, nullptr, nullptr});
}

TensorWatch::Grad TensorWatch::write_address(Param* param, const TensorImpl* grad, Hint hint) const {
  const Grad result = compare(*param, grad);
  if (result != Grad::kFits) return result;
  const Place place = place_of(grad);
  auto* slot = reinterpret_cast<int64_t*>(param->slot);
  if (place.numel == 0) {
    *slot = kEmptyGradient;
    return result;
  }
  if (place.storage == nullptr) return Grad::kChanged;  // was released
  *slot = reinterpret_cast<int64_t>(place.storage + place.offset * param->grad_itemsize);
  hint.impl = grad;
  hint.storage = grad->unsafe_storage().unsafeGetStorageImpl();
  param->grad_hint = hint;
  return result;
}

bool TensorWatch::params_unchanged(PyObject* param_groups, std::vector<int64_t>* odd) {
  if (!PyList_Check(param_groups) || PyList_GET_SIZE(param_groups) != static_cast<Py_ssize_t>(group_sizes_.size())) {
    return false;
  }
  size_t index = 0;
  for (size_t g = 0; g < group_sizes_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, str_params_) : nullptr;
    if (list == nullptr || !PyList_Check(list) || PyList_GET_SIZE(list) != group_sizes_[g]) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i, ++index) {
      if (PyList_GET_SIZE(list) != group_sizes_[g]) return false;  // a property named grad may run anybody's code
      Param& param = params_[index];
      if (index + kAhead < params_.size()) {
        const Param& later = params_[index + kAhead];
        later.hint.prefetch();
        later.grad_hint.prefetch();
        __builtin_prefetch(later.autograd_hint);
      }
      PyObject* object = PyList_GET_ITEM(list, i);
      if (object != param.object) return false;
      const Ref held(Py_NewRef(object));
      at::Tensor read;
      const at::Tensor* grad = find_grad(str_grad_, param, object, &read);
      if (grad == nullptr) return false;
      if (!grad->defined()) {
        // Its address may change while it has no gradient: compared when the next one comes.
        if (param.slot > 0) *reinterpret_cast<int64_t*>(param.slot) = 0;
        if (param.slot < 0) odd->push_back(-1 - static_cast<int64_t>(index));
        continue;
      }
      if (param.slot == 0) return false;  // its first gradient: it needs a row
      Grad result = Grad::kNeedsPython;
      if (param.slot > 0) {
        const Ref local(local_of(object, param.spec != nullptr));
        if (!local || !has_same_memory(param, impl_of(local.get()))) return false;
        if (param.spec != nullptr && Ref(spec_of(object)).get() != param.spec) return false;
        result = read_grad(&param, object, *grad);
      }
      if (result == Grad::kChanged) return false;
      if (result == Grad::kNeedsPython) odd->push_back(static_cast<int64_t>(index));
      held_params_.push_back(Py_NewRef(object));
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
    if (index + kAhead < state_.size()) prefetch_entries(state_[index + kAhead].dict, state_[index + kAhead].dict_keys);
    if (key != entry.key) return false;
    if (!entry.watched) continue;
    if (!PyDict_Check(value)) return false;
    // Ours come first and in one order, as a rule: walking along is faster than looking names up.
    PyObject *name = nullptr, *item = nullptr;
    Py_ssize_t item_position = 0;
    for (size_t k = entry.begin; k < entry.end; ++k) {
      const StateItem& seen = state_items_[k];
      if (k + 2 * kAhead < state_items_.size()) state_items_[k + 2 * kAhead].hint.prefetch();
      if (!PyDict_Next(value, &item_position, &name, &item) || name != seen.key) item = PyDict_GetItem(value, seen.key);
      // Another tensor's implementation lies elsewhere, what is no tensor is not looked into.
      if (item == nullptr || (item != seen.hint.object && !THPVariable_Check(item))) return false;
      if (impl_of(item) != seen.impl._unsafe_get_target()) return false;
      if (!seen.is_readable) continue;
      const Ref local(local_of(item, seen.is_sharded));
      if (!local) return false;
      const TensorImpl* impl = impl_of(local.get());
      if (!(place_of(impl) == seen.place) || impl->dtype() != seen.dtype) return false;
    }
  }
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
  for (PyObject* object : held_params_) impl_of(object)->bump_version();
}

}  // namespace

PYBIND11_MODULE(_tensor_watch, m) {
  m.doc() = "The warm step's look at every tensor, for the torch it was built with.";
  m.attr("torch_version") = ADAMW_KERNELS_TORCH;
  py::class_<TensorWatch>(m, "TensorWatch",
                          "Remembers every tensor as it is now; sweep() reads the gradients' addresses and tells "
                          "whether anything else changed.")
      .def(py::init([](const py::list& param_groups, const py::dict& state, const py::tuple& state_keys,
                       const std::vector<int64_t>& slots, const py::list& grad_dtypes) {
             std::vector<PyObject*> dtypes;
             for (const py::handle dtype : grad_dtypes) dtypes.push_back(dtype.ptr());
             return new TensorWatch(param_groups.ptr(), state.ptr(), state_keys.ptr(), slots, dtypes);
           }),
           py::arg("param_groups"), py::arg("state"), py::arg("state_keys"), py::arg("slots"), py::arg("grad_dtypes"))
      .def(
          "sweep",
          [](TensorWatch& watch, const py::object& param_groups, const py::object& state) {
            PyObject* result = watch.sweep(param_groups.ptr(), state.ptr());
            if (result == nullptr) throw py::error_already_set();
            return py::reinterpret_steal<py::object>(result);
          },
          py::arg("param_groups"), py::arg("state"),
          "Writes every slot. None if anything but gradients' addresses changed, else the positions to look at.")
      .def("bump_versions", &TensorWatch::bump_versions, "Tells autograd that the last sweep's parameters are written.")
      .def("release", &TensorWatch::release, "Lets the last sweep's tensors go.");
}

}  // namespace adamw_kernels
