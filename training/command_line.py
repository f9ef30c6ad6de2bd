"""What a person at the command line sees of an error: one sentence. HYDRA_FULL_ERROR=1 shows every traceback."""

from __future__ import annotations

import difflib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training.cluster import Cluster, repository_importable
from training.made_folders import remove_empty

MODEL_GROUPS = ("encoder", "processor", "decoder", "attention", "size")
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
LISTENING = 5.0  # seconds that another rank waits for the first one to say what is wrong
_job_started = False


class RankFailed(RuntimeError):
    """A rank ended with an error that is a bug, or was killed, or waited in vain. The text is all that a person needs:
    no traceback of the process that started it."""


USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException, RankFailed)  # text says all


def run(
    main: Callable[[], None],
    *,
    rewrite: Callable[[list[str]], list[str]] = list,
    finish: Callable[..., None] = lambda *, succeeded: None,
) -> None:
    """Calls a `hydra.main` function; an error that the user can repair ends as `error: one sentence`, exit code 1.

    rewrite: changes the arguments before Hydra reads them. finish: called at the end, with whether all went well.
    """
    global _job_started
    _job_started = False
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, which it otherwise prints over several lines
    succeeded = False
    try:
        with _ended_by_sigterm(), repository_importable():
            sys.argv[1:] = rewrite(sys.argv[1:])
            main()
            succeeded = True
    except KeyboardInterrupt:
        if not _is_first_process():  # Ctrl-C reaches all of them
            raise SystemExit(130) from None
        fail("interrupted", code=130)
    except _submitit_errors() as error:
        fail(_submitted_job_sentence(str(error)))
    except Exception as error:
        if TRACEBACKS or not is_user_error(error):
            _let_the_first_rank_speak()
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException) and not _job_started:
            fail(f"cannot create the output folder ({sentence(error)}); choose another with hydra.run.dir=<folder>")
        fail(sentence(error))
    finally:
        if before is None:  # processes started later shall not inherit it
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
        finish(succeeded=succeeded)


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
            if _is_first_process():  # the folder of others is its one, or where they were started
                remove_empty()

    return guarded


def fail(message: str, *, code: int = 1) -> None:
    _let_the_first_rank_speak()
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def is_user_error(error: BaseException) -> bool:
    return isinstance(_cause(error), USER_ERRORS)


def sentence(error: BaseException) -> str:
    """One line that says what is wrong and, for options that do not exist, which one may have been meant."""
    error = _cause(error)
    if isinstance(error, RankFailed):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition_sentence(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return _one_line(str(error)) or type(error).__name__


@contextmanager
def _ended_by_sigterm():
    """SIGTERM ends what is under way like Ctrl-C: files are closed, temporary ones removed; exit code 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_first_process() -> bool:
    cluster = Cluster.found()
    return cluster is None or cluster.is_first


def _let_the_first_rank_speak() -> None:
    """Where all processes of torchrun or srun find the same error before they have met, one prints it.

    The others are ended together with the first, or have an error of their own.
    """
    torch = sys.modules.get("torch")
    if not _is_first_process() and not (torch is not None and torch.distributed.is_initialized()):
        time.sleep(LISTENING)


def _cause(error: BaseException) -> BaseException:
    """What a constructor raised, without Hydra's wrapping."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _composition_sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's errors, which name search paths and object types over several lines."""
    text = str(error).split("Config search path")[0]
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        if not value:
            return f"cannot read {error.override!r}; settings are typed as name=value"
        return f"cannot read {error.override}; quote what holds spaces, commas or =, like \"{key}='{value}'\""
    if choice := re.search(r"Could not find '(.+)/(.+)'(?:\s+Available options in '.+':)?([\s\S]*)", text):
        group, name, available = choice.groups()
        if group == "hydra/launcher":
            return f"there is no {group}={name} here; joblib and submitit come with: pip install -e '.[sweep]'"
        options = f"choose one of {', '.join(available.split())}" if available.split() else "there is none to choose"
        return f"there is no {group}={name}; {options}"
    if built_on := re.search(r"In 'hydra/launcher/(\w+)': Could not load 'hydra/launcher/(\w+)'", text):
        return "hydra/launcher={} builds on {}: pip install -e '.[sweep]'".format(*built_on.groups())
    if wrong := re.search(r"Error merging override \+*(\S+)", text):
        return f"{wrong.group(1)} does not fit: {str(cause).splitlines()[0]}"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return _unknown_option(unknown.group(1), cause)
    if twice := re.search(r"An item is already at '([^']+)'", text):
        return f"{twice.group(1)} exists already; change it with {twice.group(1)}=<value>, without the +"
    return _one_line(re.sub(r"(?m)^\s*(object_type|reference_type)=.*$", "", text))


def _unknown_option(key: str, cause: BaseException) -> str:
    node = getattr(cause, "parent_node", None)
    known = [str(name) for name in node if name != "hydra"] if isinstance(node, DictConfig) else []
    parent, _, name = key.rpartition(".")
    if not parent and name in MODEL_GROUPS:
        return f"there is no option {name}; it belongs to the model: model/{name}=<option>"
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"there is no option {key}; did you mean {parent + '.' if parent else ''}{near[0]}?"
    allowed = f"{parent or 'the root'} has {', '.join(known)}" if known else "python train.py --help lists the options"
    return f"there is no option {key}; {allowed}"


def _submitit_errors() -> tuple[type[Exception], ...]:
    """What submitit raises where a job failed; nothing where it is not used."""
    utils = sys.modules.get("submitit.core.utils")
    return () if utils is None else (utils.UncompletedJobError,)


def _submitted_job_sentence(text: str) -> str:
    """Of the traceback of a submitted job the last line, and where all that the job printed is."""
    said = re.findall(r"(?m)^(?:\w+\.)*\w*(?:Error|Exception|Failed|Interrupt|Exit)\w*: .*(?:\n(?!-{9}).+)*", text)
    where = re.search(r"- (\S+\.err)", text)
    what = said[-1].partition(": ")[2] if said else _one_line(text)
    return f"a job of the sweep failed: {what}" + (f"\nwhat it printed: {where.group(1)}" if where else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
