"""TLS as both ends use it: for gRPC, and for the connections of the bulk path beside it."""

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

LEAST_VERSION = ssl.TLSVersion.TLSv1_2


class Identity(NamedTuple):
    """How a node shows who it is."""

    credentials: grpc.ServerCredentials
    context: ssl.SSLContext

    @classmethod
    def read(cls, certificate_file: Path, key_file: Path) -> "Identity":
        """Of a certificate chain and its private key, as PEM. Raises OSError (ssl.SSLError)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = LEAST_VERSION
        context.num_tickets = 0  # Nobody resumes; a connection says only what it was asked.
        context.load_cert_chain(certificate_file, key_file)
        pair = (key_file.read_bytes(), certificate_file.read_bytes())
        return cls(grpc.ssl_server_credentials([pair]), context)


class Trust(NamedTuple):
    """How a client knows that a node is the one it means."""

    credentials: grpc.ChannelCredentials
    context: ssl.SSLContext

    @classmethod
    def read(cls, ca_file: Path) -> "Trust":
        """Of the certificates that it trusts, as PEM. Raises ValueError, naming the setting."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = LEAST_VERSION
        try:
            context.load_verify_locations(ca_file)
            credentials = grpc.ssl_channel_credentials(ca_file.read_bytes())
        except ssl.SSLError:
            raise ValueError(f"tls_ca_file: {ca_file} holds no certificate (PEM)") from None
        except OSError as error:
            raise ValueError(f"tls_ca_file: {ca_file}: {error.strerror}") from None
        return cls(credentials, context)
