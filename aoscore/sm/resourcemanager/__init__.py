"""Resource manager: the node configuration and the resources that instances may be given."""
