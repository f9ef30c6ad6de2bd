"""The folder of a run: names that several files share. Imports nothing heavy: the command line reads it first."""

from pathlib import Path

OVERRIDES = "overrides.txt"


def last_checkpoint(run_dir: Path) -> Path:
    """The folder that `checkpoints/last` of a run points at. Raises ValueError when there is none."""
    last = run_dir / "checkpoints" / "last"
    if not last.is_dir():
        raise ValueError(
            f"resume={run_dir} holds no checkpoint (no checkpoints/last inside); "
            "give the folder of a run that saved one, or start anew without resume"
        )
    return last.resolve()
