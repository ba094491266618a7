"""Where the cloud is: certificate, configuration, answers, several addresses."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from aoscore.cm.communication.discovery import (
    Addresses,
    Answer,
    certificate_urls,
    discovery_urls,
    parse_answer,
    request_body,
)
from aoscore.common.errors import FailedError, InvalidArgumentError, NotFoundError

CONFIGURED = "https://aoscloud.io:9000/sd/v7/"
WHERE = "https://x/"


def certificate(*, organization: str = "", uris: tuple[str, ...] = ()) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.NameAttribute(x509.NameOID.COMMON_NAME, "unit")]
    if organization:
        names.append(x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, organization))
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(names))
        .issuer_name(x509.Name(names))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if uris:
        alternatives = x509.IssuerAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(key, hashes.SHA256())


def urls(*, override: str = "", cert: x509.Certificate | None = None, configured: str = CONFIGURED) -> list[str]:
    return discovery_urls(configured=configured, override=override, named=certificate_urls(cert) if cert else ())


def test_the_path_is_always_the_configured_one() -> None:
    assert urls(override="http://127.0.0.1:8080/else?q=1") == ["http://127.0.0.1:8080/sd/v7/?q=1"]
    assert urls(override="http://h", configured="https://c") == ["http://h/"]


def test_the_certificate_s_uris_come_first_in_order_then_the_configured_url() -> None:
    cert = certificate(organization="cloud.example", uris=("https://one:1", "https://two:2/x"))
    assert urls(cert=cert) == ["https://one:1/sd/v7/", "https://two:2/sd/v7/", CONFIGURED]


def test_the_organization_names_the_cloud() -> None:
    assert urls(cert=certificate(organization="cloud.example"))[0] == "https://cloud.example:9000/sd/v7/"


def test_a_certificate_that_says_nothing() -> None:
    assert urls(cert=certificate()) == [CONFIGURED]
    assert urls() == [CONFIGURED]
    with pytest.raises(NotFoundError, match="serviceDiscoveryUrl"):
        urls(cert=certificate(), configured="")


def test_the_request() -> None:
    assert json.loads(request_body("unit-0042")) == {
        "version": 7,
        "systemId": "unit-0042",
        "supportedProtocols": ["wss"],
    }


def test_an_answer() -> None:
    body = {"version": 7, "systemID": "u", "nextRequestDelay": 2500, "connectionInfo": ["wss://a"], "authToken": "t"}
    answer = parse_answer(200, json.dumps(body).encode(), WHERE)
    assert (answer.connection_info, answer.auth_token, answer.delay_s) == (("wss://a",), "t", 2.5)
    assert "'t'" not in repr(answer)


@pytest.mark.parametrize(("delay_ms", "delay_s"), [(0, None), (-1, None), (30, 1.0), (90_000, 90.0)])
def test_defect_5_the_wished_delay_has_a_floor(delay_ms: int, delay_s: float | None) -> None:
    """Thirty milliseconds make AosCore 9.1 connect 20 times a second (observed.md, defect 5)."""
    assert Answer(next_request_delay=delay_ms).delay_s == delay_s


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, b"{}", FailedError),
        (201, b'{"connectionInfo": ["wss://a"]}', FailedError),
        (200, b"<html>", InvalidArgumentError),
        (200, b"[]", InvalidArgumentError),
        (200, b"{}", InvalidArgumentError),
        (200, b'{"connectionInfo": 7}', InvalidArgumentError),
        (200, b'{"connectionInfo": ["wss://a"], "errorCode": 3}', FailedError),
    ],
)
def test_bad_answers(status: int, body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match=WHERE):
        parse_answer(status, body, WHERE)


def test_repeat_later_needs_no_address() -> None:
    assert parse_answer(200, b'{"errorCode": 2, "nextRequestDelay": 5000}', WHERE).delay_s == 5


def test_addresses_are_tried_in_turn_and_the_good_one_is_kept() -> None:
    addresses = Addresses()
    assert addresses.current is None
    addresses.take(Answer(connection_info=("a", "b", "c"), auth_token="t"))
    assert addresses.current == "a"
    addresses.failed()
    assert addresses.current == "b" and addresses.token == "t"
    addresses.worked()
    assert addresses.current == "b"
    addresses.failed()
    addresses.failed()
    assert addresses.current == "a"
    addresses.failed()
    assert addresses.current is None and addresses.token == ""


def test_a_refused_token_needs_a_new_answer() -> None:
    addresses = Addresses()
    addresses.take(Answer(connection_info=("a", "b")))
    addresses.forget()
    assert addresses.current is None
