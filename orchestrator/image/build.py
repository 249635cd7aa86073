"""Build blade images: system (packages), kernel and initramfs, and the agents' layer; each cached by content.

Two kinds of cache entries, so that a change rebuilds only what it must:

* ``system-HASH``: system.sqfs, vmlinux, initramfs, manifest.json, sbom.spdx.json (packages, kernel: minutes);
* ``agents-HASH``: agents.sqfs, guest_agents/ with its native parts compiled in the system image (seconds).

Templates of saved blades (orchestrator/hypervisor/template.py) are kept beside them, keyed on both.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.events import Emit, Report, step
from orchestrator.image import cache, initramfs, manifest, vmlinux
from orchestrator.image.mortal import mortal, plain
from orchestrator.image.recipe import AGENTS, Recipe, hash_of, load
from orchestrator.privilege import require_root

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FORMAT = 2  # part of every key: raise it when the steps below change what they make
SYSTEM_SPACE_BYTES = 3 << 30  # an unpacked root of 0.7 GB, the packages and the squashed image, with room to spare


@dataclass(frozen=True)
class Image:
    """A built image: everything QEMU needs to start a blade from it."""

    name: str
    flavour: str
    key: str
    system: Path
    agents: Path
    kernel: Path
    initramfs: Path
    cmdline: str


def system_key(recipe: Recipe, flavour: str) -> str:
    """Content hash over what the system entry is made of: not the command line, which is only said at boot."""
    rest = recipe.model_dump(exclude={"packages", "flavours", "cmdline"})
    return hash_of(FORMAT, recipe.packages_of(flavour), rest,
                   recipe.folder / "files", recipe.folder / "initramfs-init")  # fmt: skip


def image_key(name: str, flavour: str = "blade") -> str:
    """The key that the image ``name`` has when it is built from what is in the tree now.

    The kernel's command line counts: blades must be made anew when it changes, although the system is the same.
    """
    recipe = load(name)
    return hash_of(system_key(recipe, flavour), _words(recipe.cmdline), AGENTS)


def build(name: str, images: Path, emit: Emit, flavour: str = "blade") -> Image:
    """The image ``name``, built now or taken from the cache folder ``images``.

    Emits one step per cache entry. Raises RacklessError when the host lacks a tool or room, or a package is
    missing.
    """
    recipe = load(name)
    system_hash = system_key(recipe, flavour)
    system = _entry(emit, "system image", images, f"system-{system_hash}",
                    lambda work, report: _build_system(recipe, flavour, work, report))  # fmt: skip
    key = image_key(name, flavour)  # now: the agents may have been edited while the system was built
    agents = _entry(emit, "agents", images, f"agents-{key}",
                    lambda work, _report: _build_agents(system, key, work))  # fmt: skip
    return Image(
        name=name,
        flavour=flavour,
        key=key,
        system=system / "system.sqfs",
        agents=agents / "agents.sqfs",
        kernel=system / "vmlinux",
        initramfs=system / "initramfs",
        cmdline=_words(recipe.cmdline),
    )


def _words(cmdline: str) -> str:
    return " ".join(cmdline.split())


def _entry(emit: Emit, what: str, images: Path, name: str, make: Callable[[Path, Report], None]) -> Path:
    def build_entry(work: Path) -> None:
        with step(emit, "image", "build", what) as report:
            make(work, report)

    try:
        return cache.obtain(images, name, build_entry)
    except FileNotFoundError as error:
        raise RacklessError(
            f"cannot build the {what}: there is no {error.filename}", hint="run `make setup`"
        ) from error
    except subprocess.CalledProcessError as error:
        raise RacklessError(f"cannot build the {what}: `{plain(error.cmd)}` ended with code {error.returncode}",
                            hint=_last_line(error.stderr) or "is the disk full?") from error  # fmt: skip
    except OSError as error:
        raise RacklessError(
            f"cannot build the {what} in {images}: {error.strerror or error}",
            hint="free some disk, or set RACKLESS_CACHE to a folder with 4 GB free",
        ) from error


def _last_line(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _build_system(recipe: Recipe, flavour: str, work: Path, report: Report) -> None:
    require_root("unpack and configure an image")
    free = shutil.disk_usage(work).free
    if free < SYSTEM_SPACE_BYTES:
        raise RacklessError(
            f"only {free >> 20} MiB are free in {work.parent}; an image needs {SYSTEM_SPACE_BYTES >> 20} MiB",
            hint="free some disk, or set RACKLESS_CACHE to a folder with room",
        )
    root = work / "root"
    _debootstrap(recipe, flavour, root, work.parent / f"build-{recipe.name}.log", report)
    report(0.88, "kernel")
    release = next((root / "usr/lib/modules").iterdir()).name
    (work / "vmlinux").write_bytes(vmlinux.extract((root / f"boot/vmlinuz-{release}").read_bytes()))
    (work / "initramfs").write_bytes(
        initramfs.build(root, release, recipe.initramfs_modules, recipe.folder / "initramfs-init")
    )
    report(0.92, "files")
    manifest.write(root, recipe, flavour, work)
    _customise(recipe, root, release)
    report(0.94, "compressing")
    _squash(root, work / "system.sqfs")
    shutil.rmtree(root)


def _debootstrap(recipe: Recipe, flavour: str, root: Path, log: Path, report: Report) -> None:
    command = [
        "mmdebstrap", "--variant=minbase", "--mode=root", f"--architectures={recipe.architecture}",
        f"--include={','.join(recipe.packages_of(flavour))}",
        "--aptopt=Apt::Install-Recommends false",
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
    ]  # fmt: skip
    if KEYRING.exists():  # Ubuntu's apt does not trust Debian's archive by itself
        command.append(f"--keyring={KEYRING}")
    shares = {"apt update": 0.05, "installing essential": 0.3, "installing remaining": 0.4, "cleaning": 0.85}
    tail: list[str] = []
    try:
        process = subprocess.Popen(mortal([*command, recipe.suite, root]), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    except FileNotFoundError:
        raise RacklessError("mmdebstrap is missing", hint="apt-get install mmdebstrap, or run `make testbed`") from None
    with process, log.open("w") as record:
        assert process.stderr is not None
        for line in process.stderr:
            record.write(line)
            tail = [*tail[-3:], line.strip()]
            if line.startswith("I: "):
                message = line[3:].strip(". \n")
                fraction = max((share for text, share in shares.items() if text in message), default=None)
                report(fraction, message)
    if process.returncode:
        wrong = next((line for line in tail if line.startswith("E:")), tail[-1] if tail else "no output")
        raise RacklessError(f"mmdebstrap could not make the system image: {wrong.removeprefix('E: ')}",
                            hint="is a Debian mirror reachable? see the log", log=log)  # fmt: skip


def _customise(recipe: Recipe, root: Path, release: str) -> None:
    for pattern in recipe.drop:
        for expanded in _braces(pattern):
            for path in root.glob(expanded):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in (root / "boot").iterdir():
        path.unlink()
    shutil.copytree(recipe.folder / "files", root, dirs_exist_ok=True)
    (root / "etc/rackless/modules").write_text("\n".join(recipe.modules) + "\n")
    subprocess.run(mortal(["chroot", root, "depmod", release]), check=True, capture_output=True)
    for name in ("etc/machine-id", "etc/hostname", "etc/resolv.conf"):
        (root / name).write_text("")  # a blade gets its own when it gets its identity
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()


# So that `gcc program.c -llite` works on a blade (-lhotpot, too), and the program starts: /usr/lib is searched without
# ldconfig.
_FOR_PROGRAMS = {
    "usr/local/include/lite.h": "native/liblite/lite.h",
    "usr/lib/liblite.so": "native/build/liblite.so",
    "usr/local/include/hotpot.h": "native/libhotpot/hotpot.h",
    "usr/lib/libhotpot.so": "native/build/libhotpot.so",
}


def _build_agents(system: Path, key: str, work: Path) -> None:
    """Compile the agents' native parts and byte code with the image's compiler and Python; squash them."""
    root, layer = work / "root", work / "layer"
    subprocess.run(mortal(["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-d", root, system / "system.sqfs"]),
                   check=True, capture_output=True)  # fmt: skip
    inside = root / "opt/rackless/guest_agents"
    shutil.copytree(AGENTS, inside, ignore=shutil.ignore_patterns("__pycache__", "build"))
    (inside / "VERSION").write_text(key + "\n")
    log = work.parent / "build-agents.log"
    with log.open("w") as record:
        for command in (["make", "-C", "/opt/rackless/guest_agents/native"],
                        ["python3", "-m", "compileall", "-q", "/opt/rackless"]):  # fmt: skip
            done = subprocess.run(mortal(["chroot", root, *command]), stdout=record, stderr=record, check=False)
            if done.returncode:
                raise RacklessError(f"building the agents failed: {' '.join(command)}", log=log)
    shutil.copytree(inside, layer / "opt/rackless/guest_agents")
    bin_folder = layer / "usr/local/bin"
    bin_folder.mkdir(parents=True)
    for program in (layer / "opt/rackless/guest_agents/native/build").glob("*"):
        if program.suffix == "" and program.is_file():
            (bin_folder / program.name).symlink_to(f"/opt/rackless/guest_agents/native/build/{program.name}")
    for place, target in _FOR_PROGRAMS.items():
        (layer / place).parent.mkdir(parents=True, exist_ok=True)
        (layer / place).symlink_to(f"/opt/rackless/guest_agents/{target}")
    search_path = layer / "usr/lib/python3/dist-packages/rackless.pth"
    search_path.parent.mkdir(parents=True)
    search_path.write_text("/opt/rackless\n")  # `from guest_agents import lite` works in every program
    _squash(layer, work / "agents.sqfs")
    with tarfile.open(work / "agents.tar", "w") as archive:  # the same, for blades that run already
        archive.add(layer, arcname=".")
    shutil.rmtree(root)
    shutil.rmtree(layer)


def _squash(folder: Path, image: Path) -> None:
    subprocess.run(mortal(["mksquashfs", folder, image, "-comp", "zstd", "-Xcompression-level", "3", "-noappend",
                           "-quiet", "-no-progress", "-no-xattrs"]), check=True, capture_output=True)  # fmt: skip


def _braces(pattern: str) -> list[str]:
    """Expand one ``{a,b}`` group as a shell would."""
    head, opening, rest = pattern.partition("{")
    if not opening:
        return [pattern]
    choices, _, tail = rest.partition("}")
    return [f"{head}{choice}{tail}" for choice in choices.split(",")]
