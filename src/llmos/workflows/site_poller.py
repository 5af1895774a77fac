"""The thread of a site's agent that asks its coordinator, and renews what both are believed by.

A revocation list is good for a day, a certificate for a month. An agent that nobody watches
outlives both, so it fetches the next ones itself, in time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from llmos.crypto.notes import Verifier
from llmos.errors import LlmosError, NetworkError, RequestError, VerificationFailed
from llmos.kernel.identity import Principal
from llmos.workflows import renew_parties
from llmos.workflows.site_channel import SiteChannel

RETRY_S: Final = 2.0  # after a call that failed
RENEW_AGAIN: Final = timedelta(minutes=10)  # after a renewal, also one that brought nothing new


@dataclass(frozen=True, slots=True)
class News:
    """What the coordinator says of all jobs of this site, and by which key it signs."""

    verifier: Verifier
    instructions: list[dict[str, Any]]
    asked_at: float  # monotonic


@dataclass(slots=True)
class SitePoller:
    """Asks again and again; `put` gets each answer, or the error after which nothing is asked."""

    channel: SiteChannel
    who: Principal
    tell: Callable[[str], None]
    stop: threading.Event
    put: Callable[[News | LlmosError], None]
    _renew_from: datetime = field(default=datetime.min.replace(tzinfo=UTC))

    def run(self) -> None:
        """Ask until `stop` is set; a coordinator that cannot be reached is asked again."""
        instance, seen, silent = "", 0, False
        verifier: Verifier | None = None
        while not self.stop.is_set():
            try:
                self._renew()
                if verifier is None:
                    verifier = self.channel.coordinator_key()
                asked_at = time.monotonic()
                instance, seen, instructions = self.channel.poll(instance, seen)
                if silent:
                    self.tell(f"{self.channel.member.url} is there again")
                silent = False
                self.put(News(verifier, instructions, asked_at))
            except (NetworkError, RequestError, VerificationFailed) as error:
                if not silent:
                    self.tell(f"{error.message}; trying again")
                silent, instance, seen = True, "", 0  # answers were lost: all is told anew at once
                self.stop.wait(RETRY_S)
            except LlmosError as error:
                self.put(error)
                return

    def _renew(self) -> None:
        """Renew what is due; what fails is tried again for as long as the present list is good.

        Raises:
            NetworkError: it has run out, and the coordinator cannot be reached for another one.
            CertificateRefused: it has run out and no other one is good, or this home was revoked.
        """
        member, at = self.channel.member, datetime.now(UTC)
        waits = at < self._renew_from and not member.list_is_over(at)
        if waits or not renew_parties.is_due(member, at):
            return
        self._renew_from = at + RENEW_AGAIN
        try:
            done = renew_parties.renew(member, self.who, self.channel.parts.kernel, at)
        except LlmosError as error:
            member = self.channel.member  # the list may have come, and the certificate not
            if member.list_is_over(at) or member.is_revoked:
                raise
            self.tell(f"certificate and revocation list are not renewed yet: {error.message}")
            return
        if done.renewed and done.member.certificate is not None:
            end = done.member.certificate.not_valid_after_utc
            self.tell(f"the certificate is renewed until {end:%Y-%m-%d}")
