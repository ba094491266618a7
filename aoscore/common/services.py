"""gRPC services made from their descriptors when they are used.

The classes that grpcio-tools would write cost a daemon memory and time at start for every service of a file, used or
not. `proto/build.py` writes modules of the same names and with the same classes on top of this one.
"""

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass


class Stub:
    """The methods of a service as seen by a client: attributes with the names of the proto file."""

    _service: ServiceDescriptor

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there yet: a method that is used for the first time.
        try:
            method = self._service.methods_by_name[name]
        except KeyError:
            raise AttributeError(f"service {self._service.full_name} has no method {name}") from None
        open_call = getattr(self._channel, _kind(method))
        call = open_call(
            f"/{self._service.full_name}/{name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        setattr(self, name, call)
        return call


class Servicer:
    """Base of what answers a service: a coroutine or an async generator per method, by the names of the proto file.

    A method that is not there is answered with UNIMPLEMENTED.
    """


def adder(service: ServiceDescriptor) -> Callable[[Servicer, grpc.aio.Server], None]:
    """The function that makes a server offer `service` with the methods of a servicer."""

    def add(servicer: Servicer, server: grpc.aio.Server) -> None:
        handlers = {
            name: _handler(method, getattr(servicer, name))
            for name, method in service.methods_by_name.items()
            if hasattr(servicer, name)
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    return add


def _handler(method: MethodDescriptor, function: Callable[..., Any]) -> Any:
    make = getattr(grpc, f"{_kind(method)}_rpc_method_handler")
    return make(
        function,
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _kind(method: MethodDescriptor) -> str:
    """gRPC's name for the four kinds of methods, for example `unary_stream`."""
    sides = (method.client_streaming, method.server_streaming)
    return "_".join("stream" if streaming else "unary" for streaming in sides)
