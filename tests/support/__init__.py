"""What tests of several kinds use: certificates, free ports, running services."""
