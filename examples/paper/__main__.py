"""`python -m examples.paper [all|run|plot|claims]`: train what has no row yet, draw the figures, test the claims."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.paper import claims, figures, runner
from examples.paper.rows import RowsError
from examples.paper.settings import PLANS

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do it; 0, or 1 if rows are missing, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.paper", description=__doc__)
    parser.add_argument("command", nargs="?", default="all", choices=("all", "run", "plot", "claims"))
    parser.add_argument("--plan", default="full", choices=tuple(PLANS), help="tiny: seconds, and shows nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows and figures")
    parser.add_argument("--workers", type=int, default=runner.cores(), help="processes that train, default: all cores")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}, expected at least 1")
    if options.plan != "full" and options.results == RESULTS:
        parser.error(
            f"--plan {options.plan} needs --results, a folder of its own: {RESULTS} holds the full plan's rows"
        )
    plan = PLANS[options.plan]
    try:
        if options.command in ("all", "run"):
            runner.run(plan, options.results, options.workers)
        if options.command in ("all", "claims"):
            result = claims.compute(plan, options.results)
            claims.write(result, options.results)
            print(claims.table(result))
        if options.command in ("all", "plot"):
            for path in figures.draw(plan, options.results):
                print(path)
    except RowsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
