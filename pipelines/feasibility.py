"""Which points of a search space can be trained on the given shards, and what follows from a fixed capacity or rate."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines import trained
from pipelines.errors import Refused
from pipelines.feed import columns_of, read_columns, to_batch
from pipelines.options import validated
from pipelines.plan import lanes_for
from pipelines.recipe import Recipe, Settings
from pipelines.shards import ShardReader
from pipelines.space import Point, Space

SIZE, DIM = "num_codes", "code_dim"
SAME_NETWORK = {SIZE, DIM, "steps", "batch_size"}
"""Settings that do not change how many vectors a row becomes."""
RATE_TOLERANCE = 0.01


@dataclass
class Feasibility:
    """Completes points and refuses those that cannot be trained."""

    found: Recipe
    space: Space
    base: Mapping[str, Any]
    """The preset under the fixed settings."""
    reader: ShardReader
    capacity: int | None = None
    """Numbers in all codebooks together (levels x K x D) that every trial has."""
    bits: float | None = None
    """Bits a row that every trial has."""
    workers: int = 1
    """Of each trial: its batches must be shared by as many."""
    _vectors: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.capacity is not None and self.bits is not None:
            raise Refused("--capacity and --bits were both given; each fixes num_codes, so give one of them.")
        if self.limited and SIZE not in self.found.Settings.model_fields:
            raise Refused(f"recipe {self.found.name!r} has no {SIZE}, so no codebook size can follow from a limit.")
        if self.follows in self.space.fixed:
            raise Refused(f"{self.follows} follows from --{self.limit}; leave {self.follows}=... out of --set.")

    @property
    def limited(self) -> bool:
        return self.capacity is not None or self.bits is not None

    @property
    def limit(self) -> str:
        return f"capacity {self.capacity}" if self.capacity is not None else f"bits {self.bits:g}"

    @property
    def follows(self) -> str | None:
        """The setting that is not drawn but follows from the limit: the size, or D where only the size was given."""
        if not self.limited:
            return None
        sized = SIZE in self.space.chosen or SIZE in self.space.fixed
        dim_free = DIM in self.found.Settings.model_fields and not {DIM} & (self.space.chosen | self.space.fixed.keys())
        return DIM if self.capacity is not None and sized and dim_free else SIZE

    def drawn(self) -> Space:
        """The space without what follows."""
        domains = {key: domain for key, domain in self.space.domains.items() if key != self.follows}
        return Space(domains, self.space.fixed, self.space.given, self.space.chosen)

    def complete(self, point: Point) -> Point:
        """The point with what follows from the limit.

        Raises:
            Refused: it cannot be trained, and why.
        """
        if self.follows is not None:
            point = {**point, self.follows: self._following(point)}
            if self.follows in self.space.chosen and point[self.follows] not in self.space.domains[self.follows]:
                raise Refused(
                    f"{self.follows}={point[self.follows]} would follow from --{self.limit}, and"
                    f" {self.follows}={self.space.given[self.follows]} leaves it out"
                )
        settings = self.resolved(point)
        lanes_for(settings.batch_size, self.workers)
        books = self.found.codebooks(settings)
        if self.capacity is not None and (held := sum(k * d for k, d in books)) != self.capacity:
            raise Refused(f"its codebooks hold {held:,} numbers, not {self.capacity:,}")
        rows, vectors = self.reader.rows("train"), self.vectors_per_row(point)
        if (most := max((k for k, _ in books), default=0)) > rows * vectors:
            raise Refused(
                f"num_codes={most} is more than the {rows * vectors:,} vectors of the train split"
                f" ({rows:,} rows x {vectors}); take a smaller num_codes, or ingest more"
            )
        return point

    def vectors_per_row(self, point: Point) -> int:
        """How many vectors the quantizer sees of one row: asked of the recipe, with a smallest codebook."""
        shaping = {key: value for key, value in point.items() if _shapes_network(key, value)}
        key = json.dumps(shaping, sort_keys=True)
        if key not in self._vectors:
            settings = self.resolved(shaping)
            stage = self.found.stages(settings)[-1]
            columns, row_ids = read_columns(self.reader, "train", np.zeros(1, dtype=np.int64))
            batch, _ = to_batch(columns, row_ids, np.ones(1, dtype=bool))
            counts = stage.counts(trained.rebuild(self.found, settings), batch)
            self._vectors[key] = max(1, counts.get("vectors", counts["rows"]))
        return self._vectors[key]

    def _following(self, point: Point) -> int:
        books = self.found.codebooks(self.resolved(point))
        if not books:
            raise Refused("these settings have no codebook, so --capacity and --bits say nothing of them")
        if self.bits is not None:
            return self._size_at_rate(point)
        here = sum(d if self.follows == SIZE else k for k, d in books)
        if (self.capacity or 0) % here:
            other = DIM if self.follows == SIZE else SIZE
            raise Refused(f"{self.capacity} numbers cannot be shared by {other} {here}; choose a divisor")
        return (self.capacity or 0) // here

    def _size_at_rate(self, point: Point) -> int:
        """K with codes x log2 K = bits, to within a hundredth of the rate."""
        bits = self.bits or 0.0
        codes = self.vectors_per_row(point) * len(self.found.codebooks(self.resolved(point)))
        if not 1 <= bits / codes <= 24:
            raise Refused(
                f"{bits:g} bits over {codes} codes a row are {bits / codes:.3g} bits a code; allowed: 1 to 24"
            )
        size = round(2 ** (bits / codes))
        if abs(codes * math.log2(size) - bits) > RATE_TOLERANCE * bits:
            raise Refused(
                f"{bits:g} bits over {codes} codes a row are {bits / codes:.3g} bits a code: no whole num_codes"
            )
        return size

    def resolved(self, point: Point) -> Settings:
        """All settings of a point, with what follows from the shards. Raises Refused where they cannot be."""
        values = {**self.base, **point}
        settings = validated(self.found.Settings, values, f"recipe {self.found.name!r}")
        resolved: Settings = self.found.resolve(settings, columns_of(self.reader.manifest))
        for key in (*self.space.fixed, *point):
            if getattr(settings, key) != getattr(resolved, key):
                raise Refused(f"{key} follows from the shards ({getattr(resolved, key)}); leave it out of --set.")
        return resolved


def without_what_follows(
    found: Recipe, space: Space, base: Mapping[str, Any], columns: Mapping[str, Any]
) -> Space:  # fmt: skip
    """The space without those settings of the recipe's own proposal that these shards leave no choice of."""
    kept = {}
    for key, domain in space.domains.items():
        if key not in space.chosen:
            values = domain.grid() or (domain.draw(random.Random(0)),)
            settings = validated(found.Settings, {**base, key: values[0]}, f"recipe {found.name!r}")
            try:
                follows = getattr(found.resolve(settings, dict(columns)), key) != values[0]
            except Refused:
                follows = False
            if follows:
                continue
        kept[key] = domain
    given = {key: text for key, text in space.given.items() if key in kept}
    return Space(kept, space.fixed, given, space.chosen)


def _shapes_network(key: str, value: Any) -> bool:
    return key not in SAME_NETWORK and isinstance(value, int | list | tuple) and not isinstance(value, bool)
