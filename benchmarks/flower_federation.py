"""A Flower federation of real processes on loopback: TLS, SuperNode authentication, no network."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "flwr==1.41.0")
SITES = 3
LOOPBACK = "127.0.0.1"
Json = dict[str, Any]


class RunFailed(Exception):
    """Flower refused a command or gave a run up."""


def install(cache: Path) -> Path:
    """Return the programs of an environment that has Flower; it is made when it is not there."""
    venv = cache / hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    done = venv / "installed"
    if not done.exists():
        print(f"installing {' '.join(PACKAGES)} into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *PACKAGES], check=True)
        done.touch()
    return venv / "bin"


def write_tls(folder: Path) -> None:
    """Write ca.pem and a server certificate for loopback that it signed."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("bench CA", "bench")
    )
    ca = _certificate(ca_name, ca_key.public_key(), ca_name, ca_key, x509.BasicConstraints(True, 0))
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(LOOPBACK))]
    names = x509.SubjectAlternativeName(addresses)
    server = _certificate(name, key.public_key(), ca_name, ca_key, names)
    (folder / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(Encoding.PEM))
    pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.key").write_bytes(pkcs8)


def _certificate(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1))
    builder = builder.not_valid_after(now + timedelta(days=1))
    identifiers = (
        x509.SubjectKeyIdentifier.from_public_key(public),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
    )
    builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints))
    for identifier in identifiers:
        builder = builder.add_extension(identifier, critical=False)
    return builder.sign(key, hashes.SHA256())


