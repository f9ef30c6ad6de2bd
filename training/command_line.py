"""What a person at the command line sees of an error: one sentence. HYDRA_FULL_ERROR=1 shows every traceback."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
_job_started = False


def run(main: Callable[[], None]) -> None:
    """Calls a `hydra.main` function; an error that the user can repair ends as `error: one sentence`, exit code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, which it otherwise prints over several lines
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except Exception as error:
        if TRACEBACKS or not is_user_error(error):
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException) and not _job_started:
            fail(f"cannot create the output folder ({sentence(error)}); choose another with hydra.run.dir=<folder>")
        fail(sentence(error))


def job(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Decorates the body of a job: where it wrote nothing, because it failed early or only printed, no folder stays.

    In a sweep the sentence is printed at once and the error travels on, so that the other jobs still run.
    """

    @functools.wraps(function)
    def guarded(config: DictConfig) -> None:
        global _job_started
        _job_started = True
        hydra = HydraConfig.get()
        try:
            function(config)
        except Exception as error:
            if hydra.mode == RunMode.MULTIRUN:
                overrides = " ".join(hydra.overrides.task)
                print(f"error: job {hydra.job.num} ({overrides}): {sentence(error)}", file=sys.stderr, flush=True)
                raise
            if TRACEBACKS or not is_user_error(error):
                raise
            fail(sentence(error))
        finally:
            _remove_empty(Path(hydra.runtime.output_dir))

    return guarded


def fail(message: str, *, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def is_user_error(error: BaseException) -> bool:
    return isinstance(_cause(error), USER_ERRORS)


def sentence(error: BaseException) -> str:
    """One line that says what is wrong and, for options that do not exist, which one may have been meant."""
    error = _cause(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition_sentence(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return _one_line(str(error)) or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    """What a constructor raised, without Hydra's wrapping."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _composition_sentence(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(error).split("Config search path")[0]
    unknown = re.search(r"Could not (?:override|append to config\. An item is already at) '([^']+)'", text)
    if unknown and "already at" not in text:
        return _unknown_option(unknown.group(1), cause)
    if cause is not error:
        text = f"{text} ({str(cause).split('object_type')[0]})"
    return _one_line(re.sub(r"(?m)^\s*(object_type|reference_type)=.*$", "", text))


def _unknown_option(key: str, cause: BaseException) -> str:
    node = getattr(cause, "parent_node", None)
    known = [str(name) for name in node] if isinstance(node, DictConfig) else []
    parent, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"there is no option {key}; did you mean {parent + '.' if parent else ''}{near[0]}?"
    allowed = f" ({parent or 'the root'} has {', '.join(known)})" if known else ""
    return f"there is no option {key}{allowed}; python train.py --help lists what can be set"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _remove_empty(folder: Path) -> None:
    """Removes the folder and those above it that Hydra made for it, as long as they are empty."""
    for level in (folder, *folder.parents[:2]):
        try:
            level.rmdir()
        except OSError:
            return
