"""The gRPC services of IAM."""
