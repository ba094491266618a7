"""Generates aoscore/_pb (messages, services, type hints) from proto/.

Called by setup.py and the Makefile; output is never committed.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(proto_dir: Path = ROOT / "proto", out_dir: Path = ROOT / "aoscore" / "_pb") -> None:
    """Compile every .proto below proto_dir into the package directory out_dir, replacing what was there."""
    import grpc_tools
    from grpc_tools import protoc

    files = sorted(str(path.relative_to(proto_dir)) for path in proto_dir.rglob("*.proto"))
    if out_dir.exists():
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True)
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{proto_dir}", f"-I{well_known}"]
    arguments += [f"--{kind}_out={out_dir}" for kind in ("python", "pyi")]
    described = out_dir / "all.descriptors"
    if protoc.main([*arguments, f"--descriptor_set_out={described}", *files]) != 0:
        raise SystemExit("protoc failed, see its message above")
    _write_services(described, out_dir)
    described.unlink()
    # protoc writes imports relative to proto/; ours live in the package aoscore._pb.
    packages = "|".join(sorted({re.escape(name.split("/")[0]) for name in files}))
    own_import = re.compile(rf"^from ((?:{packages})[\w.]*) import", re.MULTILINE)
    plain_import = re.compile(rf"^import ((?:{packages})[\w.]*_pb2) as", re.MULTILINE)
    for path in [*out_dir.rglob("*.py"), *out_dir.rglob("*.pyi")]:
        text = own_import.sub(r"from aoscore._pb.\1 import", path.read_text())
        path.write_text(plain_import.sub(r"import aoscore._pb.\1 as", text))
    for directory in [out_dir, *(path for path in out_dir.rglob("*") if path.is_dir())]:
        (directory / "__init__.py").touch()


def _write_services(described: Path, out_dir: Path) -> None:
    """The modules with stubs and servicers, under the names that grpcio-tools gives them; aoscore.common.services."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    for file in FileDescriptorSet.FromString(described.read_bytes()).file:
        if not file.service:
            continue
        module = file.name.removesuffix(".proto") + "_pb2"
        package, _, name = module.replace("/", ".").rpartition(".")
        lines = [
            f'"""Services of {file.name}, written by proto/build.py."""',
            "",
            "from aoscore.common.services import Servicer, Stub, adder",
            f"from {package} import {name}",
            "",
            f"_services = {name}.DESCRIPTOR.services_by_name",
        ]
        for service in file.service:
            own = service.name
            lines += [
                "",
                "",
                f"class {own}Stub(Stub):",
                f'    """Client of {own}."""',
                "",
                f'    _service = _services["{own}"]',
                "",
                "",
                f"class {own}Servicer(Servicer):",
                f'    """What answers {own}."""',
                "",
                "",
                f'add_{own}Servicer_to_server = adder(_services["{own}"])',
            ]
        (out_dir / f"{module}_grpc.py").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tools"]
    build()
