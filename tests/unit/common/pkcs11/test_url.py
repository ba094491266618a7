from pathlib import Path

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.pkcs11.url import TokenUrl, is_token_url, parse_token_url

ID = "00112233445566778899aabbccddeeff"
PERCENT = "%00%11%22%33%44%55%66%77%88%99%AA%BB%CC%DD%EE%FF"
PIN = Path("/var/aos/iam/.usrpin")
LIBRARY = Path("/usr/lib/softhsm/libsofthsm2.so")


@pytest.mark.parametrize(
    ("more", "query"),
    [
        ({}, ""),
        ({"pin_source": PIN}, f"pin-source={PIN}"),
        ({"module_path": LIBRARY}, f"module-path={LIBRARY}"),
        ({"module_path": LIBRARY, "pin_source": PIN}, f"module-path={LIBRARY}&pin-source={PIN}"),
    ],
)
def test_form_that_peers_read(more: dict[str, Path], query: str) -> None:
    url = TokenUrl(token="aoscore", object="iam", id=ID, **more)
    assert str(url) == f"pkcs11:token=aoscore;object=iam;id={PERCENT}?{query}"
    assert parse_token_url(str(url)) == url
    assert is_token_url(str(url)) and not is_token_url("file:///x")


def test_key_for_openssl() -> None:
    """The worked example of iam.md §5.14."""
    url = TokenUrl(token="aoscore", object="iam", id=ID, module_path=LIBRARY, pin_source=PIN)
    assert url.provider_pem().decode() == (
        "-----BEGIN PKCS#11 PROVIDER URI-----\n"
        "MIGSGhlQS0NTIzExIFByb3ZpZGVyIFVSSSB2MS4wDHVwa2NzMTE6dHlwZT1wcml2\n"
        "YXRlO3Rva2VuPWFvc2NvcmU7aWQ9JTAwJTExJTIyJTMzJTQ0JTU1JTY2JTc3JTg4\n"
        "JTk5JUFBJUJCJUNDJUREJUVFJUZGP3Bpbi1zb3VyY2U9L3Zhci9hb3MvaWFtLy51\n"
        "c3JwaW4=\n"
        "-----END PKCS#11 PROVIDER URI-----\n"
    )


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("pkcs11:token=a;object=b?", "id missing"),
        ("pkcs11:", "token and object and id missing"),
        ("file:///x", "no address of a key"),
        (f"pkcs11:token=a;object=b;id={PERCENT}?pin-value=1234", "only pin-source"),
    ],
)
def test_what_is_no_address(url: str, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        parse_token_url(url)
    assert "1234" not in str(caught.value)


def test_other_writers_may_escape_and_order_as_they_like() -> None:
    url = parse_token_url(f"pkcs11:id={PERCENT};type=private;object=iam;token=my%20token?pin-source=file:/p")
    assert url == TokenUrl(token="my token", object="iam", id=ID, pin_source=Path("/p"))
    assert url.library == LIBRARY
