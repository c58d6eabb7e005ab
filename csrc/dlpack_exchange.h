// The part of the DLPack 1.x C exchange API that reads a tensor's address, dtype, device and layout.
//
// torch.Tensor publishes it as the capsule `__dlpack_c_exchange_api__`; it is a stable C ABI, so reading a
// tensor needs neither torch's headers nor its libraries, and takes some ten nanoseconds.
// Source: the DLPack specification, C exchange API (dlpack.h, DLPackExchangeAPI).
#pragma once

#include <stdint.h>

namespace adamw_kernels {
namespace dlpack {

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// A borrowed view: valid while the tensor is alive and unchanged. Strides are in elements.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Returns 0, or -1 with a Python error set (a sparse tensor, say).
  int (*tensor_from_py_object)(void* object, Tensor* out);
  void* current_work_stream;
};

constexpr char kCapsuleName[] = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

}  // namespace dlpack
}  // namespace adamw_kernels
