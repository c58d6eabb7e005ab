// The host's half of a warm step: read every gradient's address, and notice anything else that changed.
//
// A launch table holds raw addresses. They may be used again only while every parameter is the same object
// at the same address with the same dtype and layout, and every state tensor too. A watch remembers all that
// when the table is built, keeps nothing alive, and compares it on each step. State tensors are remembered by
// weak reference, parameters by identity: torch.utils.swap_tensors (`module.to()` of DTensors) refuses a tensor
// that has weak references. A new parameter at an old one's address finds no state there, or fits in all else.
// `adamw_kernels/tensor_watch.py` holds the twin in Python for use without the compiled module.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "dlpack_exchange.h"

namespace adamw_kernels {

class TensorWatch {
 public:
  // `slots[i]`: where the address of parameter i's gradient goes; 0: the parameter has no row in any table;
  // -1: it has one, but Python reads it (complex: what DLPack does not describe as the kernels read it).
  // `grad_dtypes[i]`: the DLPack dtype (code | bits << 8) that the table expects of its gradient.
  // `address_function`: of a C function that returns a tensor object's address, which torch publishes for the code that
  // its compiler generates; 0: there is none, and the method data_ptr is called, which takes ten times as many
  // instructions. Not used unless it agrees with the method on every state tensor.
  // Throws std::invalid_argument when a tensor cannot be read.
  TensorWatch(PyObject* exchange_capsule, PyObject* tensor_type, PyObject* param_groups, PyObject* state,
              const std::vector<int64_t>& slots, const std::vector<int64_t>& grad_dtypes, int64_t address_function);
  ~TensorWatch();
  TensorWatch(const TensorWatch&) = delete;
  TensorWatch& operator=(const TensorWatch&) = delete;

  // Writes every slot: the gradient's address, or 0 where there is none. Returns None if anything but the
  // gradients' addresses changed, else (params, grads, odd): the parameters with a gradient, those gradients,
  // and the positions within these lists that Python must look at (another layout or sharding, slot -1). New reference;
  // nullptr with a Python error set on failure.
  PyObject* sweep(PyObject* param_groups, PyObject* state);

 private:
  struct Param {
    PyObject* object = nullptr;  // borrowed, compared only
    const void* hint = nullptr;  // see prefetch()
    void* data = nullptr;
    int64_t slot = 0;
    int64_t numel = 0;
    size_t layout = 0;  // where its sizes and then its strides begin in layouts_
    int32_t ndim = 0;
    uint32_t dtype = 0;
    uint32_t grad_dtype = 0;
    bool plain_grad = false;        // its type reads .grad as torch.Tensor does
    PyObject* spec = nullptr;       // owned: how a DTensor is sharded; nullptr for any other tensor
    PyObject* grad_spec = nullptr;  // owned: how its last gradient was, which is the same sharding
    dlpack::Device device = {};
  };
  struct StateItem {              // one tensor of a parameter's state
    bool is_sharded = false;      // a DTensor
    PyObject* key = nullptr;      // owned
    PyObject* object = nullptr;   // borrowed, a hint like the next
    const void* hint = nullptr;   // see prefetch()
    PyObject* weakref = nullptr;  // owned
    void* data = nullptr;         // nullptr where only the tensor's identity counts (complex, empty)
  };
  struct StateEntry {
    PyObject* key = nullptr;  // borrowed, compared only
    bool watched = false;
    size_t begin = 0, end = 0;  // its items in state_items_
  };

  void check(PyObject* exchange_capsule, const std::vector<int64_t>& slots, const std::vector<int64_t>& grad_dtypes);
  void snapshot(PyObject* param_groups, PyObject* state, const std::vector<int64_t>& slots,
                const std::vector<int64_t>& grad_dtypes);
  void learn(PyTypeObject* dtensor_type);
  void release();
  bool read(PyObject* tensor, dlpack::Tensor* out) const;
  void* data_of(PyObject* tensor, bool is_sharded) const;
  void* data_by_method(PyObject* tensor) const;
  PyObject* local_of(PyObject* tensor, bool is_sharded) const;
  PyObject* spec_of(PyObject* tensor) const;
  PyObject* slot_of(PyObject* tensor, PyMemberDef* slot, PyObject* name) const;
  PyObject* grad_of(const Param& param, PyObject* object) const;
  bool is_sharded_alike(Param* param, PyObject* grad) const;
  bool params_unchanged(PyObject* param_groups, PyObject* params, PyObject* grads, PyObject* odd);
  bool state_unchanged(PyObject* state) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  PyTypeObject* tensor_type_;
  // Tensor.data_ptr and Tensor.grad, called without the interpreter's look-ups.
  PyCFunction data_ptr_ = nullptr;
  void* (*address_function_)(PyObject*) = nullptr;
  PyObject* grad_descriptor_ = nullptr;  // owned
  // The type of the first DTensor that was seen, and where its objects keep their shard and their spec.
  PyTypeObject* dtensor_type_ = nullptr;
  PyMemberDef* local_slot_ = nullptr;
  PyMemberDef* spec_slot_ = nullptr;
  std::vector<int64_t> group_sizes_;
  std::vector<Param> params_;
  std::vector<int64_t> layouts_;
  std::vector<StateEntry> state_;
  std::vector<StateItem> state_items_;
  PyObject* str_grad_;
  PyObject* str_params_;
  PyObject* str_is_neg_;
  PyObject* str_local_tensor_;
  PyObject* str_spec_;
  PyObject* str_mesh_;
  PyObject* str_placements_;
};

}  // namespace adamw_kernels
