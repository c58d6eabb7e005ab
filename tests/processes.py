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

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
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
        self.directory = pathlib.Path()  # in a rank: of files that all ranks see and that last as long as they do
        self._raised: dict[str, list[str]] | None = None
        self._worlds: Iterator[pathlib.Path] = iter(())  # where processes find each other, in this scenario

    def __call__(self, function: Callable[[int], None]) -> Callable[[int], None]:
        """Run it in every process; it is given the rank."""
        self.functions[function.__name__] = function
        return function

    # --- in each process ----------------------------------------------------------------------------------------------

    def main(self) -> None:
        """Fork the ranks from this process, which has imported by now what each would import, and wait for them."""
        self.directory = pathlib.Path(sys.argv[1])
        warnings.simplefilter("ignore")  # pages of them, of torch's own deprecations
        import torch._dynamo  # the first operation on a DTensor would import it in every rank  # noqa: F401

        ranks = []
        for rank in range(self.world):
            ranks.append(os.fork())  # no thread has been started yet
            if not ranks[-1]:
                self._be(rank)
        for process in ranks:
            os.waitpid(process, 0)

    def _be(self, rank: int) -> None:
        """Be one rank: run every scenario, and write what each raised to a file of this rank. Never returns."""
        torch.set_num_threads(1)
        raised: dict[str, str] = {}
        try:
            for name, function in self.functions.items():
                self._worlds = (self.directory / f"{name}-{n}" for n in itertools.count())
                raised[name] = "did not end"
                self._write(rank, raised)
                try:
                    self._join(next(self._worlds), rank, self.world)
                    function(rank)
                    raised[name] = ""
                except (Exception, CheckpointException):  # which is none
                    raised[name] = traceback.format_exc()
                finally:
                    if dist.is_initialized():
                        dist.destroy_process_group()  # who waits for this rank learns that it will not come
                self._write(rank, raised)
            sys.stdout.flush()
        finally:
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

    def _write(self, rank: int, raised: dict[str, str]) -> None:
        (self.directory / f"rank-{rank}.json").write_text(json.dumps(raised))

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
            said, remark = (
                pathlib.Path(directory, "said.txt"),
                "",
            )  # a pipe that nobody reads stops its writers once full
            with said.open("w") as file:
                command = [sys.executable, self.file, directory]
                ranks = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            try:
                ranks.wait(timeout=self.limit_s)
            except subprocess.TimeoutExpired:
                remark = f"the ranks took more than {self.limit_s} s"
            finally:
                with contextlib.suppress(ProcessLookupError):  # all have ended
                    os.killpg(ranks.pid, signal.SIGKILL)
                ranks.wait()
            everything = said.read_text(errors="replace") + remark
            files = [pathlib.Path(directory, f"rank-{rank}.json") for rank in range(self.world)]
            found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        return {name: [of_rank.get(name, f"never ran\n{everything}") for of_rank in found] for name in self.functions}


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor of this shape."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def whole(tensor: Any) -> torch.Tensor:
    """A DTensor's full tensor, any other as it is."""
    result: torch.Tensor = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return result
