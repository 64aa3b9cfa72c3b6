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
