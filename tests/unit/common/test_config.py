from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.config import (
    Duration,
    format_iso_duration,
    from_json,
    from_json_caseless,
    load_config,
    load_section,
    parse_duration,
    to_json,
)
from aoscore.common.errors import ConfigError, InvalidArgumentError, NotFoundError


class Inner(msgspec.Struct, rename="camel"):
    poll_period: Duration = Duration(35)
    names: list[str] = []


class Sample(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    working_dir: Path
    monitoring: Inner = msgspec.field(default_factory=Inner)
    limits: dict[str, int] = {}
    modules: list[Inner] = []
    optional: Inner | None = None


def load(tmp_path: Path, text: str, **more: object) -> Sample:
    path = tmp_path / "x.cfg"
    path.write_text(text)
    return load_config(path, Sample, **more)  # type: ignore[arg-type]


def test_reads_keys_in_any_case(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        '{"WORKINGDIR": "/a", "Monitoring": {"pollperiod": "1m30s"}, "modules": [{"Names": ["x"]}], '
        '"optional": {"POLLPERIOD": 5}}',
    )
    assert config.working_dir == Path("/a")
    assert config.monitoring.poll_period == 90
    assert config.modules[0].names == ["x"]
    assert config.optional is not None and config.optional.poll_period == 5


def test_null_is_absent(tmp_path: Path) -> None:
    assert load(tmp_path, '{"workingDir": "/a", "monitoring": null}').monitoring.poll_period == 35


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"workingDir": "/a", "wokingDir": 1}', "unknown key 'wokingDir'"),
        ('{"workingDir": "/a", "monitoring": {"pollPeriode": "1s"}}', "unknown key 'monitoring.pollPeriode'"),
        ('{"workingDir": "/a", "modules": [{}, {"nam": 1}]}', r"unknown key 'modules\[1\].nam'"),
        ('{"workingDir": "/a", "optional": {"zzz": 1}}', "unknown key 'optional.zzz'"),
        ('{"workingDir": "/a", "monitoring": {"pollPeriod": "soon"}}', r"\$.monitoring.pollPeriod"),
        ('{"workingDir": "/a", "monitoring": {"pollPeriod": []}}', r"\$.monitoring.pollPeriod"),
        ('{"workingDir": 7}', r"\$.workingDir"),
        ('{"workingDir": "/a", "modules": {}}', r"\$.modules"),
        ('{"workingDir": "/a", "WorkingDir": "/b"}', "there twice"),
        ("{}", "workingDir"),
        ('{"workingDir": ', "x.cfg"),
        ("[]", "x.cfg"),
    ],
)
def test_wrong_configuration_names_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        load(tmp_path, text)
    assert "x.cfg" in str(caught.value)


def test_keys_of_older_files_are_accepted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, '{"workingDir": "/a", "stateDir": "/b"}', ignored=frozenset({"statedir"}))
    assert "key=stateDir" in caplog.text


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.cfg"):
        load_config(tmp_path / "nothing.cfg", Sample)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("1m30s", 90),
        ("1.5h", 5400),
        ("30d", 2_592_000),
        ("100ms", 0.1),
        ("PT10S", 10),
        ("P1DT2H3M4.5S", 93784.5),
        ("P1W", 604800),
        ("PT1M", 60),
        ("12", 12),
        (12.5, 12.5),
        (0, 0),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "P", "PT", "10 s", "s", "-5s", -1, "10x", "1m-3s", "P1", "1e3"])
def test_no_durations(text: str | float) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_iso_text_reads_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_iso_duration(seconds)) == pytest.approx(seconds)


def test_documents() -> None:
    with pytest.raises(InvalidArgumentError, match="the thing"):
        from_json(b'{"workingDir": []}', Sample, what="the thing")
    tolerant = from_json_caseless('{"WORKINGdir": "/x", "future": {"a": [1]}}', Sample, what="doc")
    assert tolerant.working_dir == Path("/x")
    assert b'"workingDir":"/x"' in to_json(tolerant)


def test_section_errors_name_file_and_place() -> None:
    path = Path("/etc/x.cfg")
    assert load_section({"POLLPERIOD": "1m"}, Inner, path=path, where="modules[0]") == Inner(Duration(60))
    with pytest.raises(ConfigError, match=r"/etc/x.cfg: unknown key 'modules\[0\].color'"):
        load_section({"color": 1}, Inner, path=path, where="modules[0]")
    with pytest.raises(ConfigError, match=r"/etc/x.cfg: modules\[0\]: .*names"):
        load_section({"names": 1}, Inner, path=path, where="modules[0]")


NO_DOCUMENTS = {"no UTF-8": b'"\x90"', "deep": b"[" * 100_000, "cut": b"{", "cut key": b'{"working"'}


@pytest.mark.parametrize("data", NO_DOCUMENTS.values(), ids=NO_DOCUMENTS.keys())
def test_documents_that_are_none_are_named(data: bytes) -> None:
    """Whatever somebody sends: a blob that looks like text at its beginning, for one."""
    for decode in (from_json, from_json_caseless):
        with pytest.raises(InvalidArgumentError, match="the thing"):
            decode(data, Sample, what="the thing")
