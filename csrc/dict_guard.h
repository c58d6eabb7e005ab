// Whether any of some dicts was written since they were last looked through: what CPython itself keeps account of, at
// a load a dict or less, where walking through a dict takes hundreds of instructions and four cache lines.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adamw_kernels {

// What the dicts are of. Only from 3.12 on is the answer one for all of a kind: what is written on every step (a
// schedule's learning rate) must not count as a change of what is not.
enum class DictsOf { kState, kGroups };

#if PY_VERSION_HEX < 0x030C0000

// Until CPython 3.11 every dict holds a number that no other content of any dict ever had (PEP 509).
template <DictsOf>
class DictGuard {
 public:
  // Before the dict is read. It must not be freed while all added before it are unwritten, or the caller must know that
  // it is the same object.
  void add(PyObject* dict) { seen_.push_back({reinterpret_cast<PyDictObject*>(dict), version_of(dict)}); }

  // Whether all are as they were. Dicts are looked at in the order of their addition, none after one that was written.
  bool is_unwritten() const {
    constexpr size_t kAhead = 8;
    for (size_t k = 0; k < seen_.size(); ++k) {
      if (k + kAhead < seen_.size()) __builtin_prefetch(seen_[k + kAhead].dict);
      if (seen_[k].dict->ma_version_tag != seen_[k].version) return false;
    }
    return true;
  }

  void clear() { seen_.clear(); }

 private:
  struct Seen {
    const PyDictObject* dict;
    uint64_t version;
  };

  static uint64_t version_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }

  std::vector<Seen> seen_;
};

#else

// From 3.12 on it calls whoever asked before a dict is written or freed. One count serves all guards of the process:
// no warm step writes an optimizer's state, and whoever finds it counted up looks through its own dicts once.
template <DictsOf>
class DictGuard {
 public:
  // Before the dict is read.
  void add(PyObject* dict) {
    if (watcher() < 0) {
      can_tell_ = false;
    } else if (PyDict_Watch(watcher(), dict) != 0) {
      PyErr_Clear();
      can_tell_ = false;
    }
  }

  bool is_unwritten() const { return can_tell_ && writes_ == num_writes(); }

  void clear() {
    writes_ = num_writes();
    can_tell_ = true;
  }

 private:
  static uint64_t& num_writes() {
    static uint64_t count = 0;
    return count;
  }

  static int count_write(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
    ++num_writes();
    return 0;
  }

  // Of the interpreter's eight; negative where others took them all.
  static int watcher() {
    static const int id = [] {
      const int added = PyDict_AddWatcher(count_write);
      if (added < 0) PyErr_Clear();
      return added;
    }();
    return id;
  }

  uint64_t writes_ = num_writes();
  bool can_tell_ = true;
};

#endif

}  // namespace adamw_kernels
