"""The public form of an address has no secret, and still says which address it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli.addresses import public_address, split_user, without_secrets

SECRET = "s3cr-et"
PLAIN = [
    "photos/a?b#c.jpg", "https://host/a b.jpg", "https://host:8080/@user/a.jpg",
    "http://[::1]:80/a@b.jpg", "hf://owner/name:config", "hf://owner/name@main/a.safetensors",
    "s3://bucket/train-{000000..000009}.tar", "file:///folder/a?b.jpg", "",
]  # fmt: skip
WITH_SECRETS = [
    f"https://user:{SECRET}@host/a.jpg", f"https://{SECRET}@host", f"s3://key:{SECRET}@bucket/a",
    f"https://host/a.jpg?X-Amz-Signature={SECRET}", f"https://u:a/{SECRET}@host/a.jpg",
    f"https://u:{SECRET}@host:80/a.jpg?{SECRET}#{SECRET}", f"HTTPS://host/a#token={SECRET}",
    f"zip://a.jpg::https://u:{SECRET}@host/a.zip?{SECRET}",
    f"simplecache::https://u:{SECRET}@host/a.zip",
]  # fmt: skip


@pytest.mark.parametrize("address", PLAIN)
def test_an_address_without_secrets_and_a_path_stay(address: str) -> None:
    assert public_address(address) == address
    assert split_user(address) == (address, "")


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_no_secret_is_in_the_public_form_which_is_its_own(address: str) -> None:
    public = public_address(address)
    assert SECRET not in public
    assert "host" in public or "bucket" in public
    assert public_address(public) == public


@pytest.mark.parametrize("address", WITH_SECRETS)
@pytest.mark.parametrize(
    "text", ["cannot open ({}): no", "<urlopen error '{}'>", "{}.", '{{"url": "{}"}}', "a {}, b"]
)
def test_a_text_loses_only_secrets(address: str, text: str) -> None:
    assert without_secrets(text.format(address)) == text.format(public_address(address))


def test_words_of_libraries_that_name_only_a_path_or_a_header() -> None:
    told = without_secrets(f"Max retries exceeded with url: /a/b?token={SECRET} (Caused by x)")
    assert told.startswith("Max retries exceeded with url: /a/b?sha256=")
    assert told.endswith(" (Caused by x)")
    assert SECRET not in told
    token = "hf_abcdefghijklmnop"
    assert token not in without_secrets(f"Illegal header value b'Bearer {token}\\n'")


def test_queries_tell_addresses_apart_and_users_do_not() -> None:
    assert public_address("https://h/a?id=1") != public_address("https://h/a?id=2")
    assert public_address("https://a:b@h/a?id=1") == public_address("https://c:d@h/a?id=1")


@given(st.text(), st.text())
def test_any_text_has_a_public_form(first: str, second: str) -> None:
    for address in (first, f"https://{first}@{second}", f"{first}://{second}"):
        public = public_address(address)
        assert public_address(public) == public
        assert without_secrets(without_secrets(address)) == without_secrets(address)


def test_user_and_password_are_taken_off_the_address() -> None:
    assert split_user("https://user:p%40ss@host/a?b") == ("https://host/a?b", "user:p%40ss")
