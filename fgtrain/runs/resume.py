"""The checkpoint that `resume=` names."""

from pathlib import Path

from fgtrain.errors import CheckpointError, ConfigError
from fgtrain.lightning.checkpoints import NAMES, first_good, list_checkpoints, read_checked


def checkpoint_to_resume(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint that `resume` means: a file, or the latest good one in a run's folder; "auto" means `run_dir`.

    Raises:
        ConfigError: there is none, or `run_dir` holds a run that would be overwritten.
        CheckpointError: none of them can be used.
    """
    inside = resume is not None and run_dir.absolute() in (Path(resume).absolute(), *Path(resume).absolute().parents)
    if resume != "auto" and not inside and list_checkpoints(run_dir):
        raise ConfigError(
            f"run_dir={run_dir} holds a run that has not finished; continue it with resume=auto, or name another "
            "folder with hydra.run.dir=..."
        )
    if resume is None:
        return None
    if resume == "auto":
        found = list_checkpoints(run_dir)
        return first_good(found) if found else None
    path = Path(resume)
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            raise ConfigError(f"resume={resume} contains no checkpoint ({' or '.join(NAMES)}); give a run's folder")
        return first_good(found)
    if not path.is_file():
        raise ConfigError(
            f"resume={resume} is not a file; give the path of a checkpoint (.ckpt), a run's folder, or auto"
        )
    try:
        read_checked(path)
    except CheckpointError as error:
        other = next((p for p in list_checkpoints(path.parent) if p != path), None)
        hint = f"; try resume={other}" if other else "; there is no other checkpoint beside it"
        raise CheckpointError(f"{error}{hint}") from error
    return path
