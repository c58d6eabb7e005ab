// What of a torch tensor tells whether an address read from it may be used again, read as torch's own inlined accessors
// do: a few loads each. Only for what is compiled against torch, and runs with exactly that torch.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstddef>
#include <cstdint>

namespace adamw_kernels {

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

inline c10::TensorImpl* impl_of(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

inline c10::StorageImpl* storage_of(const c10::TensorImpl* tensor) {
  return tensor->unsafe_storage().unsafeGetStorageImpl();
}

// A tensor's .grad, undefined where it has none; without the two calls by which torch looks it up.
inline const at::Tensor& grad_of(const c10::TensorImpl* tensor) {
  static const at::Tensor none;
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(tensor->autograd_meta());
  return meta == nullptr ? none : meta->grad_;
}

// Where a tensor's memory begins, and how far into it the tensor does. Compared as it is, it tells an address without
// the size of an element, which torch looks up.
struct Place {
  char* storage = nullptr;  // nullptr where it was released, or has none
  int64_t offset = 0;       // in elements

  bool operator==(const Place& other) const { return storage == other.storage && offset == other.offset; }
};

// Throws where the memory cannot be written.
[[gnu::always_inline]] inline Place place_of(const c10::TensorImpl* tensor) {
  return {static_cast<char*>(storage_of(tensor)->mutable_data()), tensor->storage_offset()};
}

// What two tensors' keys must agree in to be read alike: the device's kind and the layout, and that neither is lazily
// negated or conjugated, or a wrapper around others. Whether autograd follows them does not matter.
inline c10::DispatchKeySet memory_keys(c10::DispatchKeySet keys) {
  return keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
}

// A step over thousands of tensors touches more memory than a cache holds: what is compared is fetched ahead, one line
// of 64 bytes at a time. These addresses are hints, which may have been freed, and are never dereferenced.
inline void prefetch(const void* address) { __builtin_prefetch(address); }

inline void prefetch(const void* object, size_t size) {
  for (size_t byte = 0; byte < size; byte += 64) prefetch(static_cast<const char*>(object) + byte);
  prefetch(static_cast<const char*>(object) + size - 1);
}

// Of a storage, its address and whether it may be written lie in its first 64 bytes.
inline void prefetch_storage(const void* storage) { prefetch(storage, 64); }

// Of a tensor, only where it begins and of what dtype it is: the first words, and those behind sizes and strides.
inline void prefetch_place(const void* impl) {
  constexpr size_t kBehindSizes = sizeof(c10::TensorImpl) - sizeof(c10::DispatchKeySet) - 32;
  prefetch(impl, 56);
  prefetch(static_cast<const char*>(impl) + kBehindSizes, 32);
}

// Where a tensor's versions are counted.
inline const void* version_hint(const c10::TensorImpl* impl) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*), "a pointer to a count");
  return *reinterpret_cast<void* const*>(&impl->version_counter());
}

}  // namespace adamw_kernels
