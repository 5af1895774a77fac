"""Join an organisation as a party: a token becomes a certificate for a key that stays here."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from llmos.crypto.certificates import MALFORMED, PartyId
from llmos.errors import CertificateRefused, ConfigError
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.parties import memberships
from llmos.parties.exchange import call
from llmos.parties.memberships import Membership
from llmos.parties.peers import Anchor, check_crl
from llmos.parties.tls import client_context, introduction_context
from llmos.parties.tokens import JoinToken, fingerprint


def run(url: str, text: str, who: Principal, kernel: Kernel, at: datetime) -> Membership:
    """Fetch the CA that the token pins, ask it for a certificate, check that and keep it.

    The token is sent only to a server that has shown a certificate of the pinned CA. Where this
    failed on the way, the same call may be made again.

    Raises:
        JoinRefused: it is no token, or the server refuses it.
        CertificateRefused: the server is not the one that the token names, or what it sends is no
            good.
        ConfigError: the URL is none.
        NetworkError: the server cannot be reached.
        PartyExists: this home is a party of the organisation already.
        PermissionDenied: policy does not let `who` manage parties.
    """
    token = JoinToken.parse(text)
    anchor = introduce(url, token, at)
    party = PartyId(anchor.organisation, token.party)
    member, request = memberships.begin(party, url, anchor, who, kernel)
    context = client_context(member.terms(kernel))
    answer = call(url, context, "/party/join", f"{token.text}\n".encode() + request)
    return memberships.finish(member, parse_certificate(answer), who, kernel, at)


def introduce(url: str, token: JoinToken, at: datetime) -> Anchor:
    """Return the CA whose fingerprint the token carries, with its revocation list.

    Raises:
        CertificateRefused: the server shows another CA, or one that is malformed.
        NetworkError: the server cannot be reached.
    """
    context = introduction_context()
    authority = parse_certificate(call(url, context, "/party/authority"))
    if fingerprint(authority) != token.authority:
        raise CertificateRefused(
            f"{url} is not the server that the token names: its CA is another one",
            hint="check the URL; if it is right, somebody stands in between",
        )
    listed = Anchor.parse(
        "", authority.public_bytes(Encoding.PEM) + call(url, context, "/party/crl")
    )
    organisation = organisation_of(authority)
    if len(listed.crls) != 1:
        raise CertificateRefused(f"{url} has no revocation list")
    check_crl(listed.crls[0], authority, at)
    return Anchor(organisation, (authority,), listed.crls)


def organisation_of(authority: x509.Certificate) -> str:
    """Return the organisation that a CA's certificate names (X509-SVID section 4.1).

    Raises:
        CertificateRefused: it names none.
    """
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return PartyId(uri.removeprefix("spiffe://"), None).organisation
    except (*MALFORMED, x509.ExtensionNotFound, ConfigError) as error:
        raise CertificateRefused("the CA's certificate names no organisation") from error


def parse_certificate(pem: bytes) -> x509.Certificate:
    """Read the certificate that a server answered with.

    Raises:
        CertificateRefused: it is malformed.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except MALFORMED as error:
        raise CertificateRefused("the server's answer is no certificate") from error
