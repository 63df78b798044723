"""What rows may name: a table of addresses, and the ways that strangers write them."""

import pytest

from mmtx.data.ip_addresses import is_link_local, is_public, literal
from mmtx.data.trust import Base, after_redirect, is_below
from mmtx.data.urls import is_url

FOLDER = "https://data.example/set/v1"
STRANGER = Base(FOLDER)
LOCAL = Base("/home/me/data")
OWN = Base("http://127.0.0.1:8000/set", private=True)
TRUSTED = Base(FOLDER, trusted=True)
METADATA = "169.254.169.254"


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.9.10", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::1",
])
def test_addresses_that_are_not_public(address):
    assert not is_public(address)
    assert STRANGER.address_refusal(f"{FOLDER}/a.png", address)
    assert not TRUSTED.address_refusal(f"{FOLDER}/a.png", address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "::ffff:1.1.1.1",
                                     "64:ff9b::101:101", "2002:101:101::1"])
def test_addresses_that_are_public(address):
    assert is_public(address) and not STRANGER.address_refusal("https://cdn.example/a.png", address)


@pytest.mark.parametrize(("host", "address"), [
    ("127.0.0.1", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0x7f000001", "127.0.0.1"), ("0177.0.0.1", "127.0.0.1"),
    ("0x7f.1", "127.0.0.1"), ("127.1", "127.0.0.1"), ("127.0.0.1.", "127.0.0.1"), ("0", "0.0.0.0"), ("[::1]", "::1"), ("::1", "::1"),
    ("2852039166", METADATA), ("0xa9.254.0xa9fe", METADATA), ("localhost", None), ("data.example", None), ("a.1", None), ("①.1", None),
])
def test_every_spelling_of_an_address(host, address):
    assert literal(host) == address


@pytest.mark.parametrize("name", [
    "a.png", "sub/a.png", "a b.png", "ü.png", "a..b.png", ".../a.png", "a.png?size=1", "https://cdn.example/a.png",
    "HTTPS://CDN.example/a.png", "https://data.example/set/v1/a.png", "https://data.example:443/set/v1/a.png",
    "https://me:pw@data.example/other/a.png", "https://1.1.1.1/a.png", "data:image/png;base64,AAAA", "DATA:,x", "x::y.png",
])
def test_what_a_stranger_may_name(name):
    assert STRANGER.refusal(STRANGER.join(name)) is None


@pytest.mark.parametrize("name", [
    # Local files.
    "/etc/passwd", "//etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd",
    "local:///etc/passwd",
    ".\t./a.png",
    # Other schemes, chained and formatting ones, in any case.
    "reference://k::http://h/refs.json", "REFERENCE://k::http://h/r.json", "simplecache::https://cdn.example/a.png", "ftp://h/a.png",
    "filecache::https://cdn.example/a.png", "blockcache::s3://b/a.png", "zip://a::https://cdn.example/a.zip", "tar://a::https://h/a.tar",
    "memory://a.png", "github://o:r@/a.png", "ssh://h/a.png", "sftp://h/a.png", "dir::file:///etc", "s3://bucket/a.png", "gs://b/a.png",
    "hf://datasets/o/n/a.png", "s3://bucket/x::github", "smb://h/a", "jar://x", "git://x", "webhdfs://h/a", "cached::https://h/a",
    # Addresses.
    "http://cdn.example/a.png", "http://data.example/set/v1/a.png", "https://127.0.0.1/a.png", "https://2130706433/a.png",
    "https://0x7f.1/a.png", "https://0177.0.0.1/a.png", "https://[::1]/a.png", "https://[::ffff:127.0.0.1]/a.png",
    "https://169.254.169.254/latest/meta-data", "https://user@127.0.0.1/a.png", "https://data.example@127.0.0.1/a.png",
    "https://127.0.0.1\\@data.example/set/v1/a.png", "https://10.0.0.1:443/a.png", "https:///a.png", "https://h:port/a.png",
    "https://[::1/a.png", "https://ho st/a.png", "https://cdn.example/a\n.png",
])
def test_what_a_stranger_may_not_name(name):
    assert STRANGER.refusal(STRANGER.join(name))


@pytest.mark.parametrize("name", [
    "../a.png", "sub/../../a.png", "%2e%2e/a.png", "%252e%252e/a.png", "..%2fa.png", "..\\a.png", "..;/a.png", "..;x=1/a.png",
    "x%3f/../../a.png", "x%23/../../a.png", "sub/..", ".\t./a.png", "%" + "25" * 20 + "2e./a.png",
])
def test_ways_up_are_not_below(name):
    for base in (OWN, Base("http://data.example/set")):
        assert base.refusal(base.join(name)) and not is_below(base.join(name), base.folder)
    # At a public address it is what any other https address is.
    assert "\t" in name or STRANGER.refusal(STRANGER.join(name)) is None


@pytest.mark.parametrize("name", [
    "https://data.example/set/v1/../x.png", "https://data.example/set/v1/%2e%2e/x.png", "https://data.example/set/v12/x.png",
    "https://data.example:444/set/v1/x.png", "http://data.example/set/v1/x.png", "https://data.example.evil/set/v1/x.png",
    "https://data.example%2eevil/set/v1/x.png", "https://data.example/set/V1/x.png",
])
def test_what_only_looks_as_if_it_lay_below(name):
    assert not is_below(name, FOLDER)


def test_what_lies_below():
    for name in ("https://DATA.example/set/v1/x.png", "https://me@data.example./set/v1/x.png", "https://data.example:443/set/v1/x",
                 "https://data.example/set/%76%31/x.png"):
        assert is_below(name, FOLDER)
    assert is_below("s3://b/set/x.png", "s3://b/set") and not is_below("s3://b/set/../x.png", "s3://b/set")
    assert not is_below("s3://c/set/x.png", "s3://b/set")


@pytest.mark.parametrize(("name", "refused"), [
    ("a.png", None), ("../a.png", None), ("/etc/passwd", None), ("https://cdn.example/a.png", None), ("http://10.0.0.1/a.png", None),
    ("http://127.0.0.1:9000/a.png", None), ("s3://bucket/a.png", None), ("gs://b/a.png", None), ("az://c/a.png", None),
    ("abfs://c/a.png", None), ("hf://datasets/o/n/a.png", None), ("data:,x", None), ("C://a.png", None), ("simplecache::/etc", None),
    ("http://169.254.169.254/latest", "link-local"), ("http://0xa9fea9fe/", "link-local"), ("http://[fd00:ec2::254]/", "link-local"),
    ("reference://k::http://h/r.json", "scheme 'reference'"), ("Reference://k::http://h/r.json", "scheme 'reference'"),
    ("simplecache::s3://b/a.png", "scheme 'simplecache::s3'"), ("s3://b/a::reference://k", "scheme"), ("file:///etc/passwd", "scheme"),
    ("memory://a", "scheme"), ("github://o:r@/a", "scheme"), ("zip://a::s3://b/a.zip", "scheme"),
])
def test_rows_of_a_local_manifest(name, refused):
    refusal = LOCAL.refusal(LOCAL.join(name))
    assert refusal is None if refused is None else refused in refusal


def test_a_local_manifest_finds_its_files():
    assert LOCAL.join("a.png") == "/home/me/data/a.png" and LOCAL.join("/a.png") == "/a.png"
    assert Base("").join("a.png") == "a.png" and STRANGER.join("a.png") == f"{FOLDER}/a.png"
    assert is_link_local(METADATA) and not is_link_local("10.0.0.1")


def test_the_user_may_trust_a_source():
    for name in ("/etc/passwd", "http://10.0.0.1/a.png", "https://127.0.0.1/a", "s3://b/a", "http://169.254.169.254/"):
        assert STRANGER.refusal(STRANGER.join(name)).endswith("(`trusted: true` or --trusted allows it)")
        assert TRUSTED.refusal(TRUSTED.join(name)) is None
    # Schemes that run code are another thing than addresses.
    for name in ("reference://k::http://h/r.json", "simplecache::https://h/a", "file:///etc/passwd"):
        assert "scheme" in TRUSTED.refusal(TRUSTED.join(name)) and "--trusted" not in TRUSTED.refusal(name)


def test_a_private_address_of_the_user_is_fine_for_what_lies_below_it():
    assert OWN.refusal(OWN.join("a.png")) is None
    assert OWN.address_refusal("http://127.0.0.1:8000/set/a.png", "127.0.0.1") is None
    for other in ("http://127.0.0.1:8000/a.png", "http://127.0.0.1:8001/set/a.png", "http://127.0.0.2:8000/set/a.png",
                  "https://127.0.0.1:8000/set/a.png", "../a.png"):
        assert OWN.refusal(OWN.join(other))
    # The name of a public source that comes to mean a private address.
    assert STRANGER.address_refusal(f"{FOLDER}/a.png", "127.0.0.1")
    assert Base(FOLDER, private=True).address_refusal(f"{FOLDER}/a.png", "127.0.0.1") is None


def test_rows_below_a_source_of_any_scheme_of_the_user():
    for folder in ("s3://b/set", "memory://set", "simplecache::https://data.example/set", "hf://datasets/o/n"):
        base = Base(folder)
        assert base.refusal(base.join("sub/a.png")) is None
        for name in ("../a.png", "x::reference://k", "x::github", "/etc/passwd", "s3://other/a.png"):
            assert base.refusal(base.join(name)), (folder, name)
    hub = Base("hf://datasets/o/n")
    assert hub.refusal("hf://datasets/o/n@abc/a.png") is None and hub.refusal("hf://datasets/o/m@abc/a.png")


def test_local_files_that_a_library_keeps(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "out").symlink_to("/etc")
    base = Base("hf://datasets/o/n", caches=(str(tmp_path / "cache"),))
    assert base.refusal(str(tmp_path / "cache" / "a.png")) is None
    for path in (tmp_path / "b.png", tmp_path / "cache2" / "a.png", tmp_path / "cache" / ".." / "b.png", tmp_path / "cache/out/passwd"):
        assert base.refusal(str(path))


@pytest.mark.parametrize(("base", "asked", "private", "target", "fine"), [
    (None, "https://a.example/x", False, "https://a.example/y", True),
    (None, "https://a.example/x", False, "https://b.example/y", True),
    (None, "https://a.example/x", False, "http://b.example/y", False),
    (None, "http://a.example/x", False, "http://b.example/y", True),
    (None, "https://a.example/x", False, "https://127.0.0.1/y", False),
    (None, "http://127.0.0.1:8/x", True, "http://127.0.0.1:8/y", True),
    (None, "http://127.0.0.1:8/x", True, "http://127.0.0.1:9/y", False),
    (None, "http://10.0.0.1/x", True, "http://169.254.169.254/y", False),
    (None, "http://[::1]:8/x", True, "http://[::1]:8/y", True),
    (LOCAL, "http://10.0.0.1/x", True, "http://10.0.0.1/y", True),
    (LOCAL, "http://10.0.0.1/x", True, "http://10.0.0.2/y", False),
    (Base("/d", trusted=True), "http://10.0.0.1/x", True, "http://10.0.0.2/y", True),
    (OWN, "http://127.0.0.1:8000/set/x", True, "http://127.0.0.1:8000/set/y", True),
    (OWN, "http://127.0.0.1:8000/set/x", True, "http://127.0.0.1:8000/y", False),
    (OWN, "http://127.0.0.1:8000/set/x", True, "https://b.example/y", True),
    (STRANGER, f"{FOLDER}/x", False, "https://10.0.0.2/y", False),
    (TRUSTED, f"{FOLDER}/x", False, "https://10.0.0.2/y", True),
])
def test_where_redirects_may_lead(base, asked, private, target, fine):
    assert (after_redirect(base, asked, private).refusal(target) is None) == fine


def test_a_name_that_changes_its_meaning_after_a_redirect():
    follow = after_redirect(None, "https://a.example/x", False)
    assert follow.address_refusal("https://a.example/y", "127.0.0.1") and not follow.address_refusal("https://a.example/y", "1.1.1.1")
    assert not after_redirect(None, "https://a.example/x", True).address_refusal("https://a.example/y", "10.0.0.1")


def test_urls_and_paths():
    for url in ("https://h/a", "HTTP://h", "s3://b", "data:,x", "DATA:,x", "simplecache::s3://b/a", "reference://k::http://h"):
        assert is_url(url)
    for path in ("a.png", "C://data/a.png", "C:\\a", "a cat: see https://h/a", " https://h/a", "a::b", "://x", "/a://b", "1a://b"):
        assert not is_url(path)
