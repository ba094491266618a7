"""Command line of the local AosCloud: `aos-devcloud serve` runs it, the other commands talk to the running one."""

import argparse
import asyncio
import json
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aoscore.common.errors import AosError
from aoscore.common.files import write_atomic
from aoscore.devcloud import imagekeys, packing, server
from aoscore.devcloud.ca import ROLES, Authority
from aoscore.devcloud.client import AdminClient

DEFAULT_DIRECTORY = Path.home() / ".aos" / "devcloud"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a refusal, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        result = arguments.run(arguments)
    except (AosError, OSError) as error:
        print(f"aos-devcloud: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if isinstance(result, str):
        print(result)
    elif result is not None:
        print(json.dumps(result, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="the cloud's directory (%(default)s)")
    common.add_argument("-v", "--verbose", action="store_true", help="log more")
    parser = argparse.ArgumentParser(prog="aos-devcloud", description="A local AosCloud for development and tests.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=help_text, description=help_text)
        sub.set_defaults(run=run)
        return sub

    serve = command("serve", _serve, "run the cloud")
    defaults = server.Options(DEFAULT_DIRECTORY)
    serve.add_argument("--domain", default=defaults.domain, help="host name in certificates and URLs (%(default)s)")
    serve.add_argument("--host", default=defaults.host, help="address to listen on (%(default)s)")
    serve.add_argument("--rest-port", type=int, default=defaults.rest_port, help="0 = a free one (%(default)s)")
    serve.add_argument("--discovery-port", type=int, default=defaults.discovery_port, help="(%(default)s)")
    serve.add_argument("--ws-port", type=int, default=None, help="port of the Unit link (the discovery port)")
    serve.add_argument("--blob-port", type=int, default=defaults.blob_port, help="(%(default)s)")
    serve.add_argument("--blob-tls", action="store_true", help="serve blobs over https")
    serve.add_argument(
        "--next-request-delay-ms", type=int, default=defaults.next_request_delay_ms, help="told to Units (%(default)s)"
    )
    serve.add_argument("--schema", type=Path, help="published JSON Schema of protocol v7, as a second check")

    ca = command("ca", _ca, "make the certificate authority if it is not there, and print the root's file")
    ca.add_argument("--domain", default=defaults.domain, help="host name in certificates (%(default)s)")
    user = command("user-cert", _user_cert, "make a user's PKCS#12 file")
    user.add_argument("--domain", default=defaults.domain, help="host name in certificates (%(default)s)")
    user.add_argument("--role", choices=ROLES, required=True)
    user.add_argument("--name", help="user name (the role)")
    user.add_argument("--output", type=Path, help="file to write (DIR/users/ROLE.p12)")
    token = command("token", lambda a: _call(a, "token", name=a.name or a.role, role=a.role), "token for aos-keys")
    token.add_argument("--role", choices=ROLES, required=True)
    token.add_argument("--name", help="user name (the role)")
    key = command("image-key", lambda a: imagekeys.add_key(a.dir, a.file), "add the key of encrypted images")
    key.add_argument("file", type=Path)

    command("units", lambda a: _call(a, "units"), "list Units")
    command("items", lambda a: _call(a, "items"), "list items")
    upload = command("upload", _upload, "store a deployment bundle, or a folder with config.yaml")
    upload.add_argument("path", type=Path)
    upload.add_argument("--user", type=Path, help="PKCS#12 file of the service provider (DIR/users/sp.p12)")
    assign = command("assign", _assign, "want an item on a Unit, or for subject:NAME that Units report")
    assign.add_argument("item", help="id, codename or type/codename")
    assign.add_argument("target", metavar="UNIT|subject:NAME")
    assign.add_argument("--version", help="(the newest)")
    assign.add_argument("--instances", type=int, help="(what the item asks for)")
    unassign = command(
        "unassign", lambda a: _call(a, "unassign", item=a.item, target=a.target), "no longer want an item"
    )
    unassign.add_argument("item")
    unassign.add_argument("target", metavar="UNIT|subject:NAME")
    watch = command("watch", _watch, "show a Unit's status, then what happens on its link")
    watch.add_argument("unit")
    watch.add_argument("--json", action="store_true", help="whole events")
    logs = command("logs", _logs, "get logs of a Unit")
    logs.add_argument("unit")
    logs.add_argument("--item", help="an item's log instead of the system log")
    logs.add_argument("--instance", type=int)
    logs.add_argument("--crash", action="store_true", help="crash log of the item")
    logs.add_argument("--node", action="append", help="only this node (may be repeated)")
    logs.add_argument("--since", help="time as 2026-01-31T12:00:00.000000Z")
    logs.add_argument("--until", help="time as 2026-01-31T12:00:00.000000Z")
    logs.add_argument("--https", action="store_true", help="have them uploaded instead of sent over the link")
    logs.add_argument("--timeout-s", type=float, default=60.0)
    call = command("call", _any_call, "run any operation of the admin API")
    call.add_argument("operation")
    call.add_argument("arguments", nargs="?", default="{}", help="JSON object")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    options = server.Options(
        directory=arguments.dir,
        domain=arguments.domain,
        host=arguments.host,
        rest_port=arguments.rest_port,
        discovery_port=arguments.discovery_port,
        ws_port=arguments.ws_port,
        blob_port=arguments.blob_port,
        blob_tls=arguments.blob_tls,
        next_request_delay_ms=arguments.next_request_delay_ms,
        schema_file=arguments.schema,
    )
    asyncio.run(_run_until_stopped(options))


async def _run_until_stopped(options: server.Options) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with server.running(options):
        await stop.wait()


def _call(arguments: argparse.Namespace, operation: str, /, **values: Any) -> Any:
    return AdminClient(arguments.dir).call(operation, **values)


def _any_call(arguments: argparse.Namespace) -> Any:
    try:
        values = json.loads(arguments.arguments)
    except ValueError as error:
        raise AosError(f"arguments are no JSON: {error}") from error
    return _call(arguments, arguments.operation, **values)


def _ca(arguments: argparse.Namespace) -> str:
    return str(Authority.open(arguments.dir / server.CA_FOLDER, arguments.domain).root_file)


def _user_cert(arguments: argparse.Namespace) -> str:
    authority = Authority.open(arguments.dir / server.CA_FOLDER, arguments.domain)
    output: Path = arguments.output or arguments.dir / "users" / f"{arguments.role}.p12"
    output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(output, authority.user_pkcs12(arguments.role, arguments.name or arguments.role))
    return str(output)


def _upload(arguments: argparse.Namespace) -> Any:
    user: Path = (arguments.user or arguments.dir / "users" / "sp.p12").absolute()
    path: Path = arguments.path.absolute()
    if not path.is_dir():
        return _call(arguments, "upload", path=str(path), user_file=str(user))
    with tempfile.TemporaryDirectory() as work:
        bundle = Path(work) / "batch.tar.gz"
        packing.pack_bundle(path, user, bundle)
        return _call(arguments, "upload", path=str(bundle), user_file=str(user))


def _assign(arguments: argparse.Namespace) -> Any:
    return _call(
        arguments,
        "assign",
        item=arguments.item,
        target=arguments.target,
        version=arguments.version,
        instances=arguments.instances,
    )


def _logs(arguments: argparse.Namespace) -> None:
    log_type = "crashLog" if arguments.crash else "instanceLog" if arguments.item else "systemLog"
    result = AdminClient(arguments.dir, arguments.timeout_s + 30).call(
        "logs",
        unit=arguments.unit,
        log_type=log_type,
        nodes=arguments.node,
        item=arguments.item,
        instance=arguments.instance,
        since=arguments.since,
        until=arguments.until,
        https=arguments.https,
        timeout_s=arguments.timeout_s,
    )
    if not result:
        raise AosError(f"no node of Unit {arguments.unit} answered within {arguments.timeout_s:g} s")
    for node, entry in result.items():
        state = entry["status"] if entry["complete"] else "incomplete"
        print(f"--- {node}: {state}" + (f", {entry['error']}" if entry["error"] else ""))
        print(entry["text"], end="")


def _watch(arguments: argparse.Namespace) -> None:
    client = AdminClient(arguments.dir)
    system_id = client.call("unit", unit=arguments.unit)["systemId"]
    events = client.watch(system_id)  # before the status is read, so that nothing is lost in between
    unit = client.call("unit", unit=system_id)
    print(f"{unit['systemId']}: {'online' if unit['online'] else 'offline'}")
    for line in _status_lines(unit["status"]):
        print(f"  {line}")
    sys.stdout.flush()
    for event in events:
        if arguments.json:
            print(json.dumps(event), flush=True)
            continue
        print(" ".join(str(event[name]) for name in ("event", "type", "problems") if name in event))
        if event.get("type") == "unitStatus" and "data" in event:
            for line in _status_lines(event["data"]):
                print(f"  {line}")
        sys.stdout.flush()


def _status_lines(status: dict[str, Any]) -> list[str]:
    """A unit status for people."""

    def name(identity: dict[str, Any]) -> str:
        return str(identity.get("codename") or identity.get("id"))

    def error(entry: dict[str, Any]) -> str:
        return f" ({entry['errorInfo']['message']})" if entry.get("errorInfo") else ""

    lines = [
        f"node {name(node['identity'])} {node['state']} {'connected' if node['isConnected'] else 'away'}{error(node)}"
        for node in status.get("nodes", [])
    ]
    lines += [
        f"item {name(item['item'])} {item['version']} {item['state']}{error(item)}" for item in status.get("items", [])
    ]
    lines += [
        f"instance {name(group['item'])}/{name(group['subject'])}/{one['instance']} {group['version']} "
        f"{one['state']} on {name(one['node'])}{error(one)}"
        for group in status.get("instances", [])
        for one in group["instances"]
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
