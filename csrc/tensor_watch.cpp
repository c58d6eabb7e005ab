// What a warm step compares: see tensor_watch.h. What it compares with: tensor_snapshot.cpp.
#include "tensor_watch.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

namespace adamw_kernels {

using c10::DispatchKey;
using c10::DispatchKeySet;

namespace {

constexpr size_t kAhead = 8;

// torch's threads do not survive fork(): what is shared among them in the child waits for ever.
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });

// Empty tensors have no address, yet a gradient of no elements is a gradient: any non-zero number stands for it.
constexpr int64_t kEmptyGradient = 16;

// A loop, where std::equal calls memcmp for one or two numbers.
[[gnu::always_inline]] inline bool are_equal(const int64_t* a, const int64_t* b, size_t count) {
  for (size_t k = 0; k < count; ++k) {
    if (a[k] != b[k]) return false;
  }
  return true;
}

// Where references are not counted by thread, and the threads are this caller's own: a task in a pool that all callers
// share might wait for the GIL.
#if AT_PARALLEL_OPENMP && !defined(Py_REF_DEBUG)
constexpr bool kCanShare = true;
#else
constexpr bool kCanShare = false;
#endif

// Calls `work` for parts of `count` items, on as many of torch's threads as they are worth, and waits for all. torch
// wakes every thread that it has, whatever few get a part (teams of different sizes make GNU OpenMP end threads and
// start others): on machines with many, that takes more items than it would on one with two.
template <typename Work>
void share(size_t count, int64_t items_per_thread, const Work& work) {
  const int64_t items = static_cast<int64_t>(count), threads = at::get_num_threads();
  if (!kCanShare || items <= std::max(items_per_thread, threads * items_per_thread / 8) ||
      in_forked_child.load(std::memory_order_relaxed)) {
    if (count > 0) work(0, count);
    return;
  }
  at::parallel_for(0, items, items_per_thread,
                   [&](int64_t begin, int64_t end) { work(static_cast<size_t>(begin), static_cast<size_t>(end)); });
}

}  // namespace

void TensorWatch::release() {
  if (!is_holding_) return;
  for (size_t index = 0; index < params_.size(); ++index) {
    if (index + kAhead < params_.size() && params_[index + kAhead].is_held) {
      prefetch(params_[index + kAhead].object);
      prefetch(params_[index + kAhead].grad);
    }
    let_go(&params_[index]);
  }
  is_holding_ = false;
}

// What it refers to may be freed here, which may run anybody's code, and even come here again.
void TensorWatch::let_go(Param* param) {
  if (!param->is_held) return;
  param->is_held = false;
  OwnedTensor::reclaim(param->grad);
  Py_DECREF(param->object);
}

// --- what is compared ------------------------------------------------------------------------------------------------

// A parameter's .grad, undefined where it has none. False where it cannot be read or is no tensor.
bool TensorWatch::find_grad(const Param& param, PyObject* object, at::Tensor* grad) const {
  if (param.plain_grad) {
    *grad = grad_of(impl_of(object));
    return true;
  }
  const Ref value(PyObject_GetAttr(object, str_grad_.get()));
  if (!value || (value.get() != Py_None && !THPVariable_Check(value.get()))) return false;
  if (value.get() != Py_None) *grad = THPVariable_Unpack(value.get());
  return true;
}

