// The pybind11 layer: unpack, check, call, throw. Tensors arrive as raw addresses; dtypes, devices,
// layouts and lifetimes were checked by Python when the launch table was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu.h"
#include "launch_table.h"
#include "moments8.h"
#ifdef ADAMW_KERNELS_CUDA
#include "cuda_step.h"
#endif

namespace py = pybind11;
using namespace adamw_kernels;

namespace {

// What adamw_kernels/launch_table.py must agree with, by name.
py::dict layout() {
  py::dict result;
  result["tensor_row_bytes"] = sizeof(TensorRow);
  result["hyper_row_bytes"] = sizeof(HyperRow);
  result["coefficient_row_bytes"] = kCoefficientRowBytes;
  result["launch_table_bytes"] = sizeof(LaunchTable);
  result["amsgrad"] = kAmsgrad;
  result["maximize"] = kMaximize;
  result["l2"] = kL2;
  result["float64"] = kFloat64;
  result["cautious"] = kCautious;
  result["cautious_decay"] = kCautiousDecay;
  result["clip"] = kClip;
  result["ema"] = kEma;
  result["ema_bfloat16"] = kEmaBfloat16;
  result["ema_warmup"] = kEmaWarmup;
  result["bound"] = kBound;
  result["schedule_decay"] = kScheduleDecay;
  result["sgd"] = kSgd;
  result["momentum"] = kMomentum;
  result["nesterov"] = kNesterov;
  result["lr_in_momentum"] = kLrInMomentum;
  result["param_format_shift"] = kParamFormatShift;
  result["moment_format_shift"] = kMomentFormatShift;
  result["group"] = kGroup;
  result["param_dtype_shift"] = kParamDtypeShift;
  result["grad_dtype_shift"] = kGradDtypeShift;
  result["dtype_codes"] = py::make_tuple<py::return_value_policy::copy>(
      static_cast<int64_t>(kF32), static_cast<int64_t>(kBF16), static_cast<int64_t>(kF16), static_cast<int64_t>(kF64));
  result["from_float32"] = kFromFloat32;
  result["from_float64"] = kFromFloat64;
  result["chunk_tensor_shift"] = kChunkTensorShift;
  result["key_offset"] = kKeyOffset;
  result["norm_chunk"] = kNormChunk;
  result["norm_lanes"] = kNormLanes;
  result["norm_domain_bytes"] = sizeof(NormDomain);
  result["signals_bytes"] = sizeof(Signals);
  result["decision_norms_offset"] = offsetof(Decision, norms);
  result["measure"] = kMeasure;
  result["decide"] = kDecide;
  result["update"] = kUpdate;
  return result;
}

void step_on_cpu(int64_t table, int64_t stages, int isa, int num_threads) {
  if (table == 0) throw std::invalid_argument("table: address 0");
  const auto isas = cpu_isas();
  if (isa < 0 || isa >= static_cast<int>(isas.size()) || !isas[isa].supported) {
    throw std::invalid_argument("isa: " + std::to_string(isa) + " is not one that this CPU runs; see cpu_isas()");
  }
  if (num_threads < 1) throw std::invalid_argument("num_threads: " + std::to_string(num_threads) + " < 1");
  const py::gil_scoped_release release;
  cpu_step(reinterpret_cast<const void*>(table), stages, isa, num_threads);
}

#ifdef ADAMW_KERNELS_CUDA
void throw_on(int error) {
  if (error == 0) return;
  throw std::runtime_error("CUDA kernels cannot be launched: " + std::string(cuda_error_string(error)) +
                           " (cudaError_t " + std::to_string(error) + ")");
}

void step_on_cuda(int64_t table, int64_t stages, int64_t batches, int64_t num_batches, int64_t stream) {
  if (table == 0) throw std::invalid_argument("table: address 0");
  const py::gil_scoped_release unlocked;  // a full launch queue makes the host wait
  throw_on(cuda_step(reinterpret_cast<const void*>(table), stages, reinterpret_cast<const CudaBatch*>(batches),
                     num_batches, stream));
}

void load_on_cuda(int64_t batches, int64_t num_batches) {
  throw_on(cuda_load(reinterpret_cast<const CudaBatch*>(batches), num_batches));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of adamw_kernels: raw addresses in, no torch inside.";

  m.def("layout", &layout, "The launch table's layout: sizes in bytes, flag bits and dtype codes.");
  m.def(
      "cpu_isas",
      [] {
        py::list result;
        for (const CpuIsa& isa : cpu_isas()) result.append(py::make_tuple(isa.name, isa.supported));
        return result;
      },
      "(name, whether this CPU runs it) of every ISA compiled in, best last.");
  m.def("cpu_step", &step_on_cpu, py::arg("table"), py::arg("stages"), py::arg("isa"), py::arg("num_threads"),
        "Stages of a step over the launch table at address `table`; `isa` is a position in cpu_isas().");

#ifdef ADAMW_KERNELS_CUDA
  m.attr("cuda_architectures") = ADAMW_KERNELS_CUDA;
  m.def("cuda_step", &step_on_cuda, py::arg("table"), py::arg("stages"), py::arg("batches"), py::arg("num_batches"),
        py::arg("stream"),
        "Stages of a step over the launch table at host address `table`, asynchronous on `stream`, a cudaStream_t.");
  m.def("cuda_load", &load_on_cuda, py::arg("batches"), py::arg("num_batches"),
        "Loads every kernel that these batches launch; throws where one cannot run on the current device.");
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("cuda_build") = ADAMW_KERNELS_CUDA_OUTCOME;
}
