"""Figures for a paper, from records: `python scripts/export_figures.py --format pdf --style icml --width column`."""

import sys

from harness.cli import export_figures

if __name__ == "__main__":
    sys.exit(export_figures())
