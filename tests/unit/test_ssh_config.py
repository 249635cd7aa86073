"""The generated ssh_config: its text, what OpenSSH makes of it, and everyday tools that use it unchanged."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import RacklessError
from orchestrator.network import place
from orchestrator.settings import RackPaths, Settings
from orchestrator.ssh import client, keys
from orchestrator.ssh.config import ssh_config_text, write_ssh_config
from orchestrator.ssh.shared import close_shared_connections, control_path, open_shared_connection
from tests.unit.stand_in import StandInRack

GOLDEN = Path(__file__).parent / "golden" / "ssh_config"
DEMO = RackPaths(Settings(Path("/c"), Path("/var/lib/rackless"), Path("/run/rackless")), "demo")


def ssh(rack: StandInRack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["ssh", "-F", str(rack.ssh_config), *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_text_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    text = ssh_config_text(DEMO, {"pb0": "10.78.0.11", "gm0": "10.78.0.10"})
    assert text == GOLDEN.read_text(), f"if this is meant, write the new text to {GOLDEN}"


def test_other_users_enter_the_namespace_with_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    text = ssh_config_text(DEMO, {"pb0": "10.78.0.11"})
    assert "ProxyCommand setsid sudo -n nsenter --net=/run/netns/rackless-demo nc -N %h %p\n" in text


def test_a_rack_without_blades_has_a_config_without_hosts() -> None:
    assert "Host " not in ssh_config_text(DEMO, {})


def test_a_run_folder_too_deep_for_sockets_does_without_shared_connections() -> None:
    deep = RackPaths(Settings(Path("/c"), Path("/s"), Path("/" + "r" * 90)), "demo")
    assert "Control" not in ssh_config_text(deep, {"pb0": "10.78.0.11"})


def test_openssh_reads_paths_with_spaces_and_percent_signs(tmp_path: Path) -> None:
    paths = RackPaths(Settings(tmp_path, tmp_path / "my state 100%", Path("/run/my run")), "demo")
    config = write_ssh_config_without_run_folder(paths, tmp_path)
    said = subprocess.run(["ssh", "-G", "-F", config, "pb0.demo"], capture_output=True, text=True, check=True)
    options = dict(line.split(" ", 1) for line in said.stdout.splitlines())
    assert options["hostname"] == "10.78.0.11"
    assert options["user"] == "root"
    assert options["controlpath"] == "/run/my run/demo/ssh/10.78.0.11"
    assert options["stricthostkeychecking"] == "true"


def write_ssh_config_without_run_folder(paths: RackPaths, folder: Path) -> Path:
    config = folder / "ssh_config"
    config.write_text(ssh_config_text(paths, {"pb0": "10.78.0.11"}))
    return config


@pytest.mark.netns
def test_ssh_by_name_qualified_name_and_address(stand_in_rack: StandInRack) -> None:
    for host in ("pb0", f"pb0.{stand_in_rack.paths.name}", stand_in_rack.blades["pb0"]):
        done = ssh(stand_in_rack, host, "echo $BLADE; exit 7")
        assert (done.stdout, done.stderr, done.returncode) == ("pb0\n", "", 7)


@pytest.mark.netns
def test_ssh_refuses_a_blade_with_another_host_key(stand_in_rack: StandInRack, tmp_path: Path) -> None:
    other = tmp_path / "known_hosts"
    other.write_text(f"pb0,{stand_in_rack.blades['pb0']} {keys.ensure_host_key(stand_in_rack.paths, 'mb0')[1]}\n")
    done = ssh(stand_in_rack, "-S", "none", "-o", f"UserKnownHostsFile={other}", "pb0", "true")
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr


@pytest.mark.netns
def test_scp_and_rsync_both_ways(stand_in_rack: StandInRack, tmp_path: Path) -> None:
    config = stand_in_rack.ssh_config
    data = os.urandom(300_000)
    (tmp_path / "a file").write_bytes(data)
    commands: list[list[str | Path]] = [
        ["scp", "-q", "-F", config, tmp_path / "a file", f"pb0:{tmp_path}/there"],
        ["scp", "-q", "-F", config, f"pb0:{tmp_path}/there", tmp_path / "back"],
        ["rsync", "-a", "-e", f"ssh -F {config}", tmp_path / "back", f"mb0:{tmp_path}/there2"],
        ["rsync", "-a", "-e", f"ssh -F {config}", f"mb0:{tmp_path}/there2", tmp_path / "back2"],
    ]
    for command in commands:
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    assert (tmp_path / "back2").read_bytes() == data


@pytest.mark.netns
def test_fabric_with_the_config_file(stand_in_rack: StandInRack) -> None:
    from fabric import Config, Connection

    with Connection("pb0", config=Config(runtime_ssh_path=str(stand_in_rack.ssh_config))) as connection:
        assert connection.run("echo $BLADE", hide=True, in_stream=False).stdout == "pb0\n"


@pytest.mark.netns
def test_a_session_is_shared_and_can_be_closed(stand_in_rack: StandInRack) -> None:
    paths, address = stand_in_rack.paths, stand_in_rack.blades["mb1"]
    socket = control_path(paths, address)
    for _ in range(2):
        open_shared_connection(paths, stand_in_rack.ssh_config, "mb1", address)
        assert socket.exists()
        assert "Master running" in ssh(stand_in_rack, "-O", "check", "mb1").stderr
    close_shared_connections(paths, [address])
    assert not socket.exists()
    close_shared_connections(paths, [address])


@pytest.mark.netns
def test_a_socket_left_by_a_killed_master_does_no_harm(stand_in_rack: StandInRack) -> None:
    paths, address = stand_in_rack.paths, stand_in_rack.blades["mb1"]
    open_shared_connection(paths, stand_in_rack.ssh_config, "mb1", address)
    said = ssh(stand_in_rack, "-O", "check", "mb1").stderr
    os.kill(int(said.split("pid=")[1].split(")")[0]), 9)
    open_shared_connection(paths, stand_in_rack.ssh_config, "mb1", address)
    assert ssh(stand_in_rack, "mb1", "echo $BLADE").stdout == "mb1\n"


@pytest.mark.netns
def test_an_address_where_nobody_answers_is_an_error(stand_in_rack: StandInRack) -> None:
    paths, silent = stand_in_rack.paths, "10.78.0.99"
    config = write_ssh_config(paths, {**stand_in_rack.blades, "sb0": silent})
    with pytest.raises(RacklessError, match="no SSH session with sb0"):
        open_shared_connection(paths, config, "sb0", silent)
    with pytest.raises(RacklessError, match=r"sb0 does not answer on 10\.78\.0\.99 port 22"):
        client.connect(paths, "sb0", silent).__enter__()


@pytest.mark.netns
def test_client_runs_puts_and_gets(stand_in_rack: StandInRack, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"\x00\xff data")
    with client.connect(stand_in_rack.paths, "pb0", stand_in_rack.blades["pb0"]) as connection:
        done = client.run(connection, "echo out; echo err >&2; exit 3", check=False)
        assert done == client.Result("pb0", 3, "out\n", "err\n")
        assert client.run(connection, ["echo", "a  b", "$BLADE"]).stdout == "a  b $BLADE\n"
        assert client.run(connection, "cat").stdout == "", "a command finds its stdin closed"
        connection.put(str(tmp_path / "here"), str(tmp_path / "there"))
        connection.get(str(tmp_path / "there"), str(tmp_path / "back"))
        with pytest.raises(RacklessError, match="on pb0 ended with exit code 3: no such thing"):
            client.run(connection, "echo no such thing >&2; exit 3")
        with pytest.raises(RacklessError, match=r"was not done after 0\.2 s"):
            client.run(connection, "sleep 3", timeout=0.2)
    assert (tmp_path / "back").read_bytes() == b"\x00\xff data"


@pytest.mark.netns
def test_client_accepts_only_the_pinned_host_key(stand_in_rack: StandInRack) -> None:
    with (
        pytest.raises(RacklessError, match="mb0 shows a host key that is not the one pinned for it"),
        client.connect(stand_in_rack.paths, "mb0", stand_in_rack.blades["pb0"]),
    ):
        pass
    with (
        pytest.raises(RacklessError, match="no SSH session with stranger"),
        client.connect(stand_in_rack.paths, "stranger", stand_in_rack.blades["pb0"]),
    ):
        pass


@pytest.mark.long
def test_a_handshake_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = RackPaths(Settings(tmp_path, tmp_path, tmp_path, handshake_seconds=3), "demo")
    keys.ensure_rack_keys(paths)
    keys.write_known_hosts(paths, {"pb0": "10.78.0.11"})
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(place, "of", lambda _: SimpleNamespace(connect=lambda *_: ours))
    with theirs:
        theirs.send(b"SSH-2.0-slow\r\n")  # and no keys
        with pytest.raises(RacklessError, match=r"no SSH session with pb0 \(10\.78\.0\.11\): no handshake within 3 s"):
            client.connect(paths, "pb0", "10.78.0.11").__enter__()


@pytest.mark.netns
def test_client_on_all_blades_at_once(stand_in_rack: StandInRack) -> None:
    heard: list[tuple[str, str, str]] = []
    blades = {**stand_in_rack.blades, "sb0": "10.78.0.99"}
    results = client.run_on_all(
        stand_in_rack.paths,
        blades,
        '[ $BLADE = mb0 ] && exit 4; echo "$BLADE"',
        lambda *heard_now: heard.append(heard_now),
    )
    assert [result.blade for result in results] == list(blades)
    assert {result.blade: result.exit_code for result in results} == {
        "gm0": 0, "pb0": 0, "mb0": 4, "mb1": 0, "sb0": 255,
    }  # fmt: skip
    assert client.worst_exit_code(results) == 255
    assert ("pb0", "stdout", "pb0\n") in heard
    assert any(blade == "sb0" and "does not answer" in text for blade, _, text in heard)


def test_a_rack_without_namespace_is_an_error(tmp_path: Path) -> None:
    paths = RackPaths(Settings(tmp_path, tmp_path, tmp_path), "no-such-rack")
    with (
        pytest.raises(RacklessError, match="rack no-such-rack has no network"),
        client.connect(paths, "pb0", "10.78.0.10"),
    ):
        pass
