"""`python -m benchmarks <name> [options]`: runs one benchmark, prints its table and stores the numbers."""

from __future__ import annotations

import argparse
import importlib
import sys

NAMES = {
    "perceiver": "Perceiver IO, forward and backward on CPU, against krasserm's, lucidrains' and transformers'",
    "perceiver_ar": "Perceiver AR, a training step and generation with a cache on CPU, against krasserm's",
    "lead_times": "one encoding for 1, 12 and 48 lead times against one for each (MetNet) and a recurrent encoder",
    "ocean": "the cross-resolution encoder, 1/4 degree with a boundary on 1 degree, against the 1/4 degree alone",
    "loader": "samples/s from RAM, memmap, NetCDF and Zarr against xbatcher, and the share of a step spent waiting",
    "healda_cpu": "HealDA v2, forward and backward on CPU, with and without observations, against PhysicsNeMo's",
    "sst": "the monthly model, forward and backward on CPU, against its formula in torch's own layers",
    "attention": "every backend of attention over lengths, heads and dtypes, and what `model.attention=auto` picks",
    "kernels": "each kernel of kernels/ against PhysicsNeMo's and against what the device can do, GPU or CPU",
    "parallel": "context parallelism: bytes against the minimum, reshard time, steps with cp = 1 to 8, start-up",
    "scaling_model": "estimates for 8 to 512 GPUs: memory, compute and communication of a rank (docs/scaling.md)",
    "startup": "seconds until `train.py --help` and until `train.py dry_run=true` return",
}


def main(arguments: list[str] | None = None) -> int:
    listing = "\n".join(f"  {name:13} {text}" for name, text in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Numbers go to benchmarks/results/<name>.json and into the table of docs/performance.md.",
        epilog=f"benchmarks:\n{listing}\n\n`python -m benchmarks <name> --help` shows the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(arguments)
    try:
        importlib.import_module(f"benchmarks.{chosen.name}").main(chosen.options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
