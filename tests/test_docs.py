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
