"""What the cloud decides: answers to the Unit's messages, desired statuses, registration, renewal.

Everything here runs inside one database transaction and does no other I/O than reading the store and signing with the
authority's keys. Sending is the business of `unitserver`.
"""

import base64
import gzip
import hashlib
import json
import uuid
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aoscore.common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, WrongStateError
from aoscore.common.semver import SemVer
from aoscore.devcloud import schema
from aoscore.devcloud.bundleconfig import BundleError
from aoscore.devcloud.bundles import ItemImages
from aoscore.devcloud.ca import CERTIFICATE_TYPES, Authority, User, fingerprint, serial
from aoscore.devcloud.endpoints import Endpoints
from aoscore.devcloud.faults import Faults
from aoscore.devcloud.link import Message, utc_text
from aoscore.devcloud.seal import BLOCK_ALGORITHM, SIGN_ALGORITHM, Sealed
from aoscore.devcloud.store import (
    Assignment,
    ItemVersion,
    Node,
    Store,
    StoredBlob,
    Subject,
    Unit,
    UnitCertificate,
    now_text,
)

CHAIN_NAME = "devcloud-items"
SECRETS_VERSION = "2.0.0"

RENEW_REQUESTED = "renew_requested"
RENEW_ISSUED = "renew_issued"
RENEW_DONE = "renew_done"
RENEW_FAILED = "renew_failed"
ISSUED = "issued"


def state_checksum(state: str) -> str:
    """SHA3-224 of a state text as the wire writes it (§4.5)."""
    return hashlib.sha3_224(state.encode()).hexdigest()


