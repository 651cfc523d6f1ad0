"""Run the paper's tables and figures, and make the page of what came out.

    python -m benchmarks.paper --quick                 # every table in small: minutes on two cores
    python -m benchmarks.paper --all                   # every table: hours
    python -m benchmarks.paper theorems table11_dense_on_the_fly
    python -m benchmarks.paper --page                  # docs/results.md and its pictures from the JSON there is

A table is run again only where its script has changed since, or with --again. Ctrl-C loses the table in work; one that
fails is reported, and the others go on. JSON goes to benchmarks/results/paper.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback


def main() -> int:
    arguments = parsed()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every script takes a GPU where it sees one
    from benchmarks.paper import page
    from benchmarks.paper.registry import TABLES

    if arguments.list:
        print("\n".join(f"{t.name:<34} about {t.minutes:g} min  {t.title}" for t in TABLES.values()))
        return 0
    if unknown := [name for name in arguments.names if name not in TABLES]:
        print(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}", file=sys.stderr)
        return 2
    chosen = arguments.names or (list(TABLES) if arguments.all or arguments.quick else [])
    failed = [name for name in chosen if not ran(name, "quick" if arguments.quick else "full", arguments.again)]
    if chosen or arguments.page:
        print(f"the page: {page.write()}")
    if failed:
        print(f"without a result: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TABLE", help="which tables; --list says which there are")
    parser.add_argument("--all", action="store_true", help="every table")
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer rounds")
    parser.add_argument("--again", action="store_true", help="also what has been run")
    parser.add_argument("--page", action="store_true", help="only make docs/results.md anew")
    parser.add_argument("--list", action="store_true", help="name the tables")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if not (arguments.names or arguments.all or arguments.quick or arguments.page or arguments.list):
        parser.error("type --quick, --all, --page, --list or names of tables")
    return arguments


def ran(name: str, size: str, again: bool) -> bool:
    """Run one table unless that has been done; whether there is a result of this script now."""
    from benchmarks.paper import kept
    from benchmarks.paper.registry import TABLES
    from gradsketch.demo.packages import AbsentError

    table = TABLES[name]
    if not again and kept.is_done(table, size):
        print(f"{name}: done before", flush=True)
        return True
    print(f"{name}: {table.title}", flush=True)
    start = time.perf_counter()
    try:
        file = kept.measured(table, size)
    except AbsentError as error:
        print(f"{name}: skipped. {error}", file=sys.stderr, flush=True)
        return False
    except Exception:
        traceback.print_exc()
        return False
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted, and lost; the tables before it are kept", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{name}: {time.perf_counter() - start:.0f} s, {file}", flush=True)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
