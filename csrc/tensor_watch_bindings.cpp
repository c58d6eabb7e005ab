// The module _tensor_watch: what a warm step asks of the torch that it was built with.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "group_guard.h"
#include "tensor_watch.h"

namespace adamw_kernels {

PYBIND11_MODULE(_tensor_watch, m) {
  m.doc() = "The warm step's look at every tensor, for the torch it was built with.";
  m.attr("torch_version") = ADAMW_KERNELS_TORCH;
  py::class_<TensorWatch>(m, "TensorWatch",
                          "Remembers every tensor as it is now; sweep() reads the gradients' addresses and tells "
                          "whether anything else changed.")
      .def(py::init([](const py::list& param_groups, const py::dict& state, const py::tuple& state_keys,
                       const std::vector<int64_t>& slots, const py::list& grad_dtypes, int64_t params_per_thread) {
             std::vector<PyObject*> dtypes;
             for (const py::handle dtype : grad_dtypes) dtypes.push_back(dtype.ptr());
             return new TensorWatch(param_groups.ptr(), state.ptr(), state_keys.ptr(), slots, dtypes,
                                    params_per_thread);
           }),
           py::arg("param_groups"), py::arg("state"), py::arg("state_keys"), py::arg("slots"), py::arg("grad_dtypes"),
           py::arg("params_per_thread"))
      .def(
          "sweep",
          [](TensorWatch& watch, const py::object& param_groups, const py::object& state) {
            PyObject* result = watch.sweep(param_groups.ptr(), state.ptr());
            if (result == nullptr) throw py::error_already_set();
            return py::reinterpret_steal<py::object>(result);
          },
          py::arg("param_groups"), py::arg("state"),
          "Writes every slot. None if anything but gradients' addresses changed, else the positions to look at.")
      .def("bump_versions", &TensorWatch::bump_versions, "Tells autograd that the last sweep's parameters are written.")
      .def("release", &TensorWatch::release, "Lets the last sweep's tensors go.")
      .def_property_readonly("parts", &TensorWatch::parts, "How many threads had a part in the last sweep.");
  py::class_<GroupGuard>(m, "GroupGuard", "Tells whether an optimizer's groups were written since they were read.")
      .def(py::init<>())
      .def(
          "remember", [](GroupGuard& guard, const py::object& groups) { guard.remember(groups.ptr()); },
          py::arg("groups"), "Before they are read.")
      .def(
          "are_unwritten",
          [](const GroupGuard& guard, const py::object& groups) { return guard.are_unwritten(groups.ptr()); },
          py::arg("groups"), "Whether these are the same groups, and no option of theirs was written.");
  m.def("is_recording", &at::hasCallbacks, "Whether a profiler, or any other observer of torch's operators, listens.");
}

}  // namespace adamw_kernels
