"""Whether the model hub may be used, and what to say when it cannot."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit

from kernels.errors import InputError

_TRUE = {"1", "true", "yes", "on"}


def hub_allowed(profile: str) -> bool:
    """True if a profile may download from the hub: never for `embedded`; for `auto` when the hub can be reached."""
    if profile == "embedded" or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        return False
    return profile == "paper" or hub_reachable()


@cache
def hub_reachable() -> bool:
    """True if a connection to the hub (HF_ENDPOINT, or the default one) opens within three seconds."""
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False


def require_hub(thing: str, repository: str, by_hand: str) -> None:
    """Raise InputError if `thing` would have to come from the hub and the hub is out of reach."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        reason = "HF_HUB_OFFLINE is set"
    elif not hub_reachable():
        reason = "no network: the hub cannot be reached"
    else:
        return
    raise InputError(f"{thing} comes from the hub ({repository}), but {reason}; to provide it by hand, use {by_hand}")
