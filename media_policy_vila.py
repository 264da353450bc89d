"""Where pictures and videos may come from, and how large they may be: the one place for both.

- A policy belongs to the process, not to a checkpoint: it is never saved, and no file of a checkpoint changes it.
- Every limit is checked from headers, before anything is decoded; the error names the limit and how to raise it.
- The defaults suit a notebook; `"server"` takes no URLs and no paths, and has tighter limits.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any


@dataclass(frozen=True)
class MediaPolicy:
    """
    Args:
        urls: fetch http(s) URLs.
        paths: read files and folders.
        root: folder or folders that all read files must lie in, links followed; None stands for anywhere. Relative
            paths start at the working directory, not at the root.
        private_addresses: fetch URLs whatever address they lead to. Otherwise every address that a name stands for
            must be a public one, is connected to as it was checked, and the environment's proxies are left out,
            because what connects behind a proxy cannot be checked. With it they are used.
        timeout: seconds for a whole download, redirects included.
        max_redirects: redirects of one URL.
        max_bytes: bytes of one picture's or video's file, download or string.
        max_pixels: pixels of one picture or video frame, as it is given, resized or padded.
        max_frames: frames that are taken of one video.
        max_media: pictures and videos of one call.
        max_visual_tokens: feature rows that the pictures and videos of one call become, all prompts together.

    Raises:
        ValueError: if a field has the wrong type or is out of range, or a root is no folder.
    """

    urls: bool = True
    paths: bool = True
    root: Any = None
    private_addresses: bool = False
    timeout: float = 30.0
    max_redirects: int = 5
    max_bytes: int = 2**31
    max_pixels: int = 2**27  # Pillow warns from about 2/3 of this on
    max_frames: int = 2**14
    max_media: int = 2**12
    max_visual_tokens: int = 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"media policy: {field.name} must be True or False")
            if field.name == "timeout" and not (is_number and 0 < value < math.inf):
                raise ValueError("media policy: timeout must be a positive number of seconds")
            least = 0 if field.name == "max_redirects" else 1
            if field.name.startswith("max_") and not (is_number and isinstance(value, int) and value >= least):
                raise ValueError(f"media policy: {field.name} must be a whole number of at least {least}")
        object.__setattr__(self, "root", resolve_roots(self.root))

    @classmethod
    def server(cls, **changes: Any) -> "MediaPolicy":
        """For requests of strangers: no URLs, no paths, limits for a few pictures or one short video."""
        limits = {
            "urls": False,
            "paths": False,
            "timeout": 10.0,
            "max_redirects": 3,
            "max_bytes": 2**26,
            "max_pixels": 2**26,
            "max_frames": 2**8,
            "max_media": 2**5,
            "max_visual_tokens": 2**16,
        }
        return cls(**{**limits, **changes})

    def changed(self, change: Any) -> "MediaPolicy":
        """The policy that `change` asks for.

        Args:
            change: a policy, `"notebook"`, `"server"`, a dictionary of the fields of this policy to change, or None.

        Raises:
            ValueError: if it is none of these, or names an unknown field.
        """
        if change is None:
            return self
        if isinstance(change, str) and change in ("notebook", "server"):
            return type(self).server() if change == "server" else type(self)()
        names = {field.name for field in fields(self)}
        # files of remote code live in several namespaces, each with this class
        if is_dataclass(change) and not isinstance(change, type) and names == {f.name for f in fields(change)}:
            change = asdict(change)
        if not isinstance(change, Mapping):
            raise ValueError("media_policy must be a MediaPolicy, 'notebook', 'server' or a dictionary of its fields")
        if not names.issuperset(change):
            raise ValueError(f"media_policy has an unknown field; known are {', '.join(sorted(names))}")
        return replace(self, **change)

    def readable_file(self, path: str) -> str | None:
        """What to open for `path`, or None if it is no file.

        Raises:
            ValueError: if files are not read, it lies outside of the root, or is too large.
        """
        real = self._resolve(path)
        if real is None or not os.path.isfile(real):
            return None
        self.check_bytes(os.path.getsize(real), "the given file")
        return real

    def readable_folder(self, path: str) -> str | None:
        """As `readable_file`; the files in the folder, which may be links, are not checked."""
        real = self._resolve(path)
        return real if real is not None and os.path.isdir(real) else None

    def may_read(self, path: str) -> bool:
        """Whether the policy allows a path, which need not exist."""
        try:
            self._resolve(path)
        except ValueError:
            return False
        return True

    def _resolve(self, path: str) -> str | None:
        if not self.paths:
            raise ValueError("files are not read here: the media policy has paths=False")
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):  # as for a NUL in it
            return None
        # before anybody learns whether it exists
        if self.root is not None and not any(is_inside(real, root) for root in self.root):
            raise ValueError("the given path lies outside of the root folder of the media policy")
        return real

    def check_bytes(self, size: int, name: str) -> None:
        if size > self.max_bytes:
            raise self.exceeded(f"{name} takes {size} bytes or more", "max_bytes")

    def check_pixels(self, width: int, height: int, purpose: str) -> None:
        if width * height > self.max_pixels:
            raise self.exceeded(f"{purpose} takes {width}x{height} pixels", "max_pixels")

    def check_frames(self, frames: int, name: str) -> None:
        if frames > self.max_frames:
            raise self.exceeded(f"{frames} or more frames are asked of {name}", "max_frames")

    def check_media(self, media: int) -> None:
        if media > self.max_media:
            raise self.exceeded(f"{media} pictures and videos are given in one call", "max_media")

    def check_visual_tokens(self, tokens: int) -> None:
        if tokens > self.max_visual_tokens:
            raise self.exceeded(f"{tokens} or more tokens are taken by pictures and videos", "max_visual_tokens")

    def exceeded(self, what: str, limit: str) -> ValueError:
        return ValueError(
            f"{what}, more than the limit {limit}={getattr(self, limit)} of the media policy: pass less, or raise the "
            f"limit with media_policy={{'{limit}': ...}}"
        )


def resolve_roots(root: Any) -> tuple[str, ...] | None:
    """One folder or several -> their real paths."""
    if root is None:
        return None
    roots = [root] if isinstance(root, (str, bytes, os.PathLike)) or not isinstance(root, Iterable) else list(root)
    try:
        folders = tuple(os.path.realpath(os.fsdecode(folder)) for folder in roots)
    except (TypeError, ValueError):
        folders = ()
    if not folders or not all(map(os.path.isdir, folders)):
        raise ValueError("media policy: root must be an existing folder or a list of such folders")
    return folders


def is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
