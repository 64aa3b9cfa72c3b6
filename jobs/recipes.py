"""List the recipes, or explain one: its settings, presets and search space.

Examples:
  vqray recipes
  vqray recipes rotation_trick
"""

import argparse
from typing import Any

from jobs import cli
from pipelines import recipe
from pipelines.options import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a recipe to explain")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.name is None:
        width = max(map(len, recipe.names())) + 2
        for name in recipe.names():
            print(f"{name:<{width}}{recipe.load(name).summary}")
        return {"recipes": recipe.names()}
    found = recipe.load(arguments.name)
    print(f"{found.name}: {found.summary}\ncorpus: {', '.join(found.corpus)}\n\nsettings (--set key=value)")
    for key, default, meaning in describe(found.Settings):
        print(f"  {key:<20}{default:<22}{meaning}")
    for preset, values in found.presets.items():
        print(f"\npreset {preset}: " + (" ".join(f"{k}={v}" for k, v in values.items()) or "the defaults"))
    print("\nsearch space: " + " ".join(f"{k}={v}" for k, v in found.space.items()))
    return {"recipe": found.name}


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
