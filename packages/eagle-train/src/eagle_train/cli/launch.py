"""One process per GPU: `eagle train` starts them with torchrun, or joins those that torchrun or SLURM started."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, MutableMapping, Sequence

from eagle_train.config import ConfigError

PORT = 29500


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def join_slurm(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set torchrun's variables from SLURM's when srun started several tasks; returns whether it did.

    The ranks meet at the first node of the job, at a port that follows from the job's number, unless MASTER_ADDR and MASTER_PORT are set.
    """
    size = int(environment.get("SLURM_NTASKS", "1"))
    if is_launched(environment) or size < 2 or "SLURM_PROCID" not in environment:
        return False
    nodes = int(environment.get("SLURM_NNODES", "1"))
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(size)
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("LOCAL_WORLD_SIZE", str(-(-size // nodes)))
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    environment.setdefault("MASTER_ADDR", first_host(hosts))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
    return True


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9],other` -> `gpu03`."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "") + (match[3] or "")


def processes(nproc: int | None, device: str | None) -> int:
    """Processes to start on this machine: `nproc`, or one for every visible GPU; one without GPUs, and for `device` cpu."""
    if nproc is not None:
        return nproc
    return max(1, gpus(device))


def gpus(device: str | None) -> int:
    """GPUs that the processes of this machine use: the visible ones, none for `device` cpu."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def torchrun(arguments: Sequence[str], nproc: int, nodes: int, rendezvous: str | None, name: str) -> list[str]:
    """torchrun's arguments for `nproc` processes of `eagle <arguments>` on this machine, one of `nodes`.

    rendezvous: HOST[:PORT] of the first machine, which every machine of a run of several gives. name: of the run.
    """
    command = ["--nproc-per-node", str(nproc)]
    if nodes == 1:
        command.append("--standalone")
    elif rendezvous is None:
        raise ConfigError(f"--nodes {nodes} needs --rdzv HOST[:PORT]: the first machine, which all of them can reach")
    else:
        endpoint = rendezvous if ":" in rendezvous else f"{rendezvous}:{PORT}"
        command += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", name]
    return [*command, "-m", "eagle_train.cli", *arguments]


def slurm_script(arguments: Sequence[str], nproc: int | None, nodes: int, name: str) -> str:
    """A batch script of `nodes` machines; without `nproc` there are 8 tasks a machine."""
    tasks = nproc or 8
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={name}",
            f"#SBATCH --nodes={nodes}",
            f"#SBATCH --ntasks-per-node={tasks}",
            f"#SBATCH --gpus-per-node={tasks}",
            "#SBATCH --signal=TERM@120  # two minutes before the limit: the running step ends with a checkpoint",
            "#SBATCH --requeue  # the same command continues the run",
            "",
            f"srun eagle {shlex.join(arguments)}",
        ]
    )


def without_launch_options(arguments: Sequence[str]) -> list[str]:
    """A command line without the options that this file reads."""
    result, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
            continue
        option = argument.partition("=")[0]
        if option in ("--nproc", "--nodes", "--rdzv", "--print-launch"):
            skip = "=" not in argument
            continue
        result.append(argument)
    return result
