"""A gateway's work for the SMs of its nodes: RegisterSM and single calls at CM."""
