"""The Node this IAM runs on: what it is made of, and its state."""
