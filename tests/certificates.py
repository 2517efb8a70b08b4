"""Certificates for the tests' servers, from a CA like that of IBM Cloud Databases.

Its certificate is older than Python 3.13's strict checks: basicConstraints is not critical, and
there is no keyUsage (seen in us-south on 2026-10-08).
"""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class CA:
    """A certificate authority."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        extensions = [x509.BasicConstraints(ca=True, path_length=None), key_id]
        self._certificate = self._sign("Tests' CA", self._key, NOW + 9 * DAY, extensions)

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, until: datetime.datetime, extensions: list[x509.ExtensionType]
    ) -> bytes:
        """Returns a certificate for this name and key, as PEM."""
        issuer, subject = (x509.Name.from_rfc4514_string(f"CN={each}") for each in ("Tests' CA", name))
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(NOW - 9 * DAY).not_valid_after(until)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def write(self, path: Path) -> Path:
        """Writes the CA's certificate as PEM; returns the path."""
        path.write_bytes(self._certificate)
        return path

    def issue(self, folder: Path, host: str, expired: bool = False) -> tuple[Path, Path]:
        """Writes a certificate for `host` and its key to `folder`; returns their paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        until = NOW - DAY if expired else NOW + 5 * DAY
        certificate, key_path = folder / "node.pem", folder / "key.pem"
        certificate.write_bytes(self._sign("node", key, until, [x509.SubjectAlternativeName([name]), issuer]))
        key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, key_path
