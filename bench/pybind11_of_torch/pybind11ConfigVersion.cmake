# 3.0 in torch 2.11 to 2.13; pybind11Config.cmake looks whether it is there at all.
set(PACKAGE_VERSION "3.0")
set(PACKAGE_VERSION_COMPATIBLE TRUE)
