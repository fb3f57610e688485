"""Files into a store with many processes: started here, or by torchrun or accelerate."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import perf_counter

from softrag.answer import AddReport
from softrag.bulk.coordinator import Coordinator, Progress
from softrag.bulk.shares import cut_shares
from softrag.bulk.worker import Address, WorkerSetup, hush_loading, run_worker, work
from softrag.checkpoint import locate, read_config
from softrag.checks import check_count
from softrag.errors import CheckpointError, StoreError
from softrag.files import find_files, vanished
from softrag.fingerprint import fingerprint_at_rate
from softrag.indexing import delete_gone
from softrag.store import MemoryStore
from softrag.store.connection import is_url

logger = logging.getLogger(__name__)

# Bytes of text for each chunk of a batch: about two batches a share.
BYTES_PER_CHUNK = 1024
# How often dead workers are looked for, in seconds.
WATCH_S = 0.2


@dataclass(frozen=True, kw_only=True)
class BulkReport(AddReport):
    """What bulk indexing did; `seconds` begins when the first worker has its model loaded.

    Attributes:
        workers: How many worked.
        restarts: How often a worker that died was replaced.
        sources_pruned: Sources whose file no longer exists, deleted on request.
    """

    workers: int
    restarts: int
    sources_pruned: int


def index_files(
    paths: Sequence[str | Path],
    *,
    setup: WorkerSetup,
    workers: int,
    prune: bool = False,
    on_progress: Callable[[Progress, int], None] | None = None,
) -> BulkReport | None:
    """Index files and folders with several processes.

    A worker that dies is replaced, and its share is done again. Killed as a whole, run it again: it
    continues. In the end every chunk is stored once.

    Under torchrun or `accelerate launch` (`WORLD_SIZE` is set) each of their processes calls this;
    it is one worker, and the first also coordinates. They replace no dead worker: all of them end,
    and start again as their launcher is told.

    Args:
        paths: Files and folders; each is read by the workers, who must find it at the same place.
        setup: What a worker loads.
        workers: How many processes to start; a launcher's own number is taken instead.
        prune: Delete from the store the files at or below `paths` that no longer exist.
        on_progress: Called with the progress and the bytes there are in all; what it raises ends
            the run and is raised here.

    Returns:
        The report; None in all but the first process of a launcher.

    Raises:
        SoftRAGError: The model cannot be loaded, or the store failed. What is stored stays stored.
    """
    check_count("workers", workers)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank > 0:
        hush_loading()
        _as_worker(setup, _share_address(None))
        return None

    files = list(find_files(paths))
    total = sum(file.stat().st_size for file in files if file.exists())
    # Enough shares for every worker to have some, and none so small that its last batch is half
    # empty most of the time.
    share_bytes = setup.chunks_per_batch * BYTES_PER_CHUNK
    share_bytes = max(1, min(share_bytes, total // (2 * max(workers, world))))
    with _open_store(setup) as store:
        coordinator = Coordinator(
            cut_shares(files, share_bytes=share_bytes),
            store=None if is_url(store.location) else store,
            on_progress=(lambda now: on_progress(now, total)) if on_progress else None,
            host=os.environ.get("MASTER_ADDR", "127.0.0.1") if world > 1 else None,
        )
        try:
            if world > 1:
                workers, restarts = world, 0
                try:
                    _as_worker(setup, _share_address(coordinator.address))
                except StoreError:
                    coordinator.wait()  # raises what went wrong here, in its own words
                    raise
                coordinator.wait()
                # One that still loads its model would take the end of this process for a fault.
                coordinator.see_off(world)
            else:
                restarts = _run_workers(coordinator, setup, workers)
            seconds = coordinator.seconds
        finally:
            coordinator.close()
        tally = coordinator.tally
        cleaning = perf_counter()
        deleted, pruned = delete_gone(store, tally), []
        if prune:
            pruned = prune_vanished(store, paths, read=tally.ids, documents=tally.documents)
        return BulkReport(
            documents=tally.documents,
            chunks_added=tally.added,
            chunks_unchanged=tally.unchanged,
            chunks_deleted=deleted,
            seconds=seconds + perf_counter() - cleaning,
            errors=tally.errors,
            workers=workers,
            restarts=restarts,
            sources_pruned=len(pruned),
        )


def prune_vanished(
    store: MemoryStore, paths: Sequence[str | Path], *, read: Collection[str], documents: int
) -> list[str]:
    """Delete from a store the files at or below `paths` that no longer exist.

    Args:
        store: The store.
        paths: What was indexed.
        read: Sources that were read just now, and stay whatever they are called.
        documents: How many documents were read just now.

    Returns:
        The sources deleted.

    Raises:
        StoreError: Nothing was read at all.
    """
    gone = [source for source in vanished(store.sources(), paths) if source not in read]
    if gone and not documents:
        raise StoreError(
            f"Nothing was read from {', '.join(map(str, paths))}, so nothing was pruned: all "
            f"{len(gone)} of its sources would go. Check that the folder is mounted; to empty the "
            "store of them, delete them by their source."
        )
    for source in gone:
        store.delete_source(source)
    return gone


def _open_store(setup: WorkerSetup) -> MemoryStore:
    # The config alone: the coordinator needs no weights.
    config = read_config(locate(setup.checkpoint))
    fingerprint = config.fingerprint
    if fingerprint is None:
        raise CheckpointError(
            f"{setup.checkpoint} has no fingerprint in its config.json. Load and save it once with "
            "SoftRAGModel.from_pretrained and save_pretrained."
        )
    if setup.rate is not None and setup.rate != config.rate:
        fingerprint = fingerprint_at_rate(fingerprint, setup.rate)
    return setup.store.open(fingerprint=fingerprint, embedder=setup.embedder("cpu"))


def _run_workers(coordinator: Coordinator, setup: WorkerSetup, count: int) -> int:
    """Keep `count` workers alive until all is done. Return how many were replaced."""
    context = _process_context(setup)
    if setup.threads is None:
        setup = replace(setup, threads=max(1, _cores() // count))

    def start(number: int) -> BaseProcess:
        process = context.Process(
            target=run_worker, args=(setup, coordinator.address, number), daemon=True
        )
        process.start()
        return process

    processes = [start(number) for number in range(count)]
    restarts = unready = 0
    try:
        while not coordinator.is_done:
            coordinator.wait(WATCH_S)
            for number, process in enumerate(processes):
                if process.is_alive() or coordinator.is_done:
                    continue
                # Those that never asked for a share will not do better the next time.
                unready = 0 if coordinator.seconds else unready + 1
                if unready > 2 * count:
                    raise StoreError(
                        f"The workers end (exit code {process.exitcode}) before they are ready. "
                        "Too little memory for that many models is the usual reason: start fewer "
                        "with --workers."
                    )
                logger.warning(
                    "worker %d died (exit code %s) and is replaced", number, process.exitcode
                )
                processes[number] = start(number)
                restarts += 1
        coordinator.wait()
        # They are told that there is no more, and end by themselves.
        for process in processes:
            process.join(timeout=5)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return restarts


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _process_context(setup: WorkerSetup) -> SpawnContext | ForkServerContext:
    """Return what starts workers: never forks of this process, with its threads, locks and GPU."""
    # What a library asks the GPU's driver while it is imported must not be inherited either.
    on_cpu = setup.device_of(0) == "cpu"
    if not on_cpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # One clean process imports the libraries (seconds), and all workers are forked from it.
    context.set_forkserver_preload(
        [run_worker.__module__, "transformers.models.auto.modeling_auto"]
    )
    return context


def _as_worker(setup: WorkerSetup, address: Address) -> None:
    try:
        work(setup, address, int(os.environ.get("LOCAL_RANK", "0")))
    except (EOFError, ConnectionError) as error:
        raise StoreError(
            "The first process has stopped; see its error. What is stored stays stored."
        ) from error


def _share_address(address: Address | None) -> Address:
    """Tell every process of a launcher where the first one's coordinator is."""
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        box: list[Address | None] = [address]
        distributed.broadcast_object_list(box, src=0)
    finally:
        distributed.destroy_process_group()
    (found,) = box
    assert found is not None
    return found
