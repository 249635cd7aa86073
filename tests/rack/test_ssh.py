"""SSH and what stands on it, on real blades, from the host as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rack.conftest import PROJECT, Rack

pytestmark = pytest.mark.rack


@pytest.fixture(scope="module")
def config(rack: Rack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the output of ``rackless ssh-config``."""
    path = tmp_path_factory.mktemp("ssh") / "config"
    path.write_text(rack("ssh-config").stdout)
    return path


def _run(*words: str | Path, **more: object) -> str:
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_ssh_gives_output_and_exit_code(rack: Rack) -> None:
    assert rack.on("pb0", "hostname") == "pb0\n"
    assert rack("ssh", "pb0", "--", "exit 7", check=False).returncode == 7


def test_exec_prefixes_lines_and_exits_as_the_worst(rack: Rack) -> None:
    done = rack("exec", "-k", "memory", "--", "hostname")
    assert sorted(line.split()[-1] for line in done.stdout.splitlines()) == ["mb0", "mb1"]
    assert rack("exec", "mb*", "--", "test $(hostname) = mb0", check=False).returncode == 1


def test_files_go_there_and_back(rack: Rack, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "there").write_bytes(data)
    rack("cp", str(tmp_path / "there"), "sb0:/vnode/some file")
    rack("cp", "sb0:/vnode/some file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


def test_plain_ssh_scp_and_rsync(rack: Rack, config: Path, tmp_path: Path) -> None:
    assert _run("ssh", "-F", config, "mb0", "hostname") == "mb0\n"
    (tmp_path / "a").write_text("by scp\n")
    _run("scp", "-q", "-F", config, tmp_path / "a", "mb0:/tmp/a")
    (tmp_path / "b").write_text("by rsync\n")
    _run("rsync", "-e", f"ssh -F {config}", tmp_path / "b", "mb0:/tmp/b")
    assert rack.on("mb0", "cat /tmp/a /tmp/b") == "by scp\nby rsync\n"


def test_fabric_with_nothing_but_the_config(rack: Rack, config: Path) -> None:
    script = f"""
from fabric import Config, Connection
from paramiko import SSHConfig
connection = Connection("gm0", config=Config(ssh_config=SSHConfig.from_path({str(config)!r})))
print(connection.run("hostname", hide=True).stdout, end="")
"""
    assert _run(sys.executable, "-c", script) == "gm0\n"


def test_ansible_finds_blades_by_kind(rack: Rack) -> None:
    environment = {**rack.bench.env(), "RACKLESS_RACK": rack.name}
    folder = Path(sys.executable).parent
    shown = json.loads(_run(folder / "ansible-inventory", "--list", cwd=PROJECT, env=environment))
    assert sorted(shown["memory"]["hosts"]) == ["mb0", "mb1"]
    assert shown["storage"]["hosts"] == ["sb0"]
    pong = _run(folder / "ansible", "-m", "ping", "manager", cwd=PROJECT, env=environment)
    assert '"ping": "pong"' in pong


def test_the_pinned_host_key_is_checked(rack: Rack, config: Path, tmp_path: Path) -> None:
    """A blade that shows another host key is refused."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    pinned = tmp_path / "known_hosts"
    address = rack.bench.status(rack.name)["mb0"]["mgmt_address"]
    pinned.write_text(f"mb0,{address} {other.with_suffix('.pub').read_text()}")
    options = ["-o", "ControlPath=none", "-o", f"UserKnownHostsFile={pinned}"]
    done = subprocess.run(["ssh", "-F", config, *options, "mb0", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert "verification failed" in done.stderr


def test_secrets_are_for_root_alone(rack: Rack) -> None:
    root = rack.bench.folder / "state/racks" / rack.name
    assert root.stat().st_mode & 0o777 == 0o700
    for file in (root / "secret", root / "ssh/id_ed25519", *(root / "ssh/hostkeys").iterdir()):
        assert file.stat().st_mode & 0o777 == 0o600


def test_console_log_and_agent_logs(rack: Rack) -> None:
    assert "rackless" in rack("logs", "pb0").stdout
    # Restored clones begin with an empty console; a shell waits on it.
    rack.on("pb0", "echo said on the console > /dev/ttyS0")
    assert "said on the console" in rack("console", "--log", "pb0").stdout