void TensorWatch::prefetch_param(const Param& param) {
  prefetch(param.object);
  prefetch(param.impl, sizeof(c10::TensorImpl));
  prefetch_storage(param.storage);
  prefetch(param.autograd, 64);
  prefetch_storage(param.grad_storage);
  if (param.sharding == nullptr) {
    prefetch(param.grad, sizeof(c10::TensorImpl));
    return;
  }
  const Sharding& sharding = *param.sharding;
  prefetch(sharding.wrapper);
  prefetch(sharding.local);
  prefetch(param.grad);
  prefetch(sharding.grad_object);
  prefetch(sharding.grad_local);
  prefetch(sharding.grad_impl, sizeof(c10::TensorImpl));
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

[[gnu::always_inline]] inline bool TensorWatch::has_sizes(const Param& param, const c10::TensorImpl* tensor) const {
  const c10::IntArrayRef sizes = tensor->sizes();
  return sizes.size() == param.ndim && are_equal(sizes.data(), layouts_.data() + param.layout, param.ndim);
}

// Of a tensor that has as many dimensions.
[[gnu::always_inline]] inline bool TensorWatch::has_strides(const Param& param, const c10::TensorImpl* tensor) const {
  return are_equal(tensor->strides().data(), layouts_.data() + param.layout + param.ndim, param.ndim);
}

inline bool TensorWatch::has_same_memory(const Param& param, const c10::TensorImpl* local) const {
  return local->key_set() == param.keys && local->dtype() == param.dtype && place_of(local) == param.place &&
         local->device() == param.device && has_sizes(param, local) && has_strides(param, local);
}

// A subclass of Tensor may have gradients that are none.
inline bool TensorWatch::has_alike_keys(const Param& param, const c10::TensorImpl* grad) {
  constexpr DispatchKeySet kPython({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});
  return memory_keys(grad->key_set()) == memory_keys(param.keys) - kPython;
}

// A gradient's own memory beside its parameter's.
inline TensorWatch::Grad TensorWatch::compare(const Param& param, const c10::TensorImpl* grad) const {
  if (!has_alike_keys(param, grad)) {
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
[[gnu::always_inline]] inline TensorWatch::Grad TensorWatch::write_address(Param* param,
                                                                           const c10::TensorImpl* grad) const {
  const Grad result = compare(*param, grad);
  if (result != Grad::kFits) return result;
  const Place place = place_of(grad);
  if (param->is_empty) {
    *param->slot = kEmptyGradient;
    return result;
  }
  if (place.storage == nullptr) return Grad::kChanged;  // was released
  *param->slot = reinterpret_cast<int64_t>(place.storage + place.offset * param->grad_itemsize);
  param->grad_storage = storage_of(grad);
  return result;
}

// Until release(). Of a DTensor, too: its object lives on with its implementation, and refers to its shard.
inline void TensorWatch::hold(Param* param, PyObject* object, const at::Tensor& grad) {
  Py_INCREF(object);
  param->grad = OwnedTensor(grad.getIntrusivePtr()).release();
  param->version = version_hint(impl_of(object));
  param->is_held = true;
}

// A DTensor's shard and its gradient's, by reads alone. False: only read_param() can tell.
inline bool TensorWatch::find_shards(Param* param, PyObject* object, const c10::TensorImpl** local,
                                     const c10::TensorImpl** grad) const {
  Sharding* sharding = param->sharding.get();
  PyObject* grad_object = (*grad)->pyobj_slot()->load_pyobj();
  if (grad_object == nullptr || Py_TYPE(grad_object) != Py_TYPE(object)) return false;
  PyObject *shard = dtensors_.peek_local(object), *grad_shard = dtensors_.peek_local(grad_object);
  if (shard == nullptr || grad_shard == nullptr || dtensors_.peek_spec(object) != sharding->spec) return false;
  PyObject* grad_spec = dtensors_.peek_spec(grad_object);
  if (grad_spec != sharding->spec && grad_spec != sharding->grad_spec) return false;
  *local = impl_of(shard);
  *grad = impl_of(grad_shard);
  sharding->grad_object = grad_object;
  sharding->grad_local = grad_shard;
  sharding->grad_impl = *grad;
  return true;
}

// A parameter, by reads alone, which any thread may do while the caller holds the GIL: nothing is called that may run
// Python, and only references to these very objects are counted. False: read_param() must look at it.
inline bool TensorWatch::read_quickly(Param* param, PyObject* object) const {
  const c10::TensorImpl* local = impl_of(object);
  const at::Tensor& grad = grad_of(local);
  if (!grad.defined()) {
    // Its address may change while it has no gradient: compared when the next one comes.
    if (param->slot != nullptr) *param->slot = 0;
    return true;
  }
  if (param->slot == nullptr) return false;
  const c10::TensorImpl* grad_local = grad.unsafeGetTensorImpl();
  if (param->sharding && !find_shards(param, object, &local, &grad_local)) return false;
  // Of other keys, compare() would ask what may run Python.
  if (!has_same_memory(*param, local) || !has_alike_keys(*param, grad_local)) return false;
  if (write_address(param, grad_local) != Grad::kFits) return false;
  hold(param, object, grad);
  return true;
}

// Of a DTensor: writes the slot if the gradient's shard fits.
TensorWatch::Grad TensorWatch::read_dtensor_grad(Param* param, PyObject* object, const at::Tensor& grad) const {
  const Ref wrapper(THPVariable_Wrap(grad));
  if (!wrapper) return Grad::kChanged;
  if (Py_TYPE(wrapper.get()) != Py_TYPE(object) || !is_sharded_alike(param->sharding.get(), wrapper.get())) {
    return Grad::kNeedsPython;
  }
  const Ref local(dtensors_.local_of(wrapper.get()));
  return local ? write_address(param, impl_of(local.get())) : Grad::kNeedsPython;
}

// Any parameter: one whose type has a property named grad, one without a slot, a DTensor of another layout. False if it
// changed.
bool TensorWatch::read_param(size_t index, PyObject* object, std::vector<int64_t>* odd) {
  Param& param = params_[index];
  const Ref held(Py_NewRef(object));
  at::Tensor grad;  // a reference of our own: what follows may run Python, which may give it another
  if (!find_grad(param, object, &grad)) return false;
  if (!grad.defined()) {
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
      result = read_dtensor_grad(&param, object, grad);
    } else {
      result = write_address(&param, grad.unsafeGetTensorImpl());
    }
  }
  if (result == Grad::kChanged) return false;
  if (result == Grad::kNeedsPython) odd->push_back(static_cast<int64_t>(index));
  // Python may have come here again, held it, or released all.
  let_go(&param);
  is_holding_ = true;
  hold(&param, object, grad);
  return true;
}

// nullptr where the group has none, or one of another length.
PyObject* TensorWatch::list_of(PyObject* param_groups, size_t index) const {
  if (PyList_GET_SIZE(param_groups) != static_cast<Py_ssize_t>(groups_.size())) return nullptr;
  PyObject* group = PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(index));
  PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, str_params_.get()) : nullptr;
  if (list == nullptr || !PyList_Check(list)) return nullptr;
  return PyList_GET_SIZE(list) == static_cast<Py_ssize_t>(groups_[index].size) ? list : nullptr;
}

