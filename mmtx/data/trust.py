"""Which files and URLs rows may name: the author of a manifest or data set is not the user who reads it.

| rows of | may name |
| --- | --- |
| a local manifest or data set | any local path, and URLs of the schemes below, but no link-local address (cloud metadata) |
| a manifest or data set at a URL | what lies below its own folder, and https at public addresses |
| either, if the user says `trusted` | local paths, and URLs of the schemes below at any address |

Chained and formatting URLs (`simplecache::`, `reference://`, ...) make fsspec run code on a stranger's text: only the user may
write them, in a config or on the command line. The same rules hold for redirects.
"""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

SCHEMES = ("https", "http", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
OPTION = " (`trusted: true` or --trusted allows it)"
# At least two letters: "C://data" is a Windows path.
URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # URL parsers drop some of these
PORTS = {"http": 80, "https": 443}
METADATA = {ipaddress.ip_address(address) for address in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200")}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
DECODINGS = 8  # most levels of nested percent-encoding


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


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also if embedded in an IPv6 address."""
    found = _unwrapped(address)
    return found.is_global and not found.is_multicast and found not in METADATA


def is_link_local(address: str) -> bool:
    """Whether an IP address is link-local, or that of a cloud's metadata service, which gives out secrets."""
    found = _unwrapped(address)
    return found.is_link_local or found in METADATA


def _unwrapped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(address.split("%")[0])
    if found.version == 6:
        embedded = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if not embedded and found in NAT64 or not embedded and int(found) >> 32 == 0 and int(found) > 1:  # ::a.b.c.d
            embedded = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = embedded or found
    return found


def literal(host: str) -> str | None:
    """The IP address of a host written as one, in any notation (decimal, octal, hexadecimal, short); None for a name."""
    try:
        return str(ipaddress.ip_address(host.strip("[]").split("%")[0]))
    except ValueError:
        try:
            return socket.inet_ntoa(socket.inet_aton(host.rstrip(".")))
        except (OSError, UnicodeEncodeError):
            return None


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL. Raises ValueError if it has no valid host or port."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if not host or re.search(r"[\s\\]", parts.netloc):
        raise ValueError("no host")
    return scheme, host, parts.port or PORTS.get(scheme)


def is_below(url: str, folder: str) -> bool:
    """Whether `url` lies in `folder`, also a URL: same scheme, host and port, and no ".." in the path."""
    folder = folder.rstrip("/") + "/"
    if CONTROL.search(url):
        return False
    if url.startswith(folder):
        rest = url.removeprefix(folder)
        rest = _decoded(re.split("[?#]", rest)[0] if is_web(url) else rest)
    else:
        try:
            if origin(url) != origin(folder):
                return False
            path, top = _decoded(urlsplit(url).path), _decoded(urlsplit(folder).path)
        except ValueError:
            return False
        if not path.startswith(top):
            return False
        rest = path.removeprefix(top)
    # "..;x" is ".." to some servers, and a backslash a slash.
    return not any(name.split(";")[0].strip() == ".." for name in re.split(r"[/\\]", rest))


def _decoded(path: str) -> str:
    """A path with all levels of percent-encoding removed."""
    for _ in range(DECODINGS):
        path, before = unquote(path), path
        if path == before:
            return path
    return ".."  # so many levels are not in good faith


@dataclass(frozen=True)
class Base:
    """The origin of rows: the folder that their names are relative to, and what else they may reach."""

    folder: str = ""        # a path or a URL
    private: bool = False   # the URL was served from a private address, which is then the user's own choice
    trusted: bool = False   # the user trusts it
    caches: tuple[str, ...] = ()  # local folders where a library keeps the files of a remote data set
    plain: bool = False     # public http is allowed as well as https
    option: str = OPTION    # the hint in a refusal to the option that would allow it

    def join(self, name: str) -> str:
        """The path or URL that a row means by `name`."""
        if is_url(name):
            return name
        if self.remote and not _is_absolute(name):
            return f"{self.folder.rstrip('/')}/{name}"
        return os.path.join(self.folder, name)

    @property
    def remote(self) -> bool:
        return is_url(self.folder)

    def refusal(self, path: str) -> str | None:
        """Why rows may not name `path`, as `join` returns it; None if they may.

        The addresses of a host name are checked later, by `address_refusal`.
        """
        if not is_url(path):
            return None if not self.remote or self.trusted or self._is_cached(path) else (
                f"found a local path in a source at a URL, expected one below its own address or https{self.option}")
        scheme = scheme_of(path)
        if scheme == "data":
            return None
        if scheme in PORTS and not is_valid_url(path):
            return "not a valid URL"
        one = scheme in PORTS or "::" not in path.removeprefix(self.folder)
        if self.remote and one and is_below(_unversioned(path), self.folder):
            return self._literal_refusal(path)
        if is_chained(path) or scheme not in SCHEMES:
            return f"found the scheme {scheme[:40]!r}, expected {', '.join(SCHEMES[:4])}, az, hf or data"
        if self.remote and not self.trusted and scheme != "https" and not (self.plain and scheme == "http"):
            return f"found another address than its source's, expected one below that or https{self.option}"
        return self._literal_refusal(path)

    def _literal_refusal(self, path: str) -> str | None:
        if scheme_of(path) not in PORTS:
            return None
        address = literal(origin(path)[1])
        return address and self.address_refusal(path, address)

    def address_refusal(self, url: str, address: str) -> str | None:
        """Why a connection to an IP address may not be made for `url`; None if it may."""
        if self.trusted or is_public(address):
            return None
        if not self.remote:
            return f"found a link-local address{self.option}" if is_link_local(address) else None
        if self.private and is_below(url, self.folder):
            return None
        return f"found a private address, expected a public one{self.option}"

    def _is_cached(self, path: str) -> bool:
        path = os.path.realpath(path)
        return any(os.path.commonpath([path, os.path.realpath(cache)]) == os.path.realpath(cache) for cache in self.caches)


def after_redirect(base: Base | None, asked: str, private: bool) -> Base:
    """What a redirect of a request for `asked` may lead to; `private` if it was answered from a private address.

    Rows of a source at a URL stay within what they may name; all else stays on the server, or goes to the public internet.
    """
    if base is not None and (base.trusted or base.remote):
        return base if base.remote else replace(base, folder=asked)
    scheme, host, port = origin(asked)
    host = f"[{host}]" if ":" in host else host
    return Base(f"{scheme}://{host}:{port}", private, plain=scheme == "http", option="" if base is None else OPTION)


def _unversioned(url: str) -> str:
    """A URL of the Hugging Face hub without the version of its data set; any other unchanged."""
    return re.sub("@[^/]*", "", url, count=1) if scheme_of(url) == "hf" else url


def is_valid_url(url: str) -> bool:
    """Whether a URL has a host, and no control characters, which other parsers might drop."""
    try:
        return bool(origin(url)) and not CONTROL.search(url)
    except ValueError:
        return False


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or os.path.isabs(name)
