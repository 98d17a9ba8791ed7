import socket

import pytest

from harness import hub
from harness.models.source import download, resolve_model
from kernels.errors import InputError


@pytest.fixture
def online(monkeypatch):
    """A switch for whether the hub answers."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def switch(reachable):
        monkeypatch.setattr(hub, "hub_reachable", lambda: reachable)

    return switch


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_the_offline_switch_is_obeyed_in_every_spelling(monkeypatch, value):
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert not hub.hub_allowed("paper")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        hub.require_hub("model 'x'", "o/x", "a folder")


@pytest.mark.parametrize(
    ("profile", "reachable", "allowed"),
    [("embedded", True, False), ("auto", True, True), ("auto", False, False), ("paper", False, True)],
)
def test_who_may_use_the_hub(online, profile, reachable, allowed):
    online(reachable)
    assert hub.hub_allowed(profile) == allowed


def test_no_network_says_what_from_where_and_how_by_hand(online):
    online(False)
    with pytest.raises(InputError) as caught:
        hub.require_hub("model 'opt-1.3b'", "facebook/opt-1.3b", "--model with a local folder")
    assert str(caught.value) == (
        "model 'opt-1.3b' comes from the hub (facebook/opt-1.3b), but no network: the hub cannot be reached; "
        "to provide it by hand, use --model with a local folder"
    )


def test_a_reachable_hub_is_no_error(online):
    online(True)
    hub.require_hub("model 'x'", "o/x", "a folder")


def test_reachability_is_a_connection_to_the_endpoint(monkeypatch):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub.hub_reachable.__wrapped__()
    server.close()
    assert not hub.hub_reachable.__wrapped__()


def test_a_hub_model_that_is_not_cached_is_refused_offline():
    with pytest.raises(InputError, match="model 'sagebench-tests/none-such' comes from the hub"):
        download(resolve_model("sagebench-tests/none-such"))
