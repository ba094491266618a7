"""Deployable items for tests, made of busybox: a folder that aos-signer or `aos-devcloud upload` can pack."""

import json
import shutil
from pathlib import Path
from textwrap import dedent, indent

APPLETS = ("sh", "httpd", "echo", "cat", "sleep", "date", "ls", "wget", "id", "ip", "nslookup", "seq", "dd", "nc")


def make_rootfs(rootfs: Path, start: str) -> None:
    """A root file system whose /bin/start runs the shell script `start`."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "www"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", rootfs / "bin" / "busybox")
    for applet in APPLETS:
        (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "www" / "index.html").write_text("hello from the service\n")
    script = rootfs / "bin" / "start"
    script.write_text(f"#!/bin/sh\n{start}\n")
    script.chmod(0o755)


def make_item(
    folder: Path,
    *,
    user: Path,
    domain: str,
    codename: str = "web",
    version: str = "1.0.0",
    start: str = "echo web service starts; exec httpd -f -vv -p 8080 -h /www",
    configuration: str = "",
    labels: tuple[str, ...] = (),
) -> Path:
    """A bundle project below `folder`; `configuration` are further YAML lines of the item's configuration.

    `labels`: it runs only where a node has all of them.
    """
    make_rootfs(folder / codename / "rootfs", start)
    more = indent(dedent(configuration), " " * 6)
    (folder / "config.yaml").write_text(f"""\
{_head(user, domain)}\
items:
  - identity:
      type: service
      codename: {codename}
      title: {codename}
    version: {version}
    sourceFolder: {codename}
    images:
      - sourceFolder: rootfs
        osInfo:
          os: linux
        archInfo:
          architecture: amd64
        workingDir: /
        cmd: /bin/start
    configuration:
      instances:
        minInstances: 1
        priority: 10
        labels: {json.dumps(labels)}
      baseLayerIsNodeRootfs: false
      hostname: {codename}
      exposedPorts:
        - 8080/tcp
{more}""")
    return folder


def make_component(
    folder: Path, *, user: Path, domain: str, runtime: str, version: str, media_type: str, payload: Path
) -> Path:
    """A bundle project below `folder` for a component that a runtime of this type takes, with its code name."""
    (folder / runtime).mkdir(parents=True)
    payload.rename(folder / runtime / "image")
    (folder / "config.yaml").write_text(f"""\
{_head(user, domain)}\
items:
  - identity:
      type: component
      codename: {runtime}
      title: {runtime}
    version: {version}
    sourceFolder: {runtime}
    images:
      - path: image
        mediaType: {media_type}
        archInfo:
          architecture: amd64
    configuration:
      runtimes:
        - codename: {runtime}
""")
    return folder


def _head(user: Path, domain: str) -> str:
    return f"""\
schemaVersion: 2
publisher:
  author: test
  company: test
publish:
  tlsKey: {user}
  signKey: {user}
  domain: {domain}
"""
