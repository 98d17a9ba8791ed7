"""Reproduce a table of the SAGE-PTQ paper: `python scripts/reproduce.py --table 1`."""

import sys

from harness.cli import reproduce

if __name__ == "__main__":
    sys.exit(reproduce())
