"""docs/add_a_model.md does what it says: its files, written into a copy of the repository, run with its commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/add_a_model.md").read_text()
FILES = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("conf", "data", "models", "kernels", "evaluation", "training"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    for name, text in FILES:
        assert not (folder / name).exists(), f"{name} exists already: the page would overwrite it"
        (folder / name).write_text(text)
    return folder


def test_the_page_adds_a_part_its_configuration_and_a_preset():
    assert [name for name, _ in FILES] == [
        "models/encoders/block_mean.py",
        "conf/model/encoder/block_mean.yaml",
        "conf/model/block_mean.yaml",
    ]
    assert len(COMMANDS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(copy, command):
    program, *arguments = shlex.split(command)
    assert program == "python"
    ran = subprocess.run([sys.executable, *arguments], cwd=copy, env=os.environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "BlockMeanEncoder" in ran.stdout if "dry_run=true" in command else "persistence" in ran.stdout


README = (ROOT / "README.md").read_text().replace("\\\n", " ")
TRAIN_COMMANDS = sorted(set(re.findall(r"python train\.py([^`\n|]*)", README)))


@pytest.mark.parametrize("command", TRAIN_COMMANDS)
def test_the_training_commands_of_the_readme_compose(command):
    """Every setting exists and has an allowed value; sweeps and resumed runs compose each of their jobs' settings."""
    from models.composition import compose

    overrides = [
        item for item in shlex.split(command) if item not in ("-m", "--help") and not item.startswith("resume=")
    ]
    for first in (0, -1) if "-m" in command else (None,):
        chosen = overrides if first is None else [_choice(item, first) for item in overrides]
        compose(chosen)


def _choice(override: str, index: int) -> str:
    name, _, values = override.partition("=")
    return f"{name}={values.split(',')[index]}"


def test_the_readme_names_every_preset_and_option():
    for group in ("", "encoder", "processor", "decoder", "attention", "size"):
        for path in (ROOT / "conf/model" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, f"the README does not name {path.relative_to(ROOT)}"
    for path in (ROOT / "conf/data").glob("*.yaml"):
        assert f"`{path.stem}`" in README, f"the README does not name {path.relative_to(ROOT)}"
