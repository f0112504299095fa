"""Certificates for one test, made by the openssl command."""

import subprocess
from pathlib import Path
from typing import NamedTuple


class Certificate(NamedTuple):
    """A certificate that signs itself, and its key, as PEM files."""

    certificate_file: Path
    key_file: Path

    @property
    def settings(self) -> dict[str, Path]:
        """For a node's `server`."""
        return {"tls_certificate_file": self.certificate_file, "tls_key_file": self.key_file}


def make_certificate(home: Path, name: str, subject: str = "IP:127.0.0.1") -> Certificate:
    """One that is good for a day, for `subject`: an address or a host (`DNS:store`)."""
    made = Certificate(home / f"{name}.pem", home / f"{name}.key")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-days", "1", "-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}",
            "-keyout", str(made.key_file), "-out", str(made.certificate_file),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return made
