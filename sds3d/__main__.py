"""``python -m sds3d``, and the program ``sds3d``: the command line, whose imports Ctrl-C may interrupt, too."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line and code 130, whenever it comes."""
    report = sys.unraisablehook
    sys.unraisablehook = lambda args: None if args.exc_type is KeyboardInterrupt else report(args)
    try:
        from sds3d.cli import main as command

        command()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
