"""`pytest tests/golden --golden <file>`: compares our model with outputs of other projects, any number of files.

`.npz` files hold weights, inputs and outputs; `.json` files hold statistics of stages, whose weights and inputs follow
from a rule. Without the option the copies in this folder are compared.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = {"golden_file": ".npz", "stages_file": ".json"}


def pytest_addoption(parser):
    parser.addoption("--golden", action="append", default=[], metavar="FILE", help="outputs to compare with")


def pytest_generate_tests(metafunc):
    given = [Path(name) for name in metafunc.config.getoption("--golden", default=[])]  # or started elsewhere
    for fixture, suffix in KINDS.items():
        if fixture in metafunc.fixturenames:
            files = [path for path in given if (path.suffix == ".json") == (suffix == ".json")]
            chosen = files if given else sorted(HERE.glob(f"*{suffix}"))
            metafunc.parametrize(fixture, chosen, ids=[path.stem for path in chosen])
