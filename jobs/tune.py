"""Search over a recipe's settings: which K and D for this corpus, and at which cost.

Trials are ordinary runs below --out, scored on the valid split; only the champion sees test. Running the same command
again runs only what is missing. --set takes search expressions beside plain values: choice:a,b,c, a..b:log2 (doubling),
a..b:log, a..b. Without one, the recipe's own space is searched (`vqray recipes NAME`).

Examples:
  vqray tune --recipe rotation_trick --shards shards/ --out kd --set num_codes=choice:256,512 code_dim=8..64:log2
  vqray tune --recipe rotation_trick --shards shards/ --out area --capacity 16384
  vqray tune --recipe plain_vq --shards shards/ --out any --sampler adaptive --trials 40 --repeats 3
  vqray tune --recipe plain_vq --shards shards/ --out any --pick 'min:distortion@bits<=512' --register cells
"""

import argparse
from collections import Counter
from typing import Any

from jobs import cli
from jobs.arguments import add_out, add_settings, add_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="a name from `vqray recipes`")
    add_shards(parser)
    add_out(parser, "the search's directory: one run below it for every trial")
    add_settings(
        parser, "what is searched (num_codes=choice:256,512 code_dim=8..64:log2), and what is fixed (steps=300)"
    )
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--capacity", type=int, metavar="N", help="K x D of every trial; one of them follows")
    limits.add_argument("--bits", type=float, metavar="B", help="bits a row of every trial; num_codes follows")
    parser.add_argument("--sampler", metavar="S", help="grid, random or adaptive (grid where the space is small)")
    parser.add_argument("--trials", type=int, metavar="N", help="points to try (all of a grid, else 20)")
    parser.add_argument("--repeats", type=int, default=1, metavar="R", help="seeds for every point (1)")
    parser.add_argument(
        "--objective", nargs="+", metavar="O", help="min:NAME or max:NAME (min:distortion min:bits_per_row)"
    )
    parser.add_argument("--asha", action="store_true", help="stop trials early that are behind on the one objective")
    parser.add_argument("--concurrent", type=int, metavar="M", help="trials at a time (as many as the cluster holds)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="Ray Train workers of each trial (1)")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="G", help="GPUs for each worker (0)")
    parser.add_argument("--preset", help="small or paper (small where there is no CUDA)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="everything random follows from it (0)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, metavar="N", help="steps between checkpoints (500)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try trials again that are recorded as failed")
    parser.add_argument(
        "--pick",
        metavar="RULE",
        help="the champion: knee, or e.g. 'min:distortion@bits<=12' (knee; of one objective, its best)",
    )
    parser.add_argument(
        "--grow",
        type=float,
        nargs="?",
        const=0.5,
        metavar="SHARE",
        help="grow codebooks of a grid from the next smaller ones, in this share of the steps (0.5)",
    )
    parser.add_argument("--register", metavar="NAME", help="publish the champion under this name, as NAME@champion")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.search_plan import Search
    from pipelines.tune import search

    searched = search(
        Search(
            recipe=arguments.recipe,
            shards=arguments.shards,
            out=arguments.out,
            preset=arguments.preset,
            words=arguments.set,
            capacity=arguments.capacity,
            bits=arguments.bits,
            sampler=arguments.sampler,
            trials=arguments.trials,
            repeats=arguments.repeats,
            seed=arguments.seed,
            objectives=arguments.objective,
            asha=arguments.asha,
            concurrent=arguments.concurrent,
            workers=arguments.workers,
            gpus_per_worker=arguments.gpus_per_worker,
            checkpoint_every=arguments.checkpoint_every,
            retry_failed=arguments.retry_failed,
            pick=arguments.pick,
            register=arguments.register,
            grow=arguments.grow,
        )
    )
    states = Counter(trial.state for trial in searched.trials)
    found = searched.conclusion
    names = [name for name, _ in searched.objectives]
    return {
        "out": searched.out,
        "digest": searched.digest,
        "skipped": searched.skipped,
        "trials": dict(states),
        "run_id": searched.run_id,
        "front": [
            {"trials": point["trials"], **point["settings"], **{name: point["valid"][name] for name in names}}
            for point in found.front
        ],
        "champion": {name: found.champion[name] for name in ("trial", "settings", "why", "bundle", "bundle_digest")},
        "metrics": found.champion["test"],
        **({"registered": found.registered} if found.registered else {}),
    }


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
