"""The link of a Secondary Node to the IAM of its Main Node."""
