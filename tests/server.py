"""The real servers for the tests: Elasticsearch, with TLS and a password, and S3.

Elasticsearch is Elastic's own integration-test distribution, from Maven Central: the server with security, without
most modules (`GET /` is not served, API keys are not kept). Needs Maven and a JDK; without them it raises
`UnavailableError`.
"""

import base64
import contextlib
import fcntl
import hashlib
import hmac
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import obstore
import pytest
import requests
from obstore.store import from_url

from tests.certificates import CA, trusting_session

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
BUILD.mkdir(exist_ok=True)
RELEASE, RELEASE_9 = "8.19.9", "9.2.0"  # of Elasticsearch
GROUP = "org.elasticsearch.distribution.integ-test-zip"
USER, PASSWORD = "admin", "p@ss/w:rd 100%"  # which a URL must percent-encode
START_SECONDS = 120
FETCH_SECONDS = 600
# A copy of os.environ: tests change the original while servers start on another thread, and a child that inherits it
# just then fails with "Bad address".
ENVIRONMENT = dict(os.environ)
# Options of a Java that lives for minutes: half the CPU time, without the optimizing compiler and parallel collection.
SHORT_LIVED = ["-XX:TieredStopAtLevel=1", "-XX:-UseG1GC", "-XX:+UseSerialGC"]
ENVIRONMENT["CLI_JAVA_OPTS"] = " ".join(["-Xms64m", "-Xmx64m", *SHORT_LIVED])  # of Elasticsearch's own programs

# Ends the server with the tests, whatever ends them: their end of the pipe is then closed.
WATCHDOG = '"$@" </dev/null & read _; kill -9 0'


class UnavailableError(Exception):
    """Why no Elasticsearch can be started here, and what to install."""


def java_home(at_least: int) -> Path:
    """The JDK on the PATH if it is new enough, else the oldest new enough among those installed."""
    on_path = shutil.which("java")
    homes = [Path(on_path).resolve().parent.parent] if on_path else []
    others = [*Path("/usr/lib/jvm").glob("*"), *Path("/Library/Java/JavaVirtualMachines").glob("*/Contents/Home")]
    versions = [(version(home), home) for home in homes + others if (home / "bin" / "java").exists()]
    fitting = [pair for pair in versions if pair[0] >= at_least]
    if not fitting:
        raise UnavailableError(
            f"no JDK {at_least} or newer found: install one (Debian: apt-get install openjdk-{at_least}-jdk-headless)"
        )
    return fitting[0][1] if fitting[0][1] in homes else min(fitting)[1]


def newest_release() -> str:
    """The newest Elasticsearch of the tests that a JDK here runs."""
    try:
        java_home(21)
    except UnavailableError:
        return RELEASE
    return RELEASE_9


def version(home: Path) -> int:
    """The major version of the JDK in `home`, 0 where it does not say."""
    release = home / "release"
    found = re.search(r'JAVA_VERSION="(\d+)', release.read_text()) if release.exists() else None
    return int(found[1]) if found else 0


