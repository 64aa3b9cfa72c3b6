"""Arguments that several verbs share, so that they read the same everywhere."""

import argparse


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, metavar="URI", help=f"{what} (a local path or s3://...)")


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, metavar="URI", help="a directory that `vqray ingest` made")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bundle", required=True, metavar="REF", help="a run or bundle directory, a URI, NAME@ALIAS or NAME@v3"
    )


def add_settings(parser: argparse.ArgumentParser, where: str) -> None:
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help=where)


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard (RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265)",
    )


def paths_of(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What of a verb's arguments is a path, by option; an --out that was left out is an empty list. A bundle is a path
    where it has a slash in it, not as NAME@v3.
    """
    found: dict[str, list[str]] = {}
    for name in ("source", "shards", "codes", "out"):
        given = getattr(arguments, name, None)
        # A source may be left out, and an --out is asked for in another way then.
        if given is not None or (name == "out" and hasattr(arguments, name)):
            found[f"--{name}"] = [
                str(one) for one in (given if isinstance(given, list) else [given]) if one is not None
            ]
    bundle = getattr(arguments, "bundle", None)
    if bundle and "/" in bundle:
        found["--bundle"] = [bundle]
    return found
