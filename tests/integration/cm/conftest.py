"""What tests of a whole CM share."""

from collections.abc import Iterator

import pytest

from tests.support.iam import Iam, provisioned_iam


@pytest.fixture(scope="module")
def iam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iam]:
    """A provisioned IAM process."""
    with provisioned_iam(tmp_path_factory.mktemp("iam")) as unit_iam:
        yield unit_iam
