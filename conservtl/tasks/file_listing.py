"""Files of a folder that may come from a stranger: links, circles, special files and names are looked at."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

__all__ = ["FolderWalk", "is_text"]

_OUTSIDE = "is a link that leads out of {home} (data.follow_links: true follows it)"
_TWICE = "is a link to a folder that is listed already, or that holds one"


class FolderWalk:
    """Walk through the folders of a root that lists each folder once, so that links in circles end.

    Folders are listed first, and links to folders after them (``finish``): of a folder and a link to it, the folder is
    listed.

    Args:
        root: everything listed is below it.
        is_wanted: whether a file of this name is listed.
        is_hidden: whether a folder of this name is passed over.
        follow_links: whether links may lead out of the root.
    """

    def __init__(
        self,
        root: Path,
        *,
        is_wanted: Callable[[str], bool],
        is_hidden: Callable[[str], bool],
        follow_links: bool,
    ) -> None:
        self.bad: dict[Path, str] = {}
        """Path that is left out -> reason."""
        self._home = os.path.realpath(root)
        self._is_wanted, self._is_hidden, self._follow = is_wanted, is_hidden, follow_links
        self._seen: set[str] = set()  # the folders listed, and all that hold them
        self._links: deque[tuple[Path, list[Path]]] = deque()

    def folders(self, folder: Path) -> list[Path]:
        """Return the visible folders in a folder, links to folders among them."""
        found = []
        for entry in self._entries(folder):
            if self._is_hidden(entry.name) or not (_is_folder(entry) or _is_broken(entry)):
                continue
            path = folder / entry.name
            if (fault := self._fault(entry, path)) is None:
                found.append(path)
            else:
                self.bad[path] = fault
        return found

    def add_files(self, folder: Path, files: list[Path]) -> None:
        """Add to ``files`` the wanted files in a folder and its visible subfolders; links to folders wait."""
        if folder.is_symlink():
            self._links.append((folder, files))
        else:
            self._add(folder, files)

    def finish(self) -> None:
        """Add the files behind links to folders."""
        while self._links:
            link, files = self._links.popleft()
            if os.path.realpath(link) in self._seen:
                self.bad[link] = _TWICE
            else:
                self._add(link, files)

    def _add(self, folder: Path, files: list[Path]) -> None:
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            self._note(os.path.realpath(folder))
            for entry in self._entries(folder):
                is_folder = _is_folder(entry)
                if not is_folder and self._is_wanted(entry.name):
                    pass
                elif self._is_hidden(entry.name) or not (is_folder or _is_broken(entry)):
                    continue
                path = folder / entry.name
                if (fault := self._fault(entry, path)) is not None:
                    self.bad[path] = fault
                elif not is_folder:
                    files.append(path)
                elif entry.is_symlink():
                    self._links.append((path, files))
                else:
                    waiting.append(path)

    def _note(self, folder: str) -> None:
        while folder not in self._seen:
            self._seen.add(folder)
            folder = str(Path(folder).parent)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.bad[folder] = f"cannot be read: {error.strerror}"
            return []

    def _fault(self, entry: os.DirEntry[str], path: Path) -> str | None:
        if not is_text(entry.name):
            return "has a name that is not valid UTF-8"
        if entry.is_symlink():
            real = os.path.realpath(path)
            if not Path(real).exists():
                return "is a link to nothing"
            if not self._follow and os.path.commonpath([real, self._home]) != self._home:
                return _OUTSIDE.format(home=self._home)
        return None if _is_folder(entry) or entry.is_file() else "is neither a file nor a folder"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()  # a link to itself raises in is_dir


def _is_broken(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link to nothing that may have been a folder."""
    return entry.is_symlink() and not Path(entry).suffix and not Path(entry).exists()


def is_text(name: str) -> bool:
    """Return whether a name is text; Python gives bytes that are none as surrogates, which no report can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
