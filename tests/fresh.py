"""Processes for tests, forked from a server that has imported everything and done nothing.

So a run costs seconds, and none can hold a lock that another one or the test itself waits for.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["mmtx.training.run", "mmtx.cli", "pytest"])
with contextlib.suppress(RuntimeError):  # this is one of the processes
    multiprocessing.forkserver.ensure_running()  # it imports while tests are collected
