"""Two processes on one machine that run functions together, joined by gloo."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS, START_SECONDS = 60, 300  # that one function may take, and the processes to start


def _work(rank: int, store: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put((rank, "ready", None))
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            torch.manual_seed(0)
            results.put((rank, function(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Pair:
    """Starts the processes at the first call, and again after one that failed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Any] = []
        self.starts = 0

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(*args)``, a module's own, in both; returns what each returned, by rank."""
        if not self.processes:
            self._start()
        for queue in self.tasks:
            queue.put((function, args))
        return self._answers(function.__name__, SECONDS)

    def _answers(self, name: str, seconds: int) -> list[Any]:
        values: dict[int, Any] = {}
        for _ in range(2):
            try:
                rank, value, error = self.results.get(timeout=seconds)
            except Exception as late:
                self.stop()
                raise AssertionError(f"{name}: no answer in {seconds} s") from late
            if error:
                self.stop()
                raise AssertionError(f"{name}, rank {rank}:\n{error}")
            values[rank] = value
        return [values[0], values[1]]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.starts += 1
        store = self.folder / f"store{self.starts}"
        self.tasks = [context.Queue() for _ in range(2)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(rank, str(store), self.tasks[rank], self.results), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()
        self._answers("the start", START_SECONDS)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def full(t: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor."""
    return t.full_tensor().detach() if hasattr(t, "full_tensor") else t.detach()
