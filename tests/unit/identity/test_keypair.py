"""Identities in files: stable, private, whole, and used by one peer at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.errors import BadInputError
from swarm.identity import Identity, verify


def test_an_identity_survives_a_restart(tmp_path: Path) -> None:
    """A server that restarts must be the same peer: clients avoid and trust peers by id."""
    path = tmp_path / "new folder" / "identity"
    with Identity.load_or_create(path) as first:
        signature = first.sign(b"hello")
    with Identity.load_or_create(path) as second:
        assert second.peer_id == first.peer_id
        assert verify(second.peer_id, b"hello", signature)


def test_fresh_identities_differ(tmp_path: Path) -> None:
    """Two servers on one machine must not become one peer."""
    with Identity.load_or_create(tmp_path / "a") as a, Identity.load_or_create(tmp_path / "b") as b:
        assert len({a.peer_id, b.peer_id, Identity.generate().peer_id}) == 3


def test_the_file_is_libp2ps_and_private(tmp_path: Path) -> None:
    """p2pd reads this very form, and who can read it can impersonate the server."""
    path = tmp_path / "identity"
    with Identity.load_or_create(path) as identity:
        assert path.read_bytes() == identity.to_libp2p_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [path], "no scratch file is left behind"


def test_a_file_others_can_read_is_made_private(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys copied from elsewhere often arrive readable; the operator learns of it."""
    path = tmp_path / "identity"
    Identity.load_or_create(path).close()
    path.chmod(0o644)
    Identity.load_or_create(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "readable by others" in caplog.text


def test_a_second_user_of_the_file_is_refused(tmp_path: Path) -> None:
    """Two running peers with one id would answer for each other at random, which nobody could explain."""
    path = tmp_path / "identity"
    with Identity.load_or_create(path) as identity:
        with pytest.raises(BadInputError, match="in use by another process"):
            Identity.load_or_create(path)
        script = f"from swarm.identity import Identity; Identity.load_or_create({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert "in use by another process" in other.stderr
    with Identity.load_or_create(path) as again:
        assert again.peer_id == identity.peer_id


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    """After a crash the server must start again without anybody removing files."""
    path = tmp_path / "identity"
    script = f"from swarm.identity import Identity; i = Identity.load_or_create({str(path)!r}); import os; os._exit(1)"
    subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    Identity.load_or_create(path).close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "68 bytes, not 0"),
        (lambda data: data[:-1], "68 bytes, not 67"),
        (lambda data: data * 100, "68 bytes, not 4096"),
        (lambda data: b"\x08\x00" + data[2:], "does not begin like"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "do not belong together"),
    ],
)
def test_a_damaged_file_is_refused_and_kept(tmp_path: Path, damage: object, reason: str) -> None:
    """A silently replaced key would be a silently changed peer; the operator decides."""
    path = tmp_path / "identity"
    Identity.load_or_create(path).close()
    assert callable(damage)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    for _ in range(2):  # the refusal leaves no lock behind
        with pytest.raises(BadInputError, match=reason) as refusal:
            Identity.load_or_create(path)
        assert str(path) in str(refusal.value)
    assert path.read_bytes() == damaged


def test_places_that_can_not_hold_a_key_are_named(tmp_path: Path) -> None:
    """A typo in --identity ends in one sentence."""
    (tmp_path / "file").write_text("")
    for path, reason in [
        (tmp_path, "can not be read .not a file"),
        (tmp_path / "file" / "identity", "can not be written"),
        (Path("/proc/nowhere/identity"), "can not be written"),
    ]:
        with pytest.raises(BadInputError, match=reason):
            Identity.load_or_create(path)


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    """Opening a pipe for reading waits for a writer, perhaps for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(BadInputError, match="not a file"):
        Identity.load_or_create(path)


def test_the_secret_is_not_shown() -> None:
    """Objects end up in logs and tracebacks."""
    identity = Identity.generate()
    assert repr(identity) == f"Identity({identity.peer_id})"
