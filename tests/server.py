"""A real Elasticsearch for the tests: TLS with a private CA, a password, one node or several.

It is Elastic's own integration-test distribution, from Maven Central: the server with security, without
most modules (`GET /` is not served). Needs Maven and a JDK; see `Unavailable` for what is said without.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import requests
import trustme

ROOT = Path(__file__).parent.parent
GROUP = "org.elasticsearch.distribution.integ-test-zip"
USER, PASSWORD = "admin", "p@ss/w:rd 100%"  # which a URL must percent-encode
START_SECONDS = 120

# Ends the server with the tests, whatever ends them: their end of the pipe is then closed.
WATCHDOG = '"$@" </dev/null & read _; kill -9 0'


class Unavailable(Exception):
    """Why no Elasticsearch can be started here, and what to install."""


def java_home(at_least: int) -> Path:
    """The JDK on the PATH if it is new enough, else the oldest new enough among those installed."""
    on_path = shutil.which("java")
    homes = [Path(on_path).resolve().parent.parent] if on_path else []
    others = [*Path("/usr/lib/jvm").glob("*"), *Path("/Library/Java/JavaVirtualMachines").glob("*/Contents/Home")]
    versions = [(version(home), home) for home in homes + others if (home / "bin" / "java").exists()]
    fitting = [pair for pair in versions if pair[0] >= at_least]
    if not fitting:
        raise Unavailable(
            f"no JDK {at_least} or newer found: install one (Debian: apt-get install openjdk-{at_least}-jdk-headless)"
        )
    return fitting[0][1] if fitting[0][1] in homes else min(fitting)[1]


def version(home: Path) -> int:
    """The major version of the JDK in `home`, 0 where it does not say."""
    release = home / "release"
    found = re.search(r'JAVA_VERSION="(\d+)', release.read_text()) if release.exists() else None
    return int(found[1]) if found else 0


def distribution(release: str) -> Path:
    """The server's zip file, fetched once with Maven."""
    path = ROOT / "build" / f"elasticsearch-{release}.zip"
    if path.exists():
        return path
    maven = shutil.which("mvn")
    if not maven:
        raise Unavailable("no Maven to fetch Elasticsearch with: install it (Debian: apt-get install maven)")
    command = [maven, "-q", "-B", "dependency:copy", f"-Dartifact={GROUP}:elasticsearch:{release}:zip"]
    command += [f"-DoutputDirectory={path.parent}", "-Dmdep.overWriteReleases=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"Maven could not fetch Elasticsearch {release}: {done.stdout[-500:]}")
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Node:
    """One node: its folder of configuration and data, its ports, and its process while it runs."""

    folder: Path
    http: int = field(default_factory=free_port)
    transport: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None


class Cluster:
    """Nodes of one Elasticsearch on this machine. Use as a context manager: it starts, stops and cleans up."""

    def __init__(self, release: str = "8.19.9", size: int = 1, memory: str = "512m", **settings: object) -> None:
        """`settings` are more of Elasticsearch's own, with `__` for each dot of their names."""
        self.java = java_home(21 if release.startswith("9") else 17)
        zipped = distribution(release)
        self.memory = memory
        self.settings = {name.replace("__", "."): value for name, value in settings.items()}
        self.folder = Path(tempfile.mkdtemp(prefix="imagesearch-test-"))
        self.nodes = [Node(self.folder / f"node-{number}") for number in range(size)]
        with zipfile.ZipFile(zipped) as archive:
            archive.extractall(self.folder)
        self.home = self.folder / f"elasticsearch-{release}"
        for program in [*self.home.glob("bin/*"), *self.home.glob("modules/*/platform/*/bin/*")]:
            program.chmod(0o755)
        self.configure()

    def configure(self) -> None:
        """Certificate, user and one folder of configuration for each node."""
        config = self.home / "config"
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        certificate = ca.issue_cert("localhost", "127.0.0.1")
        certificate.private_key_pem.write_to_path(str(config / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(config / "node.pem"))
        shutil.copy(self.folder / "ca.pem", config / "ca.pem")
        self.run("elasticsearch-users", "useradd", USER, "-p", PASSWORD, "-r", "superuser")
        for node in self.nodes:
            shutil.copytree(config, node.folder / "config")
            (node.folder / "tmp").mkdir()
        if os.geteuid() == 0:  # Elasticsearch refuses to run as root
            self.folder.chmod(0o755)
            for path in self.folder.rglob("*"):
                shutil.chown(path, "nobody")

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.home / "bin" / program), *arguments]
        subprocess.run(command, env=os.environ | {"ES_JAVA_HOME": str(self.java)}, check=True, capture_output=True)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def url(self) -> str:
        """`ES_URL` for the whole cluster."""
        credentials = f"{quote(USER, safe='')}:{quote(PASSWORD, safe='')}"
        return ",".join(f"https://{credentials}@localhost:{node.http}" for node in self.nodes)

    def __enter__(self) -> "Cluster":
        try:
            for node in self.nodes:
                self.start(node)
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, node: Node) -> None:
        """Starts a node, with the data it has; `wait` tells when it answers."""
        settings = {
            "cluster.name": self.folder.name,
            "node.name": node.folder.name,
            "path.data": node.folder / "data",
            "path.logs": node.folder / "logs",
            "network.host": "127.0.0.1",
            "http.port": node.http,
            "transport.port": node.transport,
            "cluster.routing.allocation.disk.threshold_enabled": "false",  # the disk may be nearly full here
            "xpack.security.enabled": "true",
            **self.settings,
            "xpack.security.authc.api_key.enabled": "true",
        }
        for layer in ("http", "transport"):
            settings |= {
                f"xpack.security.{layer}.ssl.enabled": "true",
                f"xpack.security.{layer}.ssl.key": "key.pem",
                f"xpack.security.{layer}.ssl.certificate": "node.pem",
                f"xpack.security.{layer}.ssl.certificate_authorities": "ca.pem",
            }
        if len(self.nodes) == 1:
            settings["discovery.type"] = "single-node"
        else:
            settings["discovery.seed_hosts"] = ",".join(f"127.0.0.1:{other.transport}" for other in self.nodes)
            settings["cluster.initial_master_nodes"] = ",".join(other.folder.name for other in self.nodes)
        command = [str(self.home / "bin" / "elasticsearch")]
        for name, value in settings.items():
            command += ["-E", f"{name}={value}"]
        environment = os.environ | {
            "ES_JAVA_HOME": str(self.java),
            "ES_PATH_CONF": str(node.folder / "config"),
            "ES_JAVA_OPTS": f"-Xms{self.memory} -Xmx{self.memory}",
            "ES_TMPDIR": str(node.folder / "tmp"),
        }
        with (node.folder / "output").open("ab") as output:
            node.process = subprocess.Popen(
                ["sh", "-c", WATCHDOG, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                cwd=node.folder,
                user="nobody" if os.geteuid() == 0 else None,
                extra_groups=[] if os.geteuid() == 0 else None,
            )

    def wait(self) -> None:
        """Waits until every node that was started answers and belongs to the cluster."""
        running = [node for node in self.nodes if node.process]
        deadline = time.monotonic() + START_SECONDS
        for node in running:
            while not self.answers(node, len(running)):
                assert node.process
                if time.monotonic() > deadline or node.process.poll() is not None:
                    raise RuntimeError("Elasticsearch did not start:\n" + (node.folder / "output").read_text()[-3000:])
                time.sleep(0.2)

    def answers(self, node: Node, size: int) -> bool:
        try:
            health = requests.get(
                f"https://localhost:{node.http}/_cluster/health",
                params={"wait_for_nodes": f">={size}", "timeout": "1s"},
                auth=(USER, PASSWORD),
                verify=str(self.ca),
                timeout=5,
            )
        except requests.RequestException:
            return False
        return health.status_code == 200 and not health.json()["timed_out"]

    def kill(self, node: Node) -> None:
        """Kills a node, as a power cut would."""
        if node.process:
            os.killpg(node.process.pid, signal.SIGKILL)
            node.process.wait()
            node.process = None
