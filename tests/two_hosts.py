"""Two groups of msrun on this host, in the place of two hosts with a process each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import ROOT


@contextmanager
def two_hosts(folder: Path, command: Sequence[str]) -> Iterator[list[subprocess.Popen]]:
    """Start a script of the project with --use_parallel on both hosts, and kill what still runs after the block.

    Args:
        folder: For the output of each host, host0.txt and host1.txt, and the logs of msrun.
        command: The script and its arguments.
    """
    binaries = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # msrun asks `ip` whether the scheduler's address is this host's. For the second host it must not be.
    fake = folder / "second_host"
    fake.mkdir()
    (fake / "ip").write_text('#!/bin/sh\necho "[]"\n')
    (fake / "ip").chmod(0o755)
    hosts: list[subprocess.Popen] = []
    try:
        for number in (0, 1):
            path = os.pathsep.join([*([str(fake)] if number else []), str(binaries), os.environ["PATH"]])
            with open(folder / f"host{number}.txt", "w") as output:
                hosts.append(
                    subprocess.Popen(
                        [
                            "msrun",
                            "--worker_num=2",
                            "--local_worker_num=1",
                            "--master_addr=127.0.0.1",
                            f"--master_port={port}",
                            f"--node_rank={number}",
                            "--join=True",
                            f"--log_dir={folder / f'logs{number}'}",
                            *command,
                            "--use_parallel=True",
                        ],
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "PATH": path},
                    )  # fmt: skip
                )
        yield hosts
    finally:
        for host in hosts:
            for process in [*psutil.Process(host.pid).children(True), host] if host.poll() is None else []:
                process.kill()


def worker_of(host: subprocess.Popen) -> int:
    """Return the process id of the process that msrun started, not of the scheduler."""
    children = psutil.Process(host.pid).children()
    return next(child.pid for child in children if child.environ().get("MS_ROLE") == "MS_WORKER")
