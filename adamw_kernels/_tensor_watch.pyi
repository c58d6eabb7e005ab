from collections.abc import Mapping, Sequence
from typing import Any

import torch

torch_version: str

class TensorWatch:
    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
        state_keys: Sequence[str],
        slots: Sequence[int],
        grad_dtypes: Sequence[torch.dtype | None],
        params_per_thread: int,
    ) -> None: ...
    def sweep(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> tuple[int, ...] | None: ...
    def bump_versions(self) -> None: ...
    def release(self) -> None: ...
    @property
    def parts(self) -> int: ...

class GroupGuard:
    def remember(self, groups: list[dict[str, Any]]) -> None: ...
    def are_unwritten(self, groups: list[dict[str, Any]]) -> bool: ...

def is_recording() -> bool: ...
