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


def threads_for(work: Matrices, names: Sequence[str], available: int) -> dict[str, int]:
    """How many of the threads each matrix gets: all at once take no more memory than the model's largest by itself.

    One each is best: linear algebra of a matrix spreads badly, above all where other processes take cores away.
    """
    elements = {name: max(1, torch.Size(p.shape).numel()) for name, p in work.pairs.items()}
    largest = max(elements.values())
    return {name: available // max(1, min(largest // elements[name], available)) for name in names}


class LocalExecutor:
    """As many matrices at once as there are threads, each on one, but large ones fewer at once; see `threads_for`.

    On a GPU a few at once, which is busy with some of them while others are read and written.
    """

    def each(self, task: Task, work: Matrices, names: Sequence[str]) -> Iterator[str]:
        """Yields each name when its task is done."""

        def do(name: str) -> str:
            task(work, name)
            return name

        if work.device.type != "cpu":
            with ThreadPoolExecutor(ON_GPU_AT_ONCE) as pool:
                yield from pool.map(do, names)
            return
        available = torch.get_num_threads()
        groups: dict[int, list[str]] = {}
        for name, threads in threads_for(work, names, available).items():
            groups.setdefault(threads, []).append(name)
        for threads, own in groups.items():
            if threads == available:
                yield from map(do, own)
                continue
            pool = ThreadPoolExecutor(available // threads, initializer=torch.set_num_threads, initargs=(threads,))
            try:
                with pool:
                    yield from pool.map(do, own)
            finally:
                torch.set_num_threads(available)


class RayExecutor:
    """Matrices spread over a Ray cluster: that of RAY_ADDRESS or of this machine, or one that is started here.

    Ray does what a lost worker was at again. Each task has the threads that `LocalExecutor` would give it, of as many
    as torch has here, or as the smallest node has cores if these are fewer: on one kind of machine the results are the
    same, to the last bit.

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
        remote = ray.remote(num_gpus=0 if work.device.type == "cpu" else 1)(_run)
        threads = threads_for(work, names, self.threads)
        running = {remote.options(num_cpus=own).remote(task, shared, name, own): name for name, own in threads.items()}
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
