"""The real servers of the tests: Elasticsearch, with TLS and a password, and S3.

Elasticsearch is Elastic's own integration-test distribution, from Maven Central: the server with security, without
most modules (`GET /` is not served, API keys are not kept). Needs Maven and a JDK; without them it raises
`UnavailableError`.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

import obstore
import requests
import urllib3
from obstore.store import S3Store

from tests.certificates import CA

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
BUILD.mkdir(exist_ok=True)
RELEASE, RELEASE_9 = "8.19.9", "9.2.0"  # of Elasticsearch
PASSWORD = "p@ss/w:rd 100%"  # which a URL must percent-encode
# What `elasticsearch-users useradd` writes for it, in seconds.
PASSWORD_HASH = "$2a$04$jJTi4aKk/.IOojO2doyRseHqMWqakc.Oohcxt0HE6KC0YRUZqF1rO"
START_SECONDS = 300  # on a busy machine, too
# Options of a Java that lives for minutes: half the CPU time, without the optimizing compiler and parallel collection.
SHORT_LIVED = ["-XX:TieredStopAtLevel=1", "-XX:-UseG1GC", "-XX:+UseSerialGC"]
ENVIRONMENT = os.environ | {"CLI_JAVA_OPTS": " ".join(["-Xms64m", "-Xmx64m", *SHORT_LIVED])}

# Ends the server with the tests, whatever ends them: their end of the pipe is then closed.
WATCHDOG = 'exec 3<&0; { read _ <&3; kill -9 0; } & exec "$@" </dev/null 3<&-'

# Privileges on the index: the smallest with which each script can do all it can.
ROLES = {
    "creator": ["create_index", "read", "write", "maintenance", "view_index_metadata"],
    "searcher": ["read", "view_index_metadata"],
}


class UnavailableError(Exception):
    """Why no server can be started here, and what to install."""


def jdks() -> list[tuple[int, Path]]:
    """The JDKs of this machine: the version and the folder of each."""
    homes = [*Path("/usr/lib/jvm").glob("*"), *Path("/Library/Java/JavaVirtualMachines").glob("*/Contents/Home")]
    homes += [Path(java).resolve().parent.parent for java in [shutil.which("java")] if java]
    releases = [(home, (home / "release").read_text()) for home in homes if (home / "release").exists()]
    return [(int(found[1]), home) for home, text in releases if (found := re.search(r'JAVA_VERSION="(\d+)', text))]


def java_home(at_least: int) -> Path:
    """The newest JDK, as Elasticsearch brings one: on an old one, int8 vectors are compared several times slower."""
    fitting = [jdk for jdk in jdks() if jdk[0] >= at_least]
    if not fitting:
        raise UnavailableError(f"no JDK {at_least} or newer (Debian: apt-get install openjdk-{at_least}-jdk-headless)")
    return max(fitting)[1]


def artifact(coordinates: str, name: str) -> Path:
    """Returns the path of an artifact of Maven Central, fetched once with Maven, by one process at a time."""
    path, maven = BUILD / name, shutil.which("mvn")
    with (BUILD / "maven.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        if not maven:
            raise UnavailableError("no Maven to fetch servers with (Debian: apt-get install maven)")
        command = [maven, "-q", "-B", "dependency:copy", f"-Dartifact={coordinates}", f"-DoutputDirectory={folder}"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"Maven could not fetch {coordinates}: {done.stdout[-500:]}")
        (fetched,) = Path(folder).iterdir()
        return fetched.rename(path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A server's process, which ends with the tests. A context manager: it starts, stops and cleans up."""

    command: list[str]
    environment: dict[str, str]
    """The variables with which the scripts find it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="imagesearch-test-"))
        self.port = free_port()
        self.process: subprocess.Popen[Any] | None = None
        self.options: dict[str, Any] = {"env": ENVIRONMENT | {"LC_ALL": "C.UTF-8"}}  # of `subprocess.Popen`

    def is_up(self) -> bool:
        """Returns True if the server answers."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it, with the data it has, and waits until it answers."""
        with (self.folder / "output").open("ab") as output:
            files: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output, "cwd": self.folder}
            command = ["sh", "-c", WATCHDOG, "sh", *self.command]
            self.process = process = subprocess.Popen(command, start_new_session=True, **files, **self.options)
        deadline = time.monotonic() + START_SECONDS
        while not self.is_up():
            if time.monotonic() > deadline or process.poll() is not None:
                self.kill()
                raise RuntimeError("A server did not start:\n" + (self.folder / "output").read_text()[-3000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """Kills it, as a power cut would."""
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        os.killpg(self.process.pid, number)


class Elasticsearch(Server):
    """One node. `settings` are Elasticsearch's own, with ``__`` for each dot of their names."""

    def __init__(
        self,
        release: str = RELEASE,
        java_options: Sequence[str] = ("-Xms512m", "-Xmx512m", *SHORT_LIVED),
        **settings: object,
    ) -> None:
        super().__init__()
        self.release = release
        java = java_home(21 if release.startswith("9") else 17)
        coordinates = f"org.elasticsearch.distribution.integ-test-zip:elasticsearch:{release}:zip"
        with zipfile.ZipFile(artifact(coordinates, f"elasticsearch-{release}.zip")) as archive:
            archive.extractall(self.folder)
        home = self.folder / f"elasticsearch-{release}"
        for program in [*home.glob("bin/*"), *home.glob("modules/*/platform/*/bin/*")]:
            program.chmod(0o755)
        (self.folder / "tmp").mkdir()
        variables = {"ES_JAVA_HOME": str(java), "ES_JAVA_OPTS": " ".join(java_options)}
        self.options = {"env": ENVIRONMENT | variables | {"ES_TMPDIR": str(self.folder / "tmp")}}
        self._configure(home / "config", settings)
        self.command = [str(home / "bin" / "elasticsearch")]
        url = f"https://admin:{quote(PASSWORD, safe='')}@localhost:{self.port}"
        self.environment = {"ES_URL": url, "ES_CA_CERT": str(home / "config" / "ca.pem")}
        if os.geteuid() == 0:  # Elasticsearch refuses to run as root
            self.options |= {"user": "nobody", "extra_groups": []}
            self.folder.chmod(0o755)
            for path in [self.folder, *self.folder.rglob("*")]:
                shutil.chown(path, "nobody")

    def _configure(self, config: Path, more: dict[str, object]) -> None:
        """Writes its settings, its certificate and its users, the administrator and one for each role."""
        authority = CA()
        authority.write(config / "ca.pem")
        authority.issue(config, "localhost")
        users = {"admin": "superuser"} | {role: role for role in ROLES}
        (config / "users").write_text("".join(f"{user}:{PASSWORD_HASH}\n" for user in users))
        (config / "users_roles").write_text("".join(f"{role}:{user}\n" for user, role in users.items()))
        roles = [f"{role}:\n  indices: [{{names: ['*'], privileges: {ROLES[role]}}}]\n" for role in ROLES]
        (config / "roles.yml").write_text("".join(roles))
        settings = {
            "path.data": str(self.folder / "data"),
            "path.logs": str(self.folder / "logs"),
            "network.host": "127.0.0.1",
            "http.port": self.port,
            "transport.port": 0,  # any
            "discovery.type": "single-node",
            "cluster.routing.allocation.disk.threshold_enabled": False,  # the disk may be nearly full here
            "xpack.security.enabled": True,
            "xpack.security.authc.api_key.enabled": True,
        }
        for layer in ("http", "transport"):
            tls = {"enabled": True, "key": "key.pem", "certificate": "node.pem", "certificate_authorities": "ca.pem"}
            settings[f"xpack.security.{layer}.ssl"] = tls
        settings |= {name.replace("__", "."): value for name, value in more.items()}
        (config / "elasticsearch.yml").write_text(json.dumps(settings))  # JSON is YAML

    def is_up(self) -> bool:
        try:
            health = send(self.environment, "GET", "_cluster/health?timeout=1s", seconds=10).json()
        except (urllib3.exceptions.HTTPError, ValueError):
            return False
        return health.get("status") in ("green", "yellow")


def send(
    environment: dict[str, str], method: str, path: str, body: bytes | None = None, seconds: Any = 600, **headers: str
) -> urllib3.BaseHTTPResponse:
    """Sends a request to Elasticsearch, whose CA is trusted on every Python."""
    url = urlsplit(environment["ES_URL"])
    context = ssl.create_default_context(cafile=environment["ES_CA_CERT"] or None)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    headers |= urllib3.make_headers(basic_auth=f"{url.username}:{unquote(url.password or '')}")
    with urllib3.PoolManager(ssl_context=context, timeout=seconds, retries=False) as pool:
        return pool.request(method, f"https://{url.hostname}:{url.port}/{path}", body=body, headers=headers)


def request(environment: dict[str, str], method: str, path: str, body: Any = None) -> Any:
    """Sends a request to Elasticsearch; returns its JSON. Raises AssertionError for an error."""
    content = None if body is None else json.dumps(body).encode()
    answer = send(environment, method, path, content, **{"Content-Type": "application/json"})
    assert answer.status < 300, answer.data
    return answer.json()


class S3(Server):
    """A real S3 server with signatures: S3Proxy, from Maven Central. It keeps objects in memory, under any key."""

    def __init__(self) -> None:
        super().__init__()
        jar = artifact("org.gaul:s3proxy:2.6.0:jar:jar-with-dependencies", "s3proxy-2.6.0.jar")
        java = [str(java_home(17) / "bin" / "java"), *SHORT_LIVED, "-Dfile.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8"]
        self.command = [*java, "-jar", str(jar), "--properties", str(self.folder / "properties")]
        self.environment = {
            "AWS_ACCESS_KEY_ID": "local-identity",
            "AWS_SECRET_ACCESS_KEY": "local-SECRET",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }
        properties = {
            "s3proxy.endpoint": self.environment["AWS_ENDPOINT_URL"],
            "s3proxy.authorization": "aws-v2-or-v4",
            "s3proxy.identity": self.environment["AWS_ACCESS_KEY_ID"],
            "s3proxy.credential": self.environment["AWS_SECRET_ACCESS_KEY"],
            "jclouds.provider": "transient",
            "jclouds.identity": "any",
            "jclouds.credential": "any",
        }
        (self.folder / "properties").write_text("\n".join(f"{name}={value}" for name, value in properties.items()))

    def is_up(self) -> bool:
        try:
            return bool(requests.get(self.environment["AWS_ENDPOINT_URL"], timeout=5).status_code)
        except requests.RequestException:
            return False


class Bucket:
    """A bucket on an S3 server, which is made if it is not there."""

    def __init__(self, environment: dict[str, str], name: str) -> None:
        self.url = f"s3://{name}"
        # S3Proxy cannot delete several objects at once.
        settings: Any = {"aws_disable_bulk_delete": "true"} | {key.lower(): each for key, each in environment.items()}
        self._store = S3Store(name, config=settings, client_options={"allow_http": True})
        answer = requests.put(obstore.sign(self._store, "PUT", "", timedelta(minutes=1)), timeout=60)
        assert answer.ok or "BucketAlreadyOwnedByYou" in answer.text, answer.text

    def put(self, objects: dict[str, bytes]) -> None:
        """Puts objects, by their keys."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(obstore.put, self._store), objects, objects.values()))

    def delete(self, *keys: str) -> None:
        for key in keys:
            obstore.delete(self._store, key)
