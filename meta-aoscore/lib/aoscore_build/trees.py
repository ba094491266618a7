"""Differences of file trees: container layers and incremental updates of a root file system (yocto.md §9).

Both read trees of a build, where owners and devices are as they will be on the target.
"""

import gzip
import os
import shutil
import stat
import tarfile
from pathlib import Path

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"


def entries(root):
    """Paths below `root` as text, relative, parents first, sorted: the order does not depend on the machine."""
    found = []
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted([*names, *files]):
            found.append(os.path.relpath(os.path.join(directory, name), root))
    return sorted(found)


def same(first, second):
    """Whether two entries are the same to a node: kind, mode, owner, content. Times are not looked at."""
    one, two = os.lstat(first), os.lstat(second)
    if (one.st_mode, one.st_uid, one.st_gid) != (two.st_mode, two.st_uid, two.st_gid):
        return False
    if stat.S_ISLNK(one.st_mode):
        return os.readlink(first) == os.readlink(second)
    if stat.S_ISREG(one.st_mode):
        return one.st_size == two.st_size and _content(first) == _content(second)
    if stat.S_ISBLK(one.st_mode) or stat.S_ISCHR(one.st_mode):
        return one.st_rdev == two.st_rdev
    return True


def _content(path):
    with open(path, "rb") as file:
        return file.read()


def is_directory(path):
    """Whether it is a directory itself, not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def _is_other(path):
    return os.path.lexists(path) and not is_directory(path)


def changes(old, new):
    """What `new` has that `old` has not or has otherwise, and what only `old` has: two sorted lists.

    A removed directory is named without what was in it. A directory that took the place of something else is in the
    first list; what is in it too.
    """
    changed, removed = [], []
    for path in entries(new):
        before = os.path.join(old, path)
        if (
            not os.path.lexists(before)
            or not _parents_are_directories(old, path)
            or not same(before, os.path.join(new, path))
        ):
            changed.append(path)
    for path in entries(old):
        if any(path.startswith(f"{gone}/") for gone in removed) or not _parents_are_directories(new, path):
            continue
        if not os.path.lexists(os.path.join(new, path)):
            removed.append(path)
    return changed, removed


def _parents_are_directories(root, path):
    return all(is_directory(os.path.join(root, parent)) for parent in Path(path).parents if str(parent) != ".")


def incremental_tree(old, new, target):
    """Make `target` the tree that, laid over `old`, gives `new`: deletions are character devices 0:0.

    Raises ValueError when nothing differs: an update that changes nothing is a mistake of its maker.
    """
    changed, removed = changes(old, new)
    if not changed and not removed:
        raise ValueError(f"{new} does not differ from {old}")
    os.makedirs(target)
    for path in changed:
        copy_entry(new, target, path)
    for path in removed:
        _make_parents(new, target, path)
        os.mknod(os.path.join(target, path), stat.S_IFCHR | 0o000, os.makedev(0, 0))
    for path in changed:
        # A directory in the place of a file hides what is below it.
        if is_directory(os.path.join(new, path)) and _is_other(os.path.join(old, path)):
            os.setxattr(os.path.join(target, path), "trusted.overlay.opaque", b"y")


def copy_entry(source, target, path):
    """Copy one entry with its parents, owners and modes; a directory without its content."""
    _make_parents(source, target, path)
    origin, copy = os.path.join(source, path), os.path.join(target, path)
    status = os.lstat(origin)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(origin), copy)
    elif stat.S_ISDIR(status.st_mode):
        os.makedirs(copy, exist_ok=True)
    elif stat.S_ISREG(status.st_mode):
        shutil.copyfile(origin, copy)
    else:
        os.mknod(copy, status.st_mode, status.st_rdev)
    os.chown(copy, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(copy, stat.S_IMODE(status.st_mode))


def _make_parents(source, target, path):
    for parent in reversed(Path(path).parents):
        if str(parent) != "." and not os.path.lexists(os.path.join(target, parent)):
            copy_entry(source, target, str(parent))


def layer_archive(parent, new, archive, epoch=0):
    """Write the container layer that turns the tree `parent` into `new`: a tar of OCI, compressed by gzip.

    Numeric owners, sorted names, one time for all: the same trees give the same bytes. `parent` None: a first layer.
    Raises ValueError when the layer would be empty.
    """
    if parent is None:
        changed, removed = entries(new), []
    else:
        changed, removed = changes(parent, new)
    if not changed and not removed:
        raise ValueError(f"the layer {archive} is empty")
    members = {}
    for path in changed:
        for above in [*reversed(Path(path).parents), Path(path)]:
            if str(above) != ".":
                members[str(above)] = os.path.join(new, above)
    for path in removed:
        for above in reversed(Path(path).parents):
            if str(above) != ".":
                members[str(above)] = os.path.join(new, above)
        members[os.path.join(os.path.dirname(path), WHITEOUT + os.path.basename(path))] = None
    for path in changed:
        if parent is not None and is_directory(os.path.join(new, path)) and _is_other(os.path.join(parent, path)):
            members[os.path.join(path, OPAQUE)] = None
    with open(archive, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=epoch) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            # Links to one file are files of their own here: their names may be in different layers.
            for name in sorted(members):
                tar.inodes = {}
                _add(tar, name, members[name], epoch)


def _add(tar, name, path, epoch):
    info = tarfile.TarInfo(name) if path is None else tar.gettarinfo(path, name)
    info.mtime = epoch
    info.uname = info.gname = ""
    if info.isreg() and path is not None:
        with open(path, "rb") as file:
            tar.addfile(info, file)
    else:
        tar.addfile(info)


def layer_order(parents):
    """Names of layers so that each comes after its parent; `parents` maps a layer to its parent or "".

    Raises ValueError for a circle, naming it.
    """
    ordered = []
    for name in sorted(parents):
        chain = []
        while name and name not in ordered:
            if name in chain:
                raise ValueError(f"layers are each other's parents: {' -> '.join([*chain, name])}")
            chain.append(name)
            name = parents.get(name, "")
        ordered += reversed(chain)
    return ordered
