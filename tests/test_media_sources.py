"""Sources of media: which URLs and paths are read, whatever their notation, and never more than was allowed."""

import base64
import dataclasses
import io
import os
import socket
import threading
import time
import zlib
from pathlib import Path

import pytest
from huggingface_hub.utils import httpx
from PIL import Image
from vila import media_sources_vila
from vila.image_loading_vila import open_image
from vila.media_policy_vila import MediaPolicy
from vila.media_sources_vila import fetch_url, is_public
from vila.video_processing_vila import load_frames

RED = Image.new("RGB", (20, 10), "red")
BUFFER = io.BytesIO()
RED.save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


@pytest.fixture
def server(loopback):
    loopback.content = PNG
    return loopback


# ---- URLs: which addresses

INTERNAL = [
    "127.0.0.1",
    "localhost",
    "127.1",
    "0x7f000001",
    "2130706433",
    "017700000001",
    "0.0.0.0",
    "0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::1]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[fc00::1]",
    "[ff02::1]",
    "169.254.169.254",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "127\u30020\u30020\u30021",
    "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    "127.0.0.1.",
    "localhost.",
    "user:pass@127.0.0.1",
    "user:pass@8.8.8.8",
    "8.8.8.8@127.0.0.1",
    "8.8.8.8%2f@127.0.0.1",
    "",
]


@pytest.fixture
def no_connection(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("scheme", ["http", "https", "HTTP"])
@pytest.mark.parametrize("host", INTERNAL)
def test_internal_addresses_are_refused_in_every_notation(host, scheme, no_connection):
    for port in ("", ":80", ":8080"):
        with pytest.raises(ValueError) as caught:
            fetch_url(f"{scheme}://{host}{port}/latest/meta-data", MediaPolicy())
        message = str(caught.value)
        assert any(words in message for words in ("private", "fetched", "user name", "names no host")), message
        assert len(message) < 250 and "meta-data" not in message


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("2002:808:808::1", True),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::1", False),
        ("::ffff:10.0.0.1", False),
        ("240.0.0.1", False),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
        ("fec0::1", False),
        ("fe80::1%2", False),
    ],
)
def test_an_address_is_public_if_it_is_global_unicast(address, expected):
    assert is_public(address) == expected


def resolve_to(monkeypatch, *answers):
    """Makes names resolve to one list of addresses after the other; returns the names that were asked for."""
    names, original = [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        if host.replace(".", "").isdigit() or ":" in host:
            return original(host, port, *args, **kwargs)
        names.append(host)
        addresses = answers[min(len(names), len(answers)) - 1]
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "::1"], ["169.254.169.254"], []],
    ids=str,
)
def test_a_name_that_stands_for_any_internal_address_is_refused(addresses, monkeypatch, no_connection):
    names = resolve_to(monkeypatch, addresses)
    with pytest.raises(ValueError, match="private, loopback"):
        fetch_url("http://pictures.example/a.png", MediaPolicy())
    assert names == ["pictures.example"]


@pytest.fixture
def connections(monkeypatch, server):
    """Addresses that are connected to; all connections end at the loopback server."""
    seen, original = [], socket.create_connection

    def connect(address, *args, **kwargs):
        seen.append(address)
        return original(("127.0.0.1", server.port), *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", connect)
    return seen


def test_the_checked_address_is_the_one_connected_to(server, connections, monkeypatch):
    """A name that changes its address between check and connection gains nothing."""
    names = resolve_to(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
    assert fetch_url("http://pictures.example:8080/a.png?b", MediaPolicy()) == PNG
    assert names == ["pictures.example"] and connections == [("93.184.216.34", 8080)]
    ((path, headers),) = server.requests
    assert path == "/a.png?b" and headers["Host"] == "pictures.example:8080"


def test_a_secure_connection_names_the_host_and_not_the_address(monkeypatch):
    requests = []

    def send(client, request, **kwargs):
        requests.append(request)
        raise httpx.ConnectError("no connection here")

    monkeypatch.setattr(httpx.Client, "send", send)
    resolve_to(monkeypatch, ["93.184.216.34", "2606:4700::1111"])
    with pytest.raises(ValueError, match="could not be fetched"):
        fetch_url("https://pictures.example./a.png", MediaPolicy())
    assert [str(request.url) for request in requests] == [
        "https://93.184.216.34/a.png",
        "https://[2606:4700::1111]/a.png",
    ]
    for request in requests:
        assert request.extensions["sni_hostname"] == "pictures.example"
        assert request.headers["Host"] == "pictures.example."


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "//127.0.0.1:{port}/secret",
        "http://[::ffff:7f00:1]:{port}/secret",
        "file:///etc/passwd",
        "ftp://pictures.example/a",
        "http://user:pass@pictures.example/secret",
        "data:image/png;base64,AAAA",
    ],
)
def test_a_redirect_goes_through_the_same_gate(target, server, connections, monkeypatch):
    resolve_to(monkeypatch, ["93.184.216.34"], ["93.184.216.34"])
    original = media_sources_vila.socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kwargs: (
            [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
            if host == "localhost"
            else original(host, *args, **kwargs)
        ),
    )
    server.answers["/a"] = (302, {"Location": target.format(port=server.port)}, b"")
    with pytest.raises(ValueError):
        fetch_url("http://pictures.example/a", MediaPolicy())
    assert server.asked == ["/a"]


