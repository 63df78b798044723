"""Which files and URLs rows may name: the author of a manifest or data set is not the user who reads it.

| rows of | may name |
| --- | --- |
| a local manifest or data set | any local path, and URLs of the schemes below, but no link-local address (cloud metadata) |
| a manifest or data set at a URL | what lies below its own folder, and https at public addresses |
| either, if the user says `trusted` | local paths, and URLs of the schemes below at any address |

Chained and formatting URLs (`simplecache::`, `reference://`, ...) make fsspec run code on a stranger's text: only the user may
write them, in a config or on the command line. The same rules hold for redirects.
"""

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from mmtx.data.ip_addresses import is_link_local, is_public, literal
from mmtx.data.urls import CONTROL, PORTS, is_chained, is_url, is_valid_url, is_web, origin, scheme_of

SCHEMES = ("https", "http", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
OPTION = " (`trusted: true` or --trusted allows it)"
DECODINGS = 8  # most levels of nested percent-encoding


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


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or os.path.isabs(name)
