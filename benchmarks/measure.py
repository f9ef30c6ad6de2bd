"""How benchmarks measure: interleaved steps by process CPU time, memory by the growth of peak RSS, results as JSON.

CPU time of the process instead of wall time, so that other work on the machine disturbs a comparison less;
implementations take turns within one run (A B C A B C ...), so that what disturbs one of them disturbs all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def paired_cpu_seconds(steps: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step in each round, after one warm-up of each. Steps take turns within a round."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(of: list[float], to: list[float]) -> float:
    """Median over the rounds of of/to: what disturbs a whole round cancels."""
    return median(numerator / denominator for numerator, denominator in zip(of, to, strict=True))


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far (Linux counts it from exec, unlike getrusage)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def in_child(function: Callable[[], object]) -> object:
    """What function returns in a forked process, whose memory starts from here and whose end frees it all.

    Call it before this process computes: a thread pool does not survive a fork. Raises RuntimeError when it fails.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a measurement in a child process failed; its traceback is above") from None
    finally:
        child.join()


def environment(packages: tuple[str, ...]) -> dict:
    """Where and with what a benchmark ran: date, processor, load, versions (packages that are absent are left out)."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": versions,
    }


def _processor() -> str:
    """Model name and the instruction sets that decide matrix products."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor() or platform.machine()
    lines = information.read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[: lines.index("") if "" in lines else None] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(sets) or 'no vector extensions reported'})"


def cpu_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Options that all comparisons on a CPU have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-store", action="store_true", help="print the table of this run only")
    return parser


def started(name: str, options: list[str], *, threads: int, packages: tuple[str, ...]) -> dict:
    """What a result says of itself before anything is measured, with that many threads from here on."""
    import torch

    torch.set_num_threads(threads)
    return environment(("torch", *packages)) | {"command": command(name, options), "threads": threads}


def finished(
    name: str,
    result: dict,
    rows: list[dict],
    table: Callable[[list[dict]], str],
    *,
    store: bool,
    key: tuple[str, ...] = (),
    order: Callable[[dict], object] | None = None,
) -> None:
    """Publishes the rows of a result that `started`, in order, stored ones of another key among them."""
    stamp = {"date": result["date"], "command": result["command"]}
    result = result | {"rows": [row | stamp for row in rows]}
    if store and key:
        result = merged(name, result, key=key)
    if order is not None:
        result["rows"].sort(key=order)
    publish(name, result, table(result["rows"]), store=store)


def merged(name: str, result: dict, *, key: tuple[str, ...]) -> dict:
    """`result` with the stored rows that this run did not measure again, stored ones first.

    Rows of another device or of other versions are dropped: one table compares like with like. key: what tells rows
    apart.
    """
    before = stored(name)
    if any(before.get(same) != result[same] for same in ("device", "cores", "versions", "threads")):
        before = {"rows": []}
    rows = {tuple(row[part] for part in key): row for row in (*before["rows"], *result["rows"])}
    return {**result, "rows": list(rows.values())}


def stored(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def publish(name: str, result: dict, table: str, *, store: bool) -> None:
    """Prints the table; with store also writes results/<name>.json and the table between its markers in the page.

    The line below the table says where, when and by which commands its rows were measured.
    """
    where = f"{result['device']}, {result['cores']} cores"
    table += "\n\n" + credit(where, result.get("rows") or [result])
    print(table)
    if not store:
        return
    _store(name, result, table)
    print(f"stored in {RESULTS.relative_to(ROOT)}/{name}.json and {PAGE.relative_to(ROOT)}")


def publish_devices(name: str, results: dict[str, dict], section: Callable[[str, dict | None], str]) -> None:
    """Into results/<name>.json and the page what GPU and CPU measured, each below its title; section: of `cuda` or
    `cpu` and its result, None where there is none."""
    sections = (section(kind, results.get(kind)) for kind in ("cuda", "cpu"))
    _store(name, results, "\n\n".join(sections))


def _store(name: str, result: dict, text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    insert(PAGE, name, text)


def credit(where: str, rows: list[dict]) -> str:
    """The line below a table: where, when and by which commands its rows were measured."""
    dates, commands = (sorted({row[part] for row in rows}) for part in ("date", "command"))
    days = " to ".join(dict.fromkeys((dates[0][:10], dates[-1][:10])))
    return f"{where}, {days}: " + ", ".join(f"`{command}`" for command in commands)


def command(name: str, options: list[str]) -> str:
    """As it is shown: without what says where its numbers go."""
    place = options.index("--output") if "--output" in options else len(options)
    options = [part for part in (*options[:place], *options[place + 2 :]) if part != "--no-store"]
    return shlex.join(["python", "-m", "benchmarks", name, *options])


def insert(page: Path, name: str, text: str) -> None:
    """Puts the text between the markers of that name in a page."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    head, rest = page.read_text().split(start)
    page.write_text(f"{head}{start}\n{text}\n{end}{rest.split(end)[1]}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)
