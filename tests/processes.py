"""Tests that need several processes: gloo ranks on this machine, started once for all scenarios of a file.

    SCENARIOS = Scenarios(__file__, world=2, limit_s=60)

    @SCENARIOS
    def parameters_agree(rank: int) -> None:
        ...

    test_two_processes = SCENARIOS.test()

    if __name__ == "__main__":
        SCENARIOS.main()

Every scenario runs in a process group of its own, and is a test of its own that shows what its ranks raised. One that
hangs is ended by the group's time-out; the ranks' files tell which it was.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


class Scenarios:
    """Functions of a rank that a number of processes run one after another."""

    def __init__(self, file: str, world: int, limit_s: float, scenario_limit_s: float = 30.0) -> None:
        """Nothing is started yet.

        Args:
            file: the test file, which the ranks run as a program.
            world: how many.
            limit_s: for all scenarios together.
            scenario_limit_s: time-out of a scenario's process group: whoever waits longer for another rank raises.
        """
        self.file = file
        self.world = world
        self.limit_s = limit_s
        self.scenario_limit_s = scenario_limit_s
        self.functions: dict[str, Callable[[int], None]] = {}
        self._raised: dict[str, list[str]] | None = None
        self._worlds: Iterator[pathlib.Path] = iter(())  # where processes find each other, in this scenario

    def __call__(self, function: Callable[[int], None]) -> Callable[[int], None]:
        """Run it in every process; it is given the rank."""
        self.functions[function.__name__] = function
        return function

    # --- in each process ----------------------------------------------------------------------------------------------

    def main(self) -> None:
        """Be one rank: run every scenario, and write what each raised to a file of this rank."""
        rank, directory = int(sys.argv[1]), pathlib.Path(sys.argv[2])
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # pages of them, of torch's own deprecations
        raised: dict[str, str] = {}
        for name, function in self.functions.items():
            self._worlds = (directory / f"{name}-{n}" for n in itertools.count())
            raised[name] = "did not end"
            self._write(directory, rank, raised)
            try:
                self._join(next(self._worlds), rank, self.world)
                function(rank)
                raised[name] = ""
            except (Exception, CheckpointException):  # which is none
                raised[name] = traceback.format_exc()
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()  # who waits for this rank learns that it will not come
            self._write(directory, rank, raised)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort a process that ends by itself (torch 2.13, without us too)

    def _join(self, store: pathlib.Path, rank: int, world: int) -> None:
        timeout = timedelta(seconds=self.scenario_limit_s)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
        dist.barrier()  # who leaves, for want of anything to do, while another is still connecting, cuts it off

    def in_world(self, size: int, function: Callable[[], T]) -> T | None:
        """Within a scenario, in all its processes: run a function in the first ones, as a world of this size.

        Returns what it returns; None in the other processes, which wait.
        """
        rank = dist.get_rank()

        def join(ranks: int) -> None:
            store = next(self._worlds)
            if rank < ranks:
                self._join(store, rank, ranks)

        dist.destroy_process_group()
        try:
            join(size)
            return function() if rank < size else None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            join(self.world)

    @staticmethod
    def _write(directory: pathlib.Path, rank: int, raised: dict[str, str]) -> None:
        (directory / f"rank-{rank}.json").write_text(json.dumps(raised))

    # --- the tests ----------------------------------------------------------------------------------------------------

    def test(self) -> Any:
        """The test function: a case a scenario. The first to run starts the processes."""

        @pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
        @pytest.mark.parametrize("name", self.functions)
        def test_processes(name: str) -> None:
            """The scenario holds on every rank; its docstring says what that is."""
            if self._raised is None:
                self._raised = self._run()
            errors = [f"rank {rank}:\n{text}" for rank, text in enumerate(self._raised[name]) if text]
            if errors:
                pytest.fail(f"{self.functions[name].__doc__}\n" + "\n".join(errors))

        return test_processes

    def _run(self) -> dict[str, list[str]]:
        """What each scenario raised on each rank; empty where it did not."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ADAMW_KERNELS_")}
        environment = {**inherited, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        with tempfile.TemporaryDirectory() as directory:
            # Files: a rank whose pipe nobody reads, while another's is read, waits for ever once it is full.
            outputs = [pathlib.Path(directory, f"rank-{rank}.txt") for rank in range(self.world)]
            ranks, remark = [], ""
            try:
                for rank, output in enumerate(outputs):
                    command = [sys.executable, self.file, str(rank), directory]
                    with output.open("w") as file:
                        ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
                deadline = time.monotonic() + self.limit_s
                for process in ranks:
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                remark = f"the ranks took more than {self.limit_s} s"
            finally:
                for process in ranks:
                    process.kill()
            files = [pathlib.Path(directory, f"rank-{rank}.json") for rank in range(self.world)]
            found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
            said = "\n".join([*(output.read_text(errors="replace") for output in outputs), remark])
        return {name: [of_rank.get(name, f"never ran\n{said}") for of_rank in found] for name in self.functions}


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor of this shape."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def whole(tensor: Any) -> torch.Tensor:
    """A DTensor's full tensor, any other as it is."""
    result: torch.Tensor = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return result
