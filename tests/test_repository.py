"""Promises of the repository: pins agree, the README's commands exist, no developer's paths are tracked."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_environment_yml_holds_the_pins_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == project["dependencies"] + project["optional-dependencies"]["test"]
    assert f"python{project['requires-python']}" in conda


def test_make_reads_the_torch_pin_from_pyproject():
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", "train", "TORCH_INDEX=https://example.org/cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--index-url https://example.org/cpu torch==2.13.0" in made


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_no_path_of_a_developers_machine_is_tracked():
    private = re.compile(r"(?<![\w.])/(?:work|root|home)/\w")
    guilty = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked_files()
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ""} and path.name != "LICENSE"
        for line in path.read_text().splitlines()
        if private.search(line)
    ]
    assert not guilty, "\n".join(guilty)


def test_no_file_of_the_configuration_sets_a_number_of_ranks():
    for path in (ROOT / "conf").rglob("*.yaml"):
        config = yaml.safe_load(path.read_text()) or {}
        assert config.get("cp") is None and config.get("dp") is None, f"{path} sets cp or dp: then +cp=8 would fail"
