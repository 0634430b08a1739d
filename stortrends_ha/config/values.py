"""How the text of one value becomes a value: names, numbers, sizes, durations, addresses, paths.

Invariants: a parser takes the text as written and returns a value or raises `ValueError`; it is strict, so
that one text has one meaning (no octal numbers, no ``1G``, no NaN). Its `expected` completes the sentence
"found 'x', expected ...".
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stortrends_ha.config.model import Address, is_wildcard

NAME_FORM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
LABEL_FORM = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
ADDRESS_FORM = re.compile(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^\[\]:]+)):(?P<port>[0-9]+)")
IPV6_FORM = re.compile(r"[0-9A-Za-z:.]+(%[0-9A-Za-z._-]+)?")  # with the zone that a link-local address needs
WHOLE_FORM = re.compile(r"0|[1-9][0-9]{0,18}")
DECIMAL_FORM = re.compile(r"(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?")
SIZE_FORM = re.compile(r"(?P<count>0|[1-9][0-9]{0,18})(?P<unit>KiB|MiB|GiB|TiB)?")
OTHER_TYPE_FORM = re.compile(r"[+-]?[0-9.]+|true|false|yes|no|on|off", re.IGNORECASE)
URL_FORM = re.compile(r"(?P<scheme>https?)://(?P<address>[^/]+)/?")
AGENT_FORM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
OPTION_FORM = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
UNIT_BYTES = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FILE_OFFSET_MAX = 2**63 - 1  # Linux's loff_t
HOST_NAME_CHARACTERS_MAX = 253  # RFC 1035
NBD_STRING_BYTES_MAX = 4096  # the NBD protocol document, "Values", strings
INTERFACE_CHARACTERS_MAX = 15  # Linux's IFNAMSIZ without the closing NUL
PATH_BYTES_MAX = 4095  # Linux's PATH_MAX without the closing NUL


@dataclass(frozen=True, slots=True)
class Value:
    """A kind of single value."""

    parse: Callable[[str], object]
    expected: str


def _match(form: re.Pattern[str], text: str) -> re.Match[str]:
    found = form.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return found


def _demand(condition: bool) -> None:
    if not condition:
        raise ValueError


def parse_name(text: str) -> str:
    """A name of a cluster, node, group or volume; fit for URIs, file names and command lines."""
    return _match(NAME_FORM, text).group()


def parse_boolean(text: str) -> bool:
    """True or false, in YAML's own spelling."""
    _demand(text.lower() in ("true", "false"))
    return text.lower() == "true"


def parse_size(text: str) -> int:
    """Bytes, from a number with or without a binary unit."""
    found = _match(SIZE_FORM, text)
    return int(found["count"]) * UNIT_BYTES[found["unit"] or ""]


def parse_port(text: str) -> int:
    """A TCP port that others can be told of, so not 0."""
    port = int(_match(WHOLE_FORM, text).group())
    _demand(1 <= port <= 65535)
    return port


def parse_host(text: str) -> str:
    """An IP address or a host name. What looks like a number but is no IP address is neither."""
    if ":" in text:
        return parse_ipv6(text)
    labels = text.split(".")
    if labels[-1].isdecimal():
        ipaddress.IPv4Address(text)
    _demand(len(text) <= HOST_NAME_CHARACTERS_MAX)
    for label in labels:
        _match(LABEL_FORM, label)
    return text


def parse_ipv6(text: str) -> str:
    """An IPv6 address, without brackets."""
    ipaddress.IPv6Address(_match(IPV6_FORM, text).group())
    return text


def parse_node_address(text: str) -> str:
    """A host that the peer can reach: not the wildcard."""
    _demand(not is_wildcard(parse_host(text)))
    return text


def parse_address(text: str) -> Address:
    """Host and port; an IPv6 address stands in brackets."""
    found = _match(ADDRESS_FORM, text)
    host = parse_ipv6(found["ipv6"]) if found["ipv6"] else parse_host(found["host"])
    return Address(host, parse_port(found["port"]))


def parse_path(text: str) -> Path:
    """A path. A bare number or boolean is far more likely a mistake than a file's name."""
    _demand(text.isprintable() and not OTHER_TYPE_FORM.fullmatch(text))
    _demand(0 < len(text.encode()) <= PATH_BYTES_MAX)
    return Path(text)


def parse_description(text: str) -> str:
    """Text for people, shown by NBD clients."""
    _demand(text.isprintable() and len(text.encode()) <= NBD_STRING_BYTES_MAX)
    return text


def parse_peer_address(text: str) -> Address:
    """Host and port that another machine can reach: not the wildcard."""
    address = parse_address(text)
    _demand(not is_wildcard(address.host))
    return address


