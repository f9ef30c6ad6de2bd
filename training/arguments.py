"""Arguments of the command line before Hydra reads them: `resume=<run folder>` becomes the overrides of that run."""

from __future__ import annotations

from pathlib import Path

from training.cluster import Cluster
from training.run_folder import OVERRIDES, last_checkpoint

MULTIRUN = ("-m", "--multirun")
# Where torchrun or srun started several processes, the first one's output folder is that of all.
NO_FOLDER = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


def rewrite(arguments: list[str]) -> list[str]:
    """The arguments for Hydra, in this process of torchrun or srun or in the only one.

    Raises ValueError where a sweep is asked for in several processes, or what is resumed is not a run's folder.
    """
    cluster = Cluster.found()
    if cluster is not None and any(argument in MULTIRUN for argument in arguments):
        raise ValueError(
            f"-m under torchrun or srun would run the whole sweep in each of {cluster.world} processes; use plain "
            "python train.py -m, which starts the ranks of each job itself"
        )
    rewritten = _resumed(arguments)
    return rewritten if cluster is None or cluster.is_first else [*rewritten, *NO_FOLDER]


def _resumed(arguments: list[str]) -> list[str]:
    """Replaces `resume=<dir>` by the recorded overrides, the given ones and `hydra.run.dir=<dir>`.

    A given override replaces a recorded one of the same key. Raises ValueError where <dir> is not a run's folder.
    """
    resumes = [
        argument for argument in arguments if _key(argument) == "resume" and _value(argument) not in ("", "null")
    ]
    sweep = [argument for argument in arguments if argument in MULTIRUN]
    if not resumes:
        # Hydra's parser refuses settings on both sides of -m.
        return [*sweep, *(argument for argument in arguments if argument not in sweep)]
    if sweep:
        raise ValueError(
            "a sweep cannot be resumed as a whole; resume its runs one by one: python train.py resume=<sweep>/0"
        )
    run_dir = _run_dir(_value(resumes[-1]))
    given = [argument for argument in arguments if argument not in resumes]
    keys = {_key(argument) for argument in given}
    recorded = [
        line for line in (run_dir / OVERRIDES).read_text().splitlines() if line.strip() and _key(line) not in keys
    ]
    for line in recorded:
        # The folder may come from a stranger, and Hydra's own node can start programs.
        if line.startswith("-") or _key(line).split(".")[0].split("/")[0] == "hydra":
            raise ValueError(f"{run_dir / OVERRIDES} holds {line!r}, which is no setting of a run; remove that line")
    return [*recorded, *given, f"resume={_quoted(run_dir)}", f"hydra.run.dir={_quoted(run_dir)}"]


def _run_dir(text: str) -> Path:
    path = Path(text).expanduser()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    if not path.is_dir():
        raise ValueError(
            f"resume={text} is not a folder; give the output folder of a run, like resume=outputs/<date>/<time>"
        )
    if not (path / OVERRIDES).exists():
        raise ValueError(
            f"resume={text} is not the folder of a run (it has no {OVERRIDES}); give a folder that train.py wrote"
        )
    last_checkpoint(path)
    return path.absolute()


def _key(argument: str) -> str:
    return argument.split("=", 1)[0].lstrip("+~")


def _value(argument: str) -> str:
    return argument.partition("=")[2].strip("'\"")


def _quoted(path: Path) -> str:
    """Quoted for Hydra's grammar, which stumbles over spaces and `=`."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
