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
//
// What a warm step costs on the host is mostly the cache lines that are touched here, which other work of the step
// before has displaced: what is remembered of a tensor is kept small, sizes are remembered once for all tensors that
// share them, and what is compared is fetched ahead. All is read first without a call that could run Python, and so on
// all of torch's threads, each of which finds most of its part in its own cache from step to step. What that does not
// settle the caller looks at afterwards. Only properties named grad, which may run anybody's code, are read before.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "dict_guard.h"
#include "dtensor_reader.h"
#include "tensor_memory.h"

namespace adamw_kernels {

class TensorWatch {
 public:
  // `state_keys`: a tuple of the names under which a table may refer to a tensor of the state.
  // `slots[i]`: where the address of parameter i's gradient goes; 0: the parameter has no row in any table;
  // -1: it has one, but Python reads it (complex).
  // `grad_dtypes[i]`: the torch.dtype that the table expects of its gradient, or None.
  // `params_per_thread`: how many are worth another thread's while. torch wakes all that it has, each of which takes an
  // eighth as many.
  // Throws std::invalid_argument when a tensor cannot be read.
  TensorWatch(PyObject* param_groups, PyObject* state, PyObject* state_keys, const std::vector<int64_t>& slots,
              const std::vector<PyObject*>& grad_dtypes, int64_t params_per_thread);
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

  // How many threads had a part in the last sweep.
  int64_t parts() const { return parts_; }

 private:
  using TensorImpl = c10::TensorImpl;
  using OwnedTensor = c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>;
  using WeakTensor = c10::weak_intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>;

  struct Sharding {                 // of a DTensor
    PyObject* spec = nullptr;       // owned
    PyObject* grad_spec = nullptr;  // owned: its last gradient's, which says the same
    // Hints: the wrapper's implementation, which is only asked for its gradient, and the shard's object; of the
    // gradient the wrapper's object, the shard's, and its implementation.
    const void* wrapper = nullptr;
    const void* local = nullptr;
    const void* grad_object = nullptr;
    const void* grad_local = nullptr;
    const void* grad_impl = nullptr;
  };
  struct Param {
    PyObject* object = nullptr;  // borrowed and compared only, unless is_held
    TensorImpl* grad = nullptr;  // the last gradient: owned if is_held, else a hint
    int64_t* slot = nullptr;     // where its gradient's address goes, or nullptr
    Place place;
    c10::DispatchKeySet keys;
    // Hints: whose memory it is, the last gradient's, and what counts versions.
    const void* impl = nullptr;
    const void* storage = nullptr;
    const void* autograd = nullptr;
    const void* grad_storage = nullptr;
    const void* version = nullptr;
    std::unique_ptr<Sharding> sharding;  // nullptr where it is no DTensor
    uint32_t layout = 0;                 // where its sizes and then its strides begin in layouts_
    uint16_t ndim = 0;
    uint8_t grad_itemsize = 0;
    bool has_row : 1 = false;        // in a table
    bool reads_suffice : 1 = false;  // read_quickly() may look at it
    bool plain_grad : 1 = false;     // its type reads .grad as torch.Tensor does
    bool is_empty : 1 = false;
    bool is_left : 1 = false;  // in a sweep: to read_param()
    bool is_held : 1 = false;  // between sweep() and release(): it has a gradient, and both are owned
    caffe2::TypeMeta dtype;
    caffe2::TypeMeta grad_dtype;
    c10::Device device = c10::kCPU;
  };
  struct StateItem {  // one tensor of a parameter's state
    // Keeps the implementation's address from being used anew, not the memory it points to.
    WeakTensor impl;
    PyObject* object;  // borrowed: looked into only where a dict is known to hold it
    Place place;
    int64_t numel;
    // Hints: whose memory it is.
    const void* memory;
    const void* storage;
    caffe2::TypeMeta dtype;
    bool is_sharded;   // a DTensor
    bool is_readable;  // false where only the tensor's identity counts (complex)
  };
  struct StateEntry {
    PyObject* key = nullptr;  // borrowed, compared only
    bool watched = false;
    size_t begin = 0, end = 0;  // its items in state_items_
  };
  struct Group {
    size_t begin = 0, size = 0;          // its parameters in params_
    PyObject* const* objects = nullptr;  // borrowed: of its list, in a sweep, while nothing of Python's has run
  };
  enum class Grad { kFits, kNeedsPython, kChanged };
  using Layouts = std::map<std::vector<int64_t>, uint32_t>;  // where each begins in layouts_

  void snapshot_params(PyObject* param_groups, const std::vector<int64_t>& slots,
                       const std::vector<PyObject*>& grad_dtypes);
  void snapshot_memory(Param* param, Layouts* known);
  uint32_t layout_of(const TensorImpl* impl, Layouts* known);
  void snapshot_state(PyObject* state, PyObject* state_keys);
  void guard_state(PyObject* state);
  static void hold(Param* param, PyObject* object, const at::Tensor& grad);
  static void let_go(Param* param);
  void drop();
  bool find_grad(const Param& param, PyObject* object, at::Tensor* grad) const;
  static void prefetch_param(const Param& param);
  bool is_sharded_alike(Sharding* sharding, PyObject* grad) const;
  bool has_sizes(const Param& param, const TensorImpl* tensor) const;
  bool has_strides(const Param& param, const TensorImpl* tensor) const;
  bool has_same_memory(const Param& param, const TensorImpl* local) const;
  static bool has_alike_keys(const Param& param, const TensorImpl* grad);
  Grad compare(const Param& param, const TensorImpl* grad) const;
  Grad write_address(Param* param, const TensorImpl* grad) const;
  Grad read_dtensor_grad(Param* param, PyObject* object, const at::Tensor& grad) const;
  bool find_shards(Param* param, PyObject* object, const TensorImpl** local, const TensorImpl** grad) const;
  bool read_quickly(Param* param, PyObject* object) const;
  bool read_param(size_t index, PyObject* object, std::vector<int64_t>* odd);
  PyObject* list_of(PyObject* param_groups, size_t index) const;
  bool find_lists(PyObject* param_groups);
  bool read_params(size_t begin, size_t end);
  bool read_left_params(PyObject* param_groups, std::vector<int64_t>* odd);
  static bool has_place(const StateItem& seen, const TensorImpl* impl);
  bool item_unchanged(const StateItem& seen, PyObject* item) const;
  bool items_unchanged(size_t begin, size_t end) const;
  bool entries_unchanged(PyObject* state) const;
  bool look_through(PyObject* state);
  bool all_unchanged(PyObject* param_groups, PyObject* state, std::vector<int64_t>* odd);

  int64_t params_per_thread_;
  DTensorReader dtensors_;
  PyObject* grad_descriptor_ = nullptr;  // owned
  std::vector<Group> groups_;
  std::vector<Param> params_;
  std::vector<int64_t> layouts_;
  std::vector<StateEntry> state_;
  std::vector<StateItem> state_items_;
  std::vector<PyObject*> state_names_;     // owned, of each item
  std::vector<const void*> state_locals_;  // hints: shards' objects, as far as any item is a DTensor
  const PyObject* guarded_ = nullptr;      // the state that guard_ is of, compared only
  DictGuard<DictsOf::kState> guard_;
  bool has_properties_ = false;  // named grad, which may run anybody's code
  bool is_holding_ = false;      // anything, between sweep() and release()
  std::atomic<int64_t> parts_{0};
  Ref str_grad_{PyUnicode_InternFromString("grad")};
  Ref str_params_{PyUnicode_InternFromString("params")};
};

}  // namespace adamw_kernels
