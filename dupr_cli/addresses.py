"""The public form of an address: what is written, shown and compared, without its secrets.

`https://user:pass@host/a.jpg?signature=...` is used as it is, but everything that is kept or shown
has `https://host/a.jpg?sha256=<hash of the query>`. The hash distinguishes addresses that differ
only in their query. The public form of a public form is itself, and of a path, the path.
"""

from __future__ import annotations

import hashlib
import re

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# A password that should have been quoted may contain a slash; then what looks like a port is none.
_USER = r"[^/?#]*@|[^/?#@:\[]*:(?!\d*(?:[/?#]|\Z))\S*@"
_PARTS = re.compile(rf"({_SCHEME})({_USER})?([^?#]*)(.*)", re.DOTALL)
# Addresses behind fsspec's protocols, as in zip://a.jpg::https://host/a.zip
_CHAINED = re.compile(rf"::(?={_SCHEME})")
_PUBLIC = re.compile(r"\?sha256=[0-9a-f]{16}")
# An address in a text; urllib3 names only the path; and a token that is not accepted as a header.
_IN_TEXT = re.compile(
    rf"{_SCHEME}[^\s\"'<>\\]+|(?<=with url: )/[^\s\"'<>\\)]+|(?<=Bearer )[^\s\"'<>\\]{{16,}}"
)
_LOCAL = ("file://", "hf://")  # a question mark there belongs to a name


def public_address(address: str) -> str:
    """An address without user, password and query, of which a hash stays; a path as it is."""
    if "://" not in address:
        return address
    return "::".join(map(_public, _CHAINED.split(address)))


def _public(address: str) -> str:
    parts = _PARTS.fullmatch(address)
    if parts is None or address.startswith(_LOCAL):
        return address
    scheme, _, place, query = parts.groups()
    return f"{scheme}{place}{_hashed(query)}"


def _hashed(query: str) -> str:
    if not query or _PUBLIC.fullmatch(query):
        return query
    return f"?sha256={hashlib.sha256(query.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def without_secrets(text: str) -> str:
    """A text, such as the message of a library, with the public form of all addresses in it."""
    return _IN_TEXT.sub(_replaced, text)


def _replaced(found: re.Match[str]) -> str:
    whole = found[0]
    address = whole.rstrip(".,;:!)]}")
    if "://" in address:
        return public_address(address) + whole[len(address) :]
    if address.startswith("/"):
        path, mark, query = address.partition("?")
        return path + _hashed(mark + query) + whole[len(address) :]
    return "..."


def split_user(address: str) -> tuple[str, str]:
    """An address without user and password, and these as `user:password`, empty if it has none."""
    parts = _PARTS.fullmatch(address)
    if parts is None or _CHAINED.search(address):
        return address, ""
    scheme, user, place, query = parts.groups()
    return f"{scheme}{place}{query}", (user or "").removesuffix("@")