def merge_status(known: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """Unit status after a full message (replaces all) or a delta (newest wins per node, item version, instance)."""
    parts = ("unitConfig", "nodes", "items", "instances", "subjects")
    news = {part: message[part] for part in parts if part in message}
    if not message.get("isDeltaInfo"):
        return news
    merged = dict(known) | {part: news[part] for part in ("unitConfig", "subjects") if part in news}
    for part, key in (("nodes", _node_key), ("items", _item_key)):
        if part in news:
            merged[part] = _merged(known.get(part, []), news[part], key)
    for group in news.get("instances", []):
        groups = merged["instances"] = list(merged.get("instances", []))
        for number, old in enumerate(groups):
            if _group_key(old) == _group_key(group):
                instances = _merged(old["instances"], group["instances"], lambda one: str(one["instance"]))
                groups[number] = {**old, "instances": instances}
                break
        else:
            groups.append(group)
    return merged


def _merged(old: list[Any], new: list[Any], key: Callable[[Any], str]) -> list[Any]:
    entries = {key(entry): entry for entry in old}
    entries.update({key(entry): entry for entry in new})
    return list(entries.values())


def _name(identity: Mapping[str, Any]) -> str:
    return str(identity.get("id") or identity.get("codename"))


def _node_key(node: Mapping[str, Any]) -> str:
    return _name(node["identity"])


def _item_key(item: Mapping[str, Any]) -> str:
    return f"{_name(item['item'])} {item['version']}"


def _group_key(group: Mapping[str, Any]) -> str:
    return f"{_name(group['item'])} {_name(group['subject'])} {group['version']}"


def owner_id(user: User) -> str:
    """Id of a service provider as owner of items."""
    return str(uuid.UUID(bytes=hashlib.sha256(f"owner/{user.name}".encode()).digest()[:16], version=4))


class Cloud:
    """The decisions. `endpoints` is filled in once the listeners have their ports."""

    def __init__(self, authority: Authority, endpoints: Endpoints, faults: Faults) -> None:
        self.authority = authority
        self.endpoints = endpoints
        self.faults = faults

    # Messages of the Unit

    def handle(self, store: Store, unit: Unit, data: Message) -> list[Message]:
        """Take in one valid message; the messages that answer it."""
        store.add_message(unit, "from", data)
        match data["messageType"]:
            case "unitStatus":
                store.set_unit_status(unit, merge_status(unit.unit_status, data))
            case "requestBlobUrls":
                return [self._blob_urls(store, unit, data)]
            case "newState":
                return self._new_state(store, unit, data)
            case "stateRequest":
                return self._update_state(store, unit, data)
            case "issueUnitCertificates":
                return self._issue_certificates(store, unit, data)
            case "installUnitCertificatesConfirmation":
                self._confirm_certificates(store, unit, data)
            case "startProvisioningResponse":
                return self._finish_provisioning(store, unit, data)
            case "deprovisioningResponse":
                if "errorInfo" not in data:
                    store.remove_node(unit, data["node"]["codename"])
            case "pushLog":
                store.put_log_part(unit, data, base64.b64decode(data["content"]))
            case "alerts":
                for alert in data["items"]:
                    store.add_alert(unit, alert)
            case "monitoringData":
                self._monitoring(store, unit, data)
        return []

    def _blob_urls(self, store: Store, unit: Unit, data: Message) -> Message:
        known = [blob for digest in dict.fromkeys(data["digests"]) if (blob := store.blob(digest))]
        items = [self._blob_info(unit, blob) for blob in known]
        return {"messageType": "blobUrls", "correlationId": data["correlationId"], "items": items}

    def _blob_info(self, unit: Unit, blob: StoredBlob) -> dict[str, Any]:
        def fault(kind: str) -> bool:
            return self.faults.take(kind, on="blobUrls", unit=unit.system_id, digest=blob.digest) is not None

        signature = bytearray(blob.signature)
        if fault("bad_signature"):
            signature[-1] ^= 1
        info: dict[str, Any] = {
            "digest": blob.digest,
            "urls": [self.endpoints.blob_url(blob.digest)],
            "sha256": hashlib.sha3_256(b"another file").hexdigest() if fault("wrong_digest") else blob.sha3_256,
            "size": blob.sealed_size,
            "decryptInfo": {
                "blockAlg": BLOCK_ALGORITHM,
                "blockIv": base64.b64encode(blob.iv).decode(),
                "blockKey": base64.b64encode(blob.key).decode(),
            },
        }
        if not fault("unsigned"):
            info["signInfo"] = {
                "chainName": CHAIN_NAME,
                "alg": SIGN_ALGORITHM,
                "value": base64.b64encode(bytes(signature)).decode(),
                "trustedTimestamp": blob.signed_at,
                "ocspValues": [],
            }
        return info

    def _new_state(self, store: Store, unit: Unit, data: Message) -> list[Message]:
        ident = _instance(data)
        valid = state_checksum(data["state"]) == data["stateChecksum"]
        if valid:
            store.put_state(unit, *ident, data["state"])
        return [
            {
                "messageType": "stateAcceptance",
                **_instance_members(ident),
                "checksum": data["stateChecksum"],
                "result": "accepted" if valid else "rejected",
                "reason": "" if valid else "checksum does not match the state",
            }
        ]

    def _update_state(self, store: Store, unit: Unit, data: Message) -> list[Message]:
        ident = _instance(data)
        state = None if data["default"] else store.state(unit, *ident)
        if state is None:
            wanted = self._wanted_version(store, ident[0], None)
            state = (wanted.default_state if wanted else None) or ""
        members = {**_instance_members(ident), "stateChecksum": state_checksum(state), "state": state}
        return [{"messageType": "updateState", **members}]

    @staticmethod
    def _monitoring(store: Store, unit: Unit, data: Message) -> None:
        for node in data["nodes"]:
            for sample in node["items"]:
                store.add_sample(unit, f"node {node['node']['codename']}", sample)
        for instance in data.get("instances", []):
            source = f"instance {_name(instance['item'])}/{_name(instance['subject'])}/{instance['instance']}"
            for sample in instance["items"]:
                store.add_sample(unit, source, sample)

    # Desired status

    def desired_status(self, store: Store, unit: Unit) -> Message:
        """What the Unit is to be, from assignments, unit config and node states.

        Items and instances are always listed: a Unit takes absent lists for empty ones (§8, D17). The unit config is
        only sent while the Unit does not report its version, since an equal version is an error there (cm-cloud §10).
        """
        reported = {_name(subject) for subject in unit.unit_status.get("subjects", [])}
        subjects = [
            subject
            for subject in store.subjects()
            if subject.id == unit.subject_id or (subject.reported_by_unit and subject.id in reported)
        ]
        assignments = store.assignments([subject.id for subject in subjects])
        versions = self._versions(store, assignments)
        message: Message = {
            "messageType": "desiredStatus",
            "items": [
                {
                    "item": {"id": version.item_id, "type": version.type},
                    "version": version.version,
                    "owner": {"id": version.owner_id},
                    "indexDigest": version.index_digest,
                }
                for version in versions.values()
            ],
            "instances": [_desired_instance(one, versions[one.item_id]) for one in assignments],
            "subjects": [_desired_subject(subject) for subject in subjects],
            **self._signing_certificates(),
        }
        nodes = [node for node in store.nodes(unit) if node.desired_state]
        if nodes:
            message["nodes"] = [{"item": {"codename": node.node_id}, "state": node.desired_state} for node in nodes]
        if unit.unit_config is not None:
            current = (unit.unit_status.get("unitConfig") or [{}])[0]
            if current.get("version") != unit.unit_config["version"]:
                message["unitConfig"] = unit.unit_config
        return message

    def desired_key(self, unit: Unit, desired: Message) -> bytes:
        """Equal for desired statuses that want the same; what the Unit happens to report does not matter."""
        return schema.canonical({**desired, "unitConfig": unit.unit_config})

    def _versions(self, store: Store, assignments: list[Assignment]) -> dict[str, ItemVersion]:
        """One version per item: the highest that any of its assignments asks for."""
        versions: dict[str, ItemVersion] = {}
        for assignment in assignments:
            wanted = self._wanted_version(store, assignment.item_id, assignment.version)
            if wanted is None:
                raise NotFoundError(f"item {assignment.item_id} has no version {assignment.version or ''}".rstrip())
            other = versions.get(assignment.item_id)
            if other is None or SemVer(wanted.version) > SemVer(other.version):
                versions[assignment.item_id] = wanted
        return versions

    @staticmethod
    def _wanted_version(store: Store, item_id: str, version: str | None) -> ItemVersion | None:
        found = [one for one in store.versions(item_id) if version in (None, one.version)]
        return found[-1] if found else None

    def _signing_certificates(self) -> dict[str, Any]:
        chain = self.authority.signing_chain
        return {
            "certificates": [
                {"certificate": base64.b64encode(_der(one)).decode(), "fingerprint": fingerprint(one)} for one in chain
            ],
            "certificateChains": [{"name": CHAIN_NAME, "fingerprints": [fingerprint(one) for one in chain]}],
        }

    # Items

    def add_bundle(
        self, store: Store, user: User, items: list[ItemImages], sealed: Mapping[str, Sealed]
    ) -> list[ItemVersion]:
        """Store the items of a checked bundle; `sealed` holds the blobs that are new, by digest.

        Raises:
            BundleError: a version exists already, or an item belongs to somebody else.
        """
        added = []
        for item in items:
            identity = item.identity
            codename = identity.codename or item.item_id
            where = f"{identity.type} {codename}"
            try:
                item_id = store.put_item(
                    item.item_id, str(identity.type), codename, identity.title or "", item.hostname, owner_id(user)
                )
                store.add_version(
                    item_id,
                    item.version,
                    item.index_digest,
                    min_instances=item.min_instances,
                    priority=item.priority,
                    labels=item.labels,
                    default_state=item.default_state,
                )
            except (AlreadyExistsError, WrongStateError) as error:
                raise BundleError(where, str(error)) from error
            for blob in item.blobs:
                if (seal := sealed.get(blob.digest)) is not None:
                    store.add_blob(
                        StoredBlob(
                            digest=blob.digest,
                            media_type=blob.media_type,
                            size=blob.size_bytes,
                            sealed_size=seal.size_bytes,
                            sha3_256=seal.sha3_256,
                            key=seal.key,
                            iv=seal.iv,
                            signature=seal.signature,
                            signed_at=now_text(),
                        )
                    )
            added += [one for one in store.versions(item_id) if one.version == item.version]
        return added

    def subject_of(self, store: Store, target: str, *, make: bool) -> Subject:
        """The subject that an assignment means: `subject:LABEL` (reported by Units), else a Unit.

        Raises:
            NotFoundError: no such Unit, or no such subject while `make` is False.
        """
        if not target.startswith("subject:"):
            unit = store.unit(target)
            return next(subject for subject in store.subjects() if subject.id == unit.subject_id)
        label = target.removeprefix("subject:")
        subject = store.subject_by_label(label)
        if subject is None:
            if not (make and label):
                raise NotFoundError(f"subject {label!r} does not exist")
            subject = store.add_subject(label, reported_by_unit=True)
        return subject

    def assign(self, store: Store, item: str, target: str, version: str | None, instances: int | None) -> Assignment:
        """Want an item for a Unit or subject.

        Raises:
            NotFoundError: unknown item, version or target.
            InvalidArgumentError: the desired status of a Unit would break a limit of the protocol.
        """
        assignment = Assignment(store.item_id(item), self.subject_of(store, target, make=True).id, version, instances)
        if self._wanted_version(store, assignment.item_id, version) is None:
            raise NotFoundError(f"item {item} has no version {version}" if version else f"item {item} has no version")
        store.assign(assignment)
        for unit in store.units():
            schema.check_to_unit(self.desired_status(store, unit))
        return assignment

    def unassign(self, store: Store, item: str, target: str) -> None:
        """Take an item from a Unit or subject.

        Raises:
            NotFoundError: it is not assigned.
        """
        if not store.unassign(store.item_id(item), self.subject_of(store, target, make=False).id):
            raise NotFoundError(f"item {item} is not assigned to {target}")

    def set_unit_config(self, store: Store, unit: Unit, config: dict[str, Any] | None) -> None:
        """Want a unit config on a Unit; None wants none.

        Raises:
            InvalidArgumentError: it breaks the contract.
        """
        store.set_unit_config(unit, config)
        schema.check_to_unit(self.desired_status(store, store.unit(unit.id)))

    # Registration and certificates

    def register(self, store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
        """Register a Unit and issue all its certificates: the answer for `aos-prov` (cloud-rest.md).

        Raises:
            InvalidArgumentError: the request is malformed.
            AlreadyExistsError: the Unit is registered already.
        """
        system_id = _text(request, "system_uid")
        if store.find_unit(system_id) is not None:
            raise AlreadyExistsError(f"Unit {system_id} is registered already, deprovision it first")
        secrets = _secrets(request)
        nodes = _objects(request, "nodes")
        kept = {name: value for name, value in request.items() if name != "secure_data"}
        model = f"{request.get('model_name', '')} {request.get('model_version', '')}".strip()
        unit = store.add_unit(system_id, model, kept)
        for node in nodes:
            node_id = _text(node, "id")
            store.put_node(unit, node_id, str(node.get("type", "")), secrets.get(node_id, ""))
        main_node = next((str(node["id"]) for node in nodes if "MainNode" in (node.get("attrs") or {})), None)
        answer: dict[str, Any] = {"id": unit.id, "system_uid": system_id, "additional_certs": []}
        for cert_type in ("online", "offline"):
            if request.get(f"{cert_type}_public_csr"):
                node_id = str(request.get(f"{cert_type}_public_node_id") or main_node or "")
                csr = _text(request, f"{cert_type}_public_csr")
                answer[f"{cert_type}_certificate"] = self._issue(store, unit, node_id, cert_type, csr, ISSUED)
        for entry in _objects(request, "additional_csrs"):
            cert_type, node_id = _text(entry, "cert_type"), str(entry.get("node_id") or main_node or "")
            chain = self._issue(store, unit, node_id, cert_type, _text(entry, "csr"), ISSUED)
            answer["additional_certs"].append({"cert_type": cert_type, "node_id": node_id, "cert": chain})
        return answer

    def _issue(self, store: Store, unit: Unit, node_id: str, cert_type: str, csr: str, status: str) -> str:
        if cert_type not in CERTIFICATE_TYPES:
            raise InvalidArgumentError(f"certificate type {cert_type!r} is none of {', '.join(CERTIFICATE_TYPES)}")
        discovery_url = self.endpoints.discovery_url if cert_type == "online" else None
        certificate = self.authority.unit_certificate(csr, unit.system_id, discovery_url)
        chain = self.authority.chain_pem(certificate)
        valid_till = utc_text(certificate.not_valid_after_utc)
        store.put_certificate(unit, UnitCertificate(serial(certificate), node_id, cert_type, valid_till, status), chain)
        return chain

    def renew(self, store: Store, unit: Unit) -> Message:
        """Begin the renewal of all certificates of a Unit: the notification to send."""
        for certificate in store.certificates(unit):
            store.set_certificate_status(certificate.serial, RENEW_REQUESTED)
        return self.renewal(store, unit)

    def renewal(self, store: Store, unit: Unit) -> Message:
        """The notification for every certificate whose renewal was asked for and has not begun."""
        due = [one for one in store.certificates(unit) if one.status == RENEW_REQUESTED]
        return {
            "messageType": "renewCertificatesNotification",
            "certificates": [
                {
                    "type": one.type,
                    "node": {"codename": one.node_id},
                    "serial": one.serial,
                    "validTill": one.valid_till,
                }
                for one in due
            ],
            "unitSecrets": {
                "version": SECRETS_VERSION,
                "nodes": [
                    {"node": {"codename": node.node_id}, "secret": node.secret}
                    for node in store.nodes(unit)
                    if node.secret
                ],
            },
        }

    def _issue_certificates(self, store: Store, unit: Unit, data: Message) -> list[Message]:
        certificates = []
        for request in data["requests"]:
            node_id, cert_type = request["node"]["codename"], request["type"]
            chain = self._issue(store, unit, node_id, cert_type, request["csr"], RENEW_ISSUED)
            certificates.append({"type": cert_type, "node": {"codename": node_id}, "certificateChain": chain})
        return [{"messageType": "issuedUnitCertificates", "certificates": certificates}] if certificates else []

    @staticmethod
    def _confirm_certificates(store: Store, unit: Unit, data: Message) -> None:
        known = store.certificates(unit)
        for confirmed in data["certificates"]:
            node_id, cert_type = confirmed["node"]["codename"], confirmed["type"]
            fresh = [one for one in known if (one.node_id, one.type, one.status) == (node_id, cert_type, RENEW_ISSUED)]
            if "errorInfo" in confirmed:
                for one in fresh:
                    store.set_certificate_status(one.serial, RENEW_FAILED)
                continue
            if confirmed["serial"] not in {one.serial for one in fresh}:
                raise InvalidArgumentError(f"{cert_type} of {node_id}: serial {confirmed['serial']} was not issued")
            store.set_certificate_status(confirmed["serial"], RENEW_DONE)
            store.drop_certificates(unit, node_id, cert_type, before=confirmed["serial"])

    # Nodes that come and go

    def start_provisioning(self, store: Store, unit: Unit, node_id: str, password: str) -> Message:
        """Add a node to a provisioned Unit: the request to send. Its answer is followed up by itself."""
        store.put_node(unit, node_id, "", password)
        return self._node_action("startProvisioningRequest", node_id, password)

    def deprovision(self, store: Store, unit: Unit, node_id: str) -> Message:
        """Remove a node from a Unit: the request to send."""
        return self._node_action("deprovisioningRequest", node_id, self._node(store, unit, node_id).secret)

    @staticmethod
    def _node(store: Store, unit: Unit, node_id: str) -> Node:
        for node in store.nodes(unit):
            if node.node_id == node_id:
                return node
        raise NotFoundError(f"node {node_id} of Unit {unit.system_id} is not registered")

    @staticmethod
    def _node_action(message_type: str, node_id: str, password: str) -> Message:
        return {
            "messageType": message_type,
            "correlationId": str(uuid.uuid4()),
            "node": {"codename": node_id},
            "password": password,
        }

    def _finish_provisioning(self, store: Store, unit: Unit, data: Message) -> list[Message]:
        if "errorInfo" in data:
            return []
        node_id = data["node"]["codename"]
        answer = self._node_action("finishProvisioningRequest", node_id, self._node(store, unit, node_id).secret)
        answer["correlationId"] = data.get("correlationId", answer["correlationId"])
        answer["certificates"] = [
            {"type": one["type"], "chain": self._issue(store, unit, node_id, one["type"], one["csr"], ISSUED)}
            for one in data["csrs"]
        ]
        return [answer]

    # Logs

    def request_log(
        self,
        store: Store,
        unit: Unit,
        *,
        log_type: str,
        nodes: list[str],
        item: str | None,
        instance: int | None,
        since: str | None,
        until: str | None,
    ) -> Message:
        """The request for a log. Without `nodes` every known node is named: 9.1 asks nobody else (§8, D23)."""
        reported = [_name(node["identity"]) for node in unit.unit_status.get("nodes", [])]
        node_ids = nodes or sorted({*reported, *(node.node_id for node in store.nodes(unit))})
        log_filter: dict[str, Any] = {"nodeIds": [{"codename": node_id} for node_id in node_ids]}
        if since:
            log_filter["from"] = since
        if until:
            log_filter["till"] = until
        if item:
            log_filter["item"] = {"id": store.item_id(item)}
        if instance is not None:
            log_filter["instance"] = instance
        return {
            "messageType": "requestLog",
            "correlationId": str(uuid.uuid4()),
            "logType": log_type,
            "filter": log_filter,
        }

    @staticmethod
    def log_result(store: Store, unit: Unit, correlation_id: str) -> dict[str, dict[str, Any]]:
        """Logs received for a request by node: `complete`, `status`, `error`, and the text so far."""
        result: dict[str, dict[str, Any]] = {}
        content: dict[str, bytes] = {}
        for node_id, part, parts_count, status, error, data in store.log_parts(unit, correlation_id):
            entry = result.setdefault(node_id, {"parts": [], "status": status, "error": None})
            entry["parts"].append(part)
            entry["complete"] = status != "ok" or len(entry["parts"]) >= parts_count
            entry["status"] = status
            entry["error"] = json.loads(error) if error else entry["error"]
            content[node_id] = content.get(node_id, b"") + data
        for node_id, entry in result.items():
            entry["text"] = _unpacked(content[node_id]) if entry["complete"] else ""
        return result


def _unpacked(content: bytes) -> str:
    """Text of a log: gzip, whole or as one stream per part, or plain."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidArgumentError(f"log is a broken gzip stream: {error}") from error
    return content.decode(errors="replace")


def _desired_instance(assignment: Assignment, version: ItemVersion) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "item": {"id": assignment.item_id},
        "subject": {"id": assignment.subject_id},
        "priority": version.priority,
        "numInstances": version.min_instances if assignment.instances is None else assignment.instances,
    }
    if version.labels:
        entry["labels"] = version.labels
    return entry


def _desired_subject(subject: Subject) -> dict[str, Any]:
    return {
        "identity": {"id": subject.id},
        "type": "user" if subject.reported_by_unit else "group",
        "isReportedFromUnit": subject.reported_by_unit,
    }


def _instance(data: Message) -> tuple[str, str, int]:
    """Item id, subject id and number of the instance that a message names by its ids."""
    if not ("id" in data["item"] and "id" in data["subject"]):
        raise InvalidArgumentError(f"{data['messageType']}: an instance with a state is named by ids")
    return data["item"]["id"], data["subject"]["id"], data["instance"]


def _instance_members(ident: tuple[str, str, int]) -> dict[str, Any]:
    return {"item": {"id": ident[0]}, "subject": {"id": ident[1]}, "instance": ident[2]}


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidArgumentError(f"{name} must be a text")
    return value


def _objects(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = document.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidArgumentError(f"{name} must be a list of objects")
    return value


def _secrets(request: Mapping[str, Any]) -> dict[str, str]:
    """Owner passwords by node id from `secure_data`."""
    try:
        nodes = json.loads(request.get("secure_data") or "{}").get("nodes") or {}
        return {str(node_id): str(password) for node_id, password in nodes.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidArgumentError(f"secure_data is malformed: {type(error).__name__}") from error
