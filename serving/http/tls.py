"""The certificate that a service shows its clients, looked at before anything is started."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from bahe_core.errors import BadInput, one_line


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files in PEM format, as every authority gives them."""

    certificate: Path
    """The service's own first, then those between it and the authority."""
    key: Path
    """Of the service's own, without a passphrase: nobody is there to type one."""


def tls(certificate: Path | None, key: Path | None) -> Tls | None:
    """TLS with these files, None without any.

    Raises BadInput when one is given alone, cannot be read, is not what it should be, or when the key is
    another certificate's.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise BadInput("TLS needs a certificate and its key; give both --tls-certificate and --tls-key.")
    for path in (certificate, key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise BadInput(
                f"{path} cannot be read ({error.strerror}); name a file in PEM format that may be."
            ) from None
    _require_pair(certificate, key)
    return Tls(certificate=certificate, key=key)


def _require_pair(certificate: Path, key: Path) -> None:
    """Raises BadInput where a server could not use them together."""

    def no_passphrase() -> str:  # without it OpenSSL would ask on the terminal
        raise BadInput(f"{key} needs a passphrase, and a service has nobody to ask; give it without one.")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Alone first, so that an error of the pair is about the key.
        context.load_verify_locations(certificate)
    except ssl.SSLError as error:
        raise BadInput(
            f"{certificate} is no certificate in PEM format ({one_line(error)}); name one with"
            " --tls-certificate."
        ) from None
    try:
        context.load_cert_chain(certificate, key, no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadInput(
                f"{key} is not the key of {certificate}; name the two that were made together."
            ) from None
        raise BadInput(
            f"{certificate} cannot be served with {key} ({one_line(error)}); name a certificate and its"
            " key, both in PEM format."
        ) from None
