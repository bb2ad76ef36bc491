"""Groups of processes that run one engine on the CPU of this machine."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ONE_HOST = Path(__file__).with_name("one_host.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def processes(
    commands: list[list[str]], folder: Path, devices: int = 1, slurm_port: int = 0
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process of Python for each command, with so many devices each. Their output is in folder/0.out and 0.err, ...
    None of them is left. slurm_port: they are told of each other as Slurm does it."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    environment = {**os.environ, "XLA_FLAGS": flags, "MMJAX_PROGRESS": "0"}
    started: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as files:
        for rank, words in enumerate(commands):
            out, err = (files.enter_context((folder / f"{rank}.{end}").open("w")) for end in ("out", "err"))
            own = environment | (slurm(rank, len(commands), slurm_port) if slurm_port else {})
            started.append(subprocess.Popen([sys.executable, *words], stdout=out, stderr=err, env=own, text=True))
        try:
            yield started
        finally:
            for process in started:
                process.kill()
                process.wait()


def slurm(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of `srun --ntasks SIZE` on one host. jax takes the port from the job's number, or from its own."""
    tasks = {"SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "JAX_COORDINATOR_PORT": port}
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    return job | {name: str(value) for name, value in tasks.items()}


def told(folder: Path, rank: int) -> str:
    """What a process has logged."""
    return (folder / f"{rank}.err").read_text()
