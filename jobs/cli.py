"""vqray: learn discrete codebooks on Ray. `vqray VERB --help` explains each verb."""

import argparse
import ast
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jobs
from pipelines import tokens
from pipelines.errors import Failed, Refused, nearest_names

NOT_VERBS = {"cli", "arguments"}


def verbs() -> dict[str, str]:
    """Every verb with the first line of its module's docstring, read without importing it (imports cost seconds)."""
    found = {}
    for module in pkgutil.iter_modules(jobs.__path__):
        if module.name not in NOT_VERBS and not module.name.startswith("_"):
            source = (Path(jobs.__path__[0]) / f"{module.name}.py").read_text(encoding="utf-8")
            found[module.name] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 when done, 2 when refused before work began, 1 when it failed during work.

    The last line of standard output is one JSON object; everything for people goes to standard error. Where a verb
    stands for another command, that one's `exit_code` is in the object, and is returned.
    """
    # Before anything reads its environment: a job's variables come sealed. Ray opens them in workers, not here.
    tokens.open_environment()
    words = list(sys.argv[1:] if argv is None else argv)
    known = verbs()
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(known))
        return 0
    verb, *rest = words
    if verb not in known:
        print(f"vqray: there is no verb {verb!r}; {nearest_names(verb, known)}", file=sys.stderr)
        return 2
    parser, run = parser_of(verb)
    return _carry_out(verb, run, parser.parse_args(rest))


def parser_of(verb: str) -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], dict[str, Any]]]:
    """The parser of one verb, and the function that carries it out."""
    module = importlib.import_module(f"jobs.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"vqray {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return parser, module.run


def main_of(file: str) -> int:
    """`python -m jobs.VERB ARGS` as `vqray VERB ARGS`; `file` is the verb's own."""
    return main([Path(file).stem, *sys.argv[1:]])


def overview(known: dict[str, str]) -> str:
    """What `vqray` alone prints."""
    width = max(map(len, known)) + 2
    lines = [f"  {verb:<{width}}{summary}" for verb, summary in known.items()]
    first = "Try `vqray demo` first: real photos in, a registered codebook out, in about three minutes."
    return "\n".join([(__doc__ or "").strip(), "", *lines, "", first])


def _carry_out(verb: str, run: Any, arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    try:
        result = run(arguments)
    except Refused as refusal:
        print(f"vqray {verb}: {refusal}", file=sys.stderr)
        return 2
    except Failed as failure:
        print(f"vqray {verb}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvqray {verb}: stopped. Run the same command again to go on from here.", file=sys.stderr)
        return 1
    seconds = round(time.perf_counter() - began, 2)
    if result.get("skipped"):
        print(f"vqray {verb}: this was done before; nothing to do", file=sys.stderr)
    print(json.dumps({**result, "seconds": seconds, "skipped": bool(result.get("skipped", False))}))
    return int(result.get("exit_code", 0))


if __name__ == "__main__":
    sys.exit(main())
