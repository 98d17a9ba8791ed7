"""Compare every method with its baseline: `python scripts/check_regression.py`. Exit code 1: something has changed."""

import sys

from harness.cli import check_regression

if __name__ == "__main__":
    sys.exit(check_regression())
