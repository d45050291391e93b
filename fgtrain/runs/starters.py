"""What started the processes of a run, from its environment variables: torchrun, SLURM or fgtrain."""

import os
from collections.abc import Mapping


def started_by(environ: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(starter, processes in total, processes on this node), or None if fgtrain starts them."""
    if "WORLD_SIZE" in environ and "LOCAL_RANK" in environ:
        total = int(environ["WORLD_SIZE"])
        return "torchrun", total, int(environ.get("LOCAL_WORLD_SIZE", total))
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in environ and not interactive:
        total = int(environ["SLURM_NTASKS"])
        nodes = int(environ.get("SLURM_NNODES", 1))
        return f"SLURM (SLURM_NTASKS={total})", total, int(environ.get("SLURM_NTASKS_PER_NODE", total // nodes))
    return None


def is_follower(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or SLURM started this process and it is not rank 0, which owns the run's folder."""
    return started_by(environ) is not None and environ.get("RANK", environ.get("SLURM_PROCID", "0")) != "0"
