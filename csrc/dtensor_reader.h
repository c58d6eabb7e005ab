// Where a DTensor keeps its shard and how it is sharded.
#pragma once

#include <structmember.h>

#include "tensor_memory.h"

namespace adamw_kernels {

class DTensorReader {
 public:
  DTensorReader()
      : local_tensor_(PyUnicode_InternFromString("_local_tensor")),
        spec_(PyUnicode_InternFromString("_spec")),
        mesh_(PyUnicode_InternFromString("mesh")),
        placements_(PyUnicode_InternFromString("placements")) {}

  bool is_sharded(PyObject* tensor) const { return PyObject_HasAttr(tensor, local_tensor_.get()) != 0; }

  // Remembers where objects of this type keep both. The first type that is seen is: there is one.
  void learn(PyTypeObject* type) {
    if (type_ != nullptr) return;
    type_ = type;  // which outlives us, like every class of torch
    const auto offset = [&](PyObject* name) -> Py_ssize_t {
      const Ref descriptor(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name));
      if (!descriptor) PyErr_Clear();
      if (!descriptor || Py_TYPE(descriptor.get()) != &PyMemberDescr_Type) return 0;
      const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.get())->d_member;
      return member->type == T_OBJECT_EX ? member->offset : 0;
    };
    local_offset_ = offset(local_tensor_.get());
    spec_offset_ = offset(spec_.get());
  }

  // A new reference; nullptr with no Python error set where the shard is not a plain tensor (a collective still under
  // way).
  PyObject* local_of(PyObject* tensor) const {
    PyObject* local = read(tensor, local_offset_, local_tensor_.get());
    if (local != nullptr && !THPVariable_CheckExact(local)) Py_CLEAR(local);
    return local;
  }

  // A new reference; nullptr with no Python error set where it does not say.
  PyObject* spec_of(PyObject* tensor) const { return read(tensor, spec_offset_, spec_.get()); }

  // The same by reads alone, a borrowed reference; nullptr where local_of() must be asked.
  PyObject* peek_local(PyObject* tensor) const {
    PyObject* local = peek(tensor, local_offset_);
    return local != nullptr && THPVariable_CheckExact(local) ? local : nullptr;
  }
  PyObject* peek_spec(PyObject* tensor) const { return peek(tensor, spec_offset_); }

  // Whether both say the same mesh and placements.
  bool are_alike(PyObject* spec, PyObject* other) const {
    for (PyObject* name : {mesh_.get(), placements_.get()}) {
      const Ref a(PyObject_GetAttr(spec, name)), b(PyObject_GetAttr(other, name));
      if (!a || !b || PyObject_RichCompareBool(a.get(), b.get(), Py_EQ) != 1) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }

 private:
  // An attribute: read where the type keeps it, or, for another type, by name.
  PyObject* read(PyObject* tensor, Py_ssize_t offset, PyObject* name) const {
    PyObject* seen = peek(tensor, offset);
    if (seen != nullptr) return Py_NewRef(seen);
    PyObject* value = PyObject_GetAttr(tensor, name);
    if (value == nullptr) PyErr_Clear();
    return value;
  }

  PyObject* peek(PyObject* tensor, Py_ssize_t offset) const {
    if (offset == 0 || Py_TYPE(tensor) != type_) return nullptr;
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset);
  }

  PyTypeObject* type_ = nullptr;
  Py_ssize_t local_offset_ = 0;
  Py_ssize_t spec_offset_ = 0;
  Ref local_tensor_, spec_, mesh_, placements_;
};

}  // namespace adamw_kernels
