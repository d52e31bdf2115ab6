"""Where the work on matrices is done: in this process, or on a Ray cluster whose nodes share the storage."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import torch

from deltacome.compression.matrices import Matrices
from deltacome.errors import DeltacomeError

ON_GPU_AT_ONCE = 3  # matrices: one that is read, one that is computed, one that is written
ExecutorName = Literal["local", "ray"]
Task = Callable[[Matrices, str], None]  # a method of `Matrices`


class Executor(Protocol):
    """Does a task for each of some matrices."""

    def each(self, task: Task, work: Matrices, names: Sequence[str]) -> Iterator[str]:
        """Yields each name when its task is done."""
        ...


class LocalExecutor:
    """One matrix after another, each on all cores; on a GPU a few at once, which is busy with some of them while others
    are read and written."""

    def each(self, task: Task, work: Matrices, names: Sequence[str]) -> Iterator[str]:
        """Yields each name when its task is done."""

        def do(name: str) -> str:
            task(work, name)
            return name

        if work.device.type == "cpu":
            yield from map(do, names)
            return
        with ThreadPoolExecutor(ON_GPU_AT_ONCE) as pool:
            yield from pool.map(do, names)


class RayExecutor:
    """Matrices spread over a Ray cluster: that of RAY_ADDRESS or of this machine, or one that is started here.

    Ray does what a lost worker was at again. Each task has as many threads as torch has here, or as the smallest node
    has cores if these are fewer: on one kind of machine the results are those of `LocalExecutor`, to the last bit, for
    the same number of threads.

    Raises:
        DeltacomeError: if Ray is not installed, or there is no cluster where RAY_ADDRESS says.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise DeltacomeError("--engine ray needs Ray; pip install 'deltacome[ray]'") from error
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DeltacomeError(f"no Ray cluster can be reached or started: {str(error).splitlines()[0]}") from error
        cores = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        self.threads = min([torch.get_num_threads(), *(count for count in cores if count)])

    def each(self, task: Task, work: Matrices, names: Sequence[str]) -> Iterator[str]:
        """Yields each name when its task is done.

        Raises:
            DeltacomeError: as the tasks, or if workers do not see the work folder, or are lost again and again.
        """
        import ray

        shared = ray.put(work)
        gpus = 0 if work.device.type == "cpu" else 1
        remote = ray.remote(num_cpus=self.threads, num_gpus=gpus)(_run)
        running = {remote.remote(task, shared, name, self.threads): name for name in names}
        name = ""
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                name = running.pop(done)
                ray.get(done)
                yield name
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise DeltacomeError(f"Ray gave up on {name}, whose workers were lost each time: {reason}") from error
        finally:
            for waiting in running:  # after an error, or if nobody asks for more
                ray.cancel(waiting)


def _run(task: Task, work: Matrices, name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if not work.store.folder.is_dir():
        raise DeltacomeError(
            f"a Ray worker does not see {work.store.folder}; the output and the checkpoints must be on storage that "
            "all nodes share, under the same path"
        )
    task(work, name)


def make_executor(name: ExecutorName) -> Executor:
    """The executor of that name.

    Raises:
        DeltacomeError: if there is none, or as `RayExecutor`.
    """
    executors: dict[str, type[Executor]] = {"local": LocalExecutor, "ray": RayExecutor}
    if name not in executors:
        raise DeltacomeError(f"there is no engine {name!r}; choose local or ray")
    return executors[name]()
