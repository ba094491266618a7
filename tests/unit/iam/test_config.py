import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import ConfigError, NotFoundError
from aoscore.iam import app
from aoscore.iam.certhandler.tokenstore import TokenStoreParams
from aoscore.iam.config import Algorithm, Config, KeyUsage, load

MODULE: dict[str, Any] = {
    "id": "iam",
    "plugin": "swmodule",
    "algorithm": "ecc",
    "maxItems": 2,
    "params": {"storagePath": "/keys"},
}
SMALL: dict[str, Any] = {
    "workingDir": "/w",
    "iamPublicServerUrl": ":8090",
    "iamProtectedServerUrl": ":8089",
    "nodeInfo": {},
}


def write(tmp_path: Path, **change: Any) -> Path:
    path = tmp_path / "iam.cfg"
    path.write_text(json.dumps({**SMALL, **change}))
    return path


def test_example_loads(repository: Path) -> None:
    settings = app.load(repository / "docs/examples/iam.cfg")
    config = settings.config
    assert config.node_info.attrs["MainNode"] == ""
    assert config.node_info.attrs["AosComponents"] == "iam,cm,sm"
    assert [module.id for module in config.cert_modules] == ["online", "offline", "iam", "sm", "cm"]
    assert [module.algorithm for module in config.cert_modules] == [Algorithm.ECC, Algorithm.RSA] + [Algorithm.ECC] * 3
    server = {KeyUsage.SERVER_AUTH, KeyUsage.CLIENT_AUTH}
    assert [set(module.extended_key_usage) for module in config.cert_modules] == [set(), set(), server, server, server]
    assert all(
        ("aosmain" in module.alternative_names) == bool(module.extended_key_usage) for module in config.cert_modules
    )
    assert config.cert_storage == "iam"
    assert config.enable_permissions_handler
    assert set(settings.stores) == {"online", "offline", "iam", "sm", "cm"}
    assert settings.identifier is not None


def test_example_of_a_secondary_node_loads(repository: Path) -> None:
    settings = app.load(repository / "docs/examples/iam-secondary.cfg")
    assert settings.config.has_main_iam and settings.identifier is None
    assert set(settings.stores) == {"iam", "sm"}


def test_example_with_tokens_loads(repository: Path) -> None:
    """The shipped set of AosCore 9.1 (iam.md §2.6)."""
    settings = app.load(repository / "docs/examples/iam-pkcs11.cfg")
    tokens = {name: store.token_label for name, store in settings.stores.items() if isinstance(store, TokenStoreParams)}
    cloud, core = ["online", "offline"], ["iam", "sm", "cm", "diskencryption"]
    assert tokens == {**dict.fromkeys(cloud, "aoscloud"), **dict.fromkeys(core, "aoscore")}
    assert [module.id for module in settings.config.cert_modules if module.self_signed] == ["diskencryption"]
    assert len({id(store._token) for store in app._stores(settings).values()}) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["iam.cfg", "iam-secondary.cfg", "iam-pkcs11.cfg"])
def test_example_spells_keys_as_documented(name: str, repository: Path) -> None:
    text = (repository / "docs/examples" / name).read_text()
    assert set(json.loads(text)) <= set(Config.__struct_encode_fields__)


def test_defaults_and_any_case(tmp_path: Path) -> None:
    config = load(write(tmp_path, CACERT="/ca", nodeInfo={"NODETYPE": "main", "attrs": {"MainNode": "", "x": "Y"}}))
    assert config.ca_cert == Path("/ca")
    assert config.node_info.node_type == "main"
    assert config.node_info.attrs == {"MainNode": "", "x": "Y"}
    assert config.node_info.provisioning_state_path == Path("/var/aos/.provisionstate")
    assert config.hook_timeout == 600
    assert not config.enable_permissions_handler
    assert load(write(tmp_path, certModules=[{**MODULE, "algorithm": "ECDSA"}])).cert_modules[0].algorithm == "ecc"


def test_keys_of_9_1_files_without_meaning_are_accepted(tmp_path: Path) -> None:
    config = load(write(tmp_path, migration={"migrationPath": "/a", "mergedMigrationPath": "/b"}))
    assert config.migration.merged_migration_path == Path("/b")


