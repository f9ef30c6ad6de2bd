"""One file with the weights of a checkpoint, whole or in shards, and all that is needed to build their model again.

python -m training.export outputs/<date>/<time>/checkpoints/best weights.safetensors
python -m training.export outputs/<date>/<time>/checkpoints/best weights.safetensors --trained

`models.load("weights.safetensors")` gives the model; any reader of safetensors gives the tensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.written_whole import written_whole
from models.composition import load
from models.stored_weights import HEADER, description
from training.checkpoints import as_safetensors
from training.command_line import TRACEBACKS, fail, is_user_error, sentence


def export(checkpoint: Path, file: Path, *, averaged: bool = True) -> None:
    """Writes the weights of a checkpoint folder, the averaged ones where it has them, to one file: complete or absent.
    Its folder is made where there is none.

    Raises ValueError where this is no checkpoint or damaged, OSError where the file cannot be written.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} must end in .safetensors, like {file.name}.safetensors")
    model, stored = load(checkpoint, ema=averaged), description(checkpoint)
    stored["averaged"] = averaged and stored["averaged"]
    with written_whole(file) as beside:
        beside.write_bytes(as_safetensors(model.state_dict(), {"format": "pt", HEADER: json.dumps(stored)}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, like <run>/checkpoints/best")
    parser.add_argument("file", type=Path, help="the file to write, ending in .safetensors")
    parser.add_argument("--trained", action="store_true", help="the trained weights instead of the averaged ones")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.file, averaged=not options.trained)
    except Exception as error:
        if TRACEBACKS or not is_user_error(error):
            raise
        fail(sentence(error))
    print(f"{options.file}: {options.file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
