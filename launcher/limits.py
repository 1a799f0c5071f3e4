"""What the system allows a process, looked at before a run starts: too little ends it later, where nothing says why."""

import resource
import threading

FILES = 100  # of a rank besides shards and connections: measured 24, and libraries open some for a moment
CONNECTIONS = 4  # to each other rank, one in each process group: measured over gloo
THREADS = 64  # of a rank: measured 16, and what torch, a driver or a library starts for its own


class LimitError(RuntimeError):
    """The system allows this process too little for the run."""


def allow_files(shards: int, world_size: int) -> None:
    """Raise this process's limit of open files to what a rank may come to need. shards: files of shards at a time.

    Raises LimitError where the hard limit is below that.
    """
    connections = CONNECTIONS * (world_size - 1)
    needed = FILES + connections + shards
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LimitError(
            f"a rank may have {needed} files open at a time, {shards} of them of shards and {connections} connections to "
            f"other ranks; the limit is {hard}: raise it (ulimit -n {needed}; of a service: LimitNOFILE), or "
            "prepare the corpus with a larger data.shard_bytes"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_threads(needed: int = THREADS) -> None:
    """Start as many threads as a rank may need, and end them. Raises LimitError where the system refuses."""
    end = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(needed):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:
        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        of_user = "no limit" if limit == resource.RLIM_INFINITY else str(limit)
        raise LimitError(
            f"a rank needs {needed} threads, the system gave {len(threads)} ({error}); raise the limit of processes of this "
            f"user (ulimit -u: {of_user}) or of this job (pids.max of its control group)"
        ) from None
    finally:
        end.set()
        for thread in threads:
            thread.join()
