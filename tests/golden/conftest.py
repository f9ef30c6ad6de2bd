"""`pytest tests/golden --golden <file>`: compares our model with outputs of other projects, any number of files.

Without the option the copies in this folder are compared.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption("--golden", action="append", default=[], metavar="FILE", help="outputs to compare with (.npz)")


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        given = metafunc.config.getoption("--golden", default=[])  # unknown where pytest starts from another folder
        chosen = [Path(name) for name in given] or sorted(HERE.glob("*.npz"))
        metafunc.parametrize("golden_file", chosen, ids=[path.stem for path in chosen])
