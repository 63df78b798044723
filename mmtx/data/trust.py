"""What rows may name. Whoever wrote a manifest or a data set is not the one who reads it.

| rows of | may name |
| --- | --- |
| a local manifest or data set | any local path, and URLs of the schemes below, but no link-local address (cloud metadata) |
| a manifest or data set at a URL | what lies below its own folder, and https at public addresses |
| either, by the user's word (`trusted`) | local paths, and URLs of the schemes below at any address |

Chained and formatting URLs (`simplecache::`, `reference://`, ...) run code of fsspec over a stranger's text: only the user
himself may write them, in a config or on the command line. Redirects lead nowhere else.
"""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

SCHEMES = ("https", "http", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
OPTION = " (`trusted: true` or --trusted allows it)"
# Two letters at least: "C://data" is a path of Windows.
URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # some of these are left out where a URL is read
PORTS = {"http": 80, "https": 443}
METADATA = {ipaddress.ip_address(address) for address in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200")}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
DECODINGS = 8  # of percent signs within percent signs


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
    """Whether fsspec would take `path` for several URLs in a row."""
    return "::" in path and is_url(path) and not is_web(path)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, whatever it is wrapped in."""
    found = _unwrapped(address)
    return found.is_global and not found.is_multicast and found not in METADATA


def is_link_local(address: str) -> bool:
    """Whether an IP address is one where clouds tell a machine its secrets, or where no router leads."""
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
    """The IP address that a host is written as, in any spelling (decimal, octal, hexadecimal, short); None for a name."""
    try:
        return str(ipaddress.ip_address(host.strip("[]").split("%")[0]))
    except ValueError:
        try:
            return socket.inet_ntoa(socket.inet_aton(host.rstrip(".")))
        except (OSError, UnicodeEncodeError):
            return None


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL. Raises ValueError where there is none."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if not host or re.search(r"[\s\\]", parts.netloc):
        raise ValueError("no host")
    return scheme, host, parts.port or PORTS.get(scheme)


def is_below(url: str, folder: str) -> bool:
    """Whether `url` lies in a folder, which is a URL: same scheme, host and port, and no way up."""
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
    """A path without percent encoding, however often it was encoded."""
    for _ in range(DECODINGS):
        path, before = unquote(path), path
        if path == before:
            return path
    return ".."  # nobody does that in good faith


@dataclass(frozen=True)
class Base:
    """Where rows come from: the folder that their relative names begin at, and what else they may reach."""

    folder: str = ""        # a path or a URL
    private: bool = False   # a URL that answered from a private address, which is then the user's own choice
    trusted: bool = False   # the user's word for it
    caches: tuple[str, ...] = ()  # local folders where a library keeps the files of a remote data set
    plain: bool = False     # public http will do as well as https
    option: str = OPTION    # how a refusal says what allows more

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
        """Why rows may not name `path`, as `join` gives it; None if they may.

        What a host's name stands for is judged later, by `address_refusal`.
        """
        if not is_url(path):
            return None if not self.remote or self.trusted or self._is_cached(path) else (
                f"found a local path in a source at a URL, expected one below its own address or https{self.option}")
        scheme = scheme_of(path)
        if scheme == "data":
            return None
        if scheme in PORTS and not is_whole(path):
            return "not a whole URL"
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
    """What a redirect may lead to, when `asked` was asked for and answered from a private address or not.

    Rows of a URL stay within what they may name; everything else stays on the server, or goes to the public internet.
    """
    if base is not None and (base.trusted or base.remote):
        return base if base.remote else replace(base, folder=asked)
    scheme, host, port = origin(asked)
    host = f"[{host}]" if ":" in host else host
    return Base(f"{scheme}://{host}:{port}", private, plain=scheme == "http", option="" if base is None else OPTION)


def _unversioned(url: str) -> str:
    """A URL of the Hugging Face hub without the version of its data set; any other as it is."""
    return re.sub("@[^/]*", "", url, count=1) if scheme_of(url) == "hf" else url


def is_whole(url: str) -> bool:
    """Whether a URL names a host, and has nothing in it that another reader would leave out."""
    try:
        return bool(origin(url)) and not CONTROL.search(url)
    except ValueError:
        return False


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or os.path.isabs(name)
