"""Trains one model on one task and data set: `python train.py`, any setting as `name=value`, `--help` lists them.

python train.py data=ncep_air_temperature            real data
python train.py model/encoder=grid_patch             another part
python train.py -m optimizer.lr=1e-3,3e-4            a sweep
python train.py dry_run=true                         shapes, parameters and memory, no training
python train.py resume=<output folder>               goes on where a run stopped
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from conf import schema
from training import arguments, command_line, sweep

schema.register()


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
@command_line.job
def train(config: DictConfig) -> None:
    # torch and everything above it only now: --help and typing errors answer at once.
    from models.composition import check
    from training.job import Job
    from training.launch import launch, mesh_of
    from training.parallel import check_mesh
    from training.run import build_data, build_task, describe, train_on_rank
    from training.sharding import check_sharding
    from training.sizes import fitted

    automatic = config.model.get("size") == "auto"
    config = check(config)
    data = build_data(config)
    if config.data.inspect:
        print(data.describe())
        return
    task = build_task(config)
    layout, mesh = task.layout(data), mesh_of(config.cp, config.dp)
    check_mesh(mesh, config, layout)
    check_sharding(mesh, config.trainer)
    if config.dry_run:
        print(describe(config, data, task, layout, mesh, automatic=automatic))
        return
    config = fitted(config, layout, mesh, automatic=automatic)
    summary = launch(train_on_rank, config, Job.current(), data, task, mesh=mesh, trainer=config.trainer)
    if summary is not None:  # on the first rank
        print(summary)


if __name__ == "__main__":
    command_line.run(train, rewrite=arguments.rewrite, finish=sweep.finish)
