"""IP addresses: which are public, and which give out secrets."""

import ipaddress
import socket

METADATA = {ipaddress.ip_address(address) for address in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200")}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
