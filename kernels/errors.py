"""Exceptions that every floor shares: bad input, and a computation that failed on good input.

Every floor raises `InputError` for something the user can put right: an unknown name, a value out of
range, a damaged file. The command line turns it into one line on stderr and exit code 2. `NumericalError` and whatever
else a run raises is kept as that run's failure, and the other runs go on.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used: the message names the thing, its value, and what would be right."""


class NumericalError(RuntimeError):
    """A computation that ran into NaN, infinity or a singular matrix: the run fails, the next one may not."""


def is_disk_full(error: OSError) -> bool:
    """True if `error` says that the disk is full, or the user's share of it (a quota)."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message for an unknown `name`: the closest known names, or all of them.

    Returns a phrase that starts with a semicolon, such as ``"; did you mean 'gptq'?"``.
    """
    names = sorted(known)
    # A misspelling may differ in case or in the separator alone ("SAGE_PTQ" for "sage-ptq").
    folded = {candidate.lower().replace("_", "-"): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), folded, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(folded[match]) for match in close) + "?"
    return "; known: " + ", ".join(names) if names else "; none is known"
