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
  // -1: it has one, but Python reads it (complex, DTensor: what DLPack does not describe).
  // `grad_dtypes[i]`: the DLPack dtype (code | bits << 8) that the table expects of its gradient.
  // Throws std::invalid_argument when a tensor cannot be read.
  TensorWatch(PyObject* exchange_capsule, PyObject* tensor_type, PyObject* param_groups, PyObject* state,
              const std::vector<int64_t>& slots, const std::vector<int64_t>& grad_dtypes);
  ~TensorWatch();
  TensorWatch(const TensorWatch&) = delete;
  TensorWatch& operator=(const TensorWatch&) = delete;

  // Writes every slot: the gradient's address, or 0 where there is none. Returns None if anything but the
  // gradients' addresses changed, else (params, grads, odd): the parameters with a gradient, those gradients,
  // and the positions within these lists that Python must look at (another layout, slot -1). New reference;
  // nullptr with a Python error set on failure.
  PyObject* sweep(PyObject* param_groups, PyObject* state);

 private:
  struct Seen {  // one state tensor, as it was
    PyObject* weakref = nullptr;
    void* data = nullptr;
    uint32_t dtype = 0;
  };
  struct Param {
    PyObject* object = nullptr;  // borrowed, compared only
    void* data = nullptr;
    uint32_t dtype = 0;
    dlpack::Device device = {};
    int64_t slot = 0;
    uint32_t grad_dtype = 0;
    int64_t numel = 0;
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
  };
  struct StateEntry {
    PyObject* key = nullptr;  // borrowed, compared only
    bool readable = false;
    Seen tensors[4];
  };

  bool read(PyObject* tensor, dlpack::Tensor* out) const;
  Seen see(PyObject* tensor, const dlpack::Tensor& view) const;
  bool unchanged(const Seen& seen, PyObject* tensor, bool readable) const;
  bool params_unchanged(PyObject* param_groups, PyObject* params, PyObject* grads, PyObject* odd) const;
  bool state_unchanged(PyObject* state) const;

  const dlpack::ExchangeApi* api_;
  PyTypeObject* tensor_type_;
  std::vector<int64_t> group_sizes_;
  std::vector<Param> params_;
  std::vector<StateEntry> state_;
  PyObject* str_grad_;
  PyObject* str_params_;
  PyObject* str_is_neg_;
  PyObject* str_state_[4];
};

}  // namespace adamw_kernels