def test_redirects_are_followed_up_to_the_limit_and_take_no_cookies_along(server, connections, monkeypatch):
    resolve_to(monkeypatch, ["93.184.216.34"])
    for hop in range(4):
        headers = {"Location": f"{hop + 1}", "Set-Cookie": "token=1"}
        server.answers[f"/{hop}"] = (302, headers, b"")
    assert fetch_url("http://pictures.example/0", MediaPolicy(max_redirects=4)) == PNG
    assert server.asked == ["/0", "/1", "/2", "/3", "/4"]
    assert not any({"Cookie", "Authorization", "Referer"} & set(headers) for _, headers in server.requests)
    with pytest.raises(ValueError, match="max_redirects=3"):
        fetch_url("http://pictures.example/0", MediaPolicy(max_redirects=3))


def test_private_addresses_can_be_allowed(server):
    assert fetch_url(f"{server.url}/a.png", MediaPolicy(private_addresses=True)) == PNG
    with pytest.raises(ValueError, match="private_addresses"):
        fetch_url(f"{server.url}/a.png", MediaPolicy())
    assert server.asked == ["/a.png"]


@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_proxy_of_the_environment_is_used_only_where_addresses_are_not_checked(is_allowed, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(media_sources_vila, "public_addresses", lambda url: ["127.0.0.1"])
    policy = MediaPolicy(private_addresses=is_allowed)
    if is_allowed:
        assert fetch_url("http://pictures.example/a.png", policy) == PNG
        assert server.asked == ["http://pictures.example/a.png"]
    else:
        assert fetch_url(f"http://pictures.example:{server.port}/a.png", policy) == PNG
        assert server.asked == ["/a.png"]


def test_urls_can_be_turned_off(server):
    for url in (f"{server.url}/a.png", "https://pictures.example/a.png"):
        with pytest.raises(ValueError, match="URLs are not fetched here"):
            fetch_url(url, MediaPolicy(urls=False, private_addresses=True))
    assert server.asked == []


# ---- URLs: how much

OPEN = MediaPolicy(private_addresses=True, max_bytes=1000, timeout=20)


@pytest.mark.parametrize("length", [{}, {"Content-Length": "1001"}, {"Content-Length": "9" * 30}], ids=str)
def test_a_download_ends_at_the_byte_limit(length, server):
    server.answers["/a"] = (200, length, bytes(1001))
    with pytest.raises(ValueError, match=r"max_bytes=1000|could not be fetched"):
        fetch_url(f"{server.url}/a", OPEN)
    server.answers["/a"] = (200, {}, bytes(1000))
    assert fetch_url(f"{server.url}/a", OPEN) == bytes(1000)


def test_compressed_answers_are_not_unpacked(server):
    server.answers["/a"] = (200, {"Content-Encoding": "deflate"}, zlib.compress(bytes(100_000)))
    with pytest.raises(ValueError, match="compressed"):
        fetch_url(f"{server.url}/a", OPEN)
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [204, 403, 404, 500])
def test_an_error_of_the_server_is_a_value_error(status, server):
    server.answers["/a"] = (status, {}, b"SECRET")
    with pytest.raises(ValueError, match=r"could not be fetched|holds no picture") as caught:
        open_image(f"{server.url}/a", OPEN)
    assert "SECRET" not in str(caught.value) and server.url not in str(caught.value)


DRIPS = {
    "nothing": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10_000,
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"a" * 10_000,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 10_000,
}


