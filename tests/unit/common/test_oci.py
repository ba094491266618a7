"""OCI and Aos item documents."""

from aoscore.common.oci import parse_item_config
from aoscore.common.types import AlertRulePercents, AlertRulePoints


def test_alert_rules_have_durations_as_text() -> None:
    config = parse_item_config(
        b'{"offlineTTL": "P1D", "alertRules": {"ram": {"minTimeout": "PT1M30S", "minThreshold": 10, "maxThreshold": 20}'
        b', "upload": {"minThreshold": 1, "maxThreshold": 2}}}',
        what="test",
    )
    assert config.offline_ttl == 86400.0
    assert config.alert_rules is not None
    assert config.alert_rules.ram == AlertRulePercents(10, 20, 90.0)
    assert config.alert_rules.upload == AlertRulePoints(1, 2)
