"""The service that the demo and the guests run: a busybox web server, as a project for aos-signer."""

import json
import os
import shutil
import textwrap
from pathlib import Path

from aoscore.common.files import remove_tree
from aoscore.ctl.host import run, which

ITEM = "demo-web"
VERSION = "1.0.0"
PORT = 8080


def make_project(project: Path, *, user: Path, domain: str, labels: tuple[str, ...] = ()) -> Path:
    """The project in the folder `project`, made anew; the service provider's PKCS#12 file `user` will sign it.

    `labels`: it runs only where a node has all of them.
    """
    remove_tree(project)
    rootfs = _make_image(project)
    (project / "config.yaml").write_text(_config_yaml(user, domain, rootfs.name, labels))
    return project


def _make_image(project: Path) -> Path:
    """A busybox root file system as an OCI image by umoci, unpacked again by umoci as the signer wants it."""
    content = project / "content"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "www"):
        (content / name).mkdir(parents=True)
    shutil.copy(which("busybox") or "busybox", content / "bin" / "busybox")
    for applet in ("sh", "httpd", "echo", "cat", "sleep", "date"):
        (content / "bin" / applet).symlink_to("busybox")
    (content / "www" / "index.html").write_text("<html><body>Hello from a service on an AosEdge Unit</body></html>\n")
    start = content / "bin" / "web"
    start.write_text(f'#!/bin/sh\necho "web service starts on port {PORT}"\nexec httpd -f -vv -p {PORT} -h /www\n')
    start.chmod(0o755)
    layout = project / "oci"
    for args in (
        ["init", "--layout", layout],
        ["new", "--image", f"{layout}:web"],
        ["insert", "--image", f"{layout}:web", content, "/"],
        ["config", "--image", f"{layout}:web", "--config.cmd", "/bin/web"],
        ["unpack", "--image", f"{layout}:web", project / "bundle"],
    ):
        run(["umoci", *args])
    (project / ITEM).mkdir()
    return (project / "bundle" / "rootfs").rename(project / ITEM / "rootfs")


def _config_yaml(user: Path, domain: str, source: str, labels: tuple[str, ...]) -> str:
    return textwrap.dedent(f"""\
        schemaVersion: 2
        publisher:
          author: demo
          company: aoscore
        publish:
          tlsKey: {user}
          signKey: {user}
          domain: {domain}
        items:
          - identity:
              type: service
              codename: {ITEM}
              title: Demo web service
            version: {VERSION}
            sourceFolder: {ITEM}
            images:
              - sourceFolder: {source}
                osInfo:
                  os: linux
                archInfo:
                  architecture: {_architecture()}
                workingDir: /
                cmd: /bin/web
            configuration:
              instances:
                minInstances: 1
                priority: 10
                labels: {json.dumps(labels)}
              baseLayerIsNodeRootfs: false
              hostname: {ITEM}
              exposedPorts:
                - {PORT}/tcp
              # No CPU limit: this machine may be too busy to promise any CPU to anybody.
              quotas:
                ramLimit: 64MiB
                tmpLimit: 1MiB
                pidsLimit: 20
        """)


def _architecture() -> str:
    """This machine in the words of OCI images."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
