from collections.abc import Mapping, Sequence
from typing import Any

import torch

cuda_architectures: str
cuda_build: str

def layout() -> dict[str, Any]: ...
def cpu_isas() -> list[tuple[str, bool]]: ...
def cpu_step(table: int, stages: int, isa: int, num_threads: int) -> None: ...
def cuda_step(table: int, stages: int, batches: int, num_batches: int, stream: int) -> None: ...
def cuda_load(batches: int, num_batches: int) -> None: ...

class TensorWatch:
    def __init__(
        self,
        exchange: object,
        tensor_type: type,
        param_groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
        slots: Sequence[int],
        grad_dtypes: Sequence[int],
        address_function: int,
    ) -> None: ...
    def sweep(
        self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]] | None: ...
