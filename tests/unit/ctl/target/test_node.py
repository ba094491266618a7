"""What a Node may be, and what follows from what (yocto.md §2, §3)."""

import itertools

import pytest

from aoscore.ctl.target import COMPONENTS, Node, node_from, tree


def test_defaults_of_both_kinds() -> None:
    main, secondary = Node(), Node(kind="secondary")
    assert (main.hostname, main.components, main.node_type) == ("main", ("cm", "sm", "iam"), "aos-unit-1.0-main")
    assert (secondary.hostname, secondary.components) == ("secondary", ("sm", "iam", "mp"))
    assert (main.dhcp, secondary.dhcp) == (False, True)
    assert secondary.main_ip == "10.0.0.100"


def test_every_selection_is_possible_where_it_makes_sense() -> None:
    selections = [chosen for count in range(1, 5) for chosen in itertools.combinations(COMPONENTS, count)]
    assert len(selections) == 15
    for chosen in selections:
        assert Node(components=chosen).components == chosen
        if "cm" in chosen:
            with pytest.raises(
                ValueError, match="'cm' runs on the main node only; valid on a secondary node: sm iam mp"
            ):
                Node(kind="secondary", components=chosen)
        else:
            Node(kind="secondary", components=chosen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": ("cm", "xx")}, "component 'xx' is unknown; valid on a main node: cm sm iam mp"),
        ({"components": ("sm", "sm")}, "one is named twice"),
        ({"kind": "third"}, "node kind 'third' is unknown; valid: main secondary"),
        ({"hostname": "a b"}, "hostname 'a b' is no host name"),
        ({"hostname": "a\nb"}, "hostname"),
        ({"image_version": ""}, "image_version '' is not X.Y.Z"),
        ({"image_version": "1.0"}, "image_version '1.0' is not X.Y.Z"),
        ({"unit_model": "a;b"}, "unit_model"),
        ({"discovery_url": "https://a\nb"}, "discovery_url .* more than one line"),
        ({"gateway": "10.0.0"}, "10.0.0"),
        ({"provisioning_peers": ("somewhere",)}, "somewhere"),
        ({"hosts": (("10.0.0.9", ("bad name",)),)}, "bad name"),
        ({"vchan_domain": "secondary"}, "vchan_domain 'secondary' is neither a number nor name:GUEST nor key:PATH"),
        ({"runtimes": ("vm",)}, "runtime 'vm' is unknown; valid: container rootfs boot"),
        ({"keys": "file"}, "encrypted data disk"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Node(**settings)  # type: ignore[arg-type]


def test_the_prefix_of_component_runtimes_is_not_put_twice() -> None:
    node = Node(runtime_prefix="vm-1.0-main-")
    assert node.component_type("rootfs") == "vm-1.0-main-rootfs"
    assert node.component_type("vm-1.0-main-rootfs") == "vm-1.0-main-rootfs"


def test_settings_are_words() -> None:
    node = node_from(
        {
            "components": "sm iam",
            "kind": "secondary",
            "dhcp": "0",
            "max_dmips": "5000",
            "hosts": "10.0.0.7=wwwivi=vis 10.0.0.8=other",
            "environment": "GRPC_DNS_RESOLVER=native",
            "admin_ports": "22 8428",
        }
    )
    assert node == Node(
        kind="secondary",
        components=("sm", "iam"),
        dhcp=False,
        max_dmips=5000,
        hosts=(("10.0.0.7", ("wwwivi", "vis")), ("10.0.0.8", ("other",))),
        environment=(("GRPC_DNS_RESOLVER", "native"),),
        admin_ports=(22, 8428),
    )


@pytest.mark.parametrize(
    ("word", "domain"), [("0", 0), (3, 3), ("name:secondary", "name:secondary"), ("key:data/peer", "key:data/peer")]
)
def test_a_domain_is_a_number_or_says_where_the_number_is(word: object, domain: object) -> None:
    assert node_from({"vchan_domain": word}).vchan_domain == domain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nothing": "1"}, "setting 'nothing' is unknown"),
        ({"max_dmips": "many"}, "setting max_dmips"),
        ({"dhcp": "maybe"}, "setting dhcp: 'maybe' is neither true nor false"),
        ({"keys": "paper"}, "setting keys: 'paper' is not one of softhsm, optee, file"),
        ({"hosts": "10.0.0.7"}, "setting hosts: '10.0.0.7' is not IP=NAME"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node_from(settings)


def test_unknown_part() -> None:
    with pytest.raises(ValueError, match="part 'things' is unknown; valid: base iam"):
        tree(Node(), ("things",))
