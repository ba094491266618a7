"""Frames of the RegisterSM stream (grpc.md, servicemanager.v5); members are converted by common.convert."""

import msgspec

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.types import InstanceStatus, LogData, NodeAlert, NodeConfigStatus, NodeMonitoring, SMInfo
from aoscore.sm.launcher.model import NodeStatuses


class AverageMonitoring(msgspec.Struct, frozen=True):
    """The answer to a question for averages."""

    monitoring: NodeMonitoring


class StatusChanges(msgspec.Struct, frozen=True):
    """Statuses that have changed."""

    statuses: tuple[InstanceStatus, ...]


Value = InstanceStatus | NodeStatuses | NodeAlert | NodeMonitoring | LogData
"""What parts of SM send by themselves."""
Answer = NodeConfigStatus | AverageMonitoring
"""What is sent because CM asked."""
Outgoing = StatusChanges | NodeStatuses | NodeAlert | NodeMonitoring | LogData | Answer


def to_frame(value: Outgoing | SMInfo) -> pb.SMOutgoingMessages:
    """The frame that carries a value."""
    match value:
        case SMInfo():
            return pb.SMOutgoingMessages(sm_info=convert.sm_info_to_pb(value))
        case NodeStatuses():
            statuses = [convert.instance_status_to_pb(status) for status in value.statuses]
            return pb.SMOutgoingMessages(node_instances_status=pb.NodeInstancesStatus(instances=statuses))
        case StatusChanges():
            statuses = [convert.instance_status_to_pb(status) for status in value.statuses]
            return pb.SMOutgoingMessages(update_instances_status=pb.UpdateInstancesStatus(instances=statuses))
        case NodeConfigStatus():
            return pb.SMOutgoingMessages(node_config_status=convert.node_config_status_to_pb(value))
        case NodeMonitoring():
            return pb.SMOutgoingMessages(instant_monitoring=convert.instant_monitoring_to_pb(value))
        case AverageMonitoring():
            return pb.SMOutgoingMessages(average_monitoring=convert.average_monitoring_to_pb(value.monitoring))
        case LogData():
            return pb.SMOutgoingMessages(log=convert.log_data_to_pb(value))
        case _:
            return pb.SMOutgoingMessages(alert=convert.alert_to_pb(value))
