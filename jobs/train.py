"""Train a recipe on shards and leave a bundle: safetensors weights and a card.

Only the train split is read. Running the same command again resumes from the newest checkpoint, or does nothing when
the bundle is there. `vqray recipes NAME` lists what --set takes.

Workers, nodes and this command may die: workers start again from the newest checkpoint by themselves, and after
anything else the same command goes on from there. SIGTERM writes a checkpoint and ends.

With --stream the shards are made by the same command: an ingest goes on beside the workers, on the CPUs they leave,
and training takes its parts in their order as they finish. When the steps outlast the parts it begins again with the
first, unless they are deleted as they are used. The bundle is written when the ingest is done too.

Examples:
  vqray train --recipe rotation_trick --shards shards/ --out runs/cells --workers 2
  vqray train --recipe plain_vq --shards shards/ --out runs/plain --set patch=4 num_codes=512 --seed 1
  vqray train --recipe rotation_trick --shards shards/ --out runs/cells --register cells
  vqray train --recipe rotation_trick --shards s3://b/shards --out s3://b/run --workers 2..8 --gpus-per-worker 1
  vqray train --recipe clvq_vae --stream --source news --prepare model=models/minilm layers=3,6 \\
    --shards shards/ --out runs/concepts --delete-used
"""

import argparse
from dataclasses import asdict
from typing import Any

from jobs import cli
from jobs.arguments import add_settings, add_shards
from pipelines.errors import Refused
from pipelines.options import parse_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="a name from `vqray recipes`")
    add_shards(parser)
    add_stream(parser)
    parser.add_argument(
        "--out",
        metavar="URI",
        help="the run's directory: checkpoints, then the bundle (a local path or s3://...); without it, one below"
        " $VQRAY_RUNS (runs/) named after what the result depends on",
    )
    parser.add_argument("--preset", help="small or paper (small where there is no CUDA)")
    parser.add_argument(
        "--workers",
        default="1",
        metavar="N|A..B",
        help="Ray Train workers, one CPU each (1); 2..8 begins and goes on with what there is, from 2 to 8",
    )
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="G", help="GPUs for each worker (0)")
    parser.add_argument("--steps", type=int, metavar="N", help="short for --set steps=N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="everything random follows from it (0)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, metavar="N", help="steps between checkpoints (500)"
    )
    parser.add_argument(
        "--micro-batches", type=int, default=1, metavar="N", help="forwards a step of each worker; one update (1)"
    )
    parser.add_argument(
        "--precision", default="float32", help="float32, or bf16: networks in bfloat16, codebooks in float32 (float32)"
    )
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="seconds that no checkpoint can be written (600)"
    )
    parser.add_argument(
        "--hang-after", type=float, default=600.0, metavar="S", help="seconds until a worker counts as hung (600)"
    )
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="after deaths without a checkpoint in between (3)"
    )
    add_settings(parser, "settings of the recipe, e.g. num_codes=512 code_dim=32")
    parser.add_argument("--register", metavar="NAME", help="publish the bundle under this name when it is done")


def add_stream(parser: argparse.ArgumentParser) -> None:
    """What `--stream` takes; each means what it means to `vqray ingest`."""
    group = parser.add_argument_group("streaming", "make the shards and train on their finished parts meanwhile")
    group.add_argument(
        "--stream", action="store_true", help="--shards is where they go; without --source, they are finished"
    )
    group.add_argument("--corpus", metavar="KIND", help="what the files hold (what the recipe trains on)")
    group.add_argument("--source", nargs="+", metavar="URI", help="files or directories to read")
    group.add_argument(
        "--prepare", nargs="+", metavar="KEY=VALUE", action="extend",
        help="settings of the corpus kind, as `vqray ingest --set` takes them",
    )  # fmt: skip
    group.add_argument("--limit", type=int, metavar="N", help="take N units, spread evenly over the sources")
    group.add_argument("--holdout", type=float, metavar="F", help="share of groups for valid and for test each (0.1)")
    group.add_argument("--max-bad-fraction", type=float, metavar="F", help="fail when more than this is bad (0.05)")
    group.add_argument(
        "--delete-used", action="store_true", help="delete a part when no checkpoint goes on in it; one pass"
    )


def streamed(arguments: argparse.Namespace) -> Any:
    """What --stream and the options that go with it ask for; None without them.

    Raises:
        Refused: one of them without --stream.
    """
    names = ("corpus", "source", "prepare", "limit", "holdout", "max_bad_fraction", "delete_used")
    given = {name: value for name in names if (value := getattr(arguments, name)) not in (None, False)}
    if not arguments.stream:
        if given:
            options = ", ".join("--" + name.replace("_", "-") for name in given)
            raise Refused(f"{options} given without --stream: it says how shards are made while training goes on.")
        return None
    from pipelines.stream_request import Streamed

    return Streamed(
        sources=tuple(given.pop("source", ())), preparation=parse_pairs(given.pop("prepare", []), "--prepare"), **given
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_pairs(arguments.set)
    if arguments.steps is not None:
        if "steps" in overrides:
            raise Refused("steps is given twice, by --steps and by --set; give it once.")
        overrides["steps"] = arguments.steps
    from pipelines import registry
    from pipelines.request import Request
    from pipelines.train import train

    if arguments.register is not None:
        registry.check_name(arguments.register)
    most, least = workers_of(arguments.workers)
    outcome = train(
        Request(
            recipe=arguments.recipe,
            shards=arguments.shards,
            out=arguments.out,
            preset=arguments.preset,
            overrides=overrides,
            seed=arguments.seed,
            workers=most,
            at_least=least,
            gpus_per_worker=arguments.gpus_per_worker,
            micro_batches=arguments.micro_batches,
            precision=arguments.precision,
            checkpoint_every=arguments.checkpoint_every,
            patience=arguments.patience,
            hang_after=arguments.hang_after,
            restarts=arguments.restarts,
            stream=streamed(arguments),
        )
    )
    result = asdict(outcome)
    if arguments.register is not None:
        published = registry.publish(registry.local_bundle(outcome.out), arguments.register, run_id=outcome.run_id)
        result["registered"] = f"{published.name}@v{published.version}"
    return result


def workers_of(words: str) -> tuple[int, int | None]:
    """(most, fewest or None) of `4` or `2..8`. Raises Refused for anything else."""
    low, dots, high = words.partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()):
        raise Refused(f"--workers {words!r} was given; write a number, or the fewest and the most: 2..8.")
    return (int(high), int(low)) if dots else (int(low), None)


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
