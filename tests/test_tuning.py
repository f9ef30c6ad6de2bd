"""Launch configurations: kept in files, found again, never waited for. The device and its clock are stand-ins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import tuning
from kernels.tuning import Tuning
from tests.interpreter import needs_triton

pytestmark = needs_triton  # part of a file's name is Triton's version
CUDA = torch.device("cuda", 0)
CANDIDATES = [{"TILE": 64}, {"TILE": 32}, {"TILE": 16}]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """An H200 on which the smallest tile is the fastest; gives what was measured."""
    measured = []

    def milliseconds(launch, config, device):
        measured.append(config["TILE"])
        launch(config)
        return config["TILE"] / 64

    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path))
    for name in ("HYDRASPHERE_AUTOTUNE", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return measured


def _tuning(candidates=CANDIDATES, source=__file__) -> Tuning:
    return Tuning("example", candidates, [source])


def _ask(kernel: Tuning, key=("bf16", 64), device=CUDA) -> dict:
    return kernel.config(key, device, lambda config: None)


def test_the_fastest_is_measured_once_and_found_in_the_file_by_the_next_process(device):
    kernel = _tuning()
    assert _ask(kernel) == _ask(kernel) == {"TILE": 16} and device == [64, 32, 16]
    assert _ask(_tuning()) == {"TILE": 16} and len(device) == 3  # another process
    assert _ask(kernel, key=("fp32", 64)) == {"TILE": 16} and len(device) == 6
    path = kernel.path("nvidia_h200")
    assert sorted(json.loads(path.read_text())) == ["bf16,64", "fp32,64"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_another_source_device_or_list_of_candidates_is_measured_again(device, tmp_path, monkeypatch):
    source = tmp_path / "kernel.py"
    source.write_text("one")
    _ask(_tuning(source=source))
    assert _ask(_tuning(CANDIDATES[:2], source)) == {"TILE": 32} and len(device) == 5
    source.write_text("two")
    _ask(_tuning(source=source))
    assert len(device) == 8
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    _ask(_tuning(source=source))
    assert len(device) == 11 and {path.name for path in (tmp_path / "kernels").iterdir()} == {
        "nvidia_h200",
        "nvidia_h100_80gb_hbm3",
    }


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"bf16,64": 3}', '{"bf16,64": {}}'])
def test_a_damaged_file_is_measured_and_written_again(device, content):
    kernel = _tuning()
    path = kernel.path("nvidia_h200")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert _ask(kernel) == {"TILE": 16} and len(device) == 3
    assert json.loads(path.read_text())["bf16,64"]["config"] == {"TILE": 16}


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_read_what_is_there_or_measure_for_themselves_but_write_nothing(device, monkeypatch, variable):
    monkeypatch.setenv(variable, "3")
    kernel = _tuning()
    assert _ask(kernel) == {"TILE": 16} and len(device) == 3
    assert not kernel.path("nvidia_h200").exists()
    monkeypatch.setenv(variable, "0")
    _ask(_tuning())
    monkeypatch.setenv(variable, "3")
    assert _ask(_tuning()) == {"TILE": 16} and len(device) == 6


def test_a_folder_that_cannot_be_written_costs_a_warning_only(device, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "file"))
    assert _ask(_tuning()) == {"TILE": 16}
    assert "configurations of kernels are not kept" in caplog.text


def test_switched_off_nothing_is_measured_and_defaults_hold(device, monkeypatch):
    _ask(_tuning())
    monkeypatch.setenv("HYDRASPHERE_AUTOTUNE", "0")
    monkeypatch.setattr(
        tuning, "shipped", lambda capability: {(9, 0): {"example": {"bf16,64": {"TILE": 32}}}}[capability]
    )
    assert _ask(_tuning()) == {"TILE": 32}
    assert _ask(_tuning(), key=("fp32", 64)) == {"TILE": 64}  # the first candidate
    monkeypatch.setenv("HYDRASPHERE_AUTOTUNE", "1")
    tuning.switch(False)
    try:
        assert _ask(_tuning()) == {"TILE": 32}
    finally:
        tuning.switch(True)
    assert len(device) == 3
    assert _ask(_tuning()) == {"TILE": 16}  # what was measured and kept
    monkeypatch.setenv("HYDRASPHERE_AUTOTUNE", "no")
    with pytest.raises(ValueError, match="HYDRASPHERE_AUTOTUNE='no' is neither 0 nor 1"):
        _ask(_tuning())


def test_neither_a_captured_graph_nor_the_cpu_is_measured(device, monkeypatch):
    assert _ask(_tuning(), device=torch.device("cpu")) == {"TILE": 64}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _ask(_tuning()) == {"TILE": 64} and device == []


def test_configurations_that_do_not_fit_lose(device, monkeypatch):
    monkeypatch.setattr(
        tuning, "_milliseconds", lambda launch, config, device: {64: 2.0}.get(config["TILE"], torch.inf)
    )
    assert _ask(_tuning()) == {"TILE": 64}
    with pytest.raises(RuntimeError, match="no configuration of kernel example runs on nvidia_h200"):
        _ask(_tuning(CANDIDATES[1:]))


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path):
    work = """
import sys
from pathlib import Path
from kernels import tuning
for number in range(40):
    tuning._store(Path(sys.argv[1]), f"{sys.argv[2]}-{number}", {"config": {"TILE": number}})
    assert tuning._read(Path(sys.argv[1])), "a reader saw part of a file"
"""
    path = tmp_path / "kernels" / "example.json"
    command = [sys.executable, "-c", work, str(path)]
    root = Path(__file__).parents[1]
    running = [subprocess.Popen([*command, name], cwd=root, stderr=subprocess.PIPE, text=True) for name in "ab"]
    for process in running:
        assert process.communicate()[1] == "" and process.returncode == 0
    assert all(entry == {"config": {"TILE": int(key.split("-")[1])}} for key, entry in tuning._read(path).items())


def test_shipped_defaults_name_their_origin_and_are_candidates():
    from kernels.film_tokenizer import launches as film
    from kernels.head_norm import launches as heads
    from kernels.modulated_norm import launches as norm
    from kernels.pixel_attention import launches as pixel
    from kernels.sort_and_pack import TUNING
    from kernels.temporal_attention import launches as temporal

    groups = [film.FORWARD, film.BACKWARD, pixel.FORWARD, pixel.BACKWARD]
    groups += [norm.TUNING, heads.TUNING, temporal.TUNING]
    kernels = {kernel.name: kernel for group in groups for kernel in group.values()} | {TUNING.name: TUNING}
    files = {path.stem: json.loads(path.read_text()) for path in tuning.DEFAULTS.glob("*.json")}
    assert files["hopper"]["capability"] == [9, 0] and "not measured" in files["hopper"]["chosen_by"]
    for content in files.values():
        found = tuning.shipped(tuple(content["capability"]))
        assert found == content["configurations"] and found.keys() <= kernels.keys()
        for name, configurations in found.items():  # what the first candidate says is not said again
            assert all(config in kernels[name].candidates[1:] for config in configurations.values())
    assert all(kernel.default((9, 0)) in kernel.candidates for kernel in kernels.values())
    assert tuning.shipped((8, 0)) == {}
