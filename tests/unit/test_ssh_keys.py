"""Keys, known_hosts and the secret: private, complete, made once."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import RacklessError
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import keys


@pytest.fixture
def paths(tmp_path: Path) -> RackPaths:
    return RackPaths(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "run"), "demo")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_rack_key_is_made_once_and_is_private(paths: RackPaths) -> None:
    first = keys.ensure_rack_keys(paths)
    assert keys.ensure_rack_keys(paths) == first
    assert first.public_key_line.startswith("ssh-ed25519 ")
    assert first.public_key_line.endswith(" rackless-demo")
    assert mode(first.private_key) == 0o600
    assert mode(paths.ssh) == 0o700


def test_openssh_agrees_on_the_public_key(paths: RackPaths) -> None:
    made = keys.ensure_rack_keys(paths)
    said = subprocess.run(["ssh-keygen", "-y", "-f", made.private_key], capture_output=True, text=True, check=True)
    assert said.stdout.split()[:2] == made.public_key_line.split()[:2]


def test_every_blade_has_a_host_key_of_its_own(paths: RackPaths) -> None:
    private, public = keys.ensure_host_key(paths, "pb0")
    assert keys.ensure_host_key(paths, "pb0") == (private, public)
    assert keys.ensure_host_key(paths, "mb0") != (private, public)
    assert private.startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert private.endswith("-----END OPENSSH PRIVATE KEY-----\n")
    assert public.endswith(" pb0.demo")
    assert mode(keys.host_key(paths, "pb0")) == 0o600
    assert mode(keys.host_key(paths, "pb0").parent) == 0o700


def test_a_blade_that_comes_back_after_it_was_forgotten_has_a_new_host_key(paths: RackPaths) -> None:
    first = keys.ensure_host_key(paths, "pb0")
    keys.forget_host_key(paths, "pb0")
    keys.forget_host_key(paths, "pb0")
    assert keys.ensure_host_key(paths, "pb0") != first


def test_loose_permissions_are_tightened(paths: RackPaths) -> None:
    key = keys.ensure_rack_keys(paths).private_key
    key.chmod(0o644)
    paths.ssh.chmod(0o755)
    keys.ensure_rack_keys(paths)
    assert (mode(key), mode(paths.ssh)) == (0o600, 0o700)


def test_all_who_ask_at_once_get_the_same_key_and_secret(paths: RackPaths) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = set(pool.map(lambda _: keys.ensure_rack_keys(paths).public_key_line, range(16)))
        secrets = set(pool.map(lambda _: keys.ensure_secret(paths), range(16)))
    assert (len(made), len(secrets)) == (1, 1)
    assert sorted(file.name for file in paths.ssh.iterdir()) == ["id_ed25519"], "no temporary file is left"


def test_known_hosts_pins_names_and_addresses(paths: RackPaths) -> None:
    known_hosts = keys.write_known_hosts(paths, {"pb0": "10.78.0.11", "mb0": "10.78.0.12"})
    key = keys.ensure_host_key(paths, "pb0")[1].split()[1]
    for name in ("pb0", "pb0.demo", "10.78.0.11"):
        found = subprocess.run(
            ["ssh-keygen", "-F", name, "-f", known_hosts], capture_output=True, text=True, check=True
        )
        assert key in found.stdout
    assert mode(known_hosts) == 0o600
    keys.write_known_hosts(paths, {"mb0": "10.78.0.12"})
    assert "pb0" not in known_hosts.read_text()


def test_the_secret_is_made_once_and_is_private(paths: RackPaths) -> None:
    secret = keys.ensure_secret(paths)
    assert len(secret) == 32
    assert keys.ensure_secret(paths) == secret
    assert paths.secret.read_text() == secret.hex() + "\n"
    assert mode(paths.secret) == 0o600


@pytest.mark.parametrize("text", ["", "zz", "00" * 31, "é"])
def test_a_spoiled_secret_is_an_error_with_a_hint(paths: RackPaths, text: str) -> None:
    paths.secret.parent.mkdir(parents=True)
    paths.secret.write_text(text)
    with pytest.raises(RacklessError, match="is not a rack secret") as caught:
        keys.ensure_secret(paths)
    assert caught.value.hint is not None
    assert "rackless down" in caught.value.hint


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "é"])
def test_a_spoiled_key_is_an_error_with_a_hint(paths: RackPaths, text: str) -> None:
    keys.ensure_rack_keys(paths)
    keys.user_key(paths).write_text(text)
    with pytest.raises(RacklessError, match="is not an SSH key") as caught:
        keys.ensure_rack_keys(paths)
    assert caught.value.hint is not None
    assert "rackless up" in caught.value.hint


def test_a_write_that_fails_leaves_the_old_file(paths: RackPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = paths.root / "file"
    keys.write_private(file, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        keys.write_private(file, "new")
    assert file.read_text() == "old"
    assert [left.name for left in paths.root.iterdir()] == ["file"]
