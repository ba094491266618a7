from aoscore.common.types import ArchInfo, CertInfo, CPUInfo, ErrorInfo, NodeInfo, NodeState, OSInfo, PartitionInfo
from aoscore.iam.iamserver.legacy import cert_info_to_pb, node_info_to_pb


def test_node_in_the_numbering_of_v5() -> None:
    node = NodeInfo(
        node_id="n1",
        node_type="type",
        title="title",
        max_dmips=10,
        total_ram=20,
        os_info=OSInfo("linux", "5"),
        cpus=(CPUInfo("model", 2, 4, ArchInfo("arm64", "v8"), 7),),
        partitions=(PartitionInfo("p", ("storages",), 100, "/var"),),
        attrs={"MainNode": "", "a": "b"},
        state=NodeState.ERROR,
        error=ErrorInfo(5, 2, "text"),
    )
    message = node_info_to_pb(node)
    assert (message.name, message.status, message.os_type) == ("title", "error", "linux")
    (cpu,) = message.cpus
    assert (cpu.model_name, cpu.num_cores, cpu.num_threads) == ("model", 2, 4)
    assert (cpu.arch, cpu.arch_family, cpu.max_dmips) == ("arm64", "v8", 7)
    assert [(part.name, list(part.types), part.total_size, part.path) for part in message.partitions] == [
        ("p", ["storages"], 100, "/var")
    ]
    assert [(attr.name, attr.value) for attr in message.attrs] == [("MainNode", ""), ("a", "b")]
    assert (message.error.aos_code, message.error.exit_code, message.error.message) == (5, 2, "text")
    assert not node_info_to_pb(NodeInfo("n1")).HasField("error")


def test_certificate() -> None:
    message = cert_info_to_pb(CertInfo("cm", "file:///c", "file:///k", "01", b"x"))
    assert (message.type, message.cert_url, message.key_url) == ("cm", "file:///c", "file:///k")
