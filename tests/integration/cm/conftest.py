"""What tests of a whole CM share."""

from collections.abc import Iterator

import pytest

from tests.support.iam import Iam
from tests.support.pki import TestCa


@pytest.fixture(scope="module")
def iam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iam]:
    """A provisioned IAM process."""
    unit_iam = Iam(tmp_path_factory.mktemp("iam"), TestCa())
    unit_iam.provision()
    unit_iam.start()
    yield unit_iam
    unit_iam.kill()