def artifact(coordinates: str, path: Path) -> Path:
    """Returns `path`, an artifact of Maven Central that is fetched once with Maven, by one process at a time."""
    if path.exists():
        return path
    maven = shutil.which("mvn")
    if not maven:
        raise UnavailableError("no Maven to fetch the tests' servers with: install it (Debian: apt-get install maven)")
    with (BUILD / "maven.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        command = [maven, "-q", "-B", "dependency:copy", f"-Dartifact={coordinates}", f"-DoutputDirectory={folder}"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"Maven could not fetch {coordinates}: {done.stdout[-500:]}")
        (fetched,) = Path(folder).iterdir()
        fetched.rename(path)
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

    def __init__(
        self,
        release: str = RELEASE,
        size: int = 1,
        java_options: Sequence[str] = ("-Xms512m", "-Xmx512m", *SHORT_LIVED),
        roles: dict[str, list[str]] | None = None,
        **settings: object,
    ) -> None:
        """Makes the nodes' folders; entering the context starts them.

        `settings` are more of Elasticsearch's own, with `__` for each dot of their names.

        `roles` maps roles of the file realm to their privileges on all indices; each has a user of its name.
        """
        self.release = release
        self.roles = roles or {}
        self.java = java_home(21 if release.startswith("9") else 17)
        zipped = artifact(f"{GROUP}:elasticsearch:{release}:zip", BUILD / f"elasticsearch-{release}.zip")
        self.java_options = java_options
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
        authority = CA()
        authority.write(self.folder / "ca.pem")
        authority.issue(config, "localhost", "127.0.0.1")
        shutil.copy(self.folder / "ca.pem", config / "ca.pem")
        self.run("elasticsearch-users", "useradd", USER, "-p", PASSWORD, "-r", "superuser")
        for role, privileges in self.roles.items():
            with (config / "roles.yml").open("a") as file:
                file.write(f"\n{role}:\n  indices:\n    - names: ['*']\n      privileges: {privileges}\n")
            # With the password of the administrator: the program takes seconds for each user.
            password_hash = (config / "users").read_text().splitlines()[0].partition(":")[2]
            with (config / "users").open("a") as users, (config / "users_roles").open("a") as users_roles:
                users.write(f"{role}:{password_hash}\n")
                users_roles.write(f"{role}:{role}\n")
        for node in self.nodes:
            shutil.copytree(config, node.folder / "config")
            (node.folder / "tmp").mkdir()
        if os.geteuid() == 0:  # Elasticsearch refuses to run as root
            self.folder.chmod(0o755)
            for path in self.folder.rglob("*"):
                shutil.chown(path, "nobody")

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.home / "bin" / program), *arguments]
        subprocess.run(command, env=ENVIRONMENT | {"ES_JAVA_HOME": str(self.java)}, check=True, capture_output=True)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def url(self) -> str:
        """`ES_URL` for the whole cluster."""
        return self.url_as(USER)

    def url_as(self, user: str) -> str:
        """`ES_URL` for the whole cluster and one of its users."""
        credentials = f"{quote(user, safe='')}:{quote(PASSWORD, safe='')}"
        return ",".join(f"https://{credentials}@localhost:{node.http}" for node in self.nodes)

    def __enter__(self) -> "Cluster":
        try:
            self.start_missing()
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
        environment = ENVIRONMENT | {
            "ES_JAVA_HOME": str(self.java),
            "ES_PATH_CONF": str(node.folder / "config"),
            "ES_JAVA_OPTS": " ".join(self.java_options),
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

    def start_missing(self) -> None:
        """Starts the nodes that do not run, and waits for them."""
        missing = [node for node in self.nodes if not node.process]
        for node in missing:
            self.start(node)
        if missing:
            self.wait()

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
            with trusting_session(self.ca) as session:
                health = session.get(
                    f"https://localhost:{node.http}/_cluster/health",
                    params={"wait_for_nodes": f">={size}", "timeout": "1s"},
                    auth=(USER, PASSWORD),
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


class S3:
    """A real S3 server with signatures: S3Proxy, from Maven Central. A context manager, like `Cluster`.

    Objects are on disk; with `in_memory`, their keys may be what no file name can.
    """

    IDENTITY, CREDENTIAL = "local-identity", "local-SECRET"

    def __init__(self, in_memory: bool = False) -> None:
        self.java = java_home(17)
        self.jar = artifact("org.gaul:s3proxy:2.6.0:jar:jar-with-dependencies", BUILD / "s3proxy-2.6.0.jar")
        self.in_memory = in_memory
        self.folder = Path(tempfile.mkdtemp(prefix="imagesearch-s3-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the process: what is pickled for another one can use the server, not end it."""
        return vars(self) | {"process": None}

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which obstore, and so the scripts, find it."""
        return {
            "AWS_ACCESS_KEY_ID": self.IDENTITY,
            "AWS_SECRET_ACCESS_KEY": self.CREDENTIAL,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
        }

    def __enter__(self) -> "S3":
        (self.folder / "objects").mkdir()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it and waits until it answers."""
        properties = {
            "s3proxy.endpoint": f"http://127.0.0.1:{self.port}",
            "s3proxy.authorization": "aws-v2-or-v4",
            "s3proxy.identity": self.IDENTITY,
            "s3proxy.credential": self.CREDENTIAL,
            "jclouds.provider": "transient" if self.in_memory else "filesystem-nio2",
            "jclouds.filesystem.basedir": self.folder / "objects",
            "jclouds.identity": "any",
            "jclouds.credential": "any",
        }
        (self.folder / "properties").write_text("\n".join(f"{name}={value}" for name, value in properties.items()))
        command = [str(self.java / "bin" / "java"), *SHORT_LIVED, "-Dfile.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8"]
        command += ["-jar", str(self.jar), "--properties", str(self.folder / "properties")]
        with (self.folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                ["sh", "-c", WATCHDOG, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=ENVIRONMENT | {"LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                requests.get(f"http://127.0.0.1:{self.port}", timeout=5)
            except requests.RequestException:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise RuntimeError(
                        "S3Proxy did not start:\n" + (self.folder / "output").read_text()[-3000:]
                    ) from None
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """Kills it, as a power cut would."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def put(self, bucket: str, key: str = "", content: bytes = b"") -> None:
        """Puts an object with any key, even one that client libraries refuse; without a key, makes the bucket."""
        path = f"/{bucket}" + (f"/{quote(key)}" if key else "")
        date = formatdate(usegmt=True)
        signature = hmac.new(self.CREDENTIAL.encode(), f"PUT\n\n\n{date}\n{path}".encode(), hashlib.sha1)
        headers = {
            "Date": date,
            "Authorization": f"AWS {self.IDENTITY}:{base64.b64encode(signature.digest()).decode()}",
            "Content-Length": str(len(content)),
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("PUT", path, body=content, headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200, (key, answer.status, answer.read())
        connection.close()


# Privileges on the index: the smallest with which each script can do all it can, and too few.
ROLES = {
    "creator": ["create_index", "read", "write", "maintenance", "view_index_metadata"],
    "searcher": ["read", "view_index_metadata"],
    "reader": ["read"],
}


FEWER = {
    f"{role}-without-{privilege}": [other for other in ROLES[role] if other != privilege]
    for role in ("creator", "searcher")
    for privilege in ROLES[role]
}


@dataclass(frozen=True)
class Server:
    """A running Elasticsearch: `ES_URL` and `ES_CA_CERT` for it."""

    url: str
    ca: str
    urls: dict[str, str] = field(default_factory=dict)
    """`ES_URL` for users with fewer privileges, by role."""

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Sends a request as the administrator; its JSON."""
        kind = (
            {"json": body}
            if not isinstance(body, bytes)
            else {"data": body, "headers": {"Content-Type": "application/x-ndjson"}}
        )
        with trusting_session(Path(self.ca)) if self.ca else requests.Session() as session:
            answer = session.request(method, f"{self.url.split(',')[0]}/{path}", timeout=60, **kind)
        assert answer.ok, answer.text
        return answer.json()


def unavailable(reason: str) -> NoReturn:
    """Skips, with the reason; in CI a missing server is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def cluster(size: int, release: str = RELEASE, **settings: object) -> Iterator[Cluster]:
    """Starts `size` nodes of Elasticsearch with these settings."""
    try:
        nodes = Cluster(release, size, **settings)  # type: ignore[arg-type]
    except UnavailableError as reason:
        unavailable(str(reason))
    with nodes:
        yield nodes


@contextlib.contextmanager
def s3_server(in_memory: bool = False) -> Iterator[S3]:
    """An S3 server."""
    try:
        server = S3(in_memory)
    except UnavailableError as reason:
        unavailable(str(reason))
    with server:
        yield server


class Bucket:
    """A bucket of its own for each test."""

    def __init__(self, server: S3, name: str) -> None:
        self.server, self.name, self.url = server, name, f"s3://{name}"
        server.put(name)
        settings: Any = {name.lower(): value for name, value in server.environment.items() if name.startswith("AWS_")}
        del settings["aws_allow_http"]
        settings["aws_disable_bulk_delete"] = "true"  # which S3Proxy does not have
        self.store = from_url(self.url, config=settings, client_options={"allow_http": True})

    def put(self, key: str, content: bytes) -> None:
        obstore.put(self.store, key, content)

    def put_any(self, key: str, content: bytes) -> None:
        """Puts an object with any key, even one that obstore refuses."""
        self.server.put(self.name, key, content)

    def put_many(self, objects: dict[str, bytes]) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.put, objects, objects.values()))

    def delete(self, *keys: str) -> None:
        for key in keys:
            obstore.delete(self.store, key)