bool TensorWatch::find_lists(PyObject* param_groups) {
  if (!PyList_Check(param_groups)) return false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* list = list_of(param_groups, g);
    if (list == nullptr) return false;
    groups_[g].objects = PySequence_Fast_ITEMS(list);
  }
  return PyList_GET_SIZE(param_groups) == static_cast<Py_ssize_t>(groups_.size());
}

// The parameters from `begin` to `end` that have no property to read. False: some are left to read_param(), and marked.
bool TensorWatch::read_params(size_t begin, size_t end) {
  const auto is_before = [](size_t index, const Group& group) { return index < group.begin; };
  auto group = std::upper_bound(groups_.begin(), groups_.end(), begin, is_before) - 1;
  bool all = true;
  for (size_t index = begin; index < end; ++index) {
    while (index >= group->begin + group->size) ++group;
    if (index + kAhead < end) prefetch_param(params_[index + kAhead]);
    Param& param = params_[index];
    PyObject* object = group->objects[index - group->begin];
    param.is_left = object != param.object || (param.plain_grad && !param.reads_suffice);
    try {
      param.is_left = param.is_left || (param.reads_suffice && !read_quickly(&param, object));
    } catch (const std::exception&) {  // memory that may not be written here, or is copied first
      param.is_left = true;
    }
    all = all && !param.is_left;
  }
  return all;
}

bool TensorWatch::read_left_params(PyObject* param_groups, std::vector<int64_t>* odd) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    const Ref list(Py_XNewRef(list_of(param_groups, g)));
    if (!list) return false;
    for (size_t i = 0; i < groups_[g].size; ++i) {
      const size_t index = groups_[g].begin + i;
      if (!params_[index].is_left) continue;
      // A property named grad may run anybody's code.
      if (PyList_GET_SIZE(list.get()) != static_cast<Py_ssize_t>(groups_[g].size)) return false;
      PyObject* object = PyList_GET_ITEM(list.get(), static_cast<Py_ssize_t>(i));
      if (object != params_[index].object || !read_param(index, object, odd)) return false;
    }
    if (list_of(param_groups, g) != list.get()) return false;
  }
  return true;
}

