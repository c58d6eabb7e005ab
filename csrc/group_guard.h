// Whether an optimizer's parameter groups were written since their options were read.
#pragma once

#include <vector>

#include "dict_guard.h"
#include "tensor_memory.h"

namespace adamw_kernels {

class GroupGuard {
 public:
  // Before the options are read.
  void remember(PyObject* groups) {
    guard_.clear();
    groups_.clear();
    can_tell_ = PyList_Check(groups);
    if (!can_tell_) return;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
      PyObject* group = PyList_GET_ITEM(groups, g);
      can_tell_ = can_tell_ && PyDict_Check(group) && has_constants(group);
      if (!can_tell_) return;
      guard_.add(group);
      groups_.push_back(group);
    }
  }

  bool are_unwritten(PyObject* groups) const {
    if (!can_tell_ || !PyList_Check(groups) || PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) {
      return false;
    }
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g)) != groups_[g]) return false;
    }
    return guard_.is_unwritten();
  }

 private:
  // Whether a value can change only by the dict's being written: not so of a list of betas, say. What a tensor holds
  // is no matter of this guard, and a group's list of parameters is the watch's.
  static bool is_constant(PyObject* value) {
    if (value == Py_None || PyFloat_CheckExact(value) || PyLong_Check(value) || PyUnicode_CheckExact(value))
      return true;
    if (THPVariable_CheckExact(value)) return true;
    if (!PyTuple_CheckExact(value)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!is_constant(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }

  static bool has_constants(PyObject* group) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(group, &position, &key, &value)) {
      if (is_constant(value)) continue;
      const bool is_list_of_params =
          PyUnicode_Check(key) && (PyUnicode_CompareWithASCIIString(key, "params") == 0 ||
                                   PyUnicode_CompareWithASCIIString(key, "param_names") == 0);
      if (!is_list_of_params) return false;
    }
    return true;
  }

  std::vector<PyObject*> groups_;  // borrowed, compared only
  DictGuard<DictsOf::kGroups> guard_;
  bool can_tell_ = false;
};

}  // namespace adamw_kernels
