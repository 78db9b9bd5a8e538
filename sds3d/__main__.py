"""``python -m sds3d``: the command line."""

from sds3d.cli import main

main()