// Whether the memory of a plain state tensor is where it was.
[[gnu::always_inline]] inline bool TensorWatch::has_place(const StateItem& seen, const c10::TensorImpl* impl) {
  return place_of(impl) == seen.place && impl->numel() == seen.numel && impl->dtype() == seen.dtype;
}

// Whether `item`, which is some tensor, is the tensor that was seen, and its memory where it was.
bool TensorWatch::item_unchanged(const StateItem& seen, PyObject* item) const {
  if (impl_of(item) != seen.impl._unsafe_get_target()) return false;
  if (!seen.is_readable) return true;
  if (!seen.is_sharded) return has_place(seen, impl_of(item));
  const Ref local(dtensors_.local_of(item));
  return local && has_place(seen, impl_of(local.get()));
}

// The items from `begin` to `end`, where no dict was written since they were seen, and so holds them still; whose
// implementations need not be asked for, since torch swaps none that has weak references. By reads alone. False: they
// changed, or only item_unchanged() can tell.
bool TensorWatch::items_unchanged(size_t begin, size_t end) const {
  constexpr size_t kFurther = 2 * kAhead;
  for (size_t k = begin; k < end; ++k) {
    if (k + kFurther < end) {
      const StateItem& later = state_items_[k + kFurther];
      prefetch_place(later.memory);
      prefetch_storage(later.storage);
      if (later.is_sharded) {
        prefetch(later.object);
        prefetch(state_locals_[k + kFurther]);
      }
    }
    const StateItem& seen = state_items_[k];
    if (!seen.is_readable) continue;
    const c10::TensorImpl* impl = seen.impl._unsafe_get_target();
    if (seen.is_sharded) {
      PyObject* local = dtensors_.peek_local(seen.object);
      if (local == nullptr) return false;
      impl = impl_of(local);
    }
    if (impl->key_set().has(DispatchKey::Python)) return false;  // may run Python to tell its size
    try {
      if (!has_place(seen, impl)) return false;
    } catch (const std::exception&) {  // memory that is copied first
      return false;
    }
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

bool TensorWatch::look_through(PyObject* state) {
  if (!PyDict_Check(state)) return false;
  guard_state(state);
  guarded_ = nullptr;  // until all has been looked through, which may throw
  if (!entries_unchanged(state)) return false;
  guarded_ = state;
  return true;
}

bool TensorWatch::all_unchanged(PyObject* param_groups, PyObject* state, std::vector<int64_t>* odd) {
  // What a property does happens before anything else is compared.
  if (has_properties_) {
    for (Param& param : params_) param.is_left = !param.plain_grad;
    if (!PyList_Check(param_groups) || !read_left_params(param_groups, odd)) return false;
  }
  const bool is_unwritten = state == guarded_ && guard_.is_unwritten();
  if (!find_lists(param_groups)) return false;
  const size_t count = params_.size(), items = is_unwritten ? state_items_.size() : 0;
  std::atomic<bool> is_same{is_unwritten}, is_read{true};
  parts_ = 0;
  share(count, params_per_thread_, [&](size_t begin, size_t end) {
    ++parts_;
    if (!items_unchanged(items * begin / count, items * end / count)) is_same = false;
    if (!read_params(begin, end)) is_read = false;
  });
  if (!is_same && !look_through(state)) return false;
  return is_read || read_left_params(param_groups, odd);
}

PyObject* TensorWatch::sweep(PyObject* param_groups, PyObject* state) {
  release();
  std::vector<int64_t> odd;
  bool is_unchanged = false;
  is_holding_ = true;
  try {
    is_unchanged = all_unchanged(param_groups, state, &odd);
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

// Takes a tenth of the sweep's time: to wake threads again is worth it for several times as many.
void TensorWatch::bump_versions() {
  share(params_.size(), 4 * params_per_thread_, [this](size_t begin, size_t end) {
    for (size_t index = begin; index < end; ++index) {
      if (index + kAhead < end && params_[index + kAhead].is_held) {
        const Param& later = params_[index + kAhead];
        prefetch(later.object);
        prefetch(later.sharding ? later.sharding->wrapper : later.impl);
        prefetch(later.version);
      }
      if (params_[index].is_held) impl_of(params_[index].object)->bump_version();
    }
  });
}

}  // namespace adamw_kernels
