"""Our .proto files against the table of AosCore 9.1's gRPC interfaces, which lives outside of the repository."""

import os
import subprocess
import sys
from pathlib import Path

import grpc_tools
import pytest
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("AOSCORE_SHARED", ROOT.parent / "shared"))
CHECKER = SHARED / "contracts" / "check_grpc.py"


def check(descriptor_set: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECKER, descriptor_set], capture_output=True, text=True, check=False)


@pytest.fixture
def proto_dir(tmp_path: Path) -> Path:
    """A copy of proto/ that a test may spoil."""
    copy = tmp_path / "proto"
    for path in (ROOT / "proto").rglob("*.proto"):
        target = copy / path.relative_to(ROOT / "proto")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    return copy


def describe(proto_dir: Path) -> Path:
    output = proto_dir.parent / "all.desc"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(str(path.relative_to(proto_dir)) for path in proto_dir.rglob("*.proto"))
    assert protoc.main(["protoc", f"-I{proto_dir}", f"-I{well_known}", f"--descriptor_set_out={output}", *files]) == 0
    return output


pytestmark = pytest.mark.skipif(
    not CHECKER.exists(), reason=f"the contract is not here: {CHECKER} (set AOSCORE_SHARED to its directory)"
)


def test_protos_match_the_contract(proto_dir: Path) -> None:
    result = check(describe(proto_dir))
    assert result.returncode == 0, result.stdout + result.stderr


def test_checker_sees_a_moved_field(proto_dir: Path) -> None:
    path = proto_dir / "iamanager" / "version.proto"
    text = path.read_text()
    path.write_text(text.replace("version = 1;", "version = 7;"))
    assert path.read_text() != text
    result = check(describe(proto_dir))
    assert result.returncode == 1
    assert "iamanager.APIVersion field 1" in result.stdout
