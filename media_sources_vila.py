"""Whatever a picture or a video comes from -> its bytes or its file, through the gate of the media policy.

- A name is resolved once; all addresses it stands for must be public, and exactly those are connected to.
- Redirects are followed by hand, every one through the same gate; no cookies, user names or passwords are sent.
- The time limit holds for the whole download: a watcher cuts the connection, however slowly a server drips.
"""

import base64
import binascii
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from huggingface_hub.utils import httpx

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
MAX_PATH_LENGTH = 4096
MAX_SHOWN_LENGTH = 200


class Source(NamedTuple):
    """The bytes of a medium, or the path of its file, and what errors call it."""

    content: bytes | str
    name: str


def open_source(source: str | bytes | os.PathLike, kind: str, policy: Any) -> Source:
    """Gets a medium from an http(s) URL, a path, a data URI, the bytes of a file or, of a picture, base64.

    Args:
        kind: `"image"` or `"video"`.
        policy: the `MediaPolicy` that says what may be read.

    Raises:
        ValueError: if the source is none of these, is refused by the policy or cannot be read.
    """
    if isinstance(source, bytes):
        policy.check_bytes(len(source), "the given byte string")
        return Source(source, "the given byte string" if kind == "image" else "the given video")
    text = os.fsdecode(source)
    if text[:8].lower().startswith(("http://", "https://")):
        return Source(fetch_url(text, policy), "the given URL" if kind == "image" else "the given video")
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.startswith(f"data:{kind}/") or not header.endswith(";base64"):
            raise ValueError(f"a data URI must be of the form data:{kind}/<type>;base64,<data>")
        name = "the given data URI"
        return Source(decode_base64(payload, name, policy), name if kind == "image" else "the given video")
    # only what has the suffix of a file name is shown: the rest may be somebody's data
    is_name = isinstance(source, os.PathLike) or (len(text) <= MAX_SHOWN_LENGTH and bool(os.path.splitext(text)[1]))
    noun = "file" if kind == "image" else "video file"
    # base64 may look like a path: outside of the root it is taken for base64 without a look at the disk
    if is_name or kind == "video" or (len(text) < MAX_PATH_LENGTH and policy.may_read(text)):
        if len(text) < MAX_PATH_LENGTH and (file := policy.readable_file(text)):
            return Source(file, f"the {noun.split()[0]} {os.path.basename(text)!r}")
        if is_name or kind == "video":
            shown = f": {text[:MAX_SHOWN_LENGTH]!r}" if is_name else ""
            raise ValueError(f"not an http(s) URL or an existing {noun}{shown}")
    try:
        return Source(decode_base64(text, "the given base64 string", policy), "the given base64 string")
    except binascii.Error as error:
        files = "an existing file, " if policy.paths else ""
        raise ValueError(f"not an http(s) URL, {files}a data URI or a base64 string") from error


def read_bytes(source: Source, policy: Any) -> bytes:
    """The content of a source.

    Raises:
        ValueError: if its file cannot be read or is too large.
    """
    if isinstance(source.content, bytes):
        return source.content
    try:
        with open(source.content, "rb") as file:
            data = file.read(policy.max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{source.name} cannot be read") from error
    policy.check_bytes(len(data), source.name)
    return data


def decode_base64(text: str, name: str, policy: Any) -> bytes:
    """Raises `binascii.Error`, a `ValueError`, if the text is no base64."""
    compact = "".join(text.split())
    policy.check_bytes(len(compact) // 4 * 3 - 2, name)
    try:
        return base64.b64decode(compact, validate=True)
    except ValueError as error:
        raise binascii.Error(f"{name} is not valid base64") from error


def fetch_url(url: str, policy: Any) -> bytes:
    """What an http(s) URL answers.

    Raises:
        ValueError: if the policy refuses it, it cannot be reached, or it answers with an error or too much.
    """
    if not policy.urls:
        raise ValueError("URLs are not fetched here: the media policy has urls=False")
    answer: futures.Future[bytes] = futures.Future()
    download = Download(policy)

    def work() -> None:
        try:
            answer.set_result(download.follow(url))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(policy.timeout)
    except futures.TimeoutError:
        raise policy.exceeded("fetching the given URL takes more seconds", "timeout") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise ValueError(f"the given URL could not be fetched ({type(error).__name__})") from error
    finally:
        download.cancel()


class Download:
    """One URL and what it redirects to; may be cancelled from another thread."""

    def __init__(self, policy: Any):
        self.policy = policy
        self.sockets: list[socket.socket] = []
        self.is_cancelled = False

    def follow(self, url: str) -> bytes:
        target = httpx.URL(url)
        for _ in range(self.policy.max_redirects + 1):
            check_url(target)
            with self._get(target) as response:
                if not response.has_redirect_location:
                    return self._read(response)
                target = target.join(response.headers["location"])
        hops = self.policy.max_redirects + 1
        raise self.policy.exceeded(f"the given URL redirects {hops} times or more", "max_redirects")

    def cancel(self) -> None:
        self.is_cancelled = True
        for connection in self.sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _get(self, url: Any) -> Iterator[Any]:
        is_free = self.policy.private_addresses
        targets = [url] if is_free else [url.copy_with(host=address) for address in public_addresses(url)]
        headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"}
        extensions = {"trace": self._watch, "sni_hostname": url.raw_host.decode("ascii").rstrip(".")}
        with httpx.Client(trust_env=is_free, timeout=self.policy.timeout) as client:
            for number, target in enumerate(targets, start=1):
                request = client.build_request("GET", target, headers=headers, extensions=extensions)
                try:
                    response = client.send(request, stream=True)
                    break
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    if number == len(targets):
                        raise
            try:
                yield response
            finally:
                response.close()

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self.sockets.append(info["return_value"].get_extra_info("socket"))
        if self.is_cancelled:
            raise httpx.ReadTimeout("cancelled")

    def _read(self, response: Any) -> bytes:
        if not response.is_success:
            raise ValueError(f"the given URL could not be fetched (status {response.status_code})")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the given URL answers with compressed data, which was not asked for")
        length = response.headers.get("content-length", "")
        self.policy.check_bytes(int(length) if length.isdecimal() and len(length) < 20 else 0, "the given URL")
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            self.policy.check_bytes(len(data), "the given URL")
        return bytes(data)


def check_url(url: Any) -> None:
    if url.scheme not in ("http", "https"):
        raise ValueError("only http and https URLs are fetched, and redirects to such")
    if url.userinfo:
        raise ValueError("a URL must not hold a user name or a password")
    if not url.host:
        raise ValueError("the given URL names no host")


def public_addresses(url: Any) -> list[str]:
    """The addresses that a URL's host stands for.

    Raises:
        ValueError: if any of them is not public.
    """
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    found = socket.getaddrinfo(url.raw_host.decode("ascii"), port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError(
            "the given URL leads to a private, loopback or otherwise reserved address: allow it with "
            "media_policy={'private_addresses': True}"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an address, and the IPv4 address inside an IPv6 one, is global unicast."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a zone makes it link-local
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip.teredo or ip not in GLOBAL_UNICAST or (ip.sixtofour and not is_public(str(ip.sixtofour))):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_private)
