"""Pretend machines on one: network, mount, process, name and IPC namespaces on a bridge, each with an address, a home, a
/tmp/ray, shared memory and an sshd that takes keys alone. Their cables can be pulled and narrowed, their power cut.

The kernel needs no more than bridges, veth pairs and tbf. Memory, cores and the rest of the file system are everyone's.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.jobs import REPOSITORY

INIT = Path(__file__).with_name("host.sh")
BRIDGE, CABLE = "cmcgns0", "cmcgns-"
GATEWAY = "10.77.0.1/24"
"""This machine's own address on the bridge, where the pretend ones reach what it serves."""
OPERATOR = "op"
"""The machine that commands are typed on; no part of the cluster."""
NEEDED = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "/usr/sbin/sshd": "openssh-server", "rsync": "rsync"}
"""Programs, and the Debian packages that have them."""
START_S = 20


def skip_unless_possible(install: bool = False) -> None:
    """Skips where no machines can be made; with ``install``, whoever asked for them gets what is missing by apt-get."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("pretend machines need root and namespaces")
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no new namespaces")
    if install and _missing() and shutil.which("apt-get"):
        _apt_get("update")
        with _no_services_started():
            _apt_get("install", "-y", "--no-install-recommends", *_missing())
    if _missing():
        pytest.skip(f"pretend machines need: apt install {' '.join(_missing())}")


def _apt_get(*words: str) -> None:
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-q", *words], env=quiet, capture_output=True, check=False)


@contextmanager
def _no_services_started() -> Iterator[None]:
    """Packages that are installed meanwhile start no daemon on this machine (Debian's policy-rc.d)."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink()


def _missing() -> list[str]:
    return sorted({package for program, package in NEEDED.items() if shutil.which(program) is None})


def in_repository(*words: str) -> list[str]:
    """``words`` as they are typed in the repository's root."""
    return ["bash", "-c", 'cd "$0" && exec "$@"', str(REPOSITORY), *words]


class Host:
    """One machine, and the end of its cable."""

    def __init__(self, folder: Path, name: str, address: str, gateway: str) -> None:
        self.folder, self.name, self.address = folder / name, name, address
        self._cable, self._gateway = f"{CABLE}{name}", gateway
        self._first: subprocess.Popen[bytes] | None = None
        self._pid, self._namespace = 0, ""

    def prepare(self, allowed: str, profile: str = "") -> None:
        """The machine's disk: its home with a login's ``profile``, its own key, and the public key of who may log in."""
        ssh = self.folder / "home" / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        (ssh / "authorized_keys").write_text(allowed)
        (ssh / "authorized_keys").chmod(0o600)
        (self.folder / "home" / ".profile").write_text(profile)
        (self.folder / "home" / ".bashrc").write_text(profile)
        host_key = self.folder / "host_key"
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(host_key))
        (self.folder / "sshd_config").write_text(
            f"HostKey {host_key}\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPidFile /run/sshd.pid\nMaxStartups 50\nStrictModes no\n"
        )

    def boot(self) -> None:
        """Power on; returns once it takes logins. Ray is not started."""
        log = self.folder / "init.log"
        namespaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        # the interpreter, the environment and the repository, wherever they lie
        kept = [sys.base_prefix, sys.prefix, str(REPOSITORY)]
        with log.open("wb") as file:
            self._first = subprocess.Popen(
                ["unshare", *namespaces, "bash", INIT, self.folder, self.address, self._gateway, *kept],
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_S
        self._pid = self._child_in_its_own_network(end)
        self._namespace = os.readlink(f"/proc/{self._pid}/ns/pid")
        # the same card at each boot: the others remember it
        last = [f"{int(number):02x}" for number in self.address.split(".")]
        card = ["name", "eth0", "address", ":".join(["02", "00", *last])]
        _do("ip", "link", "add", self._cable, "type", "veth", "peer", *card, "netns", str(self._pid))
        _do("ip", "link", "set", self._cable, "master", BRIDGE, "up")
        while time.monotonic() < end and self._first.poll() is None:
            if self.run("test", "-e", "/run/ready", check=False).returncode == 0:
                return
        raise RuntimeError(f"{self.name} did not start: {log.read_text()}")

    def _child_in_its_own_network(self, end: float) -> int:
        assert self._first is not None
        ours = os.readlink("/proc/self/ns/net")
        while time.monotonic() < end and self._first.poll() is None:
            for child in psutil.Process(self._first.pid).children():
                if os.readlink(f"/proc/{child.pid}/ns/net") != ours:
                    return child.pid
        raise RuntimeError(f"{self.name} did not start: {(self.folder / 'init.log').read_text()}")

    def command(self, *words: str, environment: dict[str, str] | None = None) -> list[str]:
        """What runs ``words`` on this machine, in a login's surroundings."""
        enter = ["nsenter", "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p", "--wd=/root"]
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        own = {"HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "PATH": path, "PYTHONUNBUFFERED": "1"}
        return [*enter, "env", "-i", *(f"{k}={v}" for k, v in (own | (environment or {})).items()), *words]

    def run(
        self, *words: str, check: bool = True, timeout_s: float = 120, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The output of a command on this machine, standard error with it."""
        done = subprocess.run(
            self.command(*words, environment=environment), text=True, stdin=subprocess.DEVNULL, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {' '.join(words)}: status {done.returncode}\n{done.stdout[-3000:]}")
        return done

    @contextmanager
    def running(self, *words: str) -> Iterator[None]:
        """A command that runs meanwhile; entered once it has printed a line."""
        process = subprocess.Popen(self.command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            # nsenter waits for its child in the machine; the child is what has to end
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()

    def processes(self) -> list[int]:
        """Ids, as seen from here, of what runs on this machine; none once it is off."""
        found = []
        for pid in psutil.pids():
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == self._namespace:
                    found.append(pid)
        return found

    def cut(self) -> None:
        """Pull the cable: the others hear nothing more."""
        _do("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _do("ip", "link", "set", self._cable, "up")

    def narrow(self, rate: str) -> None:
        """Let no more than ``rate`` (``1gbit``) through the cable each way."""
        # a burst that is small beside a step's bytes, and longer than the kernel's tick, which would starve a fast cable
        shape = ["tbf", "rate", rate, "burst", "4mb", "latency", "50ms"]
        _do("tc", "qdisc", "replace", "dev", self._cable, "root", *shape)
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", *shape)

    def refuse(self, address: str, port: int) -> None:
        """Drop what this machine sends to a port of ``address``, as a firewall does."""
        self.run("nft", "add table ip wall; add chain ip wall out { type filter hook output priority 0; }")
        self.run("nft", f"add rule ip wall out ip daddr {address} tcp dport {port} drop")

    def allow(self) -> None:
        """Take the firewall down."""
        self.run("nft", "delete table ip wall")

    def bytes_sent(self) -> int:
        """Bytes that have left through the cable."""
        return int(Path(f"/sys/class/net/{self._cable}/statistics/rx_bytes").read_text())

    def power_off(self) -> None:
        """End every process of the machine at once, its network with it."""
        if self._first is not None:
            self._first.kill()  # with it the first process, and with that all the others
            self._first.wait()
            end = time.monotonic() + START_S
            while self.processes() and time.monotonic() < end:
                time.sleep(0.05)
        subprocess.run(["ip", "link", "del", self._cable], capture_output=True, check=False)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")


class Switch:
    """The bridge that machines hang on, and they themselves by name."""

    def __init__(self, folder: Path, gateway: str) -> None:
        self.folder, self.gateway = folder, gateway
        self.hosts: dict[str, Host] = {}

    def add(self, name: str, address: str, allowed: str, profile: str = "") -> Host:
        """A new machine, not switched on; known by name to the others."""
        self.hosts[name] = host = Host(self.folder, name, address, self.gateway)
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        (self.folder / "hosts.txt").write_text(f"127.0.0.1 localhost\n{names}")
        host.prepare(allowed, profile)
        return host


@contextmanager
def running_switch(folder: Path, gateway: str = GATEWAY) -> Iterator[Switch]:
    """A switch without machines; whatever has happened, it and all that it was given are gone at the end."""
    if BRIDGE in os.listdir("/sys/class/net"):
        raise RuntimeError(
            f"another rehearsal runs here: {BRIDGE} is there (`ip link del {BRIDGE}` where it is left over)"
        )
    switch = Switch(folder, gateway)
    _do("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        _do("ip", "addr", "add", gateway, "dev", BRIDGE)
        _do("ip", "link", "set", BRIDGE, "up")
        yield switch
    finally:
        for host in switch.hosts.values():
            host.power_off()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@contextmanager
def running_hosts(folder: Path, count: int) -> Iterator[dict[str, Host]]:
    """Machines ``op`` and ``h1`` ... by name, switched on; ``op`` holds the key to all."""
    key = folder / "key"
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rehearsal", "-f", str(key))
    network = GATEWAY.rpartition(".")[0]
    with running_switch(folder) as switch:
        for name, number in ({OPERATOR: 10} | {f"h{i}": 10 + i for i in range(1, count + 1)}).items():
            switch.add(name, f"{network}.{number}", key.with_suffix(".pub").read_text())
        shutil.copy(key, switch.hosts[OPERATOR].folder / "home" / ".ssh" / "id_ed25519")
        for host in switch.hosts.values():
            host.boot()
        yield switch.hosts


def left_overs(hosts: Iterable[Host]) -> list[str]:
    """What should be gone once the hosts are: their processes, and links of their network."""
    links = [name for name in os.listdir("/sys/class/net") if name == BRIDGE or name.startswith(CABLE)]
    return links + [f"process {pid} of {host.name}" for host in hosts for pid in host.processes()]
