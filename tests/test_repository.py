"""Promises of the repository: pins agree, the README's commands exist, no developer's paths are tracked."""

import ast
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


def imported(path: Path) -> set[str]:
    """Modules that a file imports, at its top or inside functions; `from a import b` gives a and, if a module, a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            submodules = {f"{node.module}.{name.name}" for name in node.names}
            submodules = {name for name in submodules if is_module(name)}
            # `from data import grids` imports the submodule; the package alone is an empty file.
            found |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def sources(folder: str) -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py" and path.is_relative_to(ROOT / folder)]


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels", ()),
        ("data", ("kernels",)),
        ("models", ("kernels", "data")),
        ("evaluation", ("kernels", "data", "models")),
        ("training", ("kernels", "data", "models", "evaluation")),
    ],
)
def test_imports_point_one_way(folder, allowed):
    ours = {"kernels", "data", "models", "evaluation", "training", "benchmarks", "tests", "train", "evaluate"}
    guilty = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in sorted(imported(path))
        if (top := name.partition(".")[0]) in ours and top not in (folder, *allowed)
    ]
    assert sources(folder) and not guilty, "\n".join(guilty)


def test_models_import_the_modules_of_data_that_the_architecture_names():
    text = " ".join((ROOT / "docs/architecture.md").read_text().split())
    sentence = re.search(r"`models` imports only (.+?) from `data`", text)
    allowed = set(re.findall(r"`(data\.\w+)`", sentence[1]))
    assert "data.batch" in allowed and all(is_module(name) for name in allowed)
    found = {
        (".".join(name.split(".")[:2]), str(path.relative_to(ROOT)))
        for path in sources("models")
        for name in imported(path)
        if name.partition(".")[0] == "data"
    }
    assert {name for name, _ in found} <= allowed, sorted(item for item in found if item[0] not in allowed)
    assert allowed <= {name for name, _ in found}, "the architecture allows what no model needs"


def test_only_the_composition_of_models_knows_hydra():
    guilty = {
        str(path.relative_to(ROOT)) for path in sources("models") if any("hydra" in name for name in imported(path))
    }
    assert guilty == {"models/composition.py"}
