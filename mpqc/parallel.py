"""Independent trials through joblib: one process, several, or a cluster, as joblib is told.

    with using("dask", jobs=8):  # joblib.parallel_config(...) works too
        for number, result in each(work, shared, items):
            keep(result)

Results come as soon as they are there, in any order.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from mpqc.errors import EnvironmentLacks, MpqcError, UsageError
from mpqc.graph import Array

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

BACKENDS = ("loky", "threading", "dask", "ray")
_opened: dict[bytes, Any] = {}  # of this process: the last shared object


class WorkerDied(MpqcError):  # noqa: N818 - reads as the sentence it is
    """A process that worked on a trial is gone; what had ended is kept by the caller."""


def each(
    work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]
) -> Iterator[tuple[int, Result]]:
    """Do the work for all items; yield what has ended at once, with the item's number.

    Args:
        work: a function of a module, called in this process or in others.
        shared: what all items need; sent once to a process or cluster, not once an item.
        items: small and picklable.

    Raises:
        WorkerDied: a process was killed and joblib's backend does not try again.
        MpqcError: of the work.
    """
    if not items:
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError
    from joblib.parallel import get_active_backend

    backend, given = get_active_backend()
    jobs = backend.effective_n_jobs(given)
    if jobs == 1 and not _is_cluster(backend):
        for number, item in enumerate(items):
            yield number, work(shared, item)
        return
    parcel = _pack(shared)
    calls = [delayed(_call)(work, parcel, n, item) for n, item in enumerate(items)]
    try:
        if backend.supports_return_generator:
            yield from Parallel(return_as="generator_unordered", batch_size=1)(calls)
        else:  # such as Ray's: what has ended is known when a round of jobs has
            for start in range(0, len(calls), jobs):
                yield from Parallel(batch_size=1)(calls[start : start + jobs])
    except TerminatedWorkerError as error:
        raise WorkerDied(
            "a process that worked on a trial was killed (short of memory?); finished trials are "
            "in the cache: run the same command again, with fewer --jobs"
        ) from error


@contextmanager
def using(backend: str | None = None, jobs: int | None = None) -> Iterator[None]:
    """What ``each`` runs on inside the block; without arguments as joblib is configured outside.

    Args:
        backend: ``loky`` (processes), ``threading``, ``dask`` (the cluster that
            ``DASK_SCHEDULER_ADDRESS`` names, else one on this machine) or ``ray``.
        jobs: at a time; -1 for one a CPU core.

    Raises:
        UsageError: another backend, or no jobs.
        EnvironmentLacks: the package of the backend is missing.
    """
    if jobs == 0:
        raise UsageError("--jobs is at least 1, or -1 for one a CPU core")
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}: {', '.join(BACKENDS)}")
    if backend is None and jobs is None:
        yield
        return
    from joblib import parallel_config

    name = backend or "loky"
    client = _dask(jobs) if name == "dask" else None
    if name == "ray":
        _ray()
    try:
        cluster = name in ("dask", "ray")
        with parallel_config(backend=name, n_jobs=jobs or (-1 if cluster else 1)):
            yield
    finally:
        if client is not None:
            client.close()


def jobs_here() -> int:
    """How many trials the current configuration runs at a time."""
    from joblib import effective_n_jobs

    return int(effective_n_jobs(None))


def _is_cluster(backend: Any) -> bool:
    return type(backend).__name__ in ("DaskDistributedBackend", "RayBackend")


def _dask(jobs: int | None) -> Any:
    try:
        from distributed import Client, get_client
    except ImportError as error:
        raise EnvironmentLacks(
            'Dask is missing: pip install "mpqc[dask]", or --backend loky'
        ) from error
    try:
        get_client()
    except ValueError:
        import dask

        if dask.config.get("scheduler-address", None):
            return Client(set_as_default=True)
        return Client(n_workers=jobs if jobs and jobs > 0 else None, threads_per_worker=1)
    return None


def _ray() -> None:
    try:
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise EnvironmentLacks("Ray is missing: pip install ray, or --backend loky") from error
    register_ray()


def _pack(shared: object) -> Array:
    """Bytes as an array: joblib maps large ones into processes and scatters them on clusters.

    Raises:
        UsageError: it cannot be sent.
    """
    try:
        return np.frombuffer(pickle.dumps(shared, pickle.HIGHEST_PROTOCOL), np.uint8)
    except Exception as error:  # whatever a foreign __reduce__ raises
        raise UsageError(
            f"{type(shared).__name__} cannot be sent to other processes ({error}): use one job"
        ) from error


def _call(
    work: Callable[[Any, Any], Any], parcel: Array, number: int, item: Any
) -> tuple[int, Any]:
    content = parcel.tobytes()
    digest = hashlib.sha256(content).digest()
    if digest not in _opened:
        _opened.clear()
        _opened[digest] = pickle.loads(content)
    return number, work(_opened[digest], item)
