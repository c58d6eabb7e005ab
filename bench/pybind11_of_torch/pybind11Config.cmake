# pybind11 from the headers that torch brings along, for machines without a network and without a pybind11 of their own:
# cmake -Dpybind11_DIR=bench/pybind11_of_torch. As much of its `pybind11_add_module` as CMakeLists.txt uses.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch.utils; import pathlib; print(pathlib.Path(torch.__file__).parent / 'include')"
  OUTPUT_VARIABLE pybind11_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT EXISTS "${pybind11_INCLUDE_DIR}/pybind11/pybind11.h")
  set(pybind11_FOUND FALSE)
  set(pybind11_NOT_FOUND_MESSAGE "this torch brings no pybind11 headers along")
  return()
endif()

function(pybind11_add_module name)
  set(sources ${ARGN})
  list(REMOVE_ITEM sources MODULE NO_EXTRAS)
  Python_add_library(${name} MODULE WITH_SOABI ${sources})
  target_include_directories(${name} SYSTEM PRIVATE "${pybind11_INCLUDE_DIR}")
endfunction()
