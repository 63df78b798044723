"""URLs: which names are some, and their parts."""

import re
from typing import NamedTuple
from urllib.parse import urlsplit

# At least two letters: "C://data" is a Windows path.
URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # URL parsers drop some of these
PORTS = {"http": 80, "https": 443}


def is_url(path: str) -> bool:
    """Whether `path` is a URL, rather than a path of the local file system."""
    return URL.match(path) is not None


def is_web(path: str) -> bool:
    """Whether `path` is an http or https URL, which our own client opens and fsspec never sees."""
    return scheme_of(path) in PORTS


def scheme_of(path: str) -> str:
    """The scheme of a URL in lower case: "https", "data", "simplecache::s3"."""
    found = URL.match(path)
    return found[0].lower().removesuffix("//").removesuffix(":") if found else ""


def is_chained(path: str) -> bool:
    """Whether fsspec would take `path` for a chain of URLs."""
    return "::" in path and is_url(path) and not is_web(path)


class Origin(NamedTuple):
    """The server that a URL names."""

    scheme: str
    host: str
    port: int | None


def origin(url: str) -> Origin:
    """Scheme, host and port of a URL. Raises ValueError if it has no valid host or port."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if not host or re.search(r"[\s\\]", parts.netloc):
        raise ValueError("no host")
    return Origin(scheme, host, parts.port or PORTS.get(scheme))


def is_valid_url(url: str) -> bool:
    """Whether a URL has a host, and no control characters, which other parsers might drop."""
    try:
        return bool(origin(url)) and not CONTROL.search(url)
    except ValueError:
        return False
