"""Train a recipe on shards and leave a bundle: safetensors weights and a card.

Only the train split is read. Running the same command again resumes from the newest checkpoint, or does nothing when
the bundle is there. `vqray recipes NAME` lists what --set takes.

Examples:
  vqray train --recipe rotation_trick --shards shards/ --out runs/cells --workers 2
  vqray train --recipe plain_vq --shards shards/ --out runs/plain --set patch=4 num_codes=512 --seed 1
  vqray train --recipe rotation_trick --shards shards/ --out runs/cells --register cells
"""

import argparse
from dataclasses import asdict
from typing import Any

from jobs import cli
from jobs.arguments import add_out, add_settings, add_shards
from pipelines.errors import Refused
from pipelines.options import parse_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="a name from `vqray recipes`")
    add_shards(parser)
    add_out(parser, "the run's directory: checkpoints, then the bundle")
    parser.add_argument("--preset", help="small or paper (small where there is no CUDA)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="Ray Train workers, one CPU each (1)")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="G", help="GPUs for each worker (0)")
    parser.add_argument("--steps", type=int, metavar="N", help="short for --set steps=N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="everything random follows from it (0)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, metavar="N", help="steps between checkpoints (500)"
    )
    add_settings(parser, "settings of the recipe, e.g. num_codes=512 code_dim=32")
    parser.add_argument("--register", metavar="NAME", help="publish the bundle under this name when it is done")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_pairs(arguments.set)
    if arguments.steps is not None:
        if "steps" in overrides:
            raise Refused("steps is given twice, by --steps and by --set; give it once.")
        overrides["steps"] = arguments.steps
    from pipelines import registry
    from pipelines.train import Request, train

    if arguments.register is not None:
        registry.check_name(arguments.register)
    outcome = train(
        Request(
            recipe=arguments.recipe,
            shards=arguments.shards,
            out=arguments.out,
            preset=arguments.preset,
            overrides=overrides,
            seed=arguments.seed,
            workers=arguments.workers,
            gpus_per_worker=arguments.gpus_per_worker,
            checkpoint_every=arguments.checkpoint_every,
        )
    )
    result = asdict(outcome)
    if arguments.register is not None:
        published = registry.publish(registry.local_bundle(outcome.out), arguments.register, run_id=outcome.run_id)
        result["registered"] = f"{published.name}@v{published.version}"
    return result


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
