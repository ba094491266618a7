"""Service Manager: runs the instances of one Node within their limits."""