@pytest.mark.parametrize("kind", DRIPS)
def test_the_time_limit_is_for_the_whole_download(kind):
    """A server that sends a byte now and then keeps every single read alive."""
    listener, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()
    ended = threading.Event()

    def drip():
        connection, _ = listener.accept()
        try:
            for byte in DRIPS[kind] or b"":
                connection.send(bytes([byte]))
                if stop.wait(0.05):
                    return
            while connection.recv(1000):
                pass
        except OSError:
            pass
        finally:
            ended.set()
            connection.close()

    threading.Thread(target=drip, daemon=True).start()
    started, threads = time.perf_counter(), threading.active_count()
    with pytest.raises(ValueError, match=r"timeout=0.5 of the media policy|could not be fetched"):
        fetch_url(f"http://127.0.0.1:{listener.getsockname()[1]}/", dataclasses.replace(OPEN, timeout=0.5))
    assert time.perf_counter() - started < 2
    assert ended.wait(5)  # the connection does not stay open either
    stop.set()
    listener.close()
    assert threading.active_count() <= threads + 1


def test_a_slow_name_server_is_cut_too(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"timeout=0\.3 "):
        fetch_url("http://pictures.example/", MediaPolicy(timeout=0.3))
    assert time.perf_counter() - started < 2


# ---- paths


@pytest.fixture
def tree(tmp_path):
    """`root/in.png`, `out.png`, and links from inside to outside."""
    root = tmp_path / "root"
    (root / "frames").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    for path in (root / "in.png", root / "frames" / "0.png", tmp_path / "out.png", tmp_path / "root2" / "near.png"):
        path.write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "frames" / "1.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "way_in.png").symlink_to(root / "in.png")
    return tmp_path


OUTSIDE = [
    "out.png",
    "root/../out.png",
    "root/link.png",
    "root/folder/out.png",
    "root2/near.png",
    "root/missing/../../out.png",
    "no_such.png",
    "root/link.png/../../out.png",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("kind", ["picture", "video"])
def test_a_path_that_leads_out_of_the_root_is_refused_whether_it_exists_or_not(kind, path, tree):
    policy = MediaPolicy(root=tree / "root")
    with pytest.raises(ValueError, match=r"^the given path lies outside of the root folder of the media policy$"):
        open_image(f"{tree}/{path}", policy) if kind == "picture" else list(
            load_frames(f"{tree}/{path}", policy=policy)
        )


def test_relative_paths_and_several_roots_are_followed(tree, monkeypatch):
    policy = MediaPolicy(root=[str(tree / "root2"), tree / "root"])
    monkeypatch.chdir(tree)
    for path in ("root/in.png", "root2/near.png", "way_in.png", "root/frames/../in.png", Path("root/in.png")):
        assert open_image(path, policy).to_image(policy).size == RED.size
    for path in ("out.png", "../out.png", "root/../out.png"):
        with pytest.raises(ValueError, match="outside of the root"):
            open_image(path, policy)


def test_frames_of_a_folder_that_lead_out_of_the_root_are_refused(tree):
    policy = MediaPolicy(root=tree / "root")
    with pytest.raises(ValueError, match="outside of the root"):
        list(load_frames(tree / "root" / "frames", policy=policy))
    with pytest.raises(ValueError, match="outside of the root"):
        load_frames(tree / "root" / "folder" / "root2", policy=policy)
    (tree / "root" / "frames" / "1.png").unlink()
    assert len(list(load_frames(tree / "root" / "frames", policy=policy))) == 1


def test_base64_that_looks_like_a_path_is_taken_outside_of_the_root(tree):
    """As `/9j/...`, the begin of every JPEG, does."""
    buffer = io.BytesIO()
    RED.save(buffer, "JPEG")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert text.startswith("/9j/")
    for policy in (MediaPolicy(root=tree / "root"), MediaPolicy.server(), MediaPolicy()):
        assert open_image(text, policy).to_image(policy).size == RED.size


def test_nothing_is_looked_up_where_paths_are_off(tree, monkeypatch):
    for name in ("isfile", "isdir", "realpath", "exists"):
        monkeypatch.setattr(os.path, name, None)
    for path in (f"{tree}/root/in.png", tree / "root" / "in.png", "/etc/passwd", "/etc", f"{tree}/root"):
        with pytest.raises(ValueError, match=r"paths=False|base64 string") as caught:
            open_image(path, MediaPolicy.server())
        assert str(tree) not in str(caught.value)
        with pytest.raises(ValueError, match="paths=False"):
            load_frames(path, policy=MediaPolicy.server())


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/fd", "fifo"])
def test_only_regular_files_are_opened(path, tmp_path):
    if path == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
    for read in (open_image, lambda source, policy: list(load_frames(source, policy=policy))):
        with pytest.raises(ValueError):
            read(path, MediaPolicy())
