"""`python -m drill`: runs the drill and prints its figures; the last line is the verdict.

The exit status is 0 only if every promise holds.
"""

from __future__ import annotations

import argparse
import resource
import sys
from dataclasses import replace

import uvloop

from drill.plan import SHORT, Plan
from drill.run import run
from drill.verdict import checks, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="drill", description=__doc__)
    parser.add_argument("--short", action="store_true", help="100 calls/s for seven seconds")
    parser.add_argument("--rate", type=float, help="calls a second")
    parser.add_argument("--seconds", type=float, help="how long calls start")
    parser.add_argument("--sidecars", type=int, help="processes that share the store")
    parser.add_argument("--seed", type=int, help="of calls and faults")
    options = parser.parse_args()
    given = {
        name: value
        for name in ("rate", "seconds", "sidecars", "seed")
        if (value := getattr(options, name)) is not None
    }
    plan = replace(SHORT if options.short else Plan(), **given)
    if plan.rate <= 0 or plan.sidecars < 1 or plan.outage_at <= plan.store_goes_at:
        parser.error("too little to drill: the store's restart and the outage need their time")

    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = min(open_files, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    evidence = uvloop.run(run(plan, tell=lambda text: print(text, file=sys.stderr, flush=True)))
    found = list(checks(evidence))
    print(report(evidence, found))
    sys.exit(0 if all(check.holds for check in found) else 1)


if __name__ == "__main__":
    main()
