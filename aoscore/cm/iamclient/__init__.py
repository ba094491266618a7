"""IAM as CM uses it: its protected side, and the cloud's certificate and provisioning messages."""

from aoscore.cm.iamclient.client import IamClient

__all__ = ["IamClient"]
