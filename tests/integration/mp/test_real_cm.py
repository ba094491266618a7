"""An item is deployed on a Secondary Node that reaches a real CM and a real IAM only through the link of two MPs.

The link is a TCP port, or two vchans over stand-ins for Xen.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.http import request
from tests.support.fakexen import FakeXen
from tests.support.iam import Iam, free_port, provisioned_iam
from tests.support.images import Image
from tests.support.mpbed import DOMAINS, Wire, mp_process, vchan_transport
from tests.support.running import until
from tests.support.unitbed import NODE_ID, UnitBed, shown_items, unit_bed

pytestmark = pytest.mark.timeout(120)
IMAGE = Image([b"layer" * 50_000])


@pytest.fixture(scope="module")
def iam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iam]:
    with provisioned_iam(tmp_path_factory.mktemp("iam")) as unit_iam:
        yield unit_iam


def gateway(bed: UnitBed, port: int) -> dict[str, Any]:
    iam = bed.iam
    return {
        "caCert": str(iam.ca_file),
        "workingDir": str(bed.directory / "gateway"),
        "iamConfig": {
            "iamPublicServerUrl": iam.public,
            "iamMainPublicServerUrl": iam.public,
            "iamMainProtectedServerUrl": iam.protected,
        },
        "cmConfig": {"cmServerUrl": f"127.0.0.1:{bed.port}"},
        "transport": {"listen": f"127.0.0.1:{port}"},
    }


def node(bed: UnitBed, link: int, sm_port: int, blob_port: int) -> dict[str, Any]:
    return {
        "role": "node",
        "caCert": str(bed.iam.ca_file),
        "workingDir": str(bed.directory / "node"),
        "iamConfig": {"iamPublicServerUrl": bed.iam.public},
        "transport": {"connect": f"127.0.0.1:{link}"},
        "node": {
            "cmProxyUrl": f"localhost:{sm_port}",
            "iamPublicProxyUrl": f"localhost:{free_port()}",
            "iamProtectedProxyUrl": f"localhost:{free_port()}",
            "blobServerUrl": f"127.0.0.1:{blob_port}",
            "clockSync": {"enabled": False},
        },
        "images": {"minFreeSpace": 0},
    }


async def deployed(bed: UnitBed, blob_port: int) -> None:
    """The cloud wants an item, and the node has it."""
    await bed.until(lambda: f"SM connected: nodeID={NODE_ID}" in bed.log())
    await bed.cloud.connected()
    await bed.cloud.send_frame(bed.wish(("a", "1.0.0", IMAGE)))
    await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed"})
    assert bed.running == {"a": "1.0.0"}
    # What SM would do now: fetch what the instance is made of.
    digest = bed.sm.updates[-1].start_instances[0].manifest_digest
    answer = await request("GET", f"http://127.0.0.1:{blob_port}/sha256/{digest.removeprefix('sha256:')}")
    assert answer.status == 200
    assert f"sha256:{hashlib.sha256(answer.body).hexdigest()}" == digest


async def test_item_is_deployed_over_vchan_also_after_a_kill(tmp_path: Path, iam: Iam, xen: FakeXen) -> None:
    sm_port, blob_port = free_port(), free_port()
    async with unit_bed(tmp_path, iam, sm_port=sm_port) as bed:
        bed.blobs.publish(IMAGE)
        await bed.start()
        ends = {"gateway": gateway(bed, free_port()), "node": node(bed, 0, sm_port, blob_port)}
        async with contextlib.AsyncExitStack() as stack:
            for name, document in ends.items():
                document |= {"transport": vchan_transport(name)}
                end = mp_process(tmp_path, name, document, env=xen.environment(DOMAINS[name]))
                process = await stack.enter_async_context(end)
            await deployed(bed, blob_port)

            process.kill()
            await process.wait()
            xen.bury(DOMAINS["node"], process.process.pid)
            await until(lambda: f"SM disconnected: nodeID={NODE_ID}" in bed.log())
            await bed.cloud.send_frame(bed.wish())
            await stack.enter_async_context(
                mp_process(tmp_path, "node", ends["node"], env=xen.environment(DOMAINS["node"]))
            )
            await bed.until(lambda: bed.running == {}, 60)


async def test_item_is_deployed_through_the_link_also_after_a_cut(tmp_path: Path, iam: Iam) -> None:
    sm_port, blob_port, link_port = free_port(), free_port(), free_port()
    wire = Wire()
    wire.target = link_port
    async with unit_bed(tmp_path, iam, sm_port=sm_port) as bed, wire.running():
        bed.blobs.publish(IMAGE)
        await bed.start()
        async with (
            mp_process(tmp_path, "gateway", gateway(bed, link_port)),
            mp_process(tmp_path, "node", node(bed, wire.port, sm_port, blob_port)),
        ):
            await deployed(bed, blob_port)

            seen = bed.log().count(f"SM connected: nodeID={NODE_ID}")
            wire.is_open = False
            wire.cut()
            await until(lambda: f"SM disconnected: nodeID={NODE_ID}" in bed.log())
            await bed.cloud.send_frame(bed.wish())
            await asyncio.sleep(0.5)
            wire.is_open = True
            await bed.until(lambda: bed.log().count(f"SM connected: nodeID={NODE_ID}") > seen, 60)
            await bed.until(lambda: bed.running == {}, 60)
