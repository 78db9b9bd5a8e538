"""The entry point of ``sds3d`` and ``python -m sds3d``. It handles Ctrl-C during the imports, too."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it at any time with one line and exit code 130."""
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
