"""``gradsketch`` and ``python -m gradsketch``."""

import sys

__all__ = ["run"]


def run() -> int:
    """Run the command line; the libraries it imports first may be interrupted like everything else."""
    try:
        from gradsketch.cli import main

        return main()
    except KeyboardInterrupt:
        print("\ngradsketch: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