def parse_url(text: str) -> str:
    """Where etcd serves its clients: scheme, host and port, in one spelling."""
    found = _match(URL_FORM, text)
    return f"{found['scheme']}://{parse_peer_address(found['address'])}"


def parse_interface_address(text: str) -> str:
    """An address with its prefix length, as `ip address add` takes it: one that a machine can have."""
    host, slash, prefix = text.partition("/")
    _demand(slash == "/" and "%" not in host and WHOLE_FORM.fullmatch(prefix) is not None)
    interface = ipaddress.ip_interface(text)
    network = interface.network
    _demand(not interface.is_unspecified and not interface.is_multicast)
    if network.version == 4 and network.prefixlen < 31:  # RFC 3021: a network of two has no addresses of its own
        _demand(interface.ip not in (network.network_address, network.broadcast_address))
    return str(interface)


def parse_interface(text: str) -> str:
    """The name of a network interface, by the kernel's rules (dev_valid_name)."""
    _demand(0 < len(text) <= INTERFACE_CHARACTERS_MAX and text.isascii() and text.isprintable())
    _demand(text not in (".", "..") and not set(text) & set("/: "))
    return text


def parse_agent(text: str) -> str:
    """A fence agent: a program of the system's search path, or an absolute path."""
    if not text.startswith("/"):
        return _match(AGENT_FORM, text).group()
    return str(parse_path(text))


def parse_option_name(text: str) -> str:
    """The name of a fence agent's option, which is one word before the first '='."""
    return _match(OPTION_FORM, text).group()


def one_of(*words: str) -> Value:
    """One of some words."""

    def parse(text: str) -> str:
        _demand(text in words)
        return text

    return Value(parse, f"{', '.join(words[:-1])} or {words[-1]}")


def whole_number(low: int, high: int) -> Value:
    """A count between two bounds."""

    def parse(text: str) -> int:
        number = int(_match(WHOLE_FORM, text).group())
        _demand(low <= number <= high)
        return number

    return Value(parse, f"a whole number from {low} to {high}")


def seconds(low: float, high: float) -> Value:
    """A duration between two bounds."""
    return _decimal("seconds", low, high)


def factor(low: float, high: float) -> Value:
    """A ratio between two bounds."""
    return _decimal("a number", low, high)


def _decimal(what: str, low: float, high: float) -> Value:
    def parse(text: str) -> float:
        number = float(_match(DECIMAL_FORM, text).group())
        _demand(low <= number <= high)
        return number

    return Value(parse, f"{what} from {low:g} to {high:g}")


def size(low: str, high: str, *, power_of_two: bool = False) -> Value:
    """A size between two bounds."""

    def parse(text: str) -> int:
        size_bytes = parse_size(text)
        _demand(parse_size(low) <= size_bytes <= parse_size(high))
        _demand(not power_of_two or size_bytes & (size_bytes - 1) == 0)
        return size_bytes

    return Value(parse, f"a {'power of two' if power_of_two else 'size'} from {low} to {high}")


def parse_volume_size(text: str) -> int:
    """The size of a disk: not empty, and every byte within reach of a file offset."""
    size_bytes = parse_size(text)
    _demand(0 < size_bytes <= FILE_OFFSET_MAX)
    return size_bytes


NAME = Value(parse_name, "a name of 1 to 64 letters, digits, '.', '_' or '-', not beginning with '.' or '-'")
BOOLEAN = Value(parse_boolean, "true or false")
VOLUME_SIZE = Value(parse_volume_size, "a size such as 1GiB")
PORT = Value(parse_port, "a port from 1 to 65535")
NODE_ADDRESS = Value(parse_node_address, "an IP address or host name that the other node can reach")
ADDRESS = Value(parse_address, 'an address and port such as 127.0.0.1:10809 or "[::1]:10809"')
PEER_ADDRESS = Value(parse_peer_address, 'an address and port such as 192.0.2.11:7800 or "[2001:db8::1]:7800"')
URL = Value(parse_url, "a URL such as http://192.0.2.31:2379")
INTERFACE_ADDRESS = Value(parse_interface_address, "an address with its prefix length such as 192.0.2.21/24")
INTERFACE = Value(parse_interface, "the name of a network interface such as eth1")
AGENT = Value(parse_agent, "the name of a fence agent such as fence_ipmilan, or an absolute path")
OPTION_NAME = Value(parse_option_name, "a name of letters, digits, '_' or '-'")
PATH = Value(parse_path, "a path")
TEXT = Value(parse_description, f"one line of printable text of at most {NBD_STRING_BYTES_MAX} bytes")
DESCRIPTION = Value(parse_description, f"one line of printable text of at most {NBD_STRING_BYTES_MAX} bytes")