def test_secondary_node(tmp_path: Path) -> None:
    assert not load(write(tmp_path)).has_main_iam
    main = {"mainIamPublicServerUrl": "main:8090", "mainIamProtectedServerUrl": "main:8089"}
    config = load(write(tmp_path, **main))
    assert config.has_main_iam and config.node_reconnect_interval == 3
    assert load(write(tmp_path, **main, nodeReconnectInterval="10s")).node_reconnect_interval == 10


def test_disabled_module_is_ignored_completely(tmp_path: Path) -> None:
    broken = {"id": "", "plugin": "pkcs11module", "maxItems": 0, "disabled": True}
    settings = app.load(write(tmp_path, certModules=[broken, MODULE]))
    assert [module.id for module in settings.config.enabled_modules] == ["iam"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"iamPublicServerUrl": ""}, "iamPublicServerUrl is empty"),
        ({"mainIamPublicServerUrl": "main:8090"}, "mainIamPublicServerUrl.*give both or none"),
        (
            {
                "mainIamPublicServerUrl": "main:8090",
                "mainIamProtectedServerUrl": "main:8089",
                "nodeInfo": {"attrs": {"mainNODE": ""}},
            },
            "the Main Node .* registers with nobody",
        ),
        ({"nodeReconnectInterval": 0}, "nodeReconnectInterval must be positive"),
        ({"identifier": {"plugin": "visidentifier"}}, "identifier.params: .*visServer"),
        (
            {"identifier": {"plugin": "visidentifier", "params": {"visServer": "https://vis"}}},
            "identifier.params.visServer: 'https://vis' is no wss: address",
        ),
        ({"identifier": {"plugin": "psychic"}}, "identifier.plugin: 'psychic' is unknown"),
        ({"identifier": {"plugin": "fileidentifier"}}, "identifier.params: .*systemIdPath"),
        ({"certModules": [{**MODULE, "plugin": "pkcs11module"}]}, r"unknown key 'certModules\[0\].params.storagePath'"),
        (
            {"certModules": [{**MODULE, "plugin": "pkcs11module", "params": {"library": "/l", "userPinPath": "pin"}}]},
            r"certModules\[0\].params.userPinPath: pin is not absolute",
        ),
        ({"certModules": [{**MODULE, "plugin": "other"}]}, r"certModules\[0\].plugin: 'other' is unknown"),
        ({"certModules": [{**MODULE, "params": {}}]}, r"certModules\[0\].params: .*storagePath"),
        ({"certModules": [{**MODULE, "params": {"storagePath": "keys"}}]}, r"storagePath: keys is not absolute"),
        ({"certModules": [{**MODULE, "params": {"library": "x"}}]}, r"unknown key 'certModules\[0\].params.library'"),
        ({"certModules": [{**MODULE, "maxItems": 1}]}, r"certModules\[0\].maxItems: 1 is too few"),
        ({"certModules": [{**MODULE, "maxItems": 0, "selfSigned": True}]}, r"certModules\[0\].maxItems: 0 is too few"),
        ({"certModules": [{**MODULE, "algorithm": "dsa"}]}, r"dsa.*certModules\[0\].algorithm|certModules.*algorithm"),
        ({"certModules": [{**MODULE, "extendedKeyUsage": ["codeSigning"]}]}, "codeSigning"),
        ({"certModules": [{**MODULE, "alternativeNames": ["a b"]}]}, r"alternativeNames: 'a b' is no host name"),
        ({"certModules": [{**MODULE, "id": "../x"}]}, r"certModules\[0\].id: '../x' is no name"),
        ({"certModules": [MODULE, MODULE]}, r"certModules\[1\].id: type 'iam' is there twice"),
        ({"hookTimeout": "0s"}, "hookTimeout must be positive"),
        ({"access": {"IAMService": ["iam"]}}, "access: 'IAMService' is none of IAMCertificateService, "),
        ({"access": {"IAMNodesService": ["cm"]}}, "access.IAMNodesService: 'cm' is no certificate type"),
        ({"nodeInfo": {"attrs": {"a": 1}}}, "attrs"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_wrong_configuration_names_file_and_key(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write(tmp_path, **change)
    with pytest.raises(ConfigError, match=named) as caught:
        app.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.cfg"):
        app.load(tmp_path / "nothing.cfg")


def test_self_signed_module_may_keep_one(tmp_path: Path) -> None:
    load(write(tmp_path, certModules=[{**MODULE, "maxItems": 1, "selfSigned": True}]))