def write_ssh_key(path: Path) -> None:
    """Write a key with which a SuperNode authenticates, and PATH.pub, which is registered."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b"\n")


@dataclass
class Link:
    """A TCP forwarder between a SuperNode and the SuperLink that counts the bytes."""

    target: int
    passed: list[tuple[float, int, int]] = field(default_factory=list)  # when, up, down

    async def listen(self) -> int:
        """Start, and return the port."""
        server = await asyncio.start_server(self._join, LOOPBACK, 0)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _join(self, site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        try:
            link, to_link = await asyncio.open_connection(LOOPBACK, self.target)
        except OSError:  # the SuperLink is down
            to_site.close()
            return
        await asyncio.gather(self._pump(site, to_link, 1, 0), self._pump(link, to_site, 0, 1))

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, up: int, down: int
    ) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                self.passed.append((time.time(), up * len(data), down * len(data)))
                sink.write(data)
                await sink.drain()
        sink.close()

    def bytes_between(self, start: float, end: float) -> tuple[int, int]:
        """Return how many went up and down."""
        during = [chunk for chunk in self.passed if start <= chunk[0] < end]
        return sum(chunk[1] for chunk in during), sum(chunk[2] for chunk in during)


def start_links(target: int) -> tuple[list[Link], list[int]]:
    """Start a link for each site in a thread of their own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    links = [Link(target) for _ in range(SITES)]
    ports = [asyncio.run_coroutine_threadsafe(link.listen(), loop).result() for link in links]
    return links, ports


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = 120) -> float:
    """Wait and return the seconds that it took."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(what)
        time.sleep(0.2)
    return time.monotonic() - began


@dataclass(frozen=True)
class Ground:
    """What every federation stands on."""

    programs: Path
    model: Path
    data: list[Path]  # a file a site


class Federation:
    """One SuperLink and three SuperNodes, their keys and their logs below one folder.

    Args:
        ground: the programs, the model and the data.
        folder: an empty one.
        durable: the SuperLink keeps its state in a file; by default it has it in memory.
    """

    def __init__(self, ground: Ground, folder: Path, *, durable: bool) -> None:
        self.ground, self.folder, self.durable = ground, folder, durable
        self.port = free_port()
        self.links, self.link_ports = start_links(self.port)
        self.children: list[subprocess.Popen[bytes]] = []
        write_tls(folder)
        self.operator = self.home("operator", folder / "ca.pem")

    def home(self, name: str, ca: Path) -> Path:
        """Make the home of somebody who uses `flwr` and knows the CA's certificate."""
        home = self.folder / name
        home.mkdir()
        shutil.copy(ca, home / "ca.pem")
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "{LOOPBACK}:{self.port}"\n'
            f'root-certificates = "{home / "ca.pem"}"\n'
        )
        return home

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a program: nothing of ours, and no network use."""
        return {
            "PATH": f"{self.ground.programs}:{os.defpath}",
            "HOME": str(home),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # three sites share the cores, only here
        }

    def flwr(self, *arguments: str | Path, home: Path | None = None) -> Json:
        """Run a command of the operator, or of whom that home belongs to."""
        home = home or self.operator
        done = subprocess.run(
            [self.ground.programs / "flwr", *arguments, "--format", "json"],
            env=self.environment(home),
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        answer: Json = json.loads(done.stdout) if done.returncode == 0 else {}
        if not answer.get("success"):
            raise RunFailed(f"flwr {arguments[0]}: {done.stdout}{done.stderr}")
        return answer

    def _start(self, home: Path, program: str, *options: str | Path) -> subprocess.Popen[bytes]:
        with home.with_suffix(".log").open("ab") as log:
            child = subprocess.Popen(
                [self.ground.programs / program, *options],
                env=self.environment(home),
                cwd=home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.children.append(child)
        return child

    def start_superlink(self) -> float:
        """Start it, on the database that it had, and return the seconds until it listens."""
        home = self.folder / "superlink"
        home.mkdir(exist_ok=True)
        database = ("--database", home / "state.db") if self.durable else ()
        self.superlink = self._start(
            home,
            "flower-superlink",
            *("--host", LOOPBACK, "--port", str(self.port)),
            *("--ssl-certfile", self.folder / "server.pem"),
            *("--ssl-keyfile", self.folder / "server.key"),
            *("--ssl-ca-certfile", self.folder / "ca.pem"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *database,
        )
        return wait_until(self._listens, "the SuperLink does not listen")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((LOOPBACK, self.port)) == 0

    def register(self, site: int) -> None:
        """Give a site a key and make it known."""
        home = self.folder / f"site{site}"
        home.mkdir()
        write_ssh_key(home / "key")
        self.flwr("supernode", "register", home / "key.pub", "lab", "--name", home.name)

    def start_supernode(self, site: int) -> None:
        """Start the SuperNode of a site; it knows its data and its copy of the model."""
        home = self.folder / f"site{site}"
        data, model = self.ground.data[site], self.ground.model
        node = {"site": site, "data": str(data), "model": str(model)}
        self._start(
            home,
            "flower-supernode",
            *("--superlink", f"{LOOPBACK}:{self.link_ports[site]}"),
            *("--root-certificates", self.folder / "ca.pem"),
            *("--auth-supernode-private-key", home / "key"),
            *("--host", LOOPBACK, "--port", str(free_port())),
            *("--node-config", toml_pairs(node)),
        )

    def online(self) -> int:
        """Return how many SuperNodes the SuperLink sees."""
        nodes = self.flwr("supernode", "list", "lab")["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def run(self, app: Path, config: Json, home: Path | None = None) -> str:
        """Submit an application and return the run's id."""
        answer = self.flwr("run", app, "lab", "--run-config", toml_pairs(config), home=home)
        return str(answer["run-id"])

    def status(self, run: str) -> str:
        """Return what became of a run."""
        status: str = self.flwr("list", "lab", "--run-id", run)["runs"][0]["status"]
        return status

    def kill_superlink(self) -> None:
        """Kill that one process without a farewell."""
        self.superlink.kill()
        self.superlink.wait()

    def stop(self) -> None:
        """End all that was started, and what it started in turn."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for child in self.children:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, kind)
            for child in self.children:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(10)


def toml_pairs(values: Json) -> str:
    """Write values as Flower's command line takes them."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


@contextmanager
def federation(
    ground: Ground, folder: Path, *, durable: bool
) -> Iterator[tuple[Federation, dict[str, float]]]:
    """Start everything, say how long it took, and stop it at the end."""
    folder.mkdir()
    parts = Federation(ground, folder, durable=durable)
    try:
        listens_s = parts.start_superlink()
        began = time.monotonic()
        for site in range(SITES):
            parts.register(site)
        registered_s = time.monotonic() - began
        for site in range(SITES):
            parts.start_supernode(site)
        online_s = wait_until(lambda: parts.online() == SITES, "the SuperNodes are not online")
        yield (
            parts,
            {
                "superlink_listens": round(listens_s, 1),
                "sites_registered": round(registered_s, 1),
                "supernodes_online": round(online_s, 1),
            },
        )
    finally:
        parts.stop()
