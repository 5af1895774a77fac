"""The public keys of a home, as its operator publishes them in `home.pub`."""

from __future__ import annotations

from llmos.crypto.notes import Verifier
from llmos.errors import VerificationFailed


def read_public_keys(text: str) -> tuple[Verifier, Verifier]:
    """Read `home.pub`: the certificate key, then the log key.

    Raises:
        VerificationFailed: it does not hold exactly two verifier keys.
    """
    lines = text.splitlines()
    if len(lines) != 2:  # noqa: PLR2004 - certificate key and log key
        raise VerificationFailed(
            f"the public keys must be two lines, not {len(lines)}",
            hint="use the home.pub that the operator of the home published",
        )
    certificate_key, log_key = (Verifier.parse(line) for line in lines)
    return certificate_key, log_key
